"""Arch-Distillation: the student's features follow the teacher's, without labels."""

from archnet.distill.options import options_of
from archnet.distill.run import train
from archnet.distill.schedule import DistillError, Period, plan
from archnet.distill.teacher import captured, require_student
from archnet.distill.text import TextDistillation, distill_text, plan_text
from archnet.distill.training import ArchDistillation

__all__ = [
    "ArchDistillation",
    "DistillError",
    "Period",
    "TextDistillation",
    "captured",
    "distill_text",
    "options_of",
    "plan",
    "plan_text",
    "require_student",
    "train",
]
