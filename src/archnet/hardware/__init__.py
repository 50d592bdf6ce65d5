"""The hardware target: what it runs, what a network costs on it, and whether a file is pure."""

from archnet.hardware.audit import Audit, AuditError, NotJudged, Violation, audit, grouped
from archnet.hardware.cost import Cost, Product, StepCost, student_cost, teacher_cost
from archnet.hardware.cycles import DATAFLOWS, SystolicArray, cycles
from archnet.hardware.layers import layer_of
from archnet.hardware.onnx_cost import onnx_cost
from archnet.hardware.onnx_inputs import input_shapes
from archnet.hardware.target import Layer, Target, sizes

__all__ = [
    "DATAFLOWS",
    "Audit",
    "AuditError",
    "Cost",
    "Layer",
    "NotJudged",
    "Product",
    "StepCost",
    "SystolicArray",
    "Target",
    "Violation",
    "audit",
    "cycles",
    "grouped",
    "input_shapes",
    "layer_of",
    "onnx_cost",
    "sizes",
    "student_cost",
    "teacher_cost",
]
