"""Teacher to graph of ATen operators, each with its module path."""

from archnet.capture.graph import (
    Batch,
    CaptureError,
    Ref,
    TeacherGraph,
    TeacherNode,
    capture,
    place,
)
from archnet.capture.simplify import CARRIERS, stem

__all__ = [
    "CARRIERS",
    "Batch",
    "CaptureError",
    "Ref",
    "TeacherGraph",
    "TeacherNode",
    "capture",
    "place",
    "stem",
]
