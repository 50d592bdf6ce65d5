"""Where a trained teacher comes from.

Training one is `archnet.teachers.fit`, which is imported where that is done: it loads lightning.
"""

from archnet.teachers.families import MEMBERS, Member, member, random_network
from archnet.teachers.load import (
    TeacherError,
    from_factory,
    load_network,
    load_teacher,
    load_translator,
)
from archnet.teachers.marian import MarianTokens, load_marian, require_marian
from archnet.teachers.nets import NETS, CifarResNet, DigitNet, ResNet9
from archnet.teachers.taps import TappedTeacher
from archnet.teachers.transformer import Transformer

__all__ = [
    "MEMBERS",
    "NETS",
    "CifarResNet",
    "DigitNet",
    "MarianTokens",
    "Member",
    "ResNet9",
    "TappedTeacher",
    "TeacherError",
    "Transformer",
    "from_factory",
    "load_marian",
    "load_network",
    "load_teacher",
    "load_translator",
    "member",
    "random_network",
    "require_marian",
]
