"""Quantizers against their papers, where they sit, and what they leave unchanged."""

import copy
import io
import math
from functools import cache
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from archnet.convert import convert
from archnet.deploy import to_integers
from archnet.hardware import Target
from archnet.ops import Activation, BatchNorm, Convolution, FullyConnected, WeightedOperator
from archnet.quant import (
    ActivationDoReFa,
    ActivationLSQ,
    BiasQuantizer,
    QuantizationError,
    Quantizer,
    Recipe,
    Together,
    WeightDoReFa,
    WeightLSQ,
    best_scale,
    describe,
    exact_constants,
    grid_steps,
    grids,
    input_quantizers,
    pack,
    quantize,
    quantizers,
    unpack,
    unquantize,
)
from archnet.quant.attach import insert_activations
from archnet.quant.calibrate import activation_scale, lowest_level, observe
from archnet.quant.quantizers import Steps, signed_range
from archnet.teachers.nets import CifarResNet

WIDTHS = range(1, 9)
some = settings(max_examples=60, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def student(network=None, size=16, hardware="arch5"):
    if network is not None:
        return convert(network.eval(), torch.zeros(1, 3, size, size), hardware)
    made, state = converted(torch.get_rng_state().numpy().tobytes(), size)
    torch.set_rng_state(state)
    return copy.deepcopy(made)


@cache
def converted(state, size):
    """The student of a network drawn from a generator's state, once, and the state behind it."""
    made = convert(CifarResNet(14, 4).eval(), torch.zeros(1, 3, size, size))
    return made, torch.get_rng_state()


def batches(count=2, size=16):
    return [torch.randn(8, 3, size, size) for _ in range(count)]


def weighted(network):
    return {
        name: module
        for name, module in network.operators.items()
        if isinstance(module, WeightedOperator)
    }


def activations(network):
    return {n: m for n, m in network.operators.items() if isinstance(m, Activation)}


# Grids --------------------------------------------------------------------------------------


QUANTIZERS = {
    "weights": WeightLSQ,
    "weights, DoReFa": WeightDoReFa,
    "signed": lambda bits, _: ActivationLSQ(bits, signed_range(bits)[0]),
    "unsigned": lambda bits, _: ActivationLSQ(bits, 0),
    "unsigned, DoReFa": lambda bits, _: ActivationDoReFa(bits, 0),
    "one level below zero": lambda bits, _: ActivationLSQ(bits, -1),
}


@pytest.mark.parametrize("kind", QUANTIZERS)
@some
@given(bits=st.sampled_from(WIDTHS), channels=st.sampled_from([1, 3]), seed=seeds)
def test_values_are_integers_in_range_times_the_scale(kind, bits, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    quantizer = QUANTIZERS[kind](bits, channels)
    quantizer.set_scale(torch.rand(quantizer.channels, generator=generator) + 0.01)
    x = torch.randn(3, 4, 5, 5, generator=generator) * 3
    levels = quantizer.integers(x)
    assert torch.equal(levels, levels.round())
    assert quantizer.low <= levels.min()
    assert levels.max() <= quantizer.high
    assert quantizer.high - quantizer.low <= max(2, 2**bits - 1)
    scale = quantizer.scale.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(quantizer(x), levels * scale)
    if "DoReFa" not in kind or "un" in kind:
        # What lies on the grid stays there.
        assert torch.equal(quantizer.integers(levels * scale), levels)


def test_documented_examples():
    weights, unsigned, dorefa = WeightLSQ(2), ActivationLSQ(4, 0), WeightDoReFa(2)
    weights.set_scale(torch.tensor([0.5]))
    unsigned.set_scale(torch.tensor([0.25]))
    assert weights(torch.tensor([[0.3, 2.0, -9.0]])).tolist() == [[0.5, 0.5, -1.0]]
    assert unsigned(torch.tensor([[1.1, 9.0, -0.7]])).tolist() == [[1.0, 3.75, 0.0]]
    assert dorefa.integers(torch.tensor([[-0.9, 0.1, 0.6]])).tolist() == [[-1, 0, 1]]


def test_one_bit_weights_are_signs():
    quantizer = WeightLSQ(1)
    quantizer.set_scale(torch.tensor([0.5]))
    x = torch.tensor([[-2.0, -0.1, 0.0, 0.3]], requires_grad=True)
    quantizer(x).sum().backward()
    assert quantizer(x).tolist() == [[-0.5, -0.5, 0.5, 0.5]]
    assert x.grad.tolist() == [[0, 1, 1, 1]]  # clipped beyond the outer levels


# Gradients ----------------------------------------------------------------------------------


def lsq_reference(x, log_scale, low, high):
    """Arrange equations 1 and 2 of arXiv 1902.08153 so that autograd finds equation 3."""
    ratio = x / log_scale.exp()
    level = ratio.round().clamp(low, high).detach()
    inside = (ratio > low - 0.5) & (ratio < high + 0.5)  # rounds to a level without clipping
    return (level + torch.where(inside, ratio - ratio.detach(), 0.0)) * log_scale.exp()


@some
@given(
    bits=st.integers(2, 8),
    kind=st.sampled_from(["tensor", "channel", "signed", "unsigned", "one level below zero"]),
    seed=seeds,
)
def test_gradients_are_those_of_lsq(bits, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64)
    lows = {"signed": signed_range(bits)[0], "unsigned": 0, "one level below zero": -1}
    if kind not in lows:
        quantizer = WeightLSQ(bits, 4 if kind == "channel" else 1).double()
    else:
        quantizer = ActivationLSQ(bits, lows[kind]).double()
    scale = (torch.rand(quantizer.channels, generator=generator, dtype=torch.float64) + 0.5) / (
        2 ** (bits - 1)
    )
    quantizer.set_scale(scale)
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    quantizer(ours).backward(grad)

    log_scale = quantizer.log_scale.detach().clone().requires_grad_()
    rows = log_scale.reshape(-1, 1, 1, 1) if kind == "channel" else log_scale
    lsq_reference(theirs, rows, quantizer.low, quantizer.high).backward(grad)
    # Section 2.2: the weights that share the step, or the features of one image.
    count = x.numel() if kind == "tensor" else x[0].numel()
    expected = log_scale.grad / math.sqrt(count * quantizer.high)
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(quantizer.log_scale.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"per_channel": False},
        {"power_of_two": True},
        {"act_power_of_two": True},
        {"method": "dorefa"},
        {"weight_bits": 1},
        {"act_bits": 32, "first_bits": 32},
    ],
    ids=str,
)
def test_rounded_together_values_and_gradients_are_those_of_rounding_alone(recipe, layout):
    made = student()
    quantize(made, **{"weight_bits": 3, "act_bits": 4, "calibration": batches(), **recipe})
    made.to(memory_format=layout)
    images = batches(1)[0]
    together = Together(made.operators.values(), exact_constants(made))

    def result():
        made.zero_grad()
        scores = made(images)
        (scores * torch.linspace(-1, 1, scores.numel()).view_as(scores)).sum().backward()
        return scores.detach(), {n: p.grad for n, p in made.named_parameters()}

    scores, gradients = result()
    for _ in range(2):
        with together.ready():
            ours, found = result()
        assert torch.equal(ours, scores)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert torch.equal(made(images), scores)


