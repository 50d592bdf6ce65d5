"""From a student to a file that a runtime runs, and the proof that it does the same."""

from archnet.deploy.export import audit, export, to_onnx
from archnet.deploy.runtime import Parity, load_session, parity
from archnet.deploy.writer import ExportError

__all__ = ["ExportError", "Parity", "audit", "export", "load_session", "parity", "to_onnx"]
