"""Every rule keeps the teacher's function, whatever its arguments; taps; what conversion costs."""

import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import archnet
from archnet.capture import capture
from archnet.convert import ConversionError, convert
from archnet.convert.taps import choose_taps
from archnet.hardware import student_cost, teacher_cost
from archnet.ops import BatchNorm, Concat, Convolution
from archnet.quant import Recipe, quantize
from archnet.teachers.nets import CifarResNet

TARGETS = ("arch5", "arch5_conv")
TOLERANCE = 1e-5
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


class Function(nn.Module):
    """A network without modules of its own, or with those given by name."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(x) if not self._modules else self.function(self, x)


def randomise(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return network.eval()


def check(network, shape, *targets):
    """The student, after it was found pure and computing what the network computes, for each
    target; arch5 if none is named. The network is captured once: that is most of the time.
    """
    torch.manual_seed(0)
    network, x = randomise(network), torch.randn(3, *shape)
    graph = capture(network, x)
    with torch.no_grad():
        theirs = network(x.clone())
    for target in targets or ("arch5",):
        student = convert(graph, x, target)
        with torch.no_grad():
            ours = student(x)
        assert ours.shape == theirs.shape, target
        # Some windows see nothing but padding: then there is no scale to be relative to.
        off, largest = (ours - theirs).abs().max(), theirs.abs().max().item()
        assert off <= TOLERANCE * max(1.0, largest), target
        audit = archnet.audit(student, target)
        assert audit.pure, (target, audit.violations)
    return student


def kinds(student):
    return [type(module) for module in student.operators.values()]


# Convolution and batch norm -----------------------------------------------------------------


@few
@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    groups=st.sampled_from([1, 2, 3, 20]),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(7, 12), st.integers(7, 12)),
    bias=st.booleans(),
)
def test_any_convolution(kernel, stride, padding, dilation, groups, per_group, size, bias):
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(n + 2 * p >= r for n, p, r in zip(size, padding, reach, strict=True)))
    inputs, outputs = (groups * n for n in per_group)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias)
    check(conv, (inputs, *size), *TARGETS)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding):
    check(nn.Conv2d(2, 3, (3, 5), padding=padding, dilation=2), (2, 9, 9))


@pytest.mark.parametrize("conv", [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 0), (5, 1, 2), (1, 1, 1)])
@pytest.mark.parametrize("rectified", [False, True])
def test_batch_norm_before_and_after(conv, rectified):
    between = [nn.ReLU()] if rectified else []
    layers = nn.BatchNorm2d(4), *between, nn.Conv2d(4, 6, *conv, bias=False), nn.BatchNorm2d(6)
    check(nn.Sequential(*layers), (4, 9, 9), *TARGETS)


def test_batch_norm_behind_a_layer_folds_and_stays_in_front_of_padding():
    def kept(*layers):
        return BatchNorm in kinds(check(nn.Sequential(*layers), (4, 6, 6)))

    conv = nn.Conv2d(4, 4, 3, padding=1)
    assert not kept(conv, nn.BatchNorm2d(4))
    assert kept(nn.BatchNorm2d(4), conv)
    assert not kept(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    check(nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8)), (4, 6, 6))


@pytest.mark.parametrize("padding", [0, 1])
def test_the_cheapest_exact_form_is_taken(padding):
    pointwise, square = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, padding=padding)
    student = check(nn.Sequential(pointwise, nn.ReLU(), square), (4, 8, 8))
    assert kinds(student).count(Convolution) == 2
    assert [row.macs_after for row in student.report] == [row.macs_before for row in student.report]


@few
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    extra=st.integers(0, 1),
    bias=st.booleans(),
)
def test_any_transposed_convolution(kernel, stride, padding, dilation, groups, extra, bias):
    assume(all(p <= dilation * (k - 1) for k, p in zip(kernel, padding, strict=True)))
    assume(not extra or min(*stride) > extra or dilation > extra)
    conv = nn.ConvTranspose2d(2, 4, kernel, stride, padding, extra, groups, bias, dilation)
    check(conv, (2, 5, 6), *TARGETS)


def test_windows_side_by_side_are_a_matrix():
    student = check(nn.ConvTranspose2d(3, 5, 2, 2), (3, 4, 6))
    assert [(row.macs_before, row.macs_after) for row in student.report] == [(1440, 1440)]


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Conv1d(4, 6, 5, stride=2, dilation=2, groups=2),
        nn.Conv1d(4, 6, 1, bias=False),
    ],
)
def test_convolutions_of_a_sequence(conv):
    check(nn.Sequential(conv, nn.BatchNorm1d(6), nn.ReLU()), (4, 15), *TARGETS)


@pytest.mark.parametrize(
    "layer",
    [
        nn.MaxPool1d(2),
        nn.MaxPool1d(3, 2, 1, ceil_mode=True),
        nn.AvgPool1d(3, 2, 1),
        nn.AdaptiveAvgPool1d(1),
        nn.AdaptiveMaxPool1d(5),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="linear"),
        nn.ConvTranspose1d(4, 4, 3, 2, 1, output_padding=1),
    ],
    ids=str,
)
def test_operators_on_a_sequence(layer):
    check(nn.Sequential(nn.BatchNorm1d(4), layer, nn.BatchNorm1d(4), nn.ReLU()), (4, 15), *TARGETS)


class Frames(nn.Module):
    """The same layers for every frame of a video (B, T, C, H, W), joined with the batch."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), *layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x.flatten(0, 1))
        return y.reshape(x.shape[0], x.shape[1], -1).mean(1)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 1),
        nn.Conv2d(4, 6, 1, stride=2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (5, 3), stride=2, padding=(2, 0)),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, 2, stride=3, dilation=2),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2),
        nn.AdaptiveMaxPool2d(1),
        nn.AdaptiveAvgPool2d((2, 1)),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
    ],
    ids=str,
)
def test_images_joined_with_the_batch(layer):
    outputs = getattr(layer, "out_channels", 4)
    check(Frames(layer, nn.BatchNorm2d(outputs)), (3, 4, 8, 7), *TARGETS)