def test_scales_of_exact_constants_have_no_gradient():
    """A pool's 1/n is on its grid, and rounding moves a constant of several sizes."""
    made = student()
    quantize(made, Recipe(4, 4), calibration=batches())
    lone = FullyConnected(2, 2, trainable=False)
    uneven = FullyConnected(2, 2, trainable=False)
    with torch.no_grad():
        lone.weight.copy_(torch.tensor([[0.3, -0.3], [0.0, 1e-3]]))
        uneven.weight.copy_(torch.tensor([[0.3, -0.2], [0.0, 1e-3]]))
    for layer in (lone, uneven):
        layer.weight_quantizer = WeightLSQ(4, 2)
        layer.weight_quantizer.set_scale(layer.weight.abs().amax(1) / 7)
    made.operators["lone"], made.operators["uneven"] = lone, uneven
    found = exact_constants(made)
    assert lone in found
    assert uneven not in found
    assert all(not operator.trainable for operator in found)
    for layer in (lone, uneven):
        (layer(torch.randn(8, 2)) ** 2).sum().backward()
    still, moved = (layer.weight_quantizer.log_scale.grad[0].abs() for layer in (lone, uneven))
    assert still < 1e-5 < moved


def test_the_gradient_of_a_scale_is_the_sum_over_its_uses_of_one_backward_pass():
    quantizer = ActivationLSQ(4, 0)
    quantizer.set_scale(torch.tensor([0.3]))
    x, y = torch.randn(2, 6, 5), torch.randn(2, 6, 7)
    gradients = []
    for parts in ([x], [y], [x, y]):
        steps = Steps([quantizer])
        quantizer.entry = steps.entries[quantizer]
        loss = sum(quantizer(part).square().sum() for part in parts)
        for _ in range(2):  # the second pass forgets the first
            (found,) = torch.autograd.grad(loss, quantizer.log_scale, retain_graph=True)
        gradients.append(found)
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2])


