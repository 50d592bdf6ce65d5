"""Whatever a network is made of, conversion ends in its student or in one line that says why not.

Networks are drawn from a grammar of operators. The seeds of more of them are
``ARCHNET_NETWORKS=2000 pytest tests/test_errors_of_rules.py -k drawn``.
"""

import math
import os
import random
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import archnet
from archnet.capture import Batch, Ref, TeacherNode, capture
from archnet.convert import Approximation, ConversionError, convert
from archnet.convert.advice import FAMILIES, family_of, no_rule, relative
from archnet.convert.builder import Builder
from archnet.convert.rules import RULES, Rule
from archnet.convert.rules.base import Site
from archnet.coverage import measure
from archnet.errors import ArchnetError
from archnet.hardware import Target
from archnet.quant import Recipe, quantize

EXACT = 1e-4  # relative error


class Network(nn.Module):
    """A function of its input and of itself, with tables and modules by name."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x):
        return self.function(self, x)


def table(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.rand(shape, generator=generator) + 0.5)


def relative_error(student, network, graph, x):
    # A softmax or a place of the largest at the end is peeled.
    teacher = graph.scores() if graph.head else network
    with torch.no_grad():
        ours, theirs = student(x), teacher(x.clone())
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def the_line(network, x, **options):
    """What conversion says, which is one line."""
    with pytest.raises(ArchnetError) as error:
        convert(network.eval(), x, **options)
    (line,) = str(error.value).splitlines()
    assert "''" not in line
    return line


# A grammar of networks ----------------------------------------------------------------------


class Draw:
    """A network, drawn operator by operator; ``text`` says how it was written."""

    def __init__(self, seed):
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        rank = self.pick.choice([2, 3, 4, 4, 5])
        self.x = self.tensor([3, *(self.size() for _ in range(rank - 1))])
        self.steps, self.text = [], [f"x{list(self.x.shape)}"]
        value = self.x
        for _ in range(self.pick.randint(1, 4)):
            for _ in range(20):
                text, step = self.pick.choice(KINDS)(self, value)
                try:
                    made = step(value, self.x)
                except (RuntimeError, IndexError, ValueError, TypeError):
                    continue
                if isinstance(made, torch.Tensor) and 0 < made.numel() < 3000:
                    value = made
                    self.steps.append(step)
                    self.text.append(text)
                    break

    def network(self):
        def forward(_, x):
            value = x
            for step in self.steps:
                value = step(value, x)
            return value

        return Network(forward).eval()

    def size(self):
        return self.pick.choice([1, 1, 2, 3, 4])

    def tensor(self, shape):
        return torch.rand(shape, generator=self.generator) * 2 - 0.7

    def shape_like(self, shape):
        """A shape that broadcasts with another, in either direction, without its batch."""
        sizes = [n if self.pick.random() < 0.6 else 1 for n in shape] or [1]
        sizes[0] = 1
        sizes = [self.size() if n == 1 and self.pick.random() < 0.4 else n for n in sizes]
        if self.pick.random() < 0.95:
            sizes[0] = 1
        if self.pick.random() < 0.2:
            return [self.size(), *sizes]
        return sizes[self.pick.randint(0, len(sizes)) :]

    def axes(self, value):
        """Some axes, seldom the batch, seldom all."""
        if self.pick.random() < 0.1 or value.dim() < 2:
            return None
        rank = value.dim()
        first = 0 if self.pick.random() < 0.1 else 1
        chosen = self.pick.sample(range(first, rank), self.pick.randint(1, rank - first))
        return [axis - rank if self.pick.random() < 0.5 else axis for axis in chosen]


def binary(draw, value):
    c = draw.tensor(draw.shape_like(value.shape))
    if draw.pick.random() < 0.15:
        c = draw.pick.choice([0.5, -2, torch.tensor(0.3), torch.tensor([2]), 0, 1])
    shape = list(c.shape) if isinstance(c, torch.Tensor) else c
    apart = torch.as_tensor(c).abs() + 0.5
    name, step = draw.pick.choice(
        [
            ("y + c", lambda y, x: y + c),
            ("c + y", lambda y, x: c + y),
            ("y - c", lambda y, x: y - c),
            ("c - y", lambda y, x: c - y),
            ("add alpha", lambda y, x: torch.add(torch.as_tensor(c), y, alpha=-2)),
            ("sub alpha", lambda y, x: torch.sub(y, torch.as_tensor(c), alpha=0.5)),
            ("y * c", lambda y, x: y * c),
            ("c * y", lambda y, x: c * y),
            ("y / c", lambda y, x: y / apart),
            ("maximum", lambda y, x: torch.maximum(y, torch.as_tensor(c).float())),
            ("minimum", lambda y, x: torch.minimum(torch.as_tensor(c).float(), y)),
            ("max other", lambda y, x: torch.max(y, torch.as_tensor(c).float())),
            ("clamp", lambda y, x: y.clamp(torch.as_tensor(c).float())),
            ("lerp", lambda y, x: torch.lerp(y, torch.as_tensor(c).float(), 0.3)),
            ("lerp to", lambda y, x: torch.lerp(torch.as_tensor(c).float(), y, apart.float())),
            ("addcmul", lambda y, x: torch.addcmul(y, y, torch.as_tensor(c), value=0.5)),
            ("addcdiv", lambda y, x: torch.addcdiv(torch.as_tensor(c), y, apart)),
            ("where", lambda y, x: torch.where(torch.as_tensor(c) > 0, y, c)),
            ("where not", lambda y, x: torch.where(torch.as_tensor(c) > 0, 0.5, y)),
            ("masked fill", lambda y, x: y.masked_fill(torch.as_tensor(c) > 0, 2.0)),
        ]
    )
    return f"{name} {shape}", step


def both(draw, value):
    name, step = draw.pick.choice(
        [
            ("y + x", lambda y, x: y + x),
            ("x - y", lambda y, x: x - y),
            ("maximum x", torch.maximum),
            ("stack x", lambda y, x: torch.stack([y, x], -1)),
            ("cat x", lambda y, x: torch.cat([y, x], 1)),
            ("y + y.flip", lambda y, x: y + y.flip(-1)),
            ("y - y.mean", lambda y, x: y - y.mean(-1, keepdim=True)),
            ("y.T @ y", lambda y, x: y.transpose(-1, -2) @ y),
            ("y * x", lambda y, x: y * x),
            ("outer", lambda y, x: y.unsqueeze(1) - y.unsqueeze(0)),
        ]
    )
    return name, step


def reduction(draw, value):
    axes, keep = draw.axes(value), draw.pick.random() < 0.5
    one = axes[0] if axes else None
    name, step = draw.pick.choice(
        [
            ("mean", lambda y, x: y.mean(axes, keepdim=keep) if axes else y.mean()),
            ("sum", lambda y, x: y.sum(axes, keepdim=keep) if axes else y.sum()),
            ("amax", lambda y, x: y.amax(axes or (), keepdim=keep)),
            ("amin", lambda y, x: y.amin(axes or (), keepdim=keep)),
            ("max", lambda y, x: y.max() if one is None else y.max(one, keep).values),
            ("min", lambda y, x: y.min() if one is None else y.min(one, keep)[0]),
            ("var", lambda y, x: y.var(axes, unbiased=False, keepdim=keep)),
            ("std", lambda y, x: y.std(axes, keepdim=keep)),
            ("norm", lambda y, x: y.norm(p=1, dim=axes, keepdim=keep)),
            ("norm 2", lambda y, x: y.norm(dim=axes, keepdim=keep)),
            ("prod", lambda y, x: y.prod() if one is None else y.prod(one)),
            ("y / max", lambda y, x: y / (1 + y.abs().max())),
            ("y - mean", lambda y, x: y - (y.mean(axes, keepdim=True) if axes else y.mean())),
            ("logsumexp", lambda y, x: y.logsumexp(axes or 1, keepdim=keep)),
            ("argmax", lambda y, x: y.argmax(one, keep).float()),
            ("softmax", lambda y, x: y.softmax(-1 if one is None else one)),
            ("cumsum", lambda y, x: y.cumsum(-1)),
            ("places", lambda y, x: y.max(-1).indices.float()),
        ]
    )
    return f"{name} {axes} {'keep' if keep else ''}", step


def layout(draw, value):
    rank = value.dim()
    if not rank:
        return "unsqueeze", lambda y, x: y[None]
    axis, other = draw.pick.randrange(rank), draw.pick.randrange(-rank, rank)
    inner = draw.pick.randrange(1, rank) if rank > 1 else 0
    order = draw.pick.sample(range(rank), rank)
    n = value.shape[inner]
    index = torch.tensor([draw.pick.randrange(-n, n) for _ in range(draw.pick.randint(1, 4))])
    if draw.pick.random() < 0.2:
        index = index[None]
    c = draw.tensor([1, *value.shape[1:]])
    grow = [draw.size() if k == 1 and i else -1 for i, k in enumerate(value.shape)]
    repeats = [1, *(draw.pick.randint(1, 2) for _ in range(rank - 1))]
    name, step = draw.pick.choice(
        [
            ("flatten", lambda y, x: y.flatten(1)),
            ("flatten all", lambda y, x: y.flatten()),
            (f"flatten {axis}", lambda y, x: y.flatten(axis, min(axis + 1, rank - 1))),
            (f"unsqueeze {other}", lambda y, x: y.unsqueeze(other)),
            ("squeeze", lambda y, x: y.squeeze()),
            (f"squeeze {axis}", lambda y, x: y.squeeze(axis)),
            (f"transpose {axis} {other}", lambda y, x: y.transpose(axis, other)),
            (f"permute {order}", lambda y, x: y.permute(order)),
            (f"expand {grow}", lambda y, x: y.expand(grow)),
            ("expand ahead", lambda y, x: y.expand(2, *y.shape)),
            (f"repeat {repeats}", lambda y, x: y.repeat(repeats)),
            (f"flip {axis}", lambda y, x: y.flip(axis)),
            (f"roll {other}", lambda y, x: y.roll(1, other)),
            ("roll", lambda y, x: y.roll(1)),
            (f"select {inner}", lambda y, x: y.select(inner, -1)),
            (f"slice {inner}", lambda y, x: y.narrow(inner, n // 2, n - n // 2)),
            ("slice :", lambda y, x: y[:, :1]),
            ("slice 0", lambda y, x: y[0]),
            (f"index {inner} {index.tolist()}", lambda y, x: y[(slice(None),) * inner + (index,)]),
            (f"unbind {inner}", lambda y, x: y.unbind(inner)[-1]),
            (f"chunk {inner}", lambda y, x: y.chunk(2, inner)[0]),
            ("cat c", lambda y, x: torch.cat([c.expand_as(y), y], -1)),
            ("cat between", lambda y, x: torch.cat([y, c.expand_as(y), y], inner)),
            (f"stack c {inner}", lambda y, x: torch.stack([y, c.expand_as(y)], inner)),
            ("t", lambda y, x: y.t()),
            ("view", lambda y, x: y.reshape(y.shape[0], -1, 2)),
            ("view back", lambda y, x: y.reshape(-1, *x.shape[1:])),
        ]
    )
    return name, step


def layer(draw, value):
    rank, outputs = value.dim(), draw.size()
    last, inner = (value.shape[axis] if rank > 1 else 1 for axis in (-1, 1))
    weight, bias = draw.tensor([outputs, last]), draw.tensor([outputs])
    kernel = draw.pick.choice([1, 2, 3])
    taps = draw.tensor([outputs, inner, kernel, kernel][: max(rank, 3)])
    ahead = draw.shape_like(value.shape)[:-2]
    right, left = (
        draw.tensor([*ahead, last, outputs]),
        draw.tensor([outputs, value.shape[-2]] if rank > 1 else [1]),
    )
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}.get(rank, F.conv2d)
    pool = draw.pick.choice([F.max_pool2d, F.avg_pool2d])
    name, step = draw.pick.choice(
        [
            ("linear", lambda y, x: F.linear(y, weight, bias)),
            ("linear row", lambda y, x: F.linear(y, weight[0])),
            (
                "linear standard",
                lambda y, x: F.linear(y, weight / weight.norm(dim=1, keepdim=True)),
            ),
            ("linear by x", lambda y, x: F.linear(y, weight * y.amax())),
            ("linear bias x", lambda y, x: F.linear(y, weight) + y.mean(-1, keepdim=True)),
            (f"@ {list(right.shape)}", lambda y, x: y @ right),
            ("left @", lambda y, x: left @ y),
            ("@ row", lambda y, x: y @ right.reshape(-1)[:last]),
            ("row @", lambda y, x: left[0] @ y),
            ("baddbmm", lambda y, x: torch.baddbmm(right[:1, :1], y, right.expand(3, -1, -1))),
            (f"conv {kernel}", lambda y, x: convolve(y, taps, padding=kernel // 2)),
            ("conv standard", lambda y, x: convolve(y, (taps - taps.mean()) / taps.std())),
            ("conv by x", lambda y, x: convolve(y, taps * y.flatten(1).mean())),
            ("conv bias x", lambda y, x: convolve(y, taps, y.flatten(1)[0, : len(taps)])),
            ("relu", lambda y, x: y.relu()),
            ("abs", lambda y, x: y.abs()),
            ("leaky", lambda y, x: F.leaky_relu(y, 0.1)),
            ("sigmoid", lambda y, x: y.sigmoid()),
            ("square", lambda y, x: y.square()),
            ("1 / y", lambda y, x: 1 / (1 + y.abs())),
            ("prelu", lambda y, x: F.prelu(y, bias[:1])),
            ("prelu by x", lambda y, x: F.prelu(y, y.mean().reshape(1))),
            ("batch norm", lambda y, x: F.batch_norm(y, c1(y), c1(y) + 1, c1(y), c1(y))),
            ("batch norm x", lambda y, x: F.batch_norm(y, y.flatten(2).mean((0, 2)), c1(y) + 1)),
            ("layer norm", lambda y, x: F.layer_norm(y, y.shape[-1:], weight[0], weight[0])),
            ("layer norm 2", lambda y, x: F.layer_norm(y, y.shape[-2:])),
            ("group norm", lambda y, x: F.group_norm(y, 1)),
            ("pool", lambda y, x: pool(y, 2, 1)),
            ("pool 1d", lambda y, x: F.max_pool1d(y, 2, 1)),
            ("adaptive", lambda y, x: F.adaptive_avg_pool2d(y, 1)),
            ("resize", lambda y, x: F.interpolate(y, scale_factor=2)),
            ("pad", lambda y, x: F.pad(y, (1, 0), value=0.5)),
            ("dropout", lambda y, x: F.dropout(y, 0.5, training=False)),
            ("dropout on", lambda y, x: F.dropout(y, 0.5, training=True)),
            ("batch size", lambda y, x: y * y.shape[0]),
        ]
    )
    return name, step


def c1(y):
    return torch.linspace(-1, 1, y.shape[1]).square()


def attention(draw, value):
    channels, tokens = value.shape[-1] if value.dim() else 1, draw.size()
    c = draw.tensor([1, *value.shape[1:-2], tokens, channels])

    def whole(y):
        return c.expand(y.shape[0], *c.shape[1:])

    name, step = draw.pick.choice(
        [
            ("queries", lambda y, x: F.scaled_dot_product_attention(whole(y), y, y)),
            ("keys", lambda y, x: F.scaled_dot_product_attention(y, whole(y), whole(y))),
            ("key", lambda y, x: F.scaled_dot_product_attention(y, whole(y), y[..., :tokens, :])),
            ("value", lambda y, x: F.scaled_dot_product_attention(y, y[..., :tokens, :], whole(y))),
            ("q @ k", lambda y, x: (c @ y.transpose(-1, -2)).softmax(-1) @ y),
            ("@ v", lambda y, x: (y @ y.transpose(-1, -2)).softmax(-1) @ y),
            ("const v", lambda y, x: (y @ c.transpose(-1, -2)).softmax(-1) @ c),
            ("turned", lambda y, x: F.scaled_dot_product_attention(*[y.transpose(0, -2)] * 3)),
            ("drops", lambda y, x: F.scaled_dot_product_attention(y, y, y, dropout_p=0.1)),
        ]
    )
    return f"attention {name} {tokens}", step


def jump(draw, value):
    c = draw.tensor([1, *value.shape[1:]])
    return draw.pick.choice(
        [
            ("y > 0", lambda y, x: (y > 0).float()),
            ("where y", lambda y, x: torch.where(y > 0, y, 0.1 * y)),
            ("masked y", lambda y, x: y.masked_fill(y < c, 0.0)),
            ("gather", lambda y, x: y.gather(-1, y.argmax(-1, keepdim=True))),
            ("take", lambda y, x: c[0][..., y.argmax(-1)]),
            ("sort", lambda y, x: y.sort(-1)[0]),
            ("topk", lambda y, x: y.topk(1)[0]),
            ("round", lambda y, x: y.round()),
            ("y // 1", lambda y, x: y // 1),
            ("sign", lambda y, x: y.sign() * y),
            ("long", lambda y, x: y.long().float()),
            ("arange", lambda y, x: y[torch.arange(y.shape[0]), 0]),
            ("pow", lambda y, x: y.abs() ** c),
            ("2 ** y", lambda y, x: 2**y),
            ("triu", lambda y, x: y.triu()),
        ]
    )


KINDS = [binary, binary, binary, both, reduction, reduction, layout, layout, layout]
KINDS += [layer, layer, layer, attention, jump]


def outcome(seed):
    """What becomes of a network that was drawn: its student's error, or a line."""
    drawn = Draw(seed)
    network = drawn.network()
    try:
        graph = capture(network, drawn.x)
        student = convert(graph, drawn.x)
    except ArchnetError as error:
        line = str(error)
        assert "\n" not in line, drawn.text
        assert "a fault" not in line, (drawn.text, line)
        return drawn, line
    error = relative_error(student, network, graph, drawn.x)
    if all(row.exact for row in student.report):
        assert error <= EXACT, (drawn.text, error)
    assert not math.isnan(error), drawn.text
    return drawn, error