def test_a_transposed_convolution_cut_by_its_padding_is_refused():
    with pytest.raises(ConversionError, match="padded by more than its kernel"):
        convert(nn.ConvTranspose2d(2, 2, 2, 2, padding=2).eval(), torch.zeros(1, 2, 8, 8))


# Activations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        F.relu6,
        lambda x: F.hardtanh(x, -0.5, 0.7),
        lambda x: x.clamp(min=-0.3),
        lambda x: x.clamp(max=0.4),
        lambda x: x.clamp(-0.3, 0.4),
        lambda x: x.clamp_min(0.2),
        lambda x: x.clamp_max(0.2),
        lambda x: x.abs(),
        lambda x: torch.maximum(x, 0.3 - x.flip(2)),
        lambda x: torch.minimum(x.flip(3), 2 * x),
        lambda x: F.prelu(x, torch.tensor([0.2, -0.3])),
        lambda x: F.prelu(x, torch.tensor([0.2])),
        lambda x: torch.maximum(x, x[:, :1].flip(2)),
        lambda x: F.threshold(x, -0.2, -0.2),
        lambda x: F.softshrink(x, 0.3),
        lambda x: x.norm(p=1, dim=1, keepdim=True),
        nn.RReLU().eval(),
    ],
)
def test_activations(function):
    check(Function(lambda x: function(2 * x) * 3), (2, 4, 4))


# Sums and concatenations --------------------------------------------------------------------


def convs(count, kernel=3, inputs=4, outputs=4):
    return {f"c{i}": nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2) for i in range(count)}