def test_a_student_is_as_it_was_when_what_runs_together_fails():
    made = student()
    quantize(made, Recipe(3, 4), calibration=batches())
    with pytest.raises(ZeroDivisionError), Together(made.operators.values()).ready():
        raise ZeroDivisionError
    assert not any(module.on_grid for module in weighted(made).values())
    assert all(quantizer.entry is None for quantizer in quantizers(made).values())


# Calibration --------------------------------------------------------------------------------


@some
@given(low=st.sampled_from([-8, -2, 0]), seed=seeds)
def test_the_best_scale_beats_its_neighbours(low, seed):
    high = -low - 1 if low else 15
    values = torch.randn(2, 200, generator=torch.Generator().manual_seed(seed)).abs()
    values = values if low == 0 else values * torch.tensor([1.0, -1.0]).repeat(100)

    def error(scale):
        levels = (values / scale[:, None]).round().clamp(low, high)
        return (levels * scale[:, None] - values).square().sum(1)

    best = best_scale(values, low, high)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert (error(best) <= error(best * factor) * 1.05).all()


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_dead_channels_have_a_scale_and_give_no_nan(method, bits):
    network = student()
    for module in weighted(network).values():
        if module.trainable:
            module.weight.data[0] = 0
            module.bias.data[0] = 0
    dead_images = [torch.zeros(4, 3, 16, 16)]
    quantize(network, Recipe(bits, bits, method=method), calibration=dead_images).train()
    result = network(torch.randn(4, 3, 16, 16))
    result.square().sum().backward()
    assert result.isfinite().all()
    for name, parameter in network.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
        if name.endswith("log_scale"):
            assert (parameter.exp() > 0).all(), name


# Where quantizers sit -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lsq", "dorefa"])
@pytest.mark.parametrize(("bits", "least"), [(8, 0.99), (4, 0.85), (2, None)])
def test_wide_enough_students_still_follow_the_float(method, bits, least):
    network, images = student(), batches()
    with torch.no_grad():
        before = network(images[0])
        after = quantize(network, Recipe(bits, bits, method=method), calibration=images)(images[0])
    assert not torch.equal(before, after)
    if least is not None and method == "lsq":
        assert F.cosine_similarity(before.flatten(), after.flatten(), dim=0) > least


def test_first_and_last_layer_have_their_own_width():
    network = quantize(student(), Recipe(2, 4, first_bits=7, last_bits=6), calibration=batches())
    trained = [m for m in weighted(network).values() if m.trainable]
    assert [m.weight_quantizer.bits for m in trained] == [7, *[2] * (len(trained) - 2), 6]
    names = [name for name, m in weighted(network).items() if m.trainable]
    inputs = [input_quantizers(network)[name].bits for name in names]
    assert inputs[0] == 7
    assert inputs[-1] == 6
    assert set(inputs[1:-1]) == {4}


def test_scales_are_per_channel_or_per_tensor():
    for per_channel in (True, False):
        network = quantize(student(), Recipe(4, 4, per_channel=per_channel), calibration=batches(1))
        for module in weighted(network).values():
            expected = module.weight.shape[0] if per_channel else 1
            assert module.weight_quantizer.scale.shape == (expected,)