@pytest.mark.parametrize("seed", range(int(os.environ.get("ARCHNET_NETWORKS", "40"))))
def test_a_drawn_network_converts_or_ends_in_a_line(seed):
    outcome(seed)


# Constants that broadcast, and constants as values --------------------------------------------

WINDOWS = torch.tensor([[0, 2], [3, 1]])
BROADCAST = {
    "a mean and a table": lambda m, x: x.mean((2, 3), keepdim=True) + m.square,
    "a row and tables": lambda m, x: x[:, :, :1] * m.maps,
    "an axis in front": lambda m, x: x.flatten(2).unsqueeze(1) - torch.ones(3, 1, 25),
    "further axes": lambda m, x: (m.rows - x.mean((2, 3))[:, None]).flatten(1),
    "a number a sample": lambda m, x: 0.3 - x.mean((1, 2, 3)).relu() / 3,
    "a number a sample to many": lambda m, x: x.mean((1, 2, 3), keepdim=True) + m.maps,
    "the larger": lambda m, x: torch.maximum(m.square, x.mean((2, 3), keepdim=True)),
    "the smaller": lambda m, x: torch.min(x[:, :1], m.maps),
    "bounds": lambda m, x: x.clamp(m.square - 1, m.maps + 0.1),
    "a quotient": lambda m, x: x.mean(1, keepdim=True) / m.maps,
    "between": lambda m, x: torch.lerp(x[:, :, :1], m.square, 0.3),
    "between by a table": lambda m, x: torch.lerp(m.maps, x, m.square),
    "a quotient added": lambda m, x: torch.addcdiv(m.maps, x[:, :1], m.square, value=0.5),
    "a mask": lambda m, x: x.masked_fill(m.square > 1, 2.0) + torch.where(m.square > 1, x, m.maps),
    "a constant between": lambda m, x: torch.cat([x, m.one.expand(len_of(x), -1, -1, -1), x], 1),
    "a constant beside": lambda m, x: torch.stack([m.one.expand(len_of(x), -1, -1, -1), x], 2),
    "a matrix a channel": lambda m, x: x @ m.maps[:, :, :3],
    "matrices on the left": lambda m, x: m.maps[:4, None, :2] @ x.unflatten(1, (4, 2)),
    "a row by": lambda m, x: m.square[0] @ x,
    "an index of two axes": lambda m, x: x[:, WINDOWS],
    "a map without channels": lambda m, x: F.max_pool2d(x.mean(1), 2, 1),
    "frames": lambda m, x: F.pixel_shuffle(x.unflatten(1, (2, 4)), 2),
    "standardised": lambda m, x: F.conv2d(x, (m.taps - m.taps.mean()) / m.taps.std()),
    "a row of weights": lambda m, x: F.linear(x, m.square[0]),
}  # fmt: skip
TABLES = {
    "square": table(5, 5), "maps": table(8, 5, 5), "one": table(1, 8, 5, 5),
    "rows": table(1, 3, 8), "taps": table(4, 8, 3, 3),
}  # fmt: skip


