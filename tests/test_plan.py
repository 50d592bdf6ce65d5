"""Running a student in larger pieces gives the values and gradients of running it step by step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archnet.convert import Approximation, convert
from archnet.ops import Activation, Convolution, HingeLines, HingeSum, Step, Student
from archnet.ops.piece import Piece
from archnet.ops.plan import Split, plan
from archnet.ops.tables import Tabled, spread
from archnet.quant import Recipe, equalize, quantize


def step_by_step(student: Student, x: torch.Tensor) -> dict[str, torch.Tensor]:
    values = {student.graph.inputs[0]: x}
    for step in student.graph.steps:
        values[step.name] = student.operator(step.name)(*[values[name] for name in step.inputs])
    return values


def pieces(student: Student) -> list[Piece]:
    return student._pieces(tuple(student.graph.inputs), tuple(student.graph.outputs))


def gradients(student: Student, result: torch.Tensor) -> list[torch.Tensor]:
    student.zero_grad()
    ramp = torch.linspace(-1, 1, result.numel(), device=result.device)
    (result * ramp.view_as(result)).sum().backward()
    return [p.grad.clone() for p in student.parameters() if p.grad is not None]


CONVOLUTIONS = {
    "7x7": lambda: nn.Conv2d(4, 6, 7, padding=3),
    "5x3": lambda: nn.Conv2d(4, 6, (5, 3), padding=(2, 1)),
    "stride": lambda: nn.Conv2d(4, 6, 5, stride=3, padding=1),
    "uneven": lambda: nn.Conv2d(4, 6, 5, stride=(1, 2)),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "depthwise": lambda: nn.Conv2d(40, 40, 7, padding=3, groups=40),
    "groups": lambda: nn.Conv2d(36, 72, 5, padding=2, groups=3),
    "a row": lambda: nn.Conv2d(4, 6, (1, 5), padding=(0, 2)),
    "one position": lambda: nn.Conv2d(4, 6, (9, 11)),
}


@pytest.mark.parametrize("convolution", list(CONVOLUTIONS))
def test_a_convolution_of_any_window_is_one_step(convolution: str) -> None:
    layer = CONVOLUTIONS[convolution]()
    network = nn.Sequential(nn.Conv2d(3, layer.in_channels, 1), nn.ReLU(), layer, nn.ReLU()).eval()
    student = convert(network, x := torch.randn(2, 3, 9, 11))
    kinds = [type(module) for module in student.operators.values()]
    assert kinds == [Convolution, Activation, Convolution, Activation]
    with torch.no_grad():
        torch.testing.assert_close(student(x), network(x))


class Parted(nn.Module):
    """Three parts of the channels, of which each goes its own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.chunk(3, 1)
        return torch.cat([b.relu(), c, a.relu()], 1)


def test_parts_are_one_split() -> None:
    student = convert(Parted().eval(), x := torch.randn(2, 48, 6, 6))
    (split,) = [piece for piece in pieces(student) if isinstance(piece, Split)]
    assert len(split.names) == 3
    torch.testing.assert_close(student(x), step_by_step(student, x)[student.graph.outputs[0]])


def test_a_copy_runs_its_own_weights() -> None:
    student = convert(nn.Conv2d(3, 5, 5).eval(), x := torch.randn(2, 3, 9, 9))
    before = student(x)
    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(x).any()
    torch.testing.assert_close(student(x), before)