def test_32_bits_are_off():
    image = torch.randn(2, 3, 16, 16)
    floating = student()
    before = floating(image)
    torch.testing.assert_close(
        quantize(floating, Recipe(32, 32), calibration=batches(1))(image), before
    )
    only_weights = quantize(student(), Recipe(4, 32), calibration=batches(1))
    assert all(m.quantizer is None for m in activations(only_weights).values())
    assert all(m.bias_quantizer is None for m in weighted(only_weights).values())
    only_activations = quantize(student(), Recipe(32, 4), calibration=batches(1))
    assert all(m.weight_quantizer is None for m in weighted(only_activations).values())
    assert any(m.quantizer is not None for m in activations(only_activations).values())


def test_every_computed_value_lies_on_one_grid_where_it_is_read():
    network = quantize(student(), Recipe(2, 4), calibration=batches())
    on_grid, read = grids(network), 0
    for step in network.graph.steps:
        if isinstance(network.operator(step.name), WeightedOperator | BatchNorm):
            places = on_grid[step.inputs[0]]
            quantizers = {id(network.operator(place).quantizer) for place in places}
            assert len(quantizers) == 1, step.name
            assert input_quantizers(network)[step.name] is not None
            read += 1
    assert read > 10
    assert isinstance(network.operator(network.graph.outputs[0]), FullyConnected)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 3)
        self.d = nn.Linear(4, 2)

    def forward(self, x):
        y = torch.cat([F.relu(self.a(x)), F.relu(3 * self.b(x))], 1)
        return self.d(F.relu(self.c(y)).mean((2, 3)))


def test_inputs_of_a_concatenation_share_one_quantizer():
    network = quantize(student(Joined()), Recipe(4, 4), calibration=batches())
    by_name = {step.name: step for step in network.graph.steps}
    (joint,) = [s for s in by_name.values() if type(network.operator(s.name)).__name__ == "Concat"]
    first, second = (network.operator(name).quantizer for name in joint.inputs)
    assert first is second
    scales = [name for name, _ in network.named_parameters() if name.endswith("log_scale")]
    kept = {name: module.quantizer for name, module in activations(network).items()}
    assert len({id(q) for q in kept.values()}) == len(kept) - 1
    assert len(scales) == len(set(scales))


def test_a_grid_begins_where_its_values_do():
    values = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 6):
        half = 2 ** (bits - 1)
        assert lowest_level(values.abs(), bits, False, True) == 0
        assert lowest_level(values, bits, False, True) == -half
        # A hardswish's values: the lowest is -3/8, and most of what is large is above zero.
        skewed = F.hardswish(3 * values)
        low = lowest_level(skewed, bits, False, True)
        assert -half < low < 0
        assert lowest_level(skewed, bits, False, False) == -half

        def error(low, bits=bits, skewed=skewed):
            quantizer = ActivationLSQ(bits, low)
            quantizer.set_scale(activation_scale(skewed, quantizer))
            return (quantizer(skewed[None]) - skewed).square().mean()

        assert error(low) < 0.6 * error(-half)
    # The integers of 8 bits fit a byte.
    assert lowest_level(F.hardswish(3 * values), 8, False, True) == -128


def test_a_target_without_zero_points_gets_none():
    network, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 3)).eval(), batches()
    lows = []
    for zero_points in (True, False):
        student = convert(network, x[0])
        quantize(
            student, Recipe(4, 4, last_bits=4, sum_bits=4, zero_points=zero_points), calibration=x
        )
        found = {module.quantizer.low for module in activations(student).values()}
        lows.append(found - {0, -8, -128})
    assert lows[0]
    assert not lows[1]


def test_biases_lie_on_the_accumulators_grid():
    network = quantize(student(), Recipe(2, 4), calibration=batches())
    for name, module in weighted(network).items():
        quantizer, source = module.bias_quantizer, input_quantizers(network)[name]
        assert isinstance(quantizer, BiasQuantizer)
        torch.testing.assert_close(quantizer.step(), module.weight_quantizer.scale * source.scale)
        levels = quantizer.integers(module.bias)
        _, bias = module.parameters_on_grid()
        assert torch.equal(levels, levels.round())
        assert levels.abs().max() < 2**31
        assert torch.equal(bias, levels * quantizer.step())


