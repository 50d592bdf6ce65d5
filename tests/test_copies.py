"""Values that layers read several times: the same function, with more levels of the same width."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from archnet.compose import compose
from archnet.config import ConfigError
from archnet.convert import convert
from archnet.deploy import verify
from archnet.ops import BatchNorm, Student
from archnet.quant import (
    QuantizationError,
    Recipe,
    copied_layers,
    copy_values,
    merge_copies,
    quantize,
    quantizers,
    settle,
    unquantize,
)
from archnet.runs.quant import run_quant

CONF = Path(__file__).parents[1] / "conf"


class Maps(nn.Module):
    """Convolutions, a value that two layers and an addition read, and values below zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, 1, 1)
        self.depthwise, self.project = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = nn.functional.hardtanh(self.first(x) + self.depthwise(x) + x, -0.3, 1)
        return self.head(torch.relu(self.project(x)))


class Tokens(nn.Module):
    """Layers on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 33), nn.ReLU(), nn.Linear(33, 9), nn.Hardtanh(), nn.Linear(9, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


KINDS = [(Maps, (3, 10, 10)), (Tokens, (7, 6))]


def converted(kind, shape) -> tuple[Student, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, *shape)
    return convert(kind().eval(), x[:1]), x


def off(student: Student, x: torch.Tensor, bits: tuple[int, int], copies: int) -> float:
    """The relative error at the result after quantization."""
    quantized = copy.deepcopy(student)
    grids = copy_values(quantized, Recipe(*bits, copies=copies), [x]) if copies > 1 else {}
    quantize(quantized, Recipe(*bits, copies=copies), calibration=[x], learned=grids)
    with torch.no_grad():
        expected = student(x)
        return float((quantized(x) - expected).norm() / (expected - expected.mean(0)).norm())


@pytest.mark.parametrize("bits", [(4, 4), (32, 4), (2, 4), (2, 2)])
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_errors_fall_with_the_number_of_copies(kind, shape, bits) -> None:
    student, x = converted(kind, shape)
    one, two, three = (off(student, x, bits, copies) for copies in (1, 2, 3))
    assert two < 0.75 * one
    assert three < 0.9 * two


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_in_floats_nothing_changes_and_merging_undoes_it(kind, shape, copies) -> None:
    student, x = converted(kind, shape)
    expected, taps, steps = student(x), list(student.taps), list(student.graph.steps)
    copy_values(student, Recipe(32, 4, copies=copies), [x])
    torch.testing.assert_close(student(x), expected, atol=1e-5, rtol=1e-4)
    assert student.taps == taps
    assert set(copied_layers(student).values()) == {copies}
    merge_copies(student)
    torch.testing.assert_close(student(x), expected, atol=1e-5, rtol=1e-4)
    assert student.graph.steps == steps
    assert copied_layers(student) == {}


def test_a_copied_value_has_levels_between_those_of_its_grid() -> None:
    """On a value of 0 to 1: 15 steps of 4 bits, 30 of two copies, 45 of three."""
    network = nn.Sequential(nn.Linear(1, 1), nn.Hardtanh(0, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    with torch.no_grad():
        for layer in (network[0], network[2], network[3]):
            layer.weight.fill_(1)
            layer.bias.fill_(0)
    x = torch.linspace(0, 1, 4001)[:, None]
    for copies, levels in ((1, 16), (2, 31), (3, 46)):
        student = convert(network.eval(), x[:1])
        grids = copy_values(student, Recipe(32, 4, copies=copies), [x]) if copies > 1 else {}
        quantize(
            student,
            Recipe(32, 4, first_bits=32, last_bits=32, copies=copies),
            calibration=[x],
            learned=grids,
        )
        (place,) = [step.name for step in student.graph.steps if step.origin == "2"][-1:]
        (value,) = student.run({student.graph.inputs[0]: x}, [place])
        found = value.detach().round(decimals=4).unique()
        # The scale of least squared error may clip the last step.
        assert abs(len(found) - levels) <= 1
        assert float((value.detach() - x)[:3900].abs().max()) < 0.6 / (levels - 1)


def test_the_first_and_the_last_layer_and_shared_values() -> None:
    student, x = converted(Maps, (3, 10, 10))
    copy_values(student, Recipe(4, 4, copies=2), [x])
    trained = [step.origin for step in student.graph.steps if step.name in copied_layers(student)]
    assert set(trained) == {"first", "depthwise", "project"}


def test_what_training_moved_is_merged_too() -> None:
    student, x = converted(Tokens, (7, 6))
    copy_values(student, Recipe(4, 4, copies=2), [x])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = student(x)
    merge_copies(student)
    torch.testing.assert_close(student(x), expected, atol=1e-4, rtol=1e-4)


def test_channels_that_a_teacher_repeats_are_no_copies() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self[0](x))
            return self[3](torch.relu(self[2](self[1](torch.cat([x, x], 1)))))

    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.bias.data.normal_()
    layers = nn.Conv2d(3, 4, 3), norm, nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 3)
    student = convert(Twice(*layers).eval(), torch.randn(2, 3, 9, 9))
    assert any(isinstance(module, BatchNorm) for module in student.operators.values())
    assert copied_layers(student) == {}


def test_float_activations_need_none_and_a_quantized_student_is_refused() -> None:
    student, x = converted(Tokens, (7, 6))
    assert copy_values(student, Recipe(4, 32, copies=2), [x]) == {}
    with pytest.raises(QuantizationError, match="quantized already"):
        copy_values(quantize(student, Recipe(4, 4), calibration=[x]), Recipe(4, 4, copies=2), [x])


@pytest.mark.parametrize("power_of_two", [False, True])
def test_integer_files_compute_what_the_golden_model_does(power_of_two) -> None:
    student, x = converted(Maps, (3, 10, 10))
    grids = copy_values(student, Recipe(4, 4, copies=2, power_of_two=power_of_two), [x])
    quantize(
        student, Recipe(4, 4, power_of_two=power_of_two, copies=2), calibration=[x], learned=grids
    )
    settle(student)
    forms = ["qdq", "subbyte"]
    forms += [form for form in ("qonnx", "openvino") if importlib.util.find_spec(form)]
    rows = np.random.default_rng(0).normal(size=(100, 3, 10, 10)).astype(np.float32)
    for check in verify(student, rows, forms):
        assert (check.changed, check.max_steps) == (0, 0), check


def configured(*options: str):
    given = ["task=cifar10", "task.data.root=nowhere", "quant=lsq", "quant.bits=4", *options]
    return compose(CONF, given)


def test_a_run_goes_on_with_its_copies_and_makes_them_anew_for_other_widths() -> None:
    student, x = converted(Maps, (3, 10, 10))
    run_quant(configured("quant.copies=2"), student, [x], {})
    trained = copied_layers(unquantize(copy.deepcopy(student)))
    assert set(trained.values()) == {2}
    expected = student(x)

    def again(*options: str) -> Student:
        other = copy.deepcopy(student)
        learned = quantizers(copy.deepcopy(student))
        run_quant(configured(*options), unquantize(other), [x], learned)
        return other

    torch.testing.assert_close(again("quant.copies=2")(x), expected, atol=1e-5, rtol=1e-4)
    fewer = again("quant.copies=2", "quant.weight_bits=2")
    assert copied_layers(unquantize(copy.deepcopy(fewer))) == trained
    (layer, *_) = trained
    first, second = fewer.operator(layer).parameters_on_grid()[0].chunk(2, 1)
    assert not torch.equal(first, second)
    assert set(copied_layers(unquantize(again("quant.copies=3"))).values()) == {3}
    assert copied_layers(unquantize(again())) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["quant.bits=8"], "needs quant.act_bits=8 below quant.sum_bits"),
        (["quant.sum_bits=4"], "below quant.sum_bits=4"),
        (["quant=dorefa"], "works with quant=lsq"),
        (["quant=mixed", "quant.budget=0.8"], "one width for all layers"),
    ],
)
def test_what_cannot_be_copied_is_an_error_before_work_starts(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        configured("quant.copies=2", *options)
    with pytest.raises(ConfigError, match="out of range"):
        configured("quant.copies=0")
