"""Where a trained teacher comes from."""

from archnet.teachers.fit import teacher_folder, train_teacher
from archnet.teachers.load import TeacherError, load_teacher, load_translator
from archnet.teachers.marian import MarianTokens, load_marian
from archnet.teachers.nets import NETS, CifarResNet, DigitNet, ResNet9
from archnet.teachers.taps import TappedTeacher
from archnet.teachers.transformer import Transformer

__all__ = [
    "NETS",
    "CifarResNet",
    "DigitNet",
    "MarianTokens",
    "ResNet9",
    "TappedTeacher",
    "TeacherError",
    "Transformer",
    "load_marian",
    "load_teacher",
    "load_translator",
    "teacher_folder",
    "train_teacher",
]
