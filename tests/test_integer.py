"""The golden integer model against exact arithmetic and against PyTorch."""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import archnet
from archnet.deploy import ExportError
from archnet.deploy.integer import IntegerModel, Requantization, to_integers
from archnet.errors import ArchnetError
from archnet.ops import Student, WeightedOperator
from archnet.quant import Quantizer, Recipe, settle
from archnet.teachers.nets import CifarResNet

# Not shrunk: an example is a network, and the smaller one says no more.
plain = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate]
)
few, many = settings(plain, max_examples=12), settings(plain, max_examples=200)


class Block(nn.Module):
    """Stride, residual, concatenation and pooling in four layers."""

    def __init__(self, channels: int, stride: int, pool: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.left, self.right = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, 5, 3, 1, 1)
        self.pool = pool(2)
        self.head = nn.Linear(channels + 5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.left(x)
        x = torch.cat([x, self.right(x)], 1)
        return self.head(self.pool(x).mean((2, 3)))


class PreActivation(nn.Module):
    """A batch norm that no convolution can take in: it stands before a padded one."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.body, self.head = nn.Conv2d(channels, 6, 3, 2, 1), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        x = self.body(torch.relu(self.norm(stem)))
        return self.head((x + stem[:, :6, ::2, ::2]).mean((2, 3)))


def student_of(network: nn.Module, weight_bits: int, act_bits: int, **options) -> Student:
    """A quantized student of a network with random weights and statistics, settled."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(-1, 1.5)
                module.bias.normal_(0, 0.3)
    images = torch.randn(8, 3, 12, 12)
    student = archnet.convert(network.eval(), images[:1])
    archnet.quantize(student, Recipe(weight_bits, act_bits), calibration=[images], **options)
    settle(student)
    return student.eval()


def pytorch_integers(
    student: Student, model: IntegerModel, images: Tensor, name: str
) -> np.ndarray:
    """What PyTorch makes of the same inputs in float64, as integers of the model's value.

    The input is rounded in float32, as the model rounds it; products are exact after that.
    """
    entry = model.steps[0].name
    with torch.no_grad():
        (start,) = student.run({model.input: images}, [entry])
        twin = student.double()
        (value,) = twin.run({entry: start.double()}, [name])
        student.float()
    unit = model.unit(model.outputs[0]) if name == model.outputs[0] else model.grids[name].scale
    return np.rint(value.numpy() / unit).astype(np.int64)


# Requantization -----------------------------------------------------------------------------


@many
@given(
    accumulator=st.integers(-(2**31), 2**31 - 1),
    mantissa=st.integers(2**23, 2**24 - 1),
    exponent=st.integers(-44, -22),
    high=st.sampled_from([1, 3, 15, 127, 255]),
)
def test_requantization_rounds_the_exact_product_half_to_even(
    accumulator, mantissa, exponent, high
):
    scale = mantissa * 2.0**exponent
    step = Requantization("multiplier", np.array([scale]), -high - 1, high)
    exact = Fraction(accumulator) * Fraction(mantissa) * Fraction(2) ** exponent
    expected = max(-high - 1, min(high, round(exact)))  # Python, too, rounds half to even
    assert step(np.array([[accumulator]], np.int32), 1).item() == expected


@many
@given(accumulator=st.integers(-(2**20), 2**20), shift=st.integers(0, 24))
def test_a_power_of_two_is_a_shift(accumulator, shift):
    step = Requantization("power_of_two", np.array([2.0**-shift]), -128, 127)
    assert abs(int(step.multiplier[0])) == 1
    expected = max(-128, min(127, round(Fraction(accumulator, 2**shift))))
    assert step(np.array([[accumulator]], np.int32), 1).item() == expected


def test_float_requantization_is_that_of_the_runtime():
    step = Requantization("float", np.array([0.3, 0.1]), 0, 15)
    found = step(np.array([[11, 11], [-4, 155]], np.int32), 1)
    assert found.tolist() == [[3, 1], [0, 15]]


# Against PyTorch ----------------------------------------------------------------------------


@few
@given(
    weight_bits=st.sampled_from([2, 3, 4, 8]),
    act_bits=st.sampled_from([2, 4, 6, 8]),
    stride=st.sampled_from([1, 2]),
    channels=st.integers(2, 9),
    pool=st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]),
    per_channel=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_value_agrees_with_pytorch_bit_for_bit(
    weight_bits, act_bits, stride, channels, pool, per_channel, seed
):
    torch.manual_seed(seed)
    student = student_of(
        Block(channels, stride, pool), weight_bits, act_bits, per_channel=per_channel
    )
    model = to_integers(student)
    images = torch.randn(16, 3, 12, 12)
    # A rounded value may carry another name in the student: that of its activation.
    names = [*model.aliases, model.outputs[0]]
    found = model.run(images.numpy(), [model.aliases.get(name, name) for name in names])
    for name in names:
        inside = model.aliases.get(name, name)
        if name != model.outputs[0]:
            model.grids[name] = model.grids[inside]
        np.testing.assert_array_equal(
            found[inside], pytorch_integers(student, model, images, name), err_msg=name
        )


