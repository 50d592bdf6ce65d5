"""From a student to a file that a runtime runs, and the proof that it does the same."""

from archnet.deploy.doubts import doubts
from archnet.deploy.export import FORMS, audit, export, to_onnx
from archnet.deploy.integer import IntegerModel, to_integers
from archnet.deploy.runtime import Parity, load_session, parity
from archnet.deploy.translator import OnnxTranslator, export_translator
from archnet.deploy.verify import Check, verify
from archnet.deploy.writer import ExportError

__all__ = [
    "FORMS",
    "Check",
    "ExportError",
    "IntegerModel",
    "OnnxTranslator",
    "Parity",
    "audit",
    "doubts",
    "export",
    "export_translator",
    "load_session",
    "parity",
    "to_integers",
    "to_onnx",
    "verify",
]