SUMS = {
    "plain": (lambda m, x: F.relu(m.c0(x) + x), convs(1)),
    "scaled": (lambda m, x: F.relu(torch.add(m.c0(x), x, alpha=-0.3)), convs(1)),
    "difference": (lambda m, x: F.relu(m.c0(x) - 0.5 * m.c1(x)), convs(2)),
    "three": (lambda m, x: F.relu(m.c0(x) + m.c1(x) + x), convs(2)),
    "pointwise": (lambda m, x: F.relu(m.c0(x) + m.c1(x) + 1.5), convs(2, 1)),
    "mixed": (lambda m, x: F.relu(m.s(x) + m.c0(x)), {**convs(1), "s": nn.Conv2d(4, 4, 1)}),
    "twice": (lambda m, x: F.relu((y := m.c0(x)) + y), convs(1)),
    "chain": (lambda m, x: (x + m.c0(x)) + m.c1(x + m.c0(x)), convs(2)),
    "with batch norm": (lambda m, x: m.b(m.c0(x) + x), {**convs(1), "b": nn.BatchNorm2d(4)}),
    "divided": (lambda m, x: m.c0(x) / 4 - 1, convs(1)),
    "concatenated": (lambda m, x: m.d(F.relu(torch.cat([m.c0(x), x, m.c1(x)], 1))),
                     {**convs(2), "d": nn.Conv2d(12, 3, 3)}),
    "one channel to all": (lambda m, x: F.relu(m.c0(x) - x.mean(1, keepdim=True)), convs(1)),
    "all positions": (lambda m, x: x.amax((2, 3), keepdim=True) + m.c0(x), convs(1)),
    "rows and columns": (lambda m, x: m.c0(x)[:, :, :1] + x[:, :, :, :1], convs(1)),
    "between": (lambda m, x: torch.lerp(m.c0(x), x, 0.3), convs(1)),
    "constants and a product": (
        lambda m, x: torch.addcmul(torch.ones(4, 1, 1), torch.arange(4.0)[:, None, None], m.c0(x)),
        convs(1),
    ),
    "a product added": (lambda m, x: torch.addcmul(x[:, :1], m.c0(x), torch.ones(1), value=0.3),
                        convs(1)),
    "like": (lambda m, x: m.c0(x) + torch.ones_like(x) - torch.full_like(x, 0.5), convs(1)),
    "concatenated twice": (lambda m, x: torch.cat([torch.cat([x, m.c0(x)], 1), x], -3), convs(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_concatenations(name):
    function, modules = SUMS[name]
    check(Function(function, **modules), (4, 7, 7), *TARGETS)


def test_a_pointwise_shortcut_costs_nothing_more_than_the_teacher():
    function, modules = SUMS["pointwise"]
    student = check(Function(function, **modules), (4, 7, 7))
    assert sum(row.macs_after for row in student.report) == 2 * 4 * 4 * 49


def test_vectors_are_added_and_joined():
    network = Function(
        lambda m, x: torch.cat([F.relu(m.a(x) + m.b(x)), x], -1),
        a=nn.Linear(6, 5), b=nn.Linear(6, 5),
    )  # fmt: skip
    assert Concat in kinds(check(network, (6,)))


# Pooling ------------------------------------------------------------------------------------


@few
@given(
    kernel=st.integers(2, 5),
    stride=st.none() | st.integers(1, 5),
    padding=st.integers(0, 2),
    ceil=st.booleans(),
    size=st.tuples(st.integers(6, 11), st.integers(6, 11)),
)
def test_any_max_pooling(kernel, stride, padding, ceil, size):
    pool = nn.MaxPool2d(kernel, stride, min(padding, kernel // 2), ceil_mode=ceil)
    check(pool, (3, *size), *TARGETS)


@few
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    stride=st.none() | st.integers(1, 4),
    padding=st.integers(0, 2),
    ceil=st.booleans(),
    included=st.booleans(),
    divisor=st.none() | st.integers(1, 9),
    size=st.tuples(st.integers(6, 11), st.integers(6, 11)),
)
def test_any_average_pooling(kernel, stride, padding, ceil, included, divisor, size):
    padding = tuple(min(padding, k // 2) for k in kernel)
    pool = nn.AvgPool2d(kernel, stride, padding, ceil, included, divisor)
    check(pool, (3, *size), *TARGETS)


@pytest.mark.parametrize("size", [1, 2, (3, 5), (6, 9), (12, 18), (1, 4), (None, 3)])
def test_adaptive_pooling(size):
    check(nn.AdaptiveAvgPool2d(size), (20, 6, 9), *TARGETS)


@pytest.mark.parametrize("keep", [True, False])
def test_global_mean(keep):
    check(Function(lambda x: F.relu(x).mean((-2, -1), keepdim=keep)), (20, 5, 4), *TARGETS)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x).sum((-2, -1)),
        lambda x: x.sum(1, keepdim=True),
        lambda x: x.amax((2, 3)),
        lambda x: x.amax((2, 3), keepdim=True),
        lambda x: x.amax(1),
        lambda x: x.max(2).values,
        lambda x: F.max_pool2d(x, (2, 3)),
        lambda x: F.max_pool2d(x, (3, 1), (2, 3), (1, 0), ceil_mode=True),
        lambda x: F.max_pool2d(x, (3, 2), 1, dilation=(2, 3)),
        lambda x: x.amin((1, 3)),
        lambda x: x.min(2, keepdim=True)[0],
        lambda x: torch.arange(12.0).view(2, 6) @ x,
        lambda x: torch.mm(x.flatten(1), torch.ones(96, 5)),
        lambda x: F.pad(x, (1, 2), value=3.0),
        lambda x: F.pad(x, (0, 0, 1, 0, 0, 1), value=-0.5),
        lambda x: torch.einsum("bchw,oc->bowh", x, torch.arange(12.0).view(3, 4)),
        lambda x: torch.einsum("wo,bchw->bhoc", torch.arange(8.0).view(4, 2), x),
        lambda x: x @ torch.arange(4.0),
        lambda x: x.flatten(1) * torch.arange(96) - torch.ones(96),
        lambda x: torch.addmm(torch.ones(5), x.mean((2, 3)), torch.ones(4, 5), beta=2, alpha=0.5),
        lambda x: F.adaptive_max_pool2d(x, 1),
        lambda x: F.adaptive_max_pool2d(x, (3, 2)),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.interpolate(x, size=(9, 5), mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"),
    ],
)
def test_sums_extremes_and_sizes(function):
    check(Function(function), (4, 6, 4), *TARGETS)


# Layout and aliasing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.flatten(1),
        lambda x: x.view(x.size(0), 2, -1),
        lambda x: x.reshape(-1, 4, 36),
        lambda x: x.permute(0, 2, 3, 1).transpose(1, -1),
        lambda x: x[:, 1:3, ::2, -4:],
        lambda x: x[:, :1].squeeze(1).unsqueeze(-1),
        lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)),
        lambda x: F.pad(x, (1, 0, 2, 3)).contiguous().clone(),
        lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
        lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"),
        lambda x: F.pad(x, (0, 2, 3, 1), mode="circular"),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: F.pixel_unshuffle(x, 3),
        lambda x: F.unfold(x, 3, padding=1),
        lambda x: F.unfold(x, (2, 3), dilation=(2, 1), padding=(0, 1), stride=(1, 2)).flatten(1),
        lambda x: x.unfold(2, 3, 1).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3),
        lambda x: x.flatten(2).unfold(-1, 8, 4),
        lambda x: F.fold(x.reshape(-1, 16, 9), (6, 6), 2, stride=2),
        lambda x: F.fold(x.reshape(-1, 12, 12), (7, 4), (2, 3), (1, 1), (0, 1), (2, 1)),
        lambda x: F.fold(x.reshape(-1, 12, 12), (5, 4), (2, 3), (2, 1), (0, 1)).relu(),
        lambda x: torch.stack([x, 2 * x], 1).flatten(1, 2),
        lambda x: torch.stack([x, 2 * x], -1),
        lambda x: x.flip(1, 3),
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, size=(12, 24)),
        lambda x: x.view_as(x[:, :, :3].repeat(1, 1, 2, 1)),
        lambda x: x.narrow(2, -4, 3),
        lambda x: torch.cat(x.tensor_split(4, 2)[::-1], 2),
        lambda x: torch.cat(x.tensor_split((1, -2), 3)[::-1], 3),
        lambda x: torch.cat(x.dsplit((2, 3))[::-1], 2),
        lambda x: x.hsplit(2)[1],
        torch.fliplr,
        *(lambda x, k=k: torch.rot90(x[:, :, :4], k, (2, 3)) for k in (-1, 0, 2, 5)),
        lambda x: x[:, [3, 0, 1, 1]],
        lambda x: x.index_select(3, torch.tensor([5, 0, 1, 2])),
        lambda x: x[:, :1].expand(-1, 5, -1, -1),
        lambda x: x[:, :, :1, :1].expand_as(x),
        lambda x: x.mean((2, 3), keepdim=True).broadcast_to(x.shape),
        lambda x: x.repeat(1, 2, 1, 3),
        lambda x: x.tile(2, 1, 2),
        lambda x: x.repeat_interleave(3, 1).repeat_interleave(2, -1),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: x.float().to(torch.float32).type_as(x),
    ],
)
def test_layout_moves(function):
    check(Function(lambda x: function(F.relu(x))), (4, 6, 6))


