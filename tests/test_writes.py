"""Networks that write to tensors: views x writes x places convert as what they compute."""

import logging
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.capture import CaptureError, capture, place
from archnet.convert import ConversionError, convert
from archnet.convert.rules import RULES, Rule
from archnet.convert.rules.base import as_form
from archnet.coverage import measure
from archnet.errors import ArchnetError
from archnet.ops import Student

SHAPE = (4, 5, 6)  # of the map that is written to


class Writer(nn.Module):
    """A map, a write to it, and what reads it afterwards."""

    def __init__(self, write, ahead: bool = True, behind: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.ahead = nn.Conv2d(4, 4, 3, padding=1) if ahead else nn.Identity()
        self.behind = nn.Conv2d(4, 3, 3, padding=1) if behind else nn.Identity()
        self.part = nn.Conv2d(2, 2, 3, padding=1)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        before = self.ahead(x)
        y = before * 1.5
        written = self.write(self, y)
        # Of a map that was filled, nothing else would tell of the input.
        return torch.cat([self.behind(y if written is None else written), before], 1)


def check(network: nn.Module, shape: tuple[int, ...] = SHAPE) -> Student:
    """The student of a network gives what the network gives, and is called exact."""
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    student = convert(network.eval(), torch.zeros(1, *shape))
    with torch.no_grad():
        ours, theirs = student(x.clone()), network(x.clone())
    assert all(row.exact for row in student.report)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert student.graph.error is not None
    assert student.graph.error <= 1e-4
    return student


VIEWS = {
    "whole": lambda y: y,
    "channels": lambda y: y[:, 1:3],
    "from the end": lambda y: y[:, -2:],
    "every other": lambda y: y[:, ::2],
    "columns": lambda y: y[..., 1:4],
    "pixels": lambda y: y[:, :, 1::2, ::2],
    "entry": lambda y: y[:, 2],
    "last row": lambda y: y[:, :, -1],
    "nested": lambda y: y[:, 1:][:, :2, 2:],
    "flat": lambda y: y.view(y.shape[0], -1)[:, 7:40],
    "tokens": lambda y: y.flatten(2)[:, :, 3:9],
    "transposed": lambda y: y.transpose(1, 2)[:, 1:4],
    "channels last": lambda y: y.permute(0, 2, 3, 1)[..., :3],
    "moved": lambda y: y.movedim(1, -1)[:, 2:],
    "narrowed": lambda y: y.narrow(2, 1, 3),
    "chunk": lambda y: y.chunk(2, 1)[1],
    "split": lambda y: y.split([1, 2, 1], 1)[1],
    "unbound": lambda y: y.unbind(1)[3],
    "groups": lambda y: y.unflatten(1, (2, 2))[:, 1],
    "unsqueezed": lambda y: y.unsqueeze(1)[:, :, :3],
    "detached": lambda y: y.detach()[:, :3],
}


def _table(view: Tensor) -> Tensor:
    return torch.arange(view[0].numel()).view(view.shape[1:]) / 8


WRITES = {
    "zero": lambda view: view.zero_(),
    "fill": lambda view: view.fill_(0.5),
    "scale": lambda view: view.mul_(2),
    "shift": lambda view: view.add_(_table(view)),
    "rectify": lambda view: view.relu_(),
    "clip": lambda view: view.clamp_(-0.5, 0.5),
    "negate": lambda view: view.neg_(),
    "constant": lambda view: view.copy_(_table(view)),
    "feature": lambda view: view.copy_(F.relu(view * 2 + 0.25)),
    "mask": lambda view: view.masked_fill_(_table(view) > 1, 1.5),
    "places": lambda view: view.index_fill_(-1, torch.tensor([0, 2]), 0.75),
}


def writes(view: str, write: str):
    def work(_: nn.Module, y: Tensor) -> None:
        WRITES[write](VIEWS[view](y))

    return work


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(st.sampled_from([*VIEWS]), st.sampled_from([*WRITES]), st.booleans(), st.booleans())
def test_a_write_through_a_view_is_seen_by_who_reads_the_tensor(view, write, ahead, behind):
    check(Writer(writes(view, write), ahead, behind))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from([*VIEWS]), st.sampled_from([*WRITES])), max_size=4))
def test_writes_one_after_another(pairs):
    def work(network: nn.Module, y: Tensor) -> Tensor:
        before = y[:, 1:]
        for view, write in pairs:
            writes(view, write)(network, y)
        # A view from before the writes reads what they wrote.
        return torch.cat([before, y[:, :1]], 1)

    check(Writer(work))


def partial_convolution(network, y):
    y[:, :2] = network.part(y[:, :2])


def halves(network, y):
    a, _ = y.chunk(2, 1)
    a.relu_()


def shifted(network, y):
    o = torch.zeros_like(y)
    o[:, 1:] = y[:, :-1]
    return o


