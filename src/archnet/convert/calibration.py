"""Teacher and student side by side on unlabelled inputs, while the student is being built.

An approximate rule fits what it builds to the teacher's own value at that node. It reads the
*student's* value so far, so that every fit makes up for the error of those before it.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.capture import TeacherGraph, TeacherNode
from archnet.capture.compare import arguments
from archnet.capture.nodes import is_assertion
from archnet.convert.builder import Builder, ConversionError
from archnet.convert.feature import Carry, Feature, Form, Value
from archnet.ops import Permute, Reshape, Slice, Step
from archnet.ops.plan import plan

_AT_ONCE = 2**26  # numbers in the largest value on the way to what is asked for


class Calibration:
    """Values of both networks on the same inputs, computed when a rule asks for them.

    Args:
        graph: the teacher.
        inputs: of the teacher, unlabelled; what is alive at one node of both networks is held in
            memory for all of them.
        builder: of the student.
    """

    def __init__(self, graph: TeacherGraph, inputs: tuple[Tensor, ...], builder: Builder) -> None:
        self._builder = builder
        self.count = len(inputs[0])
        if any(len(x) != self.count for x in inputs):
            raise ConversionError("the inputs of a calibration differ in their number of samples")
        self._student: dict[str, Tensor] = {
            name: x.detach().float().cpu() for name, x in zip(graph.inputs, inputs, strict=True)
        }
        self._has_more = False  # than when values were dropped last
        self._graph, self.inputs = graph, inputs
        self._teacher: torch.fx.Interpreter | None = None

    @property
    def has_run(self) -> bool:
        """Whether the teacher has computed anything yet."""
        return self._teacher is not None

    def target(self, node: TeacherNode) -> Tensor:
        """The teacher's value at a node: (B, *node.shape).

        Nodes are asked for in forward order; each is computed once and dropped after its last
        reader.
        """
        if self._teacher is None:
            self._start()
        assert self._teacher is not None
        environment, by_name = self._teacher.env, self._names
        with torch.no_grad():
            while by_name[node.name] not in environment:
                try:
                    current = next(self._nodes)
                except StopIteration:
                    raise ConversionError(f"{node.name} was asked for too late") from None
                if current.op in ("call_module", "output") or is_assertion(current):
                    continue  # checks of the export; nothing reads them
                # What was peeled hands on what it reads.
                peeled = current.name in self._peeled
                environment[current] = (
                    environment[current.all_input_nodes[0]]
                    if peeled
                    else self._teacher.run_node(current)
                )
                for earlier in self._last.get(current, ()):
                    environment.pop(earlier, None)
        return node.batch.samples(environment[by_name[node.name]], node.shape).float().cpu()

    def _start(self) -> None:
        self._graph.require_free_batch()
        program = self._graph.program
        nodes = program.graph.nodes
        weights = next(iter(program.parameters()), None)
        device = torch.device("cpu") if weights is None else weights.device
        inputs = tuple(x.detach().to(device) for x in self.inputs)
        self._teacher = torch.fx.Interpreter(program.graph_module, garbage_collect_values=False)
        self._teacher.args_iter = iter(arguments(program, inputs))
        self._names = {node.name: node for node in nodes}
        self._peeled = {node.name for node in self._graph.head}
        self._nodes = iter(list(nodes))
        reader: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in nodes:
            reader.update(dict.fromkeys(node.all_input_nodes, node))
        self._last: dict[torch.fx.Node, list[torch.fx.Node]] = {}
        for node, last in reader.items():
            self._last.setdefault(last, []).append(node)

    def value(self, value: Value) -> Tensor:
        """The student's value: (B, *value.shape)."""
        with torch.no_grad():
            return self._form(value) if isinstance(value, Form) else self._feature(value)

    def hold(self, feature: Feature, value: Tensor) -> None:
        """What a feature is (B, *feature.shape), where a fit has computed it: no step has to."""
        self._has_more = True
        if feature.first is not None:
            self._student[feature.first] = value
        elif feature.last is not None:
            self._student[feature.last] = value.movedim(feature.axis, -1)

    def keep(self, values: list[Value]) -> None:
        """Drop everything that these values are not computed from."""
        if not self._has_more:
            return
        wanted, seen = set(self._graph.inputs), set[str]()
        features = [f for v in values for f in _features(v)]
        while features:
            feature = features.pop()
            names = [name for name in (feature.first, feature.last) if name is not None]
            while names:
                name = names.pop()
                if name in self._student:
                    wanted.add(name)
                elif name not in seen:
                    seen.add(name)
                    names += self._builder.step(name).inputs
            features += feature.parts or []
        for name in set(self._student) - wanted:
            del self._student[name]
        self._has_more = False

    def _feature(self, feature: Feature) -> Tensor:
        if feature.first is not None:
            return self._step(feature.first)
        if feature.last is not None:
            return self._step(feature.last).movedim(-1, feature.axis)
        assert feature.parts is not None
        return torch.cat([self._feature(part) for part in feature.parts], feature.axis)

    def _form(self, form: Form) -> Tensor:
        total = _along(form.bias.float().expand(form.channels), form.axis, len(form.shape))
        for term in form.terms:
            x = self._feature(term.feature)
            if isinstance(term, Carry):
                if term.scale is not None:
                    x = x * _along(term.scale.float(), term.feature.axis, x.dim() - 1)
            elif term.is_pointwise:
                matrix = term.weight[:, :, 0, 0].float()
                x = F.linear(x.movedim(term.feature.axis, -1), matrix)
                x = x.movedim(-1, term.feature.axis)
            else:
                x = F.conv2d(
                    x,
                    term.weight.float(),
                    None,
                    term.stride,
                    term.padding,
                    term.dilation,
                    term.groups,
                )
            total = total + x
        return total.expand(self.count, *form.shape)

    def _step(self, name: str) -> Tensor:
        """A named value, computed from those that are there if it is not, some samples at a time.

        Only what is asked for is held: what lies between would be too much for all samples at once.
        A move is a view, mostly, and what it is of may be asked for in other pieces as well.
        """
        if name not in self._student:
            self._has_more = True
            move = self._builder.modules[name]
            if isinstance(move, Permute | Reshape | Slice):
                self._student[name] = move(self._step(self._builder.step(name).inputs[0]))
            else:
                self._student[name] = self._computed(name)
        return self._student[name]

    def _computed(self, name: str) -> Tensor:
        steps, shapes = self._missing(name), self._builder.graph.shapes
        # Only looked up in, as a student's own operators are.
        operators = cast(nn.ModuleDict, self._builder.modules)
        pieces = plan(steps, operators, [name])
        widest = max(math.prod(shapes[n]) for piece in pieces for n in piece.names)
        some = max(1, min(self.count, _AT_ONCE // widest))
        sources = {n for piece in pieces for n in piece.reads if n in self._student}
        parts = []
        for start in range(0, self.count, some):
            live = {n: self._student[n][start : start + some] for n in sources}
            for piece in pieces:
                live.update(zip(piece.names, piece.work(operators, live), strict=True))
                if name in piece.names:
                    parts.append(live[name])
                for dropped in piece.dropped:
                    del live[dropped]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _missing(self, name: str) -> list[Step]:
        """The steps that lead to a value from those that are there, in order."""
        steps: dict[str, Step] = {}
        stack = [name]
        while stack:
            top = stack.pop()
            if top not in self._student and top not in steps:
                steps[top] = self._builder.step(top)
                stack += steps[top].inputs
        return sorted(steps.values(), key=lambda step: self._builder.numbers[step.name])


def _features(value: Value) -> list[Feature]:
    return [value] if isinstance(value, Feature) else [term.feature for term in value.terms]


def _along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """A vector over one axis of (B, *shape), the batch being axis 0."""
    return vector.reshape(1, *[-1 if i == axis else 1 for i in range(1, rank + 1)])