def test_fixed_grids_are_not_trained_and_learned_ones_are():
    for method, learned in (("lsq", True), ("dorefa", False)):
        network = quantize(student(), Recipe(4, 4, method=method), calibration=batches(1))
        scales = [p for n, p in network.named_parameters() if n.endswith("log_scale")]
        assert scales
        assert {p.requires_grad for p in scales} == {learned}


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_dorefa_grid(bits):
    quantizer, x = WeightDoReFa(bits), torch.linspace(-2, 2, 4001)[None]
    high = max(1, 2 ** (bits - 1) - 1)
    expected = torch.tanh(x) / math.tanh(2)
    if bits == 1:
        assert set(quantizer.integers(x).unique().tolist()) == {-1, 1}
    else:
        assert torch.equal(quantizer.integers(x), (expected * high).round())
        assert quantizer.integers(x).unique().tolist() == list(range(-high, high + 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_dorefa_grid_spans_what_leaves_least_error(bits):
    """With the published span, all but the largest of many weights would be zero at 2 bits."""
    layer = nn.Conv2d(8, 6, 3)
    torch.nn.init.normal_(layer.weight, std=0.05)
    fitted, published = WeightDoReFa(bits, 6), WeightDoReFa(bits, 6)
    fitted.set_scale(fitted.fit(layer.weight))
    levels = published.integers(layer.weight).reshape(6, -1)
    rows = layer.weight.detach().reshape(6, -1)
    published.set_scale((rows * levels).sum(1) / levels.square().sum(1))
    lost = [(q(layer.weight) - layer.weight).square().sum() for q in (fitted, published)]
    assert lost[0] <= lost[1]
    if bits == 2:
        assert (published.integers(layer.weight) == 0).double().mean() > 0.8
        assert (fitted.integers(layer.weight) == 0).double().mean() < 0.6
        assert lost[0] < 0.5 * lost[1]


# Saving and errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_bits", "act_bits", "method"), [(32, 32, "lsq"), (2, 4, "lsq"), (3, 32, "dorefa")]
)
def test_packed_students_come_back_equal(weight_bits, act_bits, method):
    network = quantize(
        student(Joined()), Recipe(weight_bits, act_bits, method=method), calibration=batches(1)
    )
    file = io.BytesIO()
    torch.save(pack(network), file)
    file.seek(0)
    again, image = unpack(torch.load(file, weights_only=True)), torch.randn(2, 3, 16, 16)
    assert torch.equal(again(image), network(image))
    assert again.taps == network.taps
    assert again.spec() == network.spec()
    shared = [len({id(m.quantizer) for m in activations(n).values()}) for n in (again, network)]
    assert shared[0] == shared[1]


@pytest.mark.parametrize("bits", [(0, 4), (4, 9), (-1, 4), (16, 4)])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(QuantizationError, match="1 to 8, or 32"):
        quantize(student(), Recipe(*bits), calibration=batches(1))


@pytest.mark.parametrize("bits", [(2, 4), (4, 32)])
def test_quantizing_twice_is_refused(bits):
    network = quantize(student(), Recipe(*bits), calibration=batches(1))
    with pytest.raises(QuantizationError, match="already"):
        quantize(network, Recipe(4, 4), calibration=batches(1))


def test_calibration_leaves_the_weights_alone():
    network = student(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)))
    (conv,) = [m for m in network.modules() if isinstance(m, Convolution)]
    before = conv.weight.clone()
    quantize(network, Recipe(2, 2), calibration=batches(1))
    assert torch.equal(conv.weight, before)
    assert not torch.equal(conv.parameters_on_grid()[0], before)