def padded(network, y):
    o = y.new_zeros(y.shape[0], 4, 7, 9)
    o[:, :, 1:-1, 2:-1] = y
    return o[:, :, :5, :6]


def swapped(network, y):
    o = torch.empty_like(y)
    o[:, :2], o[:, 2:] = y[:, 2:], y[:, :2]
    return o


def spaced(network, y):
    o = torch.ones(y.shape[0], 4, 5, 12)
    o[..., ::2] = y
    return o[..., 3:9]


def decoded(network, y):
    y[..., 0:2] = (y[..., 0:2] * 2 - 0.5 + torch.arange(5.0)[:, None]) * 8
    y[..., 2:4] = (y[..., 2:4] * 2) * 3


def own_neighbours(network, y):
    y[:, 1:] += y[:, :-1].clone()


def list_of_channels(network, y):
    y[:, [0, 3]] = y[:, [2, 1]]


def constants_at_pairs(network, y):
    y[:, [0, 1, 3], [2, 0, 4]] = 0.5


def masked(network, y):
    y[:, :, torch.arange(30).view(5, 6) % 3 == 0] = 1.0


def broadcast(network, y):
    y[:, :2] = y[:, 3:]


def into_given_memory(network, y):
    torch.mul(y[:, :3], 2, out=y[:, :3])


def new_shape(network, y):
    z = y.flatten(2)
    z.unsqueeze_(1)
    z[:, :, 1] = 0
    return y


def sometimes_a_view(network, y):
    y.transpose(1, 2).reshape(y.shape[0], -1).zero_()  # a copy: nothing is written
    y.reshape(y.shape[0], -1)[:, :20].zero_()


def painted(network, y):
    mask = torch.zeros(4, 5, 6)
    mask[1:3, 1:] = 1
    mask[0] = 2
    return y * mask


def chosen(network, y):
    return torch.where(torch.arange(6) > 2, y, y * 2)


KINDS = [
    *(partial_convolution, halves, shifted, padded, swapped, spaced, decoded, own_neighbours),
    *(list_of_channels, constants_at_pairs, masked, broadcast, into_given_memory, new_shape),
    *(sometimes_a_view, painted, chosen),
]


@pytest.mark.parametrize("write", KINDS, ids=lambda write: write.__name__)
def test_writes_as_people_write_them(write) -> None:
    check(Writer(write))


class Inside(nn.Module):
    """A submodule that writes to what it is given; its caller reads that later."""

    def forward(self, y: Tensor) -> Tensor:
        half = y[:, :2]
        half *= 3
        return half.relu()


def test_a_submodule_writes_to_what_its_caller_reads_later() -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.inside = nn.Conv2d(4, 4, 3), Inside()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.inside(y)
            return torch.cat([y, z], 1)

    student = check(Caller())
    assert "inside" in {row.path for row in student.report}


class WritesToInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 1
        x[:, 1:].sub_(0.5).div_(2)
        return self.conv(x) + x.mean((2, 3), keepdim=True)


def test_an_input_that_is_written_to_stays_as_it_was_given() -> None:
    network, x = WritesToInput().eval(), torch.randn(2, *SHAPE)
    student = check(network)
    kept = x.clone()
    with torch.no_grad():
        features = capture(network, x).features([])
        (result,) = features(x)
        student(x)
    assert torch.equal(x, kept)
    assert torch.allclose(result, network(kept.clone()))


def counter(network, y):
    network.count += 1


def statistics(network, y):
    network.mean.mul_(0.9).add_(0.1 * y.mean((0, 2, 3)))


def repaired(network, y):
    network.mean[:2] = 2
    return y - network.mean[:, None, None]


@pytest.mark.parametrize("write", [counter, statistics, repaired], ids=lambda f: f.__name__)
def test_buffers_are_written_by_the_network_alone(write) -> None:
    network = Writer(write).eval()
    convert(network, torch.randn(2, *SHAPE))
    assert float(network.count) == 0
    assert not network.mean.any()
    check(network)


def counted(network, y):
    network.count += 1
    return y * network.count


def running(network, y):
    network.mean.mul_(0.9).add_(0.1 * y.mean((0, 2, 3)))
    return y - network.mean[:, None, None]


def diagonal(network, y):
    y[..., :5].diagonal(dim1=2, dim2=3).zero_()


def one_sample(network, y):
    y[0] = 0


def next_sample(network, y):
    y[1:] = y[:-1].clone()


def overlapping(network, y):
    y[:, 1:] += y[:, :-1]


def whole_by_part(network, y):
    y *= y[:, :1]


def infinite(network, y):
    y[:, 1] = -math.inf