def reread(m, x):
    y = m.c0(x)
    z = y
    y.relu_()
    y += x
    return z + F.relu_(y)


@pytest.mark.parametrize(
    "network",
    [
        Function(reread, **convs(1)),
        Function(lambda m, x: m.c0(F.relu(m.c0(x))), **convs(1)),
        Function(lambda x: F.max_pool2d(F.relu(x - 0.1), 2).flatten(1)),
        nn.Sequential(
            nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sequential(nn.ReLU(True))), nn.Flatten()
        ),
        nn.Sequential(nn.Identity(), nn.Dropout2d(), nn.Dropout(inplace=True)),
    ],
    ids=["in place", "shared module", "functional", "nested", "nothing"],
)
def test_forms_of_writing(network):
    check(network, (4, 8, 8))


# Errors -------------------------------------------------------------------------------------


def test_an_operator_without_rule_names_operator_path_and_file():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Hardshrink()))
    with pytest.raises(ConversionError) as error:
        convert(network, torch.zeros(1, 3, 8, 8))
    for part in ("aten.hardshrink.default", "'1.0'", "convert/rules/hardshrink.py"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.MaxPool2d(3, padding=1, dilation=2), r"arch5 does not run \(kernel 3x3\)"),
        (Function(lambda x: x.repeat(2, 1, 1, 1)), "along the batch"),
        (Function(lambda x: x.repeat(2, 1, 1, 1, 1)), "in front of the batch"),
        (Function(lambda x: x.expand(3, -1, -1, -1, -1)), "along its first axis"),
        (Function(lambda x: x[:, [0, 1], [0, 1]]), "several indices"),
        (Function(lambda x: x.repeat_interleave(2)), "give dim"),
        (Function(lambda x: F.threshold(x, 0.1, 0.0)), "jumps"),
        (Function(lambda x: x.long().float()), "to integers"),
        (Function(lambda x: torch.addcmul(x, x, x)), "a \\+ b"),
        (Function(lambda x: torch.linalg.vector_norm(x, torch.inf, 1)), "sums of powers"),
        (Function(lambda x: torch.einsum("bchw,wk->bch", x, torch.ones(8, 3))), "aten.einsum"),
        (Function(lambda x: x.reshape(-1)), "between the samples"),
        (Function(lambda x: torch.cat([x, x], 0)), "along the batch"),
        (nn.Conv2d(4, 4, 2, padding="same"), "ZeroPad2d"),
        (nn.Sequential(nn.Flatten(), nn.Softmax(1), nn.ReLU()), "class scores"),
        (nn.AdaptiveMaxPool2d(3), "sizes that divide"),
        (nn.Upsample(size=11), "whole factors"),
        (nn.BatchNorm2d(4, track_running_stats=False), "running statistics"),
    ],
)
def test_what_a_rule_cannot_do_is_said(network, message):
    with pytest.raises(ConversionError, match=message):
        convert(network, torch.zeros(2, 4, 8, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": "warm"}, "exact or random"),
        ({"taps": ["layer3.1.con1"]}, r"layer3\.1\.con1.*nearest: 'layer3\.1\.conv1'"),
        ({"example_inputs": None}, "example_inputs"),
    ],
)
def test_wrong_options(options, message):
    arguments = {"example_inputs": torch.zeros(1, 3, 16, 16), **options}
    with pytest.raises(ConversionError, match=message):
        convert(CifarResNet(14, 4), **arguments)


