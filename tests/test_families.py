"""Published families convert exactly, at two input sizes each, and leave pure files."""

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

import archnet
from archnet.hardware import Target
from archnet.lower import deployed
from archnet.ops import (
    Activation,
    BatchNorm,
    Concat,
    Convolution,
    FullyConnected,
    LayoutMove,
    MaxPool,
)
from archnet.teachers import member, random_network

ALLOWED = (Convolution, MaxPool, BatchNorm, FullyConnected, Concat, Activation, LayoutMove)
TOLERANCE = 1e-4  # what "exact" means in float32, as a relative error
FAMILIES = {
    "resnet18": (64, 97),
    "resnet50": (64, 97),
    "vgg11_bn": (32, 65),
    "densenet121": (64, 97),
    "mobilenet_v2": (64, 97),
    "mnasnet1_0": (64, 97),
    "googlenet": (64, 97),
    "squeezenet1_1": (64, 97),
    "cifar_resnet20": (32, 40),
}


@lru_cache(maxsize=1)
def build(name):
    return random_network(member(name), num_classes=10)


def assert_same_function(student, teacher, images):
    with torch.no_grad():
        ours, theirs = student(images), teacher(images)
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= TOLERANCE
    assert theirs.std(0).max() > 0, "a teacher that ignores its images proves nothing"


def widest(student):
    convolutions = [m for m in student.modules() if isinstance(m, Convolution)]
    return max(max(conv.weight.shape[:2]) for conv in convolutions)


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, sizes in FAMILIES.items() for size in sizes]
)
def test_a_family_converts_exactly(name, size):
    teacher, images = build(name).train(), torch.randn(2, 3, size, size)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = archnet.convert(teacher, images)

    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    assert all(isinstance(module, ALLOWED) for module in deployed(student).operators.values())
    assert all(row.exact for row in student.report)
    assert_same_function(student, teacher.eval(), images)
    audit = archnet.audit(student)
    assert audit.pure, audit.violations[:3]


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_the_literal_target_is_exact_too(name):
    teacher, images = build(name), torch.randn(2, 3, 64, 64)
    student = archnet.convert(teacher, images, "arch5_conv")
    assert_same_function(student, teacher, images)
    assert archnet.audit(student, "arch5_conv").pure


@pytest.mark.parametrize(
    ("name", "target", "limit"),
    [
        ("mobilenet_v2", "arch5_conv", 512),
        ("resnet18", "arch5", 128),
        ("cifar_resnet20", "arch5_conv", 16),
    ],
)
def test_wide_maps_are_sliced_exactly(name, target, limit):
    teacher, images = build(name), torch.randn(2, 3, 32, 32)
    hardware = replace(Target.named(target), max_channels=limit)
    student = archnet.convert(teacher, images, hardware)
    assert widest(archnet.convert(teacher, images, target)) > limit
    assert widest(student) <= limit
    assert_same_function(student, teacher, images)
    assert archnet.audit(student, hardware).pure
