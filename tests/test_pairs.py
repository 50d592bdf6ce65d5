"""Attention for every pair of tokens, and gates, by hinges of sums: near, and in integers."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from archnet.capture import capture
from archnet.convert import Approximation, ConversionError, convert
from archnet.convert.fit import balanced, curve, product
from archnet.deploy import audit, verify
from archnet.deploy.integer import to_integers
from archnet.hardware import teacher_cost
from archnet.ops import Student, WeightedOperator
from archnet.quant import Recipe, quantize, settle
from test_c_header import assert_same, needs_gcc

PAIRS = Approximation("pairs")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Asking(nn.Module):
    """Two heads of attention over 12 tokens of 6 channels."""

    def __init__(self, key_heads: int = 2, asking: int = 12, windows: int = 1, **given) -> None:
        super().__init__()
        self.key_heads, self.asking, self.windows, self.given = key_heads, asking, windows, given
        self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 4 * key_heads)
        self.v = nn.Linear(6, 5 * key_heads)
        self.out = nn.Linear(10, 5)
        for layer in (self.q, self.k):
            nn.init.normal_(layer.weight, 0, 0.6)
        with torch.no_grad():
            # As in networks that were trained, a few axes of the values have nearly all energy.
            self.v.weight.mul_(torch.tensor([1, 1, 0.1, 0.1, 0.05]).repeat(key_heads)[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, shared = x.shape[0], 12 // self.windows, self.key_heads
        q, k, v = (
            layer(x).reshape(b, self.windows, n, heads, -1).transpose(2, 3)
            for layer, heads in ((self.q, 2), (self.k, shared), (self.v, shared))
        )
        if self.windows == 1:
            q, k, v = q[:, 0], k[:, 0], v[:, 0]
        q = q[..., : self.asking, :]
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=shared == 1, **self.given)
        return self.out(y.transpose(-2, -3).reshape(b, -1, 10))


class Gated(nn.Module):
    """Squeeze-and-excitation, and a gate for every value."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.gate, self.own = nn.Conv2d(8, 8, 1), own
        nn.init.normal_(self.gate.weight, 0, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        s = x.relu() if self.own else x.relu().mean((2, 3), keepdim=True)
        return self.out(x * F.hardsigmoid(self.gate(s)))


def errors(network: nn.Module, x: torch.Tensor, **forms: Approximation) -> dict[str, float]:
    network, half = network.eval(), len(x) // 2
    with torch.no_grad():
        wanted = network(x[half:])
    graph, found = capture(network, x[:1]), {}
    for name, form in forms.items():
        student = convert(graph, x[:1], calibration=x[:half], approximation=form)
        assert not audit(student, "arch5").violations
        with torch.no_grad():
            found[name] = float((student(x[half:]) - wanted).norm() / wanted.norm())
    return found


CASES = {
    "plain": {},
    "class attention": {"asking": 1},
    "windows": {"windows": 2, "asking": 6},
    "scale": {"scale": 0.8},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.rand(12, 12) < 0.6},
    "bias": {"attn_mask": torch.randn(2, 12, 12)},
}


@pytest.mark.parametrize("case", CASES)
def test_attention_by_pairs_is_nearly_exact(case: str) -> None:
    given = dict(CASES[case])
    if case == "mask":
        given["attn_mask"] = given["attn_mask"] | torch.eye(12, dtype=torch.bool)
    network = Asking(**given)
    found = errors(network, torch.randn(256, 12, 6), context=Approximation("context"), pairs=PAIRS)
    assert found["pairs"] < 0.1
    assert found["pairs"] < 0.4 * found["context"]


