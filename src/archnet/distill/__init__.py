"""Arch-Distillation: the student's features follow the teacher's, without labels."""

from archnet.distill.run import distill
from archnet.distill.schedule import DistillError, Period, plan
from archnet.distill.text import TextDistillation, distill_text, plan_text
from archnet.distill.training import ArchDistillation

__all__ = [
    "ArchDistillation",
    "DistillError",
    "Period",
    "TextDistillation",
    "distill",
    "distill_text",
    "plan",
    "plan_text",
]