@few
@given(act_bits=st.sampled_from([2, 3, 4, 8]), seed=st.integers(0, 2**31 - 1))
def test_a_batch_norm_before_a_padded_convolution_is_an_affine_step(act_bits, seed):
    torch.manual_seed(seed)
    student = student_of(PreActivation(8), 4, act_bits)
    model = to_integers(student)
    images = torch.randn(16, 3, 12, 12)
    found = model.run(images.numpy())[model.outputs[0]]
    np.testing.assert_array_equal(
        found, pytorch_integers(student, model, images, student.graph.outputs[0])
    )


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
def test_up_to_four_bits_float32_agrees_too(method):
    torch.manual_seed(0)
    student = student_of(CifarResNet(8, width=4), 2, 4, method=method)
    model = to_integers(student)
    images = torch.randn(64, 3, 12, 12)
    with torch.no_grad():
        floats = student(images).numpy()
    np.testing.assert_array_equal(
        model.run(images.numpy())[model.outputs[0]], np.rint(floats / model.unit(model.outputs[0]))
    )


def test_runtime_rounding_and_fixed_point_agree_on_settled_scales():
    torch.manual_seed(0)
    student = student_of(CifarResNet(8, width=4), 2, 4)
    images = torch.randn(64, 3, 12, 12).numpy()
    by_multiplier, by_float = to_integers(student), to_integers(student, "float")
    np.testing.assert_array_equal(by_multiplier.results(images)[0], by_float.results(images)[0])


# Settling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4])
def test_settling_keeps_the_integers_and_leaves_no_rounding_in_doubt(bits):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 12, 12)
    student = archnet.convert(CifarResNet(8, width=4).eval(), images[:1])
    archnet.quantize(student, Recipe(bits, bits), calibration=[images])
    layers = [module for module in student.modules() if isinstance(module, WeightedOperator)]

    def state() -> list[tuple[Tensor, Tensor]]:
        assert all(isinstance(layer.weight_quantizer, Quantizer) for layer in layers)
        return [
            (layer.weight_quantizer.integers(layer.weight), layer.weight_quantizer.scale.detach())
            for layer in layers
        ]

    before, margins = state(), settle(student)
    for (integers, scale), (ours, new) in zip(before, state(), strict=True):
        assert torch.equal(integers, ours)
        assert ((new / scale - 1).abs() <= 2.0**-12 + 1e-6).all()
    assert all(margin.roundings > 1 for margin in margins if margin.bits <= 4)


# Numbers of any size ------------------------------------------------------------------------