def _seen(images):
    """What calibration draws of images that are only flattened."""
    network = student(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
    first = next(s.name for s in network.graph.steps if network.graph.inputs[0] in s.inputs)
    return observe(network, [first], images)[first]


def test_extremes_count_as_often_as_they_are_drawn():
    images = torch.randn(32, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0, 0], images[:, 0, 0, 0, 1] = 50.0, -50.0
    seen = _seen(images)
    # Of 6,144 values of a batch 1,024 are drawn: of 64 extremes one in six.
    assert len(seen) == 32 * 1024
    assert 0 < (seen.abs() == 50).sum() < 24


@pytest.mark.parametrize("others", [torch.rand, torch.zeros])
@pytest.mark.parametrize("rare", [-0.5, 0.5])
def test_a_rare_sign_is_seen(others, rare):
    images = others(8, 16, 3, 16, 16) * -math.copysign(1, rare)
    images[3, 5, 1, 7, 7] = rare
    assert (_seen(images) == rare).any()


# Powers of two ------------------------------------------------------------------------------


def test_a_power_of_two_is_the_nearest_to_what_is_learned():
    quantizer = WeightLSQ(4, channels=3, power_of_two=True)
    quantizer.set_scale(torch.tensor([0.9, 0.3, 0.001]))
    assert quantizer.scale.tolist() == [1.0, 0.25, 2.0**-10]
    quantizer(torch.randn(3, 5)).square().sum().backward()
    assert quantizer.log_scale.grad.abs().min() > 0  # what is learned moves on between powers


def test_calibration_takes_the_best_power_of_two():
    values = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 3
    scales = best_scale(values, -8, 7, power_of_two=True)
    assert torch.equal(scales.log2(), scales.log2().round())

    def error(scale):
        return ((values / scale).round().clamp(-8, 7) * scale - values).square().sum(1)

    for factor in (0.5, 2.0):
        assert (error(scales[:, None]) <= error(scales[:, None] * factor)).all()


def test_scales_of_activations_alone_may_be_powers_of_two():
    network = student(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)))
    quantize(network, Recipe(4, 8, act_power_of_two=True), calibration=batches(1))
    kept = [m for m in network.modules() if isinstance(m, Quantizer)]
    assert {(isinstance(m, ActivationLSQ), m.power_of_two) for m in kept} == {
        (True, True),
        (False, False),
    }


def test_students_of_powers_of_two_come_back_as_such():
    network = student(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)))
    quantize(network, Recipe(4, 4, power_of_two=True), calibration=batches(1))
    again = unpack(pack(network))
    kept = [m for m in again.modules() if isinstance(m, Quantizer)]
    assert kept
    assert all(quantizer.power_of_two for quantizer in kept)


@pytest.mark.parametrize("hardware", Target.names())
def test_scales_are_those_that_the_students_target_takes(hardware):
    target = Target.named(hardware)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(784, 3))
    quantized = quantize(student(network, hardware=hardware), Recipe(4, 4), calibration=batches(1))
    shifts = target.requantization == "power_of_two"
    for quantizer in quantizers(quantized).values():
        if isinstance(quantizer, ActivationLSQ):
            assert quantizer.power_of_two == (shifts or target.act_scales == "power_of_two")
            assert target.zero_points or quantizer.low in (0, -(2 ** (quantizer.bits - 1)))
        else:
            assert quantizer.power_of_two == shifts
            assert "per_channel" in target.weight_scales or quantizer.scale.numel() == 1


def test_what_is_asked_for_goes_before_what_the_target_takes():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3))
    options = {"per_channel": True, "power_of_two": False, "act_power_of_two": False}
    quantized = quantize(
        student(network, hardware="max78000"), Recipe(4, 4, **options), calibration=batches(1)
    )
    assert not any(quantizer.power_of_two for quantizer in quantizers(quantized).values())
    assert max(quantizer.scale.numel() for quantizer in quantizers(quantized).values()) > 1


# Units --------------------------------------------------------------------------------------


def test_a_step_of_the_grid_is_known_for_every_number_on_it():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)
    )
    student = convert(network.eval(), images[:1])
    quantize(student, Recipe(2, 4, first_bits=2, last_bits=4), calibration=[images])
    first, last = [m for m in student.modules() if isinstance(m, WeightedOperator)]
    (place,) = [
        m for m in student.modules() if isinstance(m, Activation) and m.low == 0 and m.quantizer
    ]
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    sizes = grid_steps(student)

    def size(parameter: nn.Parameter) -> torch.Tensor | None:
        return sizes.get(names[id(parameter)])

    share = (first.weight_quantizer.integers(first.weight) != 0).float().mean().sqrt()
    # Every channel has a step of its own.
    expected = first.weight_quantizer.scale.reshape(-1, 1, 1, 1) * share
    torch.testing.assert_close(size(first.weight), expected)
    torch.testing.assert_close(size(first.bias), place.quantizer.scale.reshape(()))
    assert size(last.bias) is None  # nothing rounds the result
    assert size(first.weight_quantizer.log_scale) == 1 / 16  # levels -2 to 1
    assert size(place.quantizer.log_scale) == 1 / 15
    assert set(sizes) <= set(names.values())