# Taps ---------------------------------------------------------------------------------------


GATED = (4, 7, 9)  # MobileNetV3's with squeeze-and-excitation and without a shortcut
PLAIN = (1, 2, 4, 7, 11, 14, 17)  # MobileNetV2's blocks without a shortcut
BLOCKS = {
    "resnet18": ["maxpool", *(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))],
    "mobilenet_v2": [
        "features.0.2",
        *(f"features.{i}.conv" if i in PLAIN else f"features.{i}" for i in range(1, 18)),
    ],
    # A gate, whose factors are made of the same value, is no block of its own.
    "mobilenet_v3_small": [
        "features.0.2",
        *(f"features.{i}.block" for i in (1, 2)),
        "features.3",
        *(
            path
            for i in range(4, 11)
            for path in (
                [f"features.{i}.block.0.2", f"features.{i}.block.1.2", f"features.{i}.block"]
                if i in GATED
                else [f"features.{i}"]
            )
        ),
        "features.11",
    ],
    "densenet": [
        "features.pool0",
        *(f"features.{b}" for i in range(1, 4) for b in (f"denseblock{i}", f"transition{i}.pool")),
        "features.denseblock4",
    ],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_taps_stand_at_block_outputs(name):
    if name == "densenet":  # with fewer layers in a block than any that is published
        network = torchvision.models.DenseNet(block_config=(2, 2, 2, 2))
    else:
        network = torchvision.models.get_model(name)
    graph = capture(network, torch.zeros(1, 3, 32, 32))
    assert [path for path, _ in choose_taps(graph)] == BLOCKS[name]