def len_of(x):
    return x.shape[0]


@pytest.mark.parametrize("name", BROADCAST)
def test_constants_broadcast_and_are_values(name):
    network, x = Network(BROADCAST[name], **TABLES).eval(), torch.randn(4, 8, 5, 5)
    graph = capture(network, x)
    student = convert(graph, x)
    assert all(row.exact for row in student.report)
    assert relative_error(student, network, graph, x) <= 1e-5
    assert archnet.audit(student, "arch5").pure


class Pooled(nn.Module):
    """Pooling by attention: learned queries."""

    def __init__(self, **options):
        super().__init__()
        self.queries = table(1, 2, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.attention(queries, x, x, need_weights=False)[0]


ATTENTION = {
    "queries": Pooled(),
    "queries over few": Network(lambda m, x: (m.c @ x.mT).softmax(-1) @ x, c=table(1, 2, 8)),
    "keys": Network(lambda m, x: attend(x, m.c.expand(x.shape[0], -1, -1), x), c=table(1, 5, 8)),
    "values": Network(lambda m, x: attend(x, x, m.c.expand(x.shape[0], -1, -1)), c=table(1, 5, 8)),
    "keys and values": Network(lambda m, x: attend(x, *[m.c.expand(x.shape[0], -1, -1)] * 2),
                               c=table(1, 3, 8)),
}  # fmt: skip


def attend(*features):
    return F.scaled_dot_product_attention(*features)


@pytest.mark.parametrize("form", ["mixing", "context", "pairs"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_takes_constants(name, form):
    """What is left of the error is the approximation's: fixed weights alone are far off."""
    torch.manual_seed(0)
    network, x = ATTENTION[name].eval(), torch.randn(12, 5, 8)
    form = Approximation(form, attention_hinges=4, min_gain=0)
    graph = capture(network, x)
    student = convert(graph, x, approximation=form)
    assert relative_error(student, network, graph, x) < (0.9 if form.attention == "mixing" else 0.5)
    assert archnet.audit(student, "arch5").pure


def test_constants_as_values_are_quantized():
    network, x = Network(BROADCAST["a constant between"], **TABLES).eval(), torch.randn(8, 8, 5, 5)
    graph = capture(network, x)
    student = convert(graph, x)
    quantize(student, Recipe(8, 8), calibration=[x])
    assert relative_error(student, network, graph, x) < 0.05


# Lines --------------------------------------------------------------------------------------

KERNEL = table(4, 4, 3, 3)
LINES = {
    "max": (lambda x: x / x.max(), r"aten\.max\.default in the network itself: .*x\.amax"),
    "mean": (lambda x: x - x.mean(), r"aten\.mean\.default .*the batch.*x\.amax"),
    "sum": (lambda x: x / x.sum(), r"aten\.sum\.default .*the batch"),
    "norm": (lambda x: x / x.norm(), r"linalg_vector_norm.*the batch"),
    "std": (lambda x: x / x.std(), r"aten\.std.*the batch"),
    "mean of samples": (lambda x: x - x.mean(0), r"aten\.mean\.dim .*the batch"),
    "batch statistics": (lambda x: x / x.std((0, 2, 3), keepdim=True), r"aten\.std.*the batch"),
    "one variance": (lambda x: x[:, :1].var(1), r"aten\.var.*at least two entries"),
    "between samples": (lambda x: x.flatten(1) @ x.flatten(1).T, r"put the batch first"),
    "a pair of samples": (lambda x: x[:, None] - x[None], r"keep the batch an axis"),
    "empty": (lambda x: x[:, 2:2].sum(1), r"aten\.slice\.Tensor .*gives no value"),
    "weights of x": (lambda x: F.conv2d(x, KERNEL * x.mean((1, 2, 3))[0]),
                     r"aten\.select\.int .*the batch"),
    "roll": (lambda x: x.roll(1), r"aten\.roll\.default .*give dims"),
    "places": (lambda x: x.max(1).indices.float(), r"getitem.*the indices of maxima"),
    "dropout": (lambda x: F.dropout(x, 0.5, True), r"aten\.dropout.*training=self\.training"),
    "weights dropped": (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
                        r"dropout_p=0\.0"),
    "infinite": (lambda x: (x + torch.full((4, 4), -math.inf)).relu(), r"not finite.*-1e4"),
    "batch size": (lambda x: x * x.shape[0], r"the size of its batch"),
    "compare": (lambda x: torch.where(x > 0, x, 2 * x), r"aten\.gt\.Scalar .*relu, clamp"),
    "topk": (lambda x: x.topk(2)[0], r"aten\.topk.*end the network before it"),
    "sort": (lambda x: x.sort(1)[0], r"aten\.sort.*end the network before it"),
    "floor": (lambda x: x.floor(), r"aten\.floor.*rounding is not"),
    "cumsum": (lambda x: x.cumsum(-1), r"x @ torch\.ones\(n, n\)\.triu\(\)"),
    "fft": (lambda x: torch.fft.fft2(x).abs(), r"fft_fft2.*x @ cosines"),
    "gather": (lambda x: x.gather(1, x.argmax(1, keepdim=True)),
               r"also without a rule: aten\.gather"),
    "grid": (lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1)),
             r"grid_sampler.*\(ethos_u85, imx500, rk3588 run gather, but a student cannot"),
    "3-D": (lambda x: F.conv3d(x[:, None], KERNEL[:1, :1, None]), r"conv3d.*\(1, k, k\)"),
    "embedding": (lambda x: F.embedding(x.long(), KERNEL[0, 0]), r"embedding.*one_hot @ weight"),
    "unknown": (lambda x: x.renorm(2, 1, 1.0), r"archnet\.convert\.rules\.RULES"),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_what_cannot_be_is_one_line_that_says_what_to_do(name):
    function, message = LINES[name]
    line = the_line(Network(lambda m, x: function(x)), torch.rand(3, 4, 4, 4))
    assert re.search(message, line), line


MODULES = {
    "lstm": (
        nn.LSTM(8, 4, batch_first=True),
        r"aten\.lstm\.input at 'inner': a student has no recurrent layers",
    ),
    "gru": (
        nn.GRU(8, 4, batch_first=True),
        r"aten\.gru\.input at 'inner': .*run the recurrence outside",
    ),
    "batch second": (nn.MultiheadAttention(8, 2), r"at 'inner': .*batch_first=True"),
}


@pytest.mark.parametrize("name", MODULES)
def test_lines_name_the_module(name):
    module, message = MODULES[name]
    several = isinstance(module, nn.MultiheadAttention)
    network = Network(lambda m, x: m.inner(*[x] * (3 if several else 1))[0], inner=module)
    line = the_line(network, torch.rand(3, 5, 8))
    assert re.search(message, line), line


def node_reading(operator, **arguments):
    return TeacherNode("node", operator, "block.1", arguments, (4, 4, 4), Batch(4))


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("aten.conv2d.default", "weight"),
        ("aten.conv_transpose2d.input", "weight"),
        ("aten.linear.default", "bias"),
        ("aten.batch_norm.default", "running_mean"),
        ("aten.prelu.default", "weight"),
    ],
)
def test_a_weight_that_depends_on_the_input_is_named(operator, name):
    builder = Builder(Target.named("arch5"))
    feature = builder.input("x", (4, 4, 4))
    weight = torch.ones(4, 4, 1, 1) if "conv" in operator else torch.ones(4, 4)
    first = "self" if "prelu" in operator else "input"
    arguments = {first: Ref("x"), "weight": weight, "running_var": None, name: Ref("x")}
    node = node_reading(operator, **arguments)
    site = Site(node, {"x": feature}, builder, {"x": Batch(4)})
    with pytest.raises(ConversionError, match=rf"at 'block\.1': its {name} depends on the input"):
        RULES[operator].applied(site)


