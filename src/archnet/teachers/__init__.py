"""Where a trained teacher comes from."""

from archnet.teachers.fit import teacher_folder, train_teacher
from archnet.teachers.load import TeacherError, load_teacher
from archnet.teachers.nets import NETS, CifarResNet, DigitNet, ResNet9

__all__ = [
    "NETS",
    "CifarResNet",
    "DigitNet",
    "ResNet9",
    "TeacherError",
    "load_teacher",
    "teacher_folder",
    "train_teacher",
]
