"""The student: a list of steps, each one operator applied to named values."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from archnet.errors import ArchnetError
from archnet.ops import hinges, layout, native, operators, sequence
from archnet.ops.graph import NodeReport, Refinement, Step, StudentGraph, Tap
from archnet.ops.operators import Operator
from archnet.ops.plan import Piece, plan
from archnet.ops.scores import Axis, axis_of
from archnet.ops.shapes import result_shape

OPERATORS: dict[str, type[Operator]] = {
    cls.__name__: cls
    for cls in (
        operators.Convolution,
        operators.FullyConnected,
        operators.AddConstant,
        operators.BatchNorm,
        operators.Segments,
        hinges.HingeLines,
        hinges.HingeSum,
        operators.MaxPool,
        operators.Add,
        operators.AveragePool,
        operators.Mean,
        operators.Concat,
        operators.Activation,
        layout.Permute,
        layout.Reshape,
        layout.Slice,
        layout.Pad,
        native.Function,
        native.LayerNorm,
        native.Multiply,
        sequence.TokenEmbedding,
        sequence.Window,
        sequence.SplitHeads,
        sequence.MergeHeads,
        sequence.History,
        sequence.MatMul,
        sequence.Softmax,
        sequence.PairFullyConnected,
        sequence.SourcePool,
    )
}


class Student(nn.Module):
    """A network of whole operators, run step by step.

    ``graph.shapes`` holds the shape of every value for one sample (no batch axis). The forward
    pass takes (B, C, H, W) and returns what the teacher returns, for class scores (B, K): one
    tensor, or where the teacher has several results a tuple of them, in the order of
    ``graph.outputs``.
    """

    def __init__(self, graph: StudentGraph, modules: Mapping[str, Operator]) -> None:
        super().__init__()
        self.graph = graph
        self.operators = nn.ModuleDict(dict(modules))
        self._plans: dict[tuple[tuple[str, ...], tuple[str, ...]], list[Piece]] = {}

    @property
    def report(self) -> list[NodeReport]:
        """Per teacher node: path, operator, rule, exact, MACs before and after."""
        return self.graph.report

    @property
    def taps(self) -> list[Tap]:
        return self.graph.taps

    def operator(self, name: str) -> Operator:
        module = self.operators[name]
        assert isinstance(module, Operator)
        return module

    def consumers(self) -> dict[str, list[Step]]:
        """For every value the steps that read it, in order."""
        readers: dict[str, list[Step]] = {}
        for step in self.graph.steps:
            for name in step.inputs:
                readers.setdefault(name, []).append(step)
        return readers

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = dict(zip(self.graph.inputs, inputs, strict=True))
        results = self.run(values, self.graph.outputs)
        return results[0] if len(results) == 1 else tuple(results)

    def steps_between(self, sources: Sequence[str], targets: Sequence[str]) -> list[Step]:
        """The steps that compute ``targets`` from ``sources``, in order.

        Raises:
            ArchnetError: a target needs a value that does not follow from the sources.
        """
        needed, chosen = set(targets) - set(sources), []
        for step in reversed(self.graph.steps):
            if step.name in needed:
                needed.discard(step.name)
                chosen.append(step)
                needed.update(name for name in step.inputs if name not in sources)
        if needed:
            raise ArchnetError(f"{', '.join(sorted(needed))} does not follow from {list(sources)}")
        return chosen[::-1]

    def run(self, values: Mapping[str, Tensor], targets: Sequence[str]) -> list[Tensor]:
        """Compute ``targets`` from the given ``values``; a part of the student is run alone so.

        Values are dropped after their last reader, so that memory holds what is alive.
        """
        found = dict(self.visit(values, targets))
        return [values[name] if name in values else found[name] for name in targets]

    def visit(
        self, values: Mapping[str, Tensor], targets: Sequence[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """The same, one target after another as they are computed, by name.

        Those that nobody keeps are dropped as all others are: of a student whose values would not
        fit into memory together, all can be looked at.
        """
        live, wanted = dict(values), set(targets)
        for piece in self._pieces(tuple(values), tuple(targets)):
            results = piece.work(self.operators, live)
            live.update(zip(piece.names, results, strict=True))
            yield from ((name, live[name]) for name in piece.names if name in wanted)
            for name in piece.dropped:
                del live[name]

    def _pieces(self, sources: tuple[str, ...], targets: tuple[str, ...]) -> list[Piece]:
        """How ``targets`` are computed from ``sources``, planned once."""
        if (sources, targets) not in self._plans:
            steps = self.steps_between(sources, targets)
            pieces = plan(steps, self.operators, targets)
            self._plans[sources, targets] = pieces
        return self._plans[sources, targets]

    def rewire(
        self,
        steps: Sequence[Step],
        *,
        added: Mapping[str, Operator] | None = None,
        renamed: Mapping[str, str] | None = None,
    ) -> None:
        """Replace the list of steps (in place), add operators, and measure the new values.

        ``renamed`` says which value stands for another one now, at taps and as a result.
        """
        now = renamed or {}
        self._plans = {}
        self.graph.steps = list(steps)
        self.graph.outputs = [now.get(name, name) for name in self.graph.outputs]
        self.graph.taps = [replace(tap, value=now.get(tap.value, tap.value)) for tap in self.taps]
        for name, module in (added or {}).items():
            self.operators[name] = module
        for name in set(self.operators) - {step.name for step in steps}:
            del self.operators[name]
        self.measure()

    def drop_unread(self) -> None:
        """Take out steps that neither a result nor a tap depends on."""
        inputs = self.graph.inputs
        ends = (*self.graph.outputs, *(tap.value for tap in self.graph.taps))
        steps = self.steps_between(inputs, [name for name in ends if name not in inputs])
        if len(steps) < len(self.graph.steps):
            self.rewire(steps)

    def measure(self) -> None:
        """Fill ``graph.shapes`` from the shapes of the inputs; nothing is computed."""
        graph = self.graph
        ghosts = {n: torch.empty(1, *graph.shapes[n], device="meta") for n in graph.inputs}
        shapes = {name: tuple(ghost.shape[1:]) for name, ghost in ghosts.items()}
        for step in graph.steps:
            read = [shapes[name] for name in step.inputs]
            shapes[step.name] = result_shape(self.operator(step.name), read)
        graph.shapes = shapes

    def spec(self) -> dict[str, Any]:
        """The architecture as plain data; with ``state_dict()`` it is the whole student."""
        graph = asdict(self.graph)
        for step in graph["steps"]:
            module = self.operator(step["name"])
            step["operator"] = type(module).__name__
            step["arguments"] = module.spec()
        return graph

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> "Student":
        """Rebuild the architecture that ``spec()`` described (weights are not in it)."""
        unknown = {step["operator"] for step in spec["steps"]} - set(OPERATORS)
        if unknown:
            raise ArchnetError(
                f"it has {', '.join(sorted(unknown))}, which is no operator of this version: a "
                "student of another version of archnet, such as 0.1, has to be made again"
            )
        modules = {
            step["name"]: OPERATORS[step["operator"]](**step["arguments"]) for step in spec["steps"]
        }
        steps = [Step(s["name"], tuple(s["inputs"]), s["origin"]) for s in spec["steps"]]
        # Students of before they had several results say less of their one.
        outputs = list(spec["outputs"] if "outputs" in spec else [spec["output"]])
        ranges = spec.get("output_ranges", [spec.get("output_range")])
        graph = StudentGraph(
            inputs=list(spec["inputs"]),
            outputs=outputs,
            steps=steps,
            shapes={name: tuple(shape) for name, shape in spec["shapes"].items()},
            taps=[Tap(**tap) for tap in spec["taps"]],
            report=[NodeReport(**row) for row in spec["report"]],
            indices=list(spec.get("indices", [])),
            refinements=[Refinement(**row) for row in spec.get("refinements", [])],
            error=spec.get("error"),
            target=dict(spec.get("target", {})),
            output_ranges=[(seen[0], seen[1]) for seen in ranges if seen],
            classes=_classes(spec, outputs),
            output_names=list(spec.get("output_names", [])),
            preprocessing=dict(spec.get("preprocessing", {})),
        )
        return cls(graph, modules)


def _classes(spec: Mapping[str, Any], outputs: Sequence[str]) -> list[Axis]:
    """Where the classes of each result lie; where nothing is said, by the rule of their shape."""
    if lost := [name for name in outputs if name not in spec["shapes"]]:
        raise ArchnetError(f"its result {lost[0]} is no value of it")
    names = spec.get("output_names", outputs)
    if not outputs or sorted({str(name) for name in names}) != sorted(names):
        raise ArchnetError(f"its results are called {names}: each needs a name of its own")
    shapes = [tuple(spec["shapes"][name]) for name in outputs]
    found: list[Axis] = list(spec.get("classes") or map(axis_of, shapes))
    for name, axis, shape in zip(outputs, found, shapes, strict=True):
        if axis is not None and not (
            isinstance(axis, int) and axis and -len(shape) <= axis <= len(shape)
        ):
            raise ArchnetError(f"{name} has its classes along axis {axis}, of {len(shape)} axes")
    return found