def test_a_fault_of_a_rule_is_said_and_keeps_its_cause():
    def fails(_):
        raise KeyError("lanes")

    builder = Builder(Target.named("arch5"))
    node = node_reading("aten.some.default", input=Ref("x"))
    site = Site(node, {"x": builder.input("x", (4,))}, builder, {"x": Batch(2)})
    with pytest.raises(
        ConversionError, match=r"aten\.some\.default at 'block\.1'.*report"
    ) as error:
        Rule("fails", (), fails).applied(site)
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, KeyError)


# Advice by family ---------------------------------------------------------------------------


def test_families_know_relatives_that_have_rules():
    names = [name for family in FAMILIES for name in family.operators]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert not family.relative or family.relative in RULES, family.relative
        assert "\n" not in family.advice
    assert relative("aten.topk.default") == "aten.amax.default"
    assert relative("aten.pow.Tensor_Tensor") == "aten.pow.Tensor_Scalar"
    assert relative("aten.conv3d.default") == "aten.conv2d.default"
    assert relative("torchvision.nms.default") == "aten.amax.default"
    assert relative("aten.lstm.input") == ""


def test_targets_are_named_that_run_an_operator_and_no_others():
    operators = {target: Target.named(target).operators for target in Target.names()}
    for name in ("topk.default", "gather.default", "eq.Scalar", "pow.Tensor_Tensor"):
        kind, node = family_of(f"aten.{name}").kind, node_reading(f"aten.{name}")
        line = no_rule({node.operator: [node]})
        for target, runs in operators.items():
            assert (re.search(rf"\b{target}\b", line) is not None) == (kind in runs), line


@pytest.mark.parametrize("name", ["max", "topk", "places"])
def test_coverage_says_the_same(name):
    network = Network(lambda m, x: LINES[name][0](x)).eval()
    assert measure(network, [(4, 4, 4)], "arch5").stopped == the_line(
        network, torch.rand(2, 4, 4, 4)
    )
