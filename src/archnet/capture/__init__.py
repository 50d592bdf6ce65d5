"""Teacher to graph of ATen operators, each with its module path."""

from archnet.capture.graph import Batch, CaptureError, Ref, TeacherGraph, TeacherNode, capture

__all__ = ["Batch", "CaptureError", "Ref", "TeacherGraph", "TeacherNode", "capture"]