def by_feature(network, y):
    y[:, 1].masked_fill_(y[:, 0] > 0, 0.0)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (counted, r"aten\.add_\.Tensor in the network itself changes the network's 'count'"),
        (running, r"aten\.mul_\.Tensor in the network itself changes the network's 'mean'"),
        (diagonal, r"aten\.zero_\.default in the network itself writes through aten\.diagonal"),
        (one_sample, r"aten\.fill_\.Tensor in the network itself writes to some samples"),
        (next_sample, r"aten\.copy_\.default in the network itself writes to some samples"),
        (
            overlapping,
            r"aten\.add_\.Tensor in the network itself reads and writes overlapping memory",
        ),
        (
            whole_by_part,
            r"aten\.mul_\.Tensor in the network itself reads and writes overlapping memory",
        ),
        (infinite, r"in the network itself: writes numbers that are not finite"),
        (by_feature, r"no rule for aten\.gt\.Scalar in the network itself"),
    ],
    ids=lambda item: getattr(item, "__name__", None),
)
def test_what_cannot_be_names_the_write(write, message: str) -> None:
    with pytest.raises(ArchnetError, match=message) as error:
        convert(Writer(write).eval(), torch.randn(2, *SHAPE))
    assert "\n" not in str(error.value)


# Conversion compares itself -----------------------------------------------------------------


class Blocks(nn.Module):
    def __init__(self, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), activation(), nn.Conv2d(4, 4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)).mean((2, 3)))


def replace_rule(monkeypatch: pytest.MonkeyPatch, name: str, change) -> None:
    old = RULES[name]

    def apply(site):
        return change(old.apply(site), site)

    monkeypatch.setitem(RULES, name, Rule(old.name, old.operators, apply, old.reads))


def one_percent(value, site):
    return site.builder.build(as_form(value).affine(torch.tensor([1.01]), torch.zeros(1)))


@pytest.mark.parametrize(
    "example", [torch.zeros, torch.ones, torch.randn], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    ("operator", "activation", "path"),
    [
        ("aten.hardtanh.default", nn.ReLU6, "second.1"),
        ("aten.mean.dim", nn.ReLU6, ""),
        ("aten.mean.dim", nn.Hardtanh, ""),
    ],
)
def test_an_exact_rule_that_is_off_by_a_hundredth_is_named(
    monkeypatch, operator, activation, path, example
) -> None:
    replace_rule(monkeypatch, operator, one_percent)
    with pytest.raises(ConversionError, match=f"from {operator} {place(path)} on: .* is exact"):
        convert(Blocks(activation), example(1, 3, 12, 12))


def test_what_stands_before_an_approximation_is_compared_too(monkeypatch) -> None:
    replace_rule(monkeypatch, "aten.relu.default", one_percent)
    with pytest.raises(ConversionError, match=r"from aten\.relu\.default at 'first\.1' on"):
        convert(Blocks(nn.GELU), torch.randn(4, 3, 12, 12))


def test_the_error_of_a_student_with_approximations_is_kept(caplog) -> None:
    student = convert(Blocks(nn.GELU), torch.randn(16, 3, 12, 12))
    assert 1e-4 < student.graph.error < 1
    assert Student.from_spec(student.spec()).graph.error == student.graph.error
    assert not caplog.records or all(r.levelno < logging.WARNING for r in caplog.records)


def test_a_student_that_explodes_is_a_warning_with_the_worst_node(monkeypatch, caplog) -> None:
    def exploded(value, site):
        return as_form(value).affine(torch.tensor([1e6]), torch.zeros(1))

    replace_rule(monkeypatch, "aten.gelu.default", exploded)
    student = convert(Blocks(nn.GELU), torch.randn(4, 3, 12, 12))
    assert student.graph.error > 1
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "aten.gelu.default at 'second.1'" in warning


def test_new_weights_are_not_compared() -> None:
    assert convert(Blocks(), torch.randn(1, 3, 12, 12), start="random").graph.error is None


@pytest.mark.parametrize("example", [torch.zeros, torch.ones], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 0,
        lambda x: (x - x.mean((1, 2, 3), keepdim=True)).mean((2, 3)).sum(1, keepdim=True),
        lambda x: F.relu(x * 1e-20) * 1e-10,
        lambda x: (x + 1e4) - 1e4,
        lambda x: F.relu(-x.abs()),
        lambda x: x * 1e15,
    ],
)
def test_rounding_is_no_difference(function, example) -> None:
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    student = convert(Function(), example(1, 3, 6, 6))
    assert all(row.exact for row in student.report)


def test_a_forward_pass_that_draws_numbers_is_an_error() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn(3, 1, 1)

    with pytest.raises(CaptureError, match="draws random numbers in eval mode"):
        convert(Noisy(), torch.zeros(1, 3, 6, 6))


def test_coverage_has_the_error_of_approximate_networks_as_well() -> None:
    row = measure(Blocks(nn.GELU).eval(), [(3, 12, 12)], "arch5")
    assert row.converts == "approximately"
    assert 1e-4 < row.relative_error < 1
