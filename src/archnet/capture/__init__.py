"""Teacher to graph of ATen operators, each with its module path."""

from archnet.capture.graph import Batch, Ref, TeacherGraph, TeacherNode, capture
from archnet.capture.nodes import stem
from archnet.capture.simplify import CARRIERS
from archnet.errors import CaptureError

__all__ = [
    "CARRIERS",
    "Batch",
    "CaptureError",
    "Ref",
    "TeacherGraph",
    "TeacherNode",
    "capture",
    "stem",
]
