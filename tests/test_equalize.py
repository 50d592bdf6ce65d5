"""Batch norms that bring channels to one size: the same function, nearer after rounding."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from archnet.compose import compose
from archnet.convert import convert
from archnet.deploy import verify
from archnet.ops import BatchNorm, Student
from archnet.quant import QuantizationError, Recipe, equalize, quantize, settle
from archnet.runs.quant import run_quant

CONF = Path(__file__).parents[1] / "conf"
SIZES = torch.logspace(-2, 0, 32)


class Uneven(nn.Module):
    """A depthwise layer and an addition that read channels a hundred times as large as others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.project, self.head = nn.Conv2d(32, 8, 1), nn.Linear(8, 5)
        with torch.no_grad():
            self.stem.weight.mul_(SIZES[:, None, None, None])
            self.stem.bias.mul_(SIZES)
            self.depthwise.weight.div_(SIZES[:, None, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardtanh(self.stem(x), -3, 3)
        x = self.project(torch.relu(self.depthwise(x)) + x)
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Layers on tokens; the one in the middle reads uneven channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 32), nn.Linear(32, 8), nn.Linear(8, 5)
        with torch.no_grad():
            self.first.weight.mul_(SIZES[:, None])
            self.first.bias.mul_(SIZES)
            self.second.weight.div_(SIZES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def uneven(network: nn.Module, *shape: int) -> tuple[Student, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, *shape)
    return convert(network.eval(), x[:1]), x


def norms(student: Student) -> int:
    return sum(isinstance(module, BatchNorm) for module in student.operators.values())


def off(student: Student, x: torch.Tensor, bits: tuple[int, int]) -> float:
    """The relative error at the result after quantization."""
    quantized = quantize(copy.deepcopy(student), Recipe(*bits, equalize=False), calibration=[x])
    with torch.no_grad():
        expected = student(x)
        return float((quantized(x) - expected).norm() / (expected - expected.mean(0)).norm())


@pytest.mark.parametrize("bits", [(4, 4), (8, 4), (2, 4), (32, 4)])
@pytest.mark.parametrize(("kind", "shape"), [(Uneven, (3, 8, 8)), (Tokens, (7, 6))])
def test_the_function_stays_and_rounding_costs_less(kind, shape, bits) -> None:
    torch.manual_seed(0)
    student, x = uneven(kind(), *shape)
    before, expected, taps = off(student, x, bits), student(x), list(student.taps)
    assert len(equalize(student, Recipe(*bits), [x])) == 1
    assert norms(student) == 1
    torch.testing.assert_close(student(x), expected, atol=1e-4, rtol=1e-4)
    assert student.taps == taps
    # At two bits what weights lose is more than what this wins.
    assert off(student, x, bits) < (1.1 if bits[0] == 2 else 0.9) * before


@pytest.mark.parametrize(("recipe", "expected"), [({}, 1), ({"equalize": False}, 0),
                                                  ({"act_bits": 8}, 0)])  # fmt: skip
def test_quantize_equalizes_as_its_recipe_says(recipe, expected) -> None:
    torch.manual_seed(0)
    student, x = uneven(Uneven(), 3, 8, 8)
    quantize(student, calibration=[x], **{"weight_bits": 4, "act_bits": 4, **recipe})
    assert norms(student) == expected


def test_channels_of_one_size_stay_without_a_norm() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3))
    student, x = uneven(network, 3, 9, 9)
    assert equalize(student, Recipe(4, 4), [x]) == []
    assert norms(student) == 0


def test_float_activations_need_none() -> None:
    student, x = uneven(Uneven(), 3, 8, 8)
    assert equalize(student, Recipe(4, 32), [x]) == []


def test_a_quantized_student_is_refused() -> None:
    student, x = uneven(Uneven(), 3, 8, 8)
    with pytest.raises(QuantizationError, match="quantized already"):
        equalize(quantize(student, Recipe(4, 4), calibration=[x]), Recipe(4, 4), [x])


def test_the_first_and_the_last_layer_are_left_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    with torch.no_grad():
        network[0].weight.mul_(SIZES[:, None])
        network[2].weight.div_(SIZES)
    student, x = uneven(network, 32)
    assert equalize(student, Recipe(4, 4), [x * SIZES.flip(0)]) == []


def test_a_norm_that_is_there_for_the_layer_alone_is_not_followed_by_another() -> None:
    torch.manual_seed(0)
    student, x = uneven(Uneven(), 3, 8, 8)
    (value,) = equalize(student, Recipe(4, 4), [x])
    expected, norm = student(x), student.operator(f"{value}_equal")
    assert isinstance(norm, BatchNorm)
    with torch.no_grad():
        # As training might leave it.
        norm.weight.mul_(SIZES)
        for module in student.operators.values():
            if getattr(module, "groups", 1) == 32:
                module.weight.div_(SIZES[:, None, None, None])
    torch.testing.assert_close(student(x), expected, atol=1e-3, rtol=1e-3)
    assert equalize(student, Recipe(4, 4), [x]) == [f"{value}_equal"]
    assert norms(student) == 1
    torch.testing.assert_close(student(x), expected, atol=1e-3, rtol=1e-3)


def test_integer_files_compute_what_the_golden_model_does() -> None:
    torch.manual_seed(0)
    student, x = uneven(Uneven(), 3, 8, 8)
    equalize(student, Recipe(4, 4), [x])
    quantize(student, Recipe(4, 4), calibration=[x])
    settle(student)
    forms = ["qdq", "subbyte"]
    forms += [form for form in ("qonnx", "openvino") if importlib.util.find_spec(form)]
    rows = np.random.default_rng(0).normal(size=(100, 3, 8, 8)).astype(np.float32)
    for check in verify(student, rows, forms):
        assert (check.changed, check.max_steps) == (0, 0), check


@pytest.mark.parametrize(("key", "count"), [("true", 1), ("false", 0)])
def test_the_key_of_the_config(key: str, count: int) -> None:
    torch.manual_seed(0)
    student, x = uneven(Uneven(), 3, 8, 8)
    options = ["task=cifar10", "task.data.root=nowhere", "quant=lsq", "quant.bits=4"]
    config = compose(CONF, [*options, f"quant.equalize={key}"])
    run_quant(config, student, [x], {})
    assert norms(student) == count