@pytest.mark.parametrize("emptied", [[1], [0, 1, 2, 3]])
@pytest.mark.parametrize("per_channel", [True, False])
def test_channels_that_weight_decay_has_emptied_keep_their_bias(emptied, per_channel):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        network[0].weight[emptied] = 1e-20
        network[0].bias[emptied] = 0.7
    images = torch.randn(16, 3, 8, 8)
    student = convert(network, images)
    calibration = [images]
    quantize(student, weight_bits=8, act_bits=8, calibration=calibration, per_channel=per_channel)
    to_integers(student)  # every bias fits the accumulator
    with torch.no_grad():
        assert (student(images) - network(images)).norm() < 0.02 * network(images).norm()


def test_a_relu_that_never_opens_leaves_its_readers_their_biases():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        network[0].bias.fill_(-100.0)
    images = torch.randn(16, 3, 8, 8)
    student = convert(network, images)
    quantize(student, weight_bits=8, act_bits=8, calibration=[images])
    to_integers(student)
    with torch.no_grad():
        assert torch.allclose(student(images), network(images), atol=0.01)


def test_what_no_trained_layer_multiplies_keeps_8_bits():
    """A layer's result that segments of a smooth activation read, and those."""
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish(), nn.Conv2d(8, 4, 3)).eval()
    images = torch.randn(64, 3, 8, 8)
    for sum_bits in (8, 4):
        student = convert(network, images)
        quantize(student, Recipe(4, 4, sum_bits=sum_bits), calibration=[images])
        sums = {"conv2d_conv_grid", "hardswish_segments_grid"}
        found = {name: module.quantizer.bits for name, module in activations(student).items()}
        assert {found[name] for name in sums} == {sum_bits}
        assert found["hardswish_merge_grid"] == 8  # the last layer's input
        assert found["input_grid"] == 8


def test_constants_are_as_near_to_their_weights_as_8_bits_are():
    """Nothing trains their rounding away: one number a row is exact, the rest has 8 bits."""
    network = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 4)).eval()
    x = torch.randn(256, 6) * torch.rand(256, 1)
    student = convert(network, x)
    quantize(student, Recipe(2, 4, last_bits=2), calibration=[x])
    constants = [m for m in weighted(student).values() if not m.trainable]
    assert {module.weight_quantizer.bits for module in constants} == {2, 8}
    for module in constants:
        error = (module.weight_quantizer(module.weight) - module.weight).abs().amax()
        bound = 1e-6 if module.weight_quantizer.bits == 2 else 1 / 127
        assert error <= bound * module.weight.abs().amax()
    assert any(m.weight_quantizer.bits == 2 for m in weighted(student).values() if m.trainable)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which reads pixels that the first one reads too."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second, self.last = (
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8), (8, 8), (8, 4))
        )

    def forward(self, x):
        x = self.stem(x)
        # A layout move that only the convolution needs, and one that both do.
        y = x.transpose(2, 3).flip(2)
        y = y + self.second(self.first(y).relu())
        return self.last(y.relu())


def test_sums_are_finer_than_what_convolutions_read():
    network, images = Residual().eval(), torch.randn(32, 3, 8, 8)
    student = convert(network, images)
    plain = copy.deepcopy(student)
    insert_activations(plain, fine_sums=True)
    # In floats a further place changes nothing.
    torch.testing.assert_close(plain(images), network(images), rtol=1e-4, atol=1e-4)
    quantize(student, Recipe(4, 4), calibration=[images])
    on_grid, bits = grids(student), {}
    for step in student.graph.steps:
        module = student.operator(step.name)
        if isinstance(module, WeightedOperator):
            places = on_grid[step.inputs[0]]
            (bits[step.name],) = {student.operator(n).quantizer.bits for n in places}
            assert module.trainable or bits[step.name] == 8
    convolutions = [name for name in bits if name.startswith("conv2d")]
    assert [bits[name] for name in convolutions] == [8, 4, 4, 8]
    assert sum(name.endswith("_narrow") for name in student.operators) >= 1
    steps = student.steps_between(student.graph.inputs, [student.graph.outputs[0]])
    assert len(steps) == len(student.graph.steps)
    to_integers(student)