def test_a_long_chain_is_cut_at_its_activations():
    network = nn.Sequential(*(m for _ in range(6) for m in (nn.Conv2d(3, 3, 3), nn.ReLU())))
    student = convert(network, torch.zeros(1, 3, 16, 16))
    assert [tap.path for tap in student.taps] == ["1", "3", "5", "7", "9", "11"]


def test_taps_carry_the_teachers_features():
    network, x = randomise(CifarResNet(14, 4)), torch.randn(2, 3, 16, 16)
    student = convert(network, x, taps=["layer3.0", "layer1"])
    assert [tap.path for tap in student.taps] == ["layer1", "layer3.0"]
    seen = {}
    for path in ("layer1", "layer3.0"):
        network.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, result, path=path: seen.update({path: result})
        )
    with torch.no_grad():
        network(x)
        values = student.run({student.graph.inputs[0]: x}, [tap.value for tap in student.taps])
    torch.testing.assert_close(values, list(seen.values()), rtol=1e-4, atol=1e-5)


# Start and cost -----------------------------------------------------------------------------


def test_a_random_start_is_another_function_of_the_same_form():
    network, x = CifarResNet(8, 4).eval(), torch.randn(2, 3, 16, 16)
    exact, random, again, other = (
        convert(network, x, start=start, seed=seed)
        for start, seed in [("exact", 0), ("random", 1), ("random", 1), ("random", 2)]
    )
    assert exact.graph.steps == random.graph.steps
    assert torch.equal(random(x), again(x))
    assert not torch.allclose(random(x), exact(x), rtol=0.1)
    assert not torch.allclose(random(x), other(x), rtol=0.1)


@pytest.mark.parametrize(
    ("name", "limit"), [("resnet18", 1.6), ("resnet50", 2.0), ("mobilenet_v2", 3.0)]
)
def test_exact_students_stay_near_the_teachers_cost(name, limit):
    network, image = torchvision.models.get_model(name), torch.zeros(1, 3, 224, 224)
    student = convert(network, image)
    teacher = teacher_cost(network, image, 8, 8)
    assert student_cost(student).macs <= limit * teacher.macs
    if name == "resnet18":
        quantize(student, Recipe(2, 4), calibration=[image])
        assert student_cost(student).bops <= 0.30 * teacher.bops
