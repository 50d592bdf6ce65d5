"""A Transformer becomes a student that translates.

The walk over a captured graph fixes every size but the batch, and sentences have none; so this
goes through the teacher's layers instead, which are the same for every Transformer of the kind
`archnet.teachers.Transformer` describes. What each part becomes:

- token table and positions: one fully connected layer on two one-hots, exact.
- x + f(x): an addition, exact.
- layer norm: batch norm, whose statistics are fitted (`fit_norms`); in front of layers (pre-norm)
  it folds into them, behind an addition (post-norm) it stays. Approximate.
- attention, where the target has matmul and softmax: kept, 1/sqrt(d) folded, exact.
- attention, where it has not: among the tokens of one sentence a window of neighbours (`Window`,
  causal in the decoder) and two fully connected layers; from target to source a relation,
  FC(relu(FC(concat(g_t, h_s)))) maximised over s, and a fully connected layer. New weights.
- a feed-forward part: its two layers, exact, with a ReLU between; approximate where the teacher
  has another activation.
- dropout: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from archnet.convert.builder import ConversionError
from archnet.hardware import Target
from archnet.ops import (
    Activation,
    Add,
    BatchNorm,
    FullyConnected,
    History,
    MatMul,
    MergeHeads,
    NodeReport,
    Operator,
    PairFullyConnected,
    Permute,
    Softmax,
    SourcePool,
    SplitHeads,
    Step,
    Student,
    StudentGraph,
    Tap,
    TokenEmbedding,
    WeightedOperator,
    Window,
)

NEIGHBOURS = 4  # other positions that a window sees: two on each side, or four before
EXAMPLE = 16  # tokens of the sentence for which shapes and costs are given
STEP = 0.1  # size of a new sub-layer's last weights, beside the usual


class TranslationTarget(Protocol):
    """What is read of the target."""

    name: str
    operators: list[str]
    fc_per_position: bool


@dataclass(frozen=True)
class Norm:
    """A layer norm of the teacher, whose place a batch norm takes.

    Args:
        path: of the norm's module in the teacher.
        value: what it reads, in the student.
        readers: fully connected layers into which it folds, or the batch norm that it is.
    """

    path: str
    value: str
    readers: tuple[str, ...]


@dataclass
class _Builder:
    steps: list[Step] = field(default_factory=list)
    modules: dict[str, Operator] = field(default_factory=dict)
    taps: list[Tap] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list)
    report: list[NodeReport] = field(default_factory=list)

    def add(self, name: str, operator: Operator, *inputs: str, origin: str) -> str:
        self.steps.append(Step(name, inputs, origin))
        self.modules[name] = operator
        return name

    def linear(self, name: str, x: str, layer: Any, origin: str, *, scale: float = 1.0) -> str:
        """A linear layer of the teacher, times a number."""
        module = FullyConnected(layer.in_features, layer.out_features)
        with torch.no_grad():
            module.weight.copy_(layer.weight * scale)
            if layer.bias is not None:
                module.bias.copy_(layer.bias * scale)
        return self.add(name, module, x, origin=origin)

    def new(self, name: str, x: str, inputs: int, outputs: int, origin: str, gain: float) -> str:
        """A fully connected layer with new weights, of the size He et al. (2015) give times a
        gain.
        """
        module = FullyConnected(inputs, outputs)
        nn.init.normal_(module.weight, std=gain * (2 / inputs) ** 0.5)
        return self.add(name, module, x, origin=origin)

    def relu(self, name: str, x: str, origin: str) -> str:
        return self.add(name, Activation(low=0.0), x, origin=origin)

    def norm(self, name: str, x: str, dim: int, path: str, origin: str) -> str:
        """A batch norm of every channel of (B, T, C), still to be fitted."""
        module = BatchNorm(dim)
        with torch.no_grad():
            module.running_var.fill_(1 - module.eps)
        first = self.add(f"{name}_first", Permute((0, 2, 1)), x, origin=origin)
        normed = self.add(name, module, first, origin=origin)
        self.norms.append(Norm(path, x, (name,)))
        return self.add(f"{name}_last", Permute((0, 2, 1)), normed, origin=origin)

    def tap(self, path: str, value: str) -> None:
        self.taps.append(Tap(path, path, value))


def convert_translator(
    teacher: nn.Module, hardware: TranslationTarget, *, seed: int = 0
) -> tuple[Student, list[Norm]]:
    """Convert a Transformer for translation.

    Args:
        teacher: as `archnet.teachers.Transformer` builds it; it is left untouched.
        hardware: attention is kept where its operators include matmul and softmax.
        seed: of new weights.

    Returns:
        The student, float32 on the CPU, and the norms that are still to be fitted. The student
        takes token numbers ``source`` (B, S) and ``target`` (B, T) and the marks ``pad`` (B, S),
        and gives scores (B, T, V).

    Raises:
        ConversionError: another kind of network, or a target without layers at positions.
    """
    if not all(hasattr(teacher, name) for name in ("encoder", "decoder", "projection")):
        raise ConversionError(
            f"a {type(teacher).__name__} does not translate: conversion for translation knows "
            "archnet.teachers.Transformer"
        )
    if not hardware.fc_per_position:
        raise ConversionError(
            f"hardware={hardware.name} has no fully connected layer at positions, of which a "
            "translating student is made: take arch5 or arch5_matmul"
        )
    attends = {"matmul", "softmax"} <= set(hardware.operators)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        builder = _Builder()
        output = _Translator(builder, teacher, attends).build()
    graph = StudentGraph(
        inputs=["source", "target", "pad"],
        outputs=[output],
        steps=builder.steps,
        shapes=dict.fromkeys(("source", "target", "pad"), (EXAMPLE,)),
        taps=builder.taps,
        report=builder.report,
        indices=["source", "target", "pad"],
        classes=[-1],
        target=Target.of(hardware).description(),
    )
    student = Student(graph, builder.modules).eval()
    student.measure()
    return student, builder.norms


class _Translator:
    """Goes through the teacher's layers."""

    def __init__(self, builder: _Builder, teacher: Any, attends: bool) -> None:
        self.builder, self.teacher, self.attends = builder, teacher, attends
        self.dim: int = teacher.tokens.embedding_dim

    def build(self) -> str:
        encoder = self._stack("encoder", "source", None)
        decoded = self._stack("decoder", "target", encoder)
        projection = self.teacher.projection
        output = self.builder.linear("scores", decoded, projection, "projection")
        self._settle(decoded, "scores")
        self._report("projection", "linear", "linear", True)
        return output

    def _stack(self, side: str, tokens: str, memory: str | None) -> str:
        stack, build = getattr(self.teacher, side), self.builder
        embed = stack.embed
        table = embed.tokens.weight * embed.scale
        module = TokenEmbedding(len(table), len(embed.positions), self.dim)
        module.weight.copy_(torch.cat([table, embed.positions]).t())
        x = build.add(f"{side}_embed", module, tokens, origin=f"{side}.embed")
        build.tap(f"{side}.embed", x)
        self._report(f"{side}.embed", "embedding", "one-hot", True)
        for index, layer in enumerate(stack.layers):
            x = self._layer(f"{side}.layers.{index}", layer, x, memory)
        if not isinstance(stack.norm, nn.Identity):
            self._pending(f"{side}.norm", x)
        return x

    def _layer(self, path: str, layer: Any, x: str, memory: str | None) -> str:
        parts: list[tuple[str, Callable[[str, str, str], str]]] = [
            ("attention", lambda name, place, x: self._mix(name, place, layer.attention, x, memory))
        ]
        if memory is not None:
            parts.append(
                ("cross", lambda name, place, x: self._cross(name, place, layer.cross, x, memory))
            )
        parts.append(("feed", lambda name, place, x: self._feed(name, place, layer.feed, x)))
        for part, build in parts:
            place, norm = f"{path}.{part}", f"{path}.{part}_norm"
            name = place.replace(".", "_").replace("_layers", "")
            if layer.pre:
                self._pending(norm, x)
            result = build(name, place, x)
            x = self.builder.add(f"{name}_sum", Add(), x, result, origin=place)
            if not layer.pre:
                x = self.builder.norm(f"{name}_norm", x, self.dim, norm, place)
                self._report(norm, "layer_norm", "batch norm", False)
            self.builder.tap(f"{place}_result", x)
        return x

    # A norm in front of layers folds into all of them, which are known once they are built.

    def _pending(self, path: str, value: str) -> None:
        self._report(path, "layer_norm", "batch norm", False)
        self.builder.norms.append(Norm(path, value, readers=("",)))

    def _settle(self, value: str, *readers: str) -> None:
        """Name layers that read a value, for the norm in front of them if there is one."""
        norms = self.builder.norms
        for place, norm in enumerate(norms):
            if norm.value == value and norm.readers:
                known = () if norm.readers == ("",) else norm.readers
                norms[place] = Norm(norm.path, norm.value, (*known, *readers))

    def _mix(self, name: str, path: str, layer: Any, x: str, memory: str | None) -> str:
        """Among the tokens of one sentence."""
        causal = memory is not None
        if self.attends:
            result = self._attention(name, path, layer, x, x, causal)
            self._settle(x, *(f"{name}_{part}" for part in ("query", "key", "value")))
            return result
        build = self.builder
        before, after = (NEIGHBOURS, 0) if causal else (NEIGHBOURS // 2, NEIGHBOURS // 2)
        inputs = (x,) if causal else (x, "pad")
        seen = build.add(f"{name}_window", Window(before, after), *inputs, origin=path)
        wide = (NEIGHBOURS + 1) * self.dim
        inner = build.new(f"{name}_inner", seen, wide, 2 * self.dim, path, 1.0)
        inner = build.relu(f"{name}_relu", inner, path)
        self._drop_pending()
        self._report(path, "attention", "window", False)
        return build.new(f"{name}_output", inner, 2 * self.dim, self.dim, path, STEP)

    def _cross(self, name: str, path: str, layer: Any, x: str, memory: str) -> str:
        """From a target position to the source."""
        if self.attends:
            result = self._attention(name, path, layer, x, memory, False)
            self._settle(x, f"{name}_query")
            self._settle(memory, f"{name}_key", f"{name}_value")
            return result
        build, width = self.builder, self.dim // 2
        ours = build.new(f"{name}_ours", x, self.dim, width, path, 0.7)
        theirs = build.new(f"{name}_theirs", memory, self.dim, width, path, 0.7)
        pairs = PairFullyConnected(width, width, width)
        nn.init.normal_(pairs.weight, std=width**-0.5)
        related = build.add(f"{name}_pairs", pairs, ours, theirs, origin=path)
        related = build.relu(f"{name}_relu", related, path)
        related = build.new(f"{name}_related", related, width, self.dim, path, 1.0)
        pooled = build.add(f"{name}_pool", SourcePool(), related, "pad", origin=path)
        self._drop_pending()
        self._report(path, "attention", "relation", False)
        return build.new(f"{name}_output", pooled, self.dim, self.dim, path, STEP)

    def _attention(
        self, name: str, path: str, layer: Any, x: str, memory: str, causal: bool
    ) -> str:
        build, heads = self.builder, layer.heads

        def part(kind: str, source: str, scale: float = 1.0) -> str:
            linear = build.linear(
                f"{name}_{kind}", source, getattr(layer, kind), f"{path}.{kind}", scale=scale
            )
            return build.add(f"{name}_{kind}_heads", SplitHeads(heads), linear, origin=path)

        query = part("query", x, (self.dim // heads) ** -0.5)
        keys, values = part("key", memory), part("value", memory)
        if causal:
            keys = build.add(f"{name}_keys", History(), keys, origin=path)
            values = build.add(f"{name}_values", History(), values, origin=path)
        scores = build.add(f"{name}_scores", MatMul(transposed=True), query, keys, origin=path)
        inputs = (scores,) if causal else (scores, "pad")
        weights = build.add(f"{name}_weights", Softmax(causal), *inputs, origin=path)
        build.tap(f"{path}.weights", weights)
        mixed = build.add(f"{name}_mixed", MatMul(), weights, values, origin=path)
        merged = build.add(f"{name}_merged", MergeHeads(), mixed, origin=path)
        self._report(path, "attention", "attention", True)
        return build.linear(f"{name}_output", merged, layer.output, f"{path}.output")

    def _feed(self, name: str, path: str, layer: Any, x: str) -> str:
        build = self.builder
        inner = build.linear(f"{name}_expand", x, layer.expand, f"{path}.expand")
        self._settle(x, f"{name}_expand")
        inner = build.relu(f"{name}_relu", inner, path)
        # Another activation becomes a ReLU, which distillation then makes the best of.
        self._report(path, "feed-forward", "linear", layer.activation == "relu")
        return build.linear(f"{name}_reduce", inner, layer.reduce, f"{path}.reduce")

    def _drop_pending(self) -> None:
        """Layers with new weights learn what the norm before them did."""
        self.builder.norms = [norm for norm in self.builder.norms if norm.readers != ("",)]

    def _report(self, path: str, operator: str, rule: str, exact: bool) -> None:
        self.builder.report.append(NodeReport(path, operator, rule, exact, 0, 0))


def fit_norms(
    student: Student,
    norms: Sequence[Norm],
    teacher: Callable[..., Mapping[str, Tensor]],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
) -> dict[str, float]:
    """Fit the batch norms that stand for layer norms on unlabelled text and fold them, in place.

    One after another, each on what the student computes with those before it: for every channel
    the scale and shift that bring the student's value closest to what the teacher's norm gives
    (least squares over real tokens). That is a batch norm with the statistics of all the text at
    once, whatever the lengths in a batch: padding does not count, and no batch has statistics of
    its own, in training or later.

    Args:
        student, norms: from `convert_translator`.
        teacher: gives, for the inputs of a batch, what each norm's module gives, by path.
        batches: (source, target, pad); padding in the target is zero.

    Returns:
        For every norm the share of the teacher's variance that is left unexplained.
    """
    batches = list(batches)
    with torch.no_grad():
        targets = [teacher(*batch) for batch in batches]
    left: dict[str, float] = {}
    for norm in norms:
        xs, ys = [], []
        with torch.no_grad():
            for (source, target, pad), found in zip(batches, targets, strict=True):
                values = dict(zip(student.graph.inputs, (source, target, pad), strict=True))
                (x,) = student.run(values, [norm.value])
                real = ~pad.bool() if norm.path.startswith("encoder") else target != 0
                xs.append(x[real].double())
                ys.append(found[norm.path][real].double())
            x_ND, y_ND = torch.cat(xs), torch.cat(ys)
            mean_D, goal_D = x_ND.mean(0), y_ND.mean(0)
            spread_D = (x_ND - mean_D).square().mean(0).clamp_min(1e-12)
            scale_D = ((x_ND - mean_D) * (y_ND - goal_D)).mean(0) / spread_D
            shift_D = goal_D - scale_D * mean_D
            _fold(student, norm, scale_D.float(), shift_D.float())
            error = (x_ND * scale_D + shift_D - y_ND).square().mean()
            left[norm.path] = float(error / y_ND.var().clamp_min(1e-12))
    return left


def _fold(student: Student, norm: Norm, scale_D: Tensor, shift_D: Tensor) -> None:
    """W (s x + t) + b = (W s) x + (W t + b) in the layers behind; s and t of a batch norm."""
    for name in norm.readers:
        layer = student.operator(name)
        if isinstance(layer, BatchNorm):
            layer.weight.copy_(scale_D)
            layer.bias.copy_(shift_D)
            continue
        assert isinstance(layer, WeightedOperator)
        layer.bias.add_(layer.weight @ shift_D)
        layer.weight.mul_(scale_D)