class Written(Asking):
    """The same with two products and a softmax, as many networks have it."""

    def __init__(self, how: str) -> None:
        super().__init__(windows=2)
        self.how, self.table = how, nn.Parameter(torch.randn(2, 6, 6))
        self.register_buffer("mask", torch.rand(2, 1, 6, 6) < 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = x.shape[0]
        x = x.reshape(-1, 6, 6) if self.how == "folded" else x.reshape(b, 2, 6, 6)
        q, k, v = (
            layer(x).unflatten(-1, (2, -1)).transpose(-2, -3) for layer in (self.q, self.k, self.v)
        )
        if self.how == "einsum":
            scores = torch.einsum("b w h i d, b w h j d -> b w h i j", q, 0.6 * k) + self.table
            scores = scores.masked_fill(self.mask, -100)
            y = torch.einsum("bwhij,bwhjd->bwhid", scores.softmax(-1), v)
        elif self.how == "folded":
            scores = (0.6 * q) @ k.transpose(-2, -1) + self.table[None]
            scores = scores.view(-1, 2, 2, 6, 6) + torch.where(self.mask, -100.0, 0.0)
            y = scores.view(-1, 2, 6, 6).softmax(-1) @ v
        elif self.how == "scaled":
            scores = (q @ k.mT + self.table) * torch.tensor([0.4, 0.8])[:, None, None]
            y = scores.softmax(-1) @ v
        elif self.how == "channels first":
            q, k, v = (y.transpose(-1, -2).contiguous() for y in (q, k, v))
            y = (v @ (0.4 * (q.mT @ k)).softmax(-1).permute(0, 1, 2, 4, 3)).mT
        else:
            order = (0, 1, 2, 4, 3)
            y = F.softmax(q @ k.permute(order) / 2 + 3.0, dim=4).matmul(v)
        return self.out(y.transpose(-2, -3).reshape(b, 12, 10))


@pytest.mark.parametrize("how", ["matmul", "einsum", "folded", "scaled", "channels first"])
def test_attention_written_as_products_is_attention(how: str) -> None:
    network, x = Written(how), torch.randn(256, 12, 6)
    found = errors(network, x, context=Approximation("context"), pairs=PAIRS)
    assert found["pairs"] < 0.1
    assert found["pairs"] < 0.4 * found["context"]
    form = Approximation("mixing")
    student = convert(network, x[:1], calibration=x, approximation=form)
    # Queries and keys are not computed, and the report says so.
    assert {row.rule for row in student.report if row.operator == "aten.softmax.int"} == {
        "left out"
    }
    teacher = teacher_cost(network, x[:1]).macs
    assert sum(row.macs_before for row in student.report) == teacher


TABLE = torch.linspace(0, 1, 64).view(8, 8)


@pytest.mark.parametrize(
    "scores",
    [
        lambda q, k: (q @ k.mT).tanh(),
        lambda q, k: q[..., :1] * k.mT[..., :1, :],
        lambda q, k: (q @ k.mT) * torch.arange(8),
        lambda q, k: (q.unflatten(0, (-1, 1)) @ k.mT.unflatten(0, (-1, 1)) * TABLE)[:, 0],
    ],
    ids=["bent", "no product", "scaled by key", "scaled by pair"],
)
def test_what_is_not_quite_attention_keeps_its_fixed_weights(scores) -> None:
    class Other(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scores(x, x).softmax(-1) @ x

    x = torch.randn(64, 8, 4)
    student = convert(Other().eval(), x[:1], calibration=x, approximation=PAIRS)
    assert [row.rule for row in student.report if row.error is not None] == ["product"]


class Turned(nn.Module):
    """Attention of a token to itself and others, by a function of queries."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.function(x)
        return (q @ q.transpose(-1, -2)).softmax(-1) @ x


def test_attention_whose_queries_no_rule_converts_keeps_its_fixed_weights() -> None:
    x = torch.randn(64, 8, 4)
    student = convert(Turned(F.hardshrink).eval(), x[:1], calibration=x, approximation=PAIRS)
    assert [row.rule for row in student.report if row.error is not None] == ["product"]


def test_cosine_attention_comes_nearer_by_pairs() -> None:
    network, x = Turned(lambda x: F.normalize(x, dim=-1)), torch.randn(512, 8, 8)
    found = errors(network, x, pairs=PAIRS, mixing=Approximation("mixing"))
    assert found["pairs"] < 0.75 * found["mixing"]


def test_keys_for_several_heads() -> None:
    found = errors(Asking(key_heads=1), torch.randn(256, 12, 6), pairs=PAIRS)
    assert found["pairs"] < 0.1


def test_more_hinges_come_nearer() -> None:
    forms = {str(n): Approximation("pairs", attention_hinges=n) for n in (2, 4, 8)}
    found = errors(Asking(), torch.randn(256, 12, 6), **forms)
    assert found["8"] < 0.8 * found["4"] < 0.8 * 0.8 * found["2"]


def test_a_mask_that_depends_on_the_input_is_an_error() -> None:
    class Masked(Asking):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.given = {"attn_mask": x[:, None, :1, :1].expand(-1, 2, 12, 12)}
            return super().forward(x)

    with pytest.raises(ConversionError, match=r"mask that depends on the input.*attention=context"):
        errors(Masked(), torch.randn(16, 12, 6), pairs=PAIRS)


def test_without_layers_at_positions_attention_has_its_context() -> None:
    x = torch.randn(32, 12, 6)
    student = convert(Asking().eval(), x[:1], "arch5_conv", calibration=x, approximation=PAIRS)
    assert not audit(student, "arch5_conv").violations


@pytest.mark.parametrize("own", [False, True], ids=["for a channel", "for a value"])
def test_a_gate_by_hinges_is_nearer_than_a_sum(own: bool) -> None:
    x = torch.randn(128, 3, 8, 8) * (0.3 + torch.rand(128, 3, 1, 1))
    forms = {str(n): Approximation(gate_hinges=n) for n in (0, 4, 8)}
    found = errors(Gated(own), x, **forms)
    assert found["4"] < 0.5 * found["0"]
    assert found["8"] < found["4"]


def test_axes_of_two_features_hold_their_products() -> None:
    x, y = torch.randn(4, 200).double(), torch.randn(4, 200).double()
    x[3] = x[2]  # not of full rank
    a, b, sizes = balanced(x, y)
    torch.testing.assert_close((a @ x).T @ (b @ y), x.T @ y)
    assert bool((sizes[:-1] >= sizes[1:]).all())
    assert float(sizes[3]) < 1e-3
    for matrix, value in ((a, x), (b, y)):
        covariance = matrix @ value @ value.T @ matrix.T / 200
        torch.testing.assert_close(covariance, torch.diag(sizes), atol=1e-3, rtol=1e-4)


def test_products_and_curves_have_weights_of_one_sign() -> None:
    """What cancels would be lost to rounding."""
    f = product(torch.randn(4000, 3), torch.randn(4000, 3), 8)
    assert bool((f.weights > 0).all())
    x = -torch.rand(5000) * 6
    assert bool((curve(x, x.exp(), 5).weights > 0).all())
    z = 0.02 + torch.rand(5000)
    logarithm = curve(z, z.log(), 4, side=-1, offset=True)
    assert bool((logarithm.weights < 0).all())
    assert float((logarithm(z) - z.log()).square().mean().sqrt()) < 0.08


def quantized(network: nn.Module, x: torch.Tensor, *bits: int) -> Student:
    student = convert(network.eval(), x[:1], calibration=x, approximation=PAIRS)
    quantize(student, Recipe(*bits), calibration=[x])
    settle(student)
    return student


def test_few_bits_hold_the_layers_for_pairs() -> None:
    x = torch.randn(64, 12, 6)
    student = convert(Asking().eval(), x[:1], calibration=x, approximation=PAIRS)
    before = {name: op.weight.clone() for name, op in student.operators.items() if is_fixed(op)}
    quantize(student, Recipe(2, 4), calibration=[x])
    narrow = 0
    for name, weight in before.items():
        layer = student.operator(name)
        assert isinstance(layer, WeightedOperator)
        grid = layer.parameters_on_grid()[0]
        narrow += layer.weight_quantizer.bits == 2
        limit = 1e-5 if layer.weight_quantizer.bits == 2 else 0.01
        torch.testing.assert_close(grid, weight, rtol=limit, atol=limit * float(weight.abs().max()))
    # All but those that turn axes and mix tokens.
    assert narrow > 15


def is_fixed(operator: nn.Module) -> bool:
    return isinstance(operator, WeightedOperator) and not operator.trainable


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 4)])
@pytest.mark.parametrize("network", [Asking(), Gated()], ids=["attention", "gate"])
def test_runtimes_agree_with_the_golden_model(network: nn.Module, bits: tuple[int, int]) -> None:
    x = torch.randn(64, 12, 6) if isinstance(network, Asking) else torch.randn(64, 3, 8, 8)
    student = quantized(network, x, *bits)
    forms = ["qdq", "subbyte"]
    forms += [form for form in ("qonnx", "openvino") if importlib.util.find_spec(form)]
    for check in verify(student, 2 * x, forms):
        assert (check.changed, check.max_steps) == (0, 0), check


@needs_gcc
@pytest.mark.parametrize("network", [Asking(), Gated()], ids=["attention", "gate"])
def test_c_gives_the_integers_of_the_golden_model(network: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(32, 12, 6) if isinstance(network, Asking) else torch.randn(32, 3, 8, 8)
    assert_same(to_integers(quantized(network, x, 8, 8)), 2 * x.numpy(), tmp_path)


def test_math_is_finite_where_attention_looks_at_one_token() -> None:
    """Scores far apart: a softmax that is one-hot."""
    network = Asking()
    with torch.no_grad():
        network.q.weight.mul_(6)
    found = errors(network, torch.randn(256, 12, 6), pairs=PAIRS)
    assert math.isfinite(found["pairs"])
    assert found["pairs"] < 0.5