class Attention(nn.Module):
    """Two heads that meet scores of some size."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 6).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(3 * q, 2 * k, v).transpose(1, 2).reshape(b, n, 12)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_hinges_of_pairs_run_as_one_function(bits: int) -> None:
    torch.manual_seed(0)
    network, x = Attention().eval(), torch.randn(64, 7, 6)
    student = convert(network, x[:1], calibration=x, approximation=Approximation("pairs"))
    if bits < 32:
        quantize(student, Recipe(bits, bits), calibration=[x])
    found = [piece for piece in pieces(student) if isinstance(piece, Tabled)]
    # Scores, exponentials, weights and sums; of one number the rest, a logarithm among it.
    assert sorted(len(piece.reads) for piece in found) == [1, 1, 1, 1, 2, 2, 2, 2]
    student.double()
    result, expected = (
        student(x.double()),
        step_by_step(student, x.double())[student.graph.outputs[0]],
    )
    torch.testing.assert_close(result, expected)
    for ours, theirs in zip(gradients(student, result), gradients(student, expected), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.inference_mode():
        torch.testing.assert_close(student(x.double()), expected)


def test_hinges_that_are_asked_for_are_computed() -> None:
    torch.manual_seed(0)
    network, x = Attention().eval(), torch.randn(32, 7, 6)
    student = convert(network, x[:1], calibration=x, approximation=Approximation("pairs")).double()
    x = x.double()
    (bent, *_) = [piece for piece in pieces(student) if isinstance(piece, Tabled)]
    names = [step.name for step in bent.steps[1:]]
    values = student.run({student.graph.inputs[0]: x}, names)
    expected = step_by_step(student, x)
    for name, value in zip(names, values, strict=True):
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("bits", [32, 8])
def test_under_autocast_hinges_are_no_less_precise_than_one_by_one(bits: int) -> None:
    torch.manual_seed(0)
    network, x = Attention().eval(), torch.randn(64, 7, 6)
    student = convert(network, x[:1], calibration=x, approximation=Approximation("pairs"))
    if bits < 32:
        quantize(student, Recipe(bits, bits), calibration=[x])
    with torch.no_grad():
        expected = student(x)
        with torch.autocast("cpu", torch.bfloat16):
            one_by_one = step_by_step(student, x)[student.graph.outputs[0]]
    with torch.autocast("cpu", torch.bfloat16):
        result = student(x)
    result.float().square().mean().backward()
    off, others = ((y.detach().float() - expected).norm() for y in (result, one_by_one))
    assert off < 1.1 * others
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


class Smooth(nn.Module):
    """Hinges by channel: on a map, behind lanes, before an addition, and on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 20, 3, 1, 1, groups=20)
        self.third, self.head = nn.Conv2d(20, 6, 1), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.hardswish(2 * self.first(x))
        x = F.gelu(self.second(x)) + x
        return self.head(F.silu(self.third(x).flatten(2).transpose(1, 2))).mean(1)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_functions_of_single_numbers_are_looked_up(bits: int) -> None:
    torch.manual_seed(0)
    network, x = Smooth().eval(), torch.randn(32, 3, 10, 10)
    approximation = Approximation(hinges=3)
    student = convert(network, x[:1], calibration=x, approximation=approximation)
    if bits < 32:
        equalize(student, Recipe(bits, bits), [x])
        quantize(student, Recipe(bits, bits), calibration=[x])
        found = [piece for piece in pieces(student) if isinstance(piece, Tabled)]
        assert len(found) == 3
    student.double()
    for batch in (x.double(), x[:2].double()):  # of two samples no table is made
        result = student(batch)
        expected = step_by_step(student, batch)[student.graph.outputs[0]]
        torch.testing.assert_close(result, expected)
        ours, theirs = gradients(student, result), gradients(student, expected)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)
    with torch.inference_mode():
        torch.testing.assert_close(student(batch), expected)


def test_a_function_of_several_numbers_is_not_looked_up() -> None:
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AvgPool2d(2)).eval(), torch.randn(16, 3, 8, 8)
    student = quantize(convert(network, x[:1]), Recipe(8, 8), calibration=[x])
    assert not any(isinstance(piece, Tabled) for piece in pieces(student))


def test_a_table_under_autocast() -> None:
    torch.manual_seed(0)
    network, x = Smooth().eval(), torch.randn(32, 3, 10, 10)
    student = quantize(convert(network, x[:1], calibration=x), Recipe(4, 4), calibration=[x])
    with torch.autocast("cpu", torch.bfloat16):
        result = student(x)
    result.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("size", [1, 97, 1200, 2**13])
@pytest.mark.parametrize("count", [5, 511])
def test_what_a_gpu_adds_to_copies_of_the_entries(count: int, size: int) -> None:
    index = torch.randint(count, (size,), dtype=torch.int32)
    values = torch.randn(size, dtype=torch.float64)
    torch.testing.assert_close(
        spread(index, values, count), torch.bincount(index, values, count), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("sign", [0, 1, -1])
def test_hinges_broadcast_and_may_be_flat(sign: int) -> None:
    """Rows of one that meet those of another, one hinge without a slope among them."""
    torch.manual_seed(0)
    lines, act, total = HingeLines(3, sign), Activation(0.0), HingeSum(5, 3)
    with torch.no_grad():
        slopes = torch.tensor([[0.5], [0.0], [-2.0]])
        lines.weight.copy_(torch.cat([slopes, sign * slopes], 1) if sign else slopes)
        lines.bias.copy_(torch.tensor([0.1, 0.0, -0.3]))
        total.weight.copy_(torch.tensor([1.0, 1.0, -1.0]).repeat(5))
    shapes = {"x": (4, 1, 5), "y": (1, 6, 5)} if sign else {"x": (4, 6, 5)}
    steps = [Step("lines", tuple(shapes)), Step("act", ("lines",)), Step("total", ("act",))]
    operators = nn.ModuleDict({"lines": lines, "act": act, "total": total})
    (piece,) = plan(steps, operators, ["total"])
    live = {name: torch.randn(2, *shape) for name, shape in shapes.items()}
    (found,) = piece.work(operators, live)
    torch.testing.assert_close(found, total(act(lines(*live.values()))))
    assert found.shape == (2, 4, 6)
