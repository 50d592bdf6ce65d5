"""What the capture of a teacher can fail with."""

from archnet.errors import ArchnetError


class CaptureError(ArchnetError):
    """The teacher cannot be captured as one graph."""
