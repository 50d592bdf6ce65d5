"""Teacher to graph of ATen operators, each with its module path."""

from archnet.capture.graph import CaptureError, Ref, TeacherGraph, TeacherNode, capture

__all__ = ["CaptureError", "Ref", "TeacherGraph", "TeacherNode", "capture"]
