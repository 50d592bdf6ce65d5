"""The errors a user can cause. Each message names the key, file or layer, and says what to do."""


class ArchnetError(Exception):
    """Base of every error that archnet raises on purpose; shown as one line, without traceback."""


class ConfigError(ArchnetError):
    """A config key, group option or value that cannot be."""


class CaptureError(ArchnetError):
    """The teacher cannot be captured as one graph."""
