"""The hardware target: what it runs, what a network costs on it, and whether a file is pure."""

from archnet.hardware.audit import Audit, AuditError, Violation, audit
from archnet.hardware.cost import Cost, StepCost, student_cost, teacher_cost
from archnet.hardware.target import Target

__all__ = [
    "Audit",
    "AuditError",
    "Cost",
    "StepCost",
    "Target",
    "Violation",
    "audit",
    "student_cost",
    "teacher_cost",
]