class Mixed(nn.Module):
    """Two layers that add, a norm that stays, pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 6, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.left(torch.relu(self.norm(x))) + self.right(x)
        return self.head(self.pool(torch.relu(x)).flatten(1))


def steps_apart(network: nn.Module, weight_bits: int, act_bits: int, **options) -> float:
    """The largest difference of PyTorch's result, in float32, from the golden model's."""
    images = torch.randn(8, 3, 4, 4)
    student = archnet.convert(network.eval(), images[:1])
    archnet.quantize(student, Recipe(weight_bits, act_bits), calibration=[images], **options)
    settle(student)
    model = to_integers(student)
    with torch.no_grad():
        floats = student(images).double().numpy()
    assert np.isfinite(floats).all()
    found = model.run(images.numpy())[model.outputs[0]]
    return float(np.abs(np.rint(floats / model.unit(model.outputs[0])) - found).max())


CHANGES = {
    "weights": lambda layer, size: layer.weight.mul_(size),
    "a channel": lambda layer, size: layer.weight[1].mul_(size),
    "biases": lambda layer, size: layer.bias.fill_(size),
    "a bias": lambda layer, size: layer.bias[2].fill_(-size),
    "no weights": lambda layer, size: layer.weight.zero_(),
    "no channels": lambda layer, size: layer.weight[:3].zero_(),
}


@settings(plain, max_examples=10)
@given(
    name=st.sampled_from(["stem", "left", "right", "head", "norm"]),
    change=st.sampled_from(list(CHANGES)),
    exponent=st.integers(-30, 30),
    bits=st.sampled_from([(2, 4), (1, 2), (4, 4), (8, 8)]),
    per_channel=st.booleans(),
    power_of_two=st.booleans(),
    method=st.sampled_from(["lsq", "dorefa"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_numbers_of_any_size_agree_or_name_their_layer(
    name, change, exponent, bits, per_channel, power_of_two, method, seed
):
    torch.manual_seed(seed)
    network = Mixed()
    with torch.no_grad():
        CHANGES[change](getattr(network, name), 10.0**exponent)
    options = {"per_channel": per_channel, "power_of_two": power_of_two, "method": method}
    try:
        apart = steps_apart(network, *bits, **options)
    except ArchnetError as error:
        assert re.search(r"step \w+", str(error))  # noqa: PT017
        assert abs(exponent) > 6 or method == "dorefa"
    else:
        assert apart == 0


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("name", "bias"), [("left", None), ("head", 1.0), ("head", 1e9)])
def test_a_layer_without_weights_agrees(name, bias, per_channel, method):
    torch.manual_seed(0)
    network = Mixed()
    layer = getattr(network, name)
    with torch.no_grad():
        layer.weight.zero_()
        if bias is not None:
            layer.bias.fill_(bias)
    assert steps_apart(network, 2, 4, per_channel=per_channel, method=method) == 0


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e30])
def test_layers_of_any_size_are_quantized_as_well_as_others(size):
    """What one layer makes large the next makes small."""
    torch.manual_seed(0)
    images = torch.randn(8, 3, 4, 4)
    found = []
    for factor in (1.0, size):
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5, bias=False)
        )
        with torch.no_grad():
            network[0].weight *= factor
            network[0].bias *= factor
            network[3].weight /= factor
            expected = network(images)
            student = archnet.convert(network.eval(), images[:1])
            archnet.quantize(student, Recipe(4, 4), calibration=[images])
            found.append(((student(images) - expected).norm() / expected.norm()).item())
            model = to_integers(student)
            golden = model.results(images.numpy())[0] * model.unit(model.outputs[0])
            torch.testing.assert_close(
                torch.from_numpy(golden).float(), student(images), rtol=1e-4, atol=1e-5
            )
    assert found[1] < 1.05 * found[0] + 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n: (n[0].weight.mul_(1e30), n[2].weight.mul_(1e30)), r"step .*'2'.* not finite"),
        (lambda n: (n[0].weight.mul_(1e25), n[2].weight.mul_(1e9)), r"step .*'2'.*float32"),
        (lambda n: (n[0].weight.mul_(1e-25), n[2].weight.mul_(1e-25)), r"step .*'2'.*float32"),
        (lambda n: n[0].weight.mul_(1e12).abs_().neg_(), r"step .*requantiz"),
    ],
)
def test_what_no_float_or_multiplier_holds_names_its_layer(change, message):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Flatten()
    network = nn.Sequential(*layers, nn.Linear(24, 5)).eval()
    with torch.no_grad():
        network[0].bias.zero_()
        network[2].bias.zero_()
        change(network)
    images = torch.rand(8, 3, 4, 4)
    with pytest.raises(ArchnetError, match=message):
        student = archnet.convert(network, images[:1])
        archnet.quantize(student, Recipe(4, 4), calibration=[images])
        to_integers(student)


@many
@given(
    level=st.integers(-128, 127),
    slope=st.floats(2.0**-60, 2.0**4),
    shift=st.floats(-(2.0**40), 2.0**40),
    kind=st.sampled_from(["multiplier", "power_of_two"]),
)
def test_a_norm_of_any_slope_keeps_its_shift(level, slope, shift, kind):
    slope = 2.0 ** round(math.log2(slope)) if kind == "power_of_two" else slope
    step = Requantization(kind, np.array([slope]), 0, 255, np.array([shift]))
    exact = Fraction(level) * Fraction(slope) + Fraction(shift)
    found = step(np.array([[level]], np.int32), 1).item()
    assert abs(found - max(Fraction(0), min(Fraction(255), exact))) <= Fraction(1, 2) + Fraction(
        1, 2**14
    )


# What cannot be -----------------------------------------------------------------------------


def test_a_float_student_has_no_integers():
    student = archnet.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ExportError, match=r"float.*quant\.weight_bits"):
        to_integers(student)


def test_an_accumulator_that_can_overflow_is_named():
    torch.manual_seed(0)
    student = student_of(CifarResNet(8, width=4), 8, 8)
    widest = max(to_integers(student).accumulators().values())
    with pytest.raises(
        ExportError,
        match=rf"step \w+, from .* in the teacher: its accumulator can need {widest} bits",
    ):
        to_integers(student, accumulator=widest - 1)
    to_integers(student, accumulator=widest)


@many
@given(
    rows=st.lists(st.lists(st.integers(-8, 7), min_size=4, max_size=4), min_size=1, max_size=3),
    bias=st.integers(-1000, 1000),
    low=st.sampled_from([0, -8]),
)
def test_the_worst_case_of_an_accumulator_is_reached(rows, bias, low):
    from archnet.deploy.integer import IntegerGrid, IntegerStep, accumulator_bits
    from archnet.ops import FullyConnected

    weight = np.array(rows, np.int32)
    step = IntegerStep(
        "fc",
        ("x",),
        FullyConnected(4, len(rows)),
        weight=weight,
        bias=np.full(len(rows), bias, np.int32),
    )
    bits = accumulator_bits(step, IntegerGrid(1.0, low, 7))
    best = np.where(weight > 0, 7, low)
    worst = np.where(weight > 0, low, 7)
    ends = [
        (weight * best).clip(0).sum(1) + max(bias, 0),
        (weight * worst).clip(None, 0).sum(1) + min(bias, 0),
    ]
    assert all(-(2 ** (bits - 1)) <= end < 2 ** (bits - 1) for part in ends for end in part)
    assert bits == 1 or any(
        not -(2 ** (bits - 2)) <= end < 2 ** (bits - 2) for part in ends for end in part
    )


def test_a_shift_alone_needs_scales_that_are_powers_of_two():
    torch.manual_seed(0)
    with pytest.raises(ExportError, match="not a power of two"):
        to_integers(student_of(CifarResNet(8, width=4), 4, 4), "power_of_two")


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 4), (8, 8)])
def test_scales_that_are_powers_of_two_need_nothing_but_shifts(weight_bits, act_bits):
    torch.manual_seed(0)
    student = student_of(CifarResNet(8, width=4), weight_bits, act_bits, power_of_two=True)
    shifts, multipliers = to_integers(student, "power_of_two"), to_integers(student)
    for step in shifts.steps:
        if step.requantization is not None:
            multiplier = np.abs(step.requantization.multiplier)
            assert not (multiplier & (multiplier - 1)).any()  # 1, or more where it goes left
    images = torch.randn(8, 3, 12, 12)
    found = shifts.run(images.numpy())[shifts.outputs[0]]
    assert np.array_equal(found, multipliers.run(images.numpy())[multipliers.outputs[0]])
    assert np.array_equal(found, pytorch_integers(student, shifts, images, shifts.outputs[0]))


def test_an_unknown_requantization_is_an_error():
    with pytest.raises(ExportError, match="multiplier, float, power_of_two"):
        to_integers(student_of(CifarResNet(8, width=4), 4, 4), "fixed")