@pytest.mark.parametrize("network", [Residual(), nn.Sequential(nn.Conv2d(3, 8, 1), nn.Hardswish())])
def test_a_student_without_its_quantizers_is_the_float_one(network):
    """Steps, taps and weights before rounding; quantized again it is what it would have been."""
    network, images = network.eval(), torch.randn(32, 3, 8, 8)
    student = convert(network, images)
    plain, once = (
        copy.deepcopy(student),
        quantize(copy.deepcopy(student), Recipe(2, 4), calibration=[images]),
    )
    quantize(student, Recipe(4, 4), calibration=[images])
    unquantize(student)
    assert not describe(student)
    assert len(student.graph.steps) == len(plain.graph.steps)
    assert [tap.value for tap in student.taps] == [tap.value for tap in plain.taps]
    assert torch.equal(student(images), plain(images))
    quantize(student, Recipe(2, 4), calibration=[images])
    assert describe(student) == describe(once)
    assert torch.equal(student(images), once(images))


@pytest.mark.parametrize("bits", [(4, 4), (2, 4), (4, 8)])
def test_grids_that_training_found_are_kept_where_the_width_is(bits):
    """The same widths again: the very student. Others are calibrated as if for the first time."""
    network, images = Residual().eval(), torch.randn(32, 3, 8, 8)
    student = quantize(convert(network, images), Recipe(4, 4), calibration=[images])
    for quantizer in set(quantizers(student).values()):
        quantizer.log_scale.data += 0.1 * torch.randn(quantizer.channels)
    trained, learned = copy.deepcopy(student), quantizers(copy.deepcopy(student))
    plain = quantize(copy.deepcopy(unquantize(student)), Recipe(*bits), calibration=[images])
    quantize(student, Recipe(*bits), calibration=[images], learned=learned)
    if bits == (4, 4):
        assert describe(student) == describe(trained)
        assert torch.equal(student(images), trained(images))
    before, new = quantizers(plain), quantizers(student)
    assert new.keys() == before.keys()
    assert any(
        name in learned and quantizer.bits == learned[name].bits for name, quantizer in new.items()
    )
    for name, quantizer in new.items():
        kept = name in learned and quantizer.bits == learned[name].bits
        source = learned if kept else before
        assert torch.equal(quantizer.log_scale, source[name].log_scale), name


# Numbers that are none ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_calibration_that_is_not_finite_is_named(value):
    given = batches(3)
    given[1][0, 0, 0, 0] = value
    with pytest.raises(QuantizationError, match=r"calibration: \w+ of batch 1 has values"):
        quantize(student(), Recipe(2, 4), calibration=given)
    with pytest.raises(QuantizationError, match="calibration has no batch"):
        quantize(student(), Recipe(2, 4), calibration=[])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_student_that_is_not_finite_is_named(name, value):
    network = student()
    step, module = next(iter(weighted(network).items()))
    getattr(module, name).data.flatten()[0] = value
    with pytest.raises(QuantizationError, match=rf"step {step}.*: its {name} is not finite"):
        quantize(network, Recipe(2, 4), calibration=batches())


@pytest.mark.parametrize("low", [0, -8])
def test_one_pass_rounds_as_several_do(low: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, here on a CPU."""
    torch.manual_seed(0)
    quantizer = ActivationLSQ(4, low)
    quantizer.set_scale(torch.tensor([0.3]))
    x, given = torch.randn(8, 5, 6), torch.randn(8, 5, 6)
    found, module = [], import_module("archnet.quant.quantizers")
    for fuses in (False, True):
        monkeypatch.setattr(module, "_fuses", lambda x, fuses=fuses: fuses)
        quantizer.zero_grad()
        y = quantizer(leaf := x.clone().requires_grad_())
        (y * given).sum().backward()
        found.append((y.detach(), leaf.grad, quantizer.log_scale.grad))
    for several, one in zip(*found, strict=True):
        torch.testing.assert_close(one, several)
