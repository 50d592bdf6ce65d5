"""Teacher to graph: `torch.export` runs the network once and lists its ATen operators.

The graph knows no class names. Each node keeps the path of the module that ran it, its
arguments by the name that the operator's schema gives them, and the shape of its result. What
depends on no input (a table of positions that is looked up, a mask that is drawn) is computed
here and stands in the arguments as a tensor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection

from archnet.capture.compare import require_same
from archnet.capture.functional import states
from archnet.capture.head import peel
from archnet.capture.nodes import is_assertion, module_path, named_arguments, place, stem
from archnet.capture.simplify import simplify
from archnet.capture.unwrap import (
    InFloat32,
    Inputs,
    call_of,
    from_script,
    outputs_of,
    reason,
    require_finite,
    require_known,
    tidy_script,
    unwrap,
    view,
)
from archnet.errors import CaptureError
from archnet.loaders import Takes


@dataclass(frozen=True)
class Ref:
    """The value of another node (or input) of the graph."""

    name: str


@dataclass(frozen=True)
class Batch:
    """Where the samples of a batch lie in a tensor of the teacher.

    Networks move the batch axis (sequence first) and join it with others (windows of an image as
    samples of their own). A student's values have it in front and alone: sample by sample they
    hold the same numbers in the same order.

    Attributes:
        rank: axes of the teacher's tensor.
        axis: the one with the samples; -1 if no single axis has them.
        folded: how many entries of that axis belong to one sample.
        outer: entries of a sample before the samples, in the order of memory.
    """

    rank: int
    axis: int = 0
    folded: int = 1
    outer: int = 1

    @property
    def plain(self) -> bool:
        """The batch is the first axis and holds nothing else."""
        return self.axis == 0 and self.folded == 1

    def student_axis(self, axis: int) -> int:
        """The student's axis (its batch is 0) of an axis that is not the plain batch."""
        axis %= self.rank
        if axis < self.axis:
            return axis + 1
        return axis + 1 if self.folded > 1 else axis

    def student_order(self, order: Sequence[int]) -> tuple[int, ...]:
        """A permutation of the teacher's axes as one of the student's."""
        moved = (axis % self.rank for axis in order)
        kept = [axis for axis in moved if axis != self.axis or self.folded > 1]
        return (0, *(self.student_axis(axis) for axis in kept))

    def samples(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The teacher's tensor as the student would have it: (B, *shape)."""
        count = value.numel() // math.prod(shape)
        return value.reshape(self.outer, count, -1).movedim(1, 0).reshape(count, *shape)


@dataclass(frozen=True)
class TeacherNode:
    """One ATen operator at work.

    ``operator`` is the overload's name (``aten.conv2d.default``), ``path`` the teacher's module
    that ran it, ``arguments`` maps schema names to plain values, tensors (constants of the
    teacher) or `Ref`, ``shape`` is that of the result for one sample: without the batch axis, or
    where that is joined with another, with the other alone. ``floating``: the result is of
    floating-point numbers.
    """

    name: str
    operator: str
    path: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    batch: Batch
    floating: bool = True

    @property
    def place(self) -> str:
        """Where a message says that the operator is."""
        return place(self.path)

    def refs(self) -> list[str]:
        """Names of the values that this node reads, in order, with repetitions."""
        return _refs(list(self.arguments.values()))


@dataclass
class TeacherGraph:
    """The captured teacher.

    ``program`` is what `torch.export` gave: it runs with any batch size, and from it the values
    at taps are read while distilling. ``outputs`` are the nodes (or inputs) that it returns,
    ``names`` what they are called in its result, and ``classes`` the axis of the classes of each,
    where a softmax or a decision that was peeled tells; else None. ``fixed_batch`` says that the
    teacher's own code has turned the batch size into a number (`len(x)`, `int(x.shape[0])`), so
    that it does not. ``head`` has what follows on the scores in the program and was peeled
    (`head.peel`), in order.
    """

    inputs: dict[str, tuple[int, ...]]
    nodes: list[TeacherNode]
    outputs: list[str]
    program: ExportedProgram
    fixed_batch: bool = False
    head: Sequence[TeacherNode] = ()
    names: Sequence[str] = ("output",)
    classes: Sequence[int | None] = (None,)

    @property
    def takes(self) -> Takes:
        """What the teacher's inputs are."""
        values = {node.name: node.meta.get("val") for node in self.program.graph.nodes}
        given = {name: values[name] for name in self.inputs}
        whole = {name for name, x in given.items() if not x.is_floating_point()}
        return Takes(self.inputs, frozenset(whole))

    def require_free_batch(self) -> None:
        """
        Raises:
            CaptureError: the teacher's code fixes the size of its batches.
        """
        if self.fixed_batch:
            raise CaptureError(
                "the teacher's forward makes the batch size a constant (len(x), int(...) or a "
                "branch on it), so that it cannot run batches of another size: write x.shape[0] "
                "instead"
            )

    def batches(self) -> dict[str, Batch]:
        """Where the samples lie, for every value."""
        found = {name: Batch(len(shape) + 1) for name, shape in self.inputs.items()}
        return found | {node.name: node.batch for node in self.nodes}

    def uses(self) -> dict[str, int]:
        """How many times each value is read (a result of the network counts as a reader)."""
        counts = dict.fromkeys(self.outputs, 1)
        for node in self.nodes:
            for name in node.refs():
                counts[name] = counts.get(name, 0) + 1
        return counts

    def features(self, nodes: Sequence[str]) -> "Features":
        """The teacher as a module that returns the values of ``nodes`` and then its results, as a
        student gives them: scores where its head was peeled.

        The module shares the captured weights; it is in eval mode, as captured.

        Raises:
            CaptureError: there is no such node, or the teacher fixes the size of its batches.
        """
        self.require_free_batch()
        module = self.program.module()
        # Parameters of its own, in the same memory: a module that moves to another device moves
        # those it has, and this graph's stay for what reads them next.
        own: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, parameter in [*part.named_parameters(recurse=False, remove_duplicate=False)]:
                fresh = nn.Parameter(parameter.detach(), parameter.requires_grad)
                part.register_parameter(name, own.setdefault(id(parameter), fresh))
        graph = module.graph
        (result,) = [node for node in graph.nodes if node.op == "output"]
        by_name = {node.name: node for node in graph.nodes}
        missing = [name for name in nodes if name not in by_name]
        if missing:
            raise CaptureError(f"the captured teacher has no node {missing[0]}")
        for head in reversed(self.head):
            for user in list(by_name[head.name].users):
                if is_assertion(user):
                    graph.erase_node(user)  # of the type that is no longer there
            by_name[head.name].replace_all_uses_with(by_name[head.refs()[0]])
            graph.erase_node(by_name[head.name])
        # torch.export returns the results as a tuple inside the output's single argument.
        result.args = (tuple(by_name[name] for name in (*nodes, *self.outputs)),)
        # Without pytree information the tuple is returned as it is.
        graph._codegen = torch.fx.graph.CodeGen()
        # `torch.fx` calls a graph's inputs placeholders.
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        assert len(placeholders) == len(self.inputs)
        for node in graph.nodes:
            if node.target is torch.ops.aten.view.default:
                # A view asks for strides as they were at capture. Another memory format or
                # another device's kernels give others.
                node.target = torch.ops.aten.reshape.default
        module.recompile()
        args, named = self.program.example_inputs
        return Features(module, len(args), list(named))

    def scores(self) -> nn.Module:
        """The teacher as a module that returns its scores: what a student is compared with.

        They are its result, or where its head was peeled, what stood before that; a tuple where
        there are several.

        Raises:
            CaptureError: the teacher fixes the size of its batches.
        """
        return _Scores(self.features([]))


class Features(nn.Module):
    """A captured graph that returns chosen values, and moves to another device as any module does.

    `torch.export` keeps constants as plain attributes, and writes the device of the capture into
    the operators that make tensors.

    Args:
        captured: the graph.
        unnamed: how many inputs it was captured with that have no names.
        names: of the others, which are passed by these.
    """

    def __init__(self, captured: Any, unnamed: int, names: Sequence[str]) -> None:
        super().__init__()
        self.captured, self.unnamed, self.names = captured, unnamed, names
        for name, value in [*vars(captured).items()]:
            if isinstance(value, Tensor):
                delattr(captured, name)
                captured.register_buffer(name, value, persistent=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.names, inputs[self.unnamed :], strict=True))
        return cast(tuple[Tensor, ...], self.captured(*inputs[: self.unnamed], **named))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        device = next((p.device for p in (*self.parameters(), *self.buffers())), None)
        fixed = [node for node in self.captured.graph.nodes if node.kwargs.get("device")]
        if device is not None and any(node.kwargs["device"] != device for node in fixed):
            for node in fixed:
                node.kwargs = {**node.kwargs, "device": device}
            self.captured.recompile()
        return self


class _Scores(nn.Module):
    """The results that `TeacherGraph.features` gives: one tensor, or a tuple of several."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        found = cast(tuple[Tensor, ...], self.features(*inputs))
        return found[0] if len(found) == 1 else found


def capture(teacher: nn.Module, example_inputs: Inputs) -> TeacherGraph:
    """Capture a network in eval mode; it is left untouched.

    The graph shares the memory of the teacher's float32 weights: who trains the teacher further
    captures it again. Weights and inputs in other floating-point types are converted to float32.

    Args:
        teacher: any `nn.Module` that `torch.export` can trace, or one in TorchScript; wrapped in
            `DataParallel` or compiled ones are unwrapped.
        example_inputs: one tensor or array (B, ...), a sequence of them, or a mapping from the
            names of the forward's arguments. The batch size is free afterwards, every other size
            is fixed.

    Raises:
        CaptureError: the network has data-dependent control flow, does not run on such inputs,
            returns no tensor, or holds numbers that are not finite; or what was captured gives
            other results on the examples.
    """
    network = unwrap(teacher)
    frozen = view(network)
    call = call_of(frozen, example_inputs)
    is_script = isinstance(frozen, torch.jit.ScriptModule)
    if isinstance(frozen, torch.jit.ScriptModule):
        frozen = from_script(frozen, call.args)
    names: list[str] = []

    def flat(module: nn.Module, inputs: Any, result: Any) -> tuple[Tensor, ...]:
        found = outputs_of(result)
        names[:] = found
        return tuple(found.values())

    hook = frozen.register_forward_hook(flat)
    shapes = ShapesCollection()
    for x in call.tensors:
        shapes[x] = {0: Dim.AUTO}
    try:
        # Without gradients, so that a part of the teacher under `no_grad` is nothing special.
        # What torch prints of a graph that it cannot make is for those who work on torch.
        with torch.no_grad(), InFloat32(), redirect_stderr(StringIO()):
            program = torch.export.export(
                frozen, call.args, call.kwargs, dynamic_shapes=shapes, strict=False
            )
    except CaptureError:
        raise
    except Exception as error:
        hook.remove()
        raise CaptureError(reason(frozen, call, error)) from error
    if is_script:
        tidy_script(program)
    require_known(program)
    require_finite(program)
    simplify(program)
    graph = _read(program, names)
    require_same(frozen, program, call)
    return peel(graph)


def _read(program: ExportedProgram, names: Sequence[str]) -> TeacherGraph:
    own = states(program)
    inputs: dict[str, tuple[int, ...]] = {}
    batches: dict[str, Batch] = {}
    constants: dict[str, Any] = {}
    nodes: list[TeacherNode] = []
    results: Sequence[Any] = ()
    fixed_batch = False

    def resolve(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            if argument.name in constants:
                return constants[argument.name]
            return Ref(argument.name)
        if isinstance(argument, list | tuple):
            return type(argument)(resolve(item) for item in argument)
        return argument

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if node.name in own:
                constants[node.name] = own[node.name]
            elif not isinstance(value, Tensor):
                raise CaptureError(
                    f"the teacher's forward reads '{node.name}', which is not a tensor (a random "
                    "generator, an object): store its value as a buffer of the module"
                )
            else:
                inputs[node.name] = tuple(map(_of_one, value.shape[1:]))
                batches[node.name] = Batch(value.dim())
                fixed_batch |= not _is_symbolic(value.shape[0])
        elif node.op == "call_function":
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise CaptureError(
                    f"the teacher's forward uses {node.target.name()} (autocast, enable_grad, a "
                    "branch, a loop): leave that out of the forward pass"
                )
            if value is None:
                continue  # an assertion of the export
            if isinstance(value, torch.SymInt | int):
                constants[node.name] = _of_one(value)
                continue
            arguments = {k: resolve(value) for k, value in named_arguments(node).items()}
            shaped = _SHAPED_LIKE.get(str(node.target))
            read = _refs([item for name, item in arguments.items() if name != shaped])
            if read and stem(node.target) in _ARITHMETIC and any(map(_is_count, node.args)):
                raise CaptureError(
                    f"{node.target} {place(module_path(node))} computes with the size of its "
                    "batch, which a student does not know: write a constant for x.shape[0]"
                )
            if not read or _reads_no_values(str(node.target)):
                constants[node.name] = _compute(node, resolve)
                continue
            batch = _batch_of(node, batches[read[0]])
            nodes.append(
                TeacherNode(
                    node.name,
                    str(node.target),
                    module_path(node),
                    arguments,
                    _sample_shape(value, batch),
                    batch,
                    not isinstance(value, Tensor) or value.is_floating_point(),
                )
            )
            batches[node.name] = batch
        elif node.op == "output":
            results = node.args[0]
    # What was converted from TorchScript runs no hook that names them.
    several = [f"output_{index}" for index in range(len(results))]
    names = names or (several if len(results) > 1 else ["output"])
    outputs = []
    for name, result in zip(names, map(resolve, results), strict=True):
        if not isinstance(result, Ref):
            said = "" if len(names) == 1 else f" '{name}'"
            raise CaptureError(f"the teacher's result{said} does not depend on its input")
        outputs.append(result.name)
    none = (None,) * len(outputs)
    return TeacherGraph(inputs, nodes, outputs, program, fixed_batch, (), tuple(names), none)


_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "clamp")


def _is_count(argument: Any) -> bool:
    """Whether an argument is a number that depends on the size of the batch."""
    value = argument.meta.get("val") if isinstance(argument, torch.fx.Node) else None
    return isinstance(value, torch.SymInt | torch.SymFloat) and bool(value.node.expr.free_symbols)


# Operators that keep the order of memory whatever they do to the axes.
_RESHAPES = (
    *("view", "reshape", "view_as", "reshape_as"),
    *("flatten", "unflatten", "_unsafe_view"),
)


def _batch_of(node: torch.fx.Node, before: Batch) -> Batch:
    """Where the samples lie in a result, by its symbolic sizes and what the operator read."""
    sizes = list(_shape(node))  # of several results, which are alike, the first
    symbolic = [axis for axis, size in enumerate(sizes) if _is_symbolic(size)]
    if not symbolic and before.plain and not any(map(_symbolic, map(_shape, node.all_input_nodes))):
        # The teacher fixes the size of its batches; what begins with another size has lost them.
        counts = {_of_one(shape[0]) for shape in map(_shape, node.all_input_nodes) if shape}
        return Batch(len(sizes), 0 if sizes and _of_one(sizes[0]) in counts else -1)
    if len(symbolic) != 1 or before.axis < 0:
        return Batch(len(sizes), axis=-1)
    (axis,) = symbolic
    folded, ahead = _of_one(sizes[axis]), math.prod(map(_of_one, sizes[:axis]))
    if getattr(node.target, "__name__", "").split(".")[0] in _RESHAPES:
        outer = before.outer
    else:
        # Within its axis a batch stays where it is, and the axis may have moved.
        first = next(shape for shape in map(_shape, node.all_input_nodes) if _symbolic(shape))
        outer = ahead * (before.outer // math.prod(map(_of_one, first[: before.axis])))
    if outer % ahead or folded % (outer // ahead):
        return Batch(len(sizes), axis=-1)
    return Batch(len(sizes), axis, folded, outer)


def _shape(node: torch.fx.Node) -> Sequence[Any]:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = value[0]
    return value.shape if isinstance(value, Tensor) else ()


def _symbolic(shape: Sequence[Any]) -> bool:
    return any(map(_is_symbolic, shape))


def _is_symbolic(size: Any) -> bool:
    """Whether a size depends on the batch's; the export may have settled it to a number."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


def _reads_no_values(operator: str) -> bool:
    """Whether an operator reads a tensor for its type and shape alone: ``new_zeros`` and so on."""
    return operator.startswith("aten.new_") or operator in _LIKE


# What is read of an argument of these is its shape and type alone.
_SHAPED_LIKE = {
    "aten.expand_as.default": "other",
    "aten.view_as.default": "other",
    "aten.reshape_as.default": "other",
    "aten.type_as.default": "other",
    "aten.to.other": "other",
}
_LIKE = [f"aten.{value}_like.default" for value in ("zeros", "ones", "full", "empty")]


def _compute(node: torch.fx.Node, resolve: Callable[[Any], Any]) -> Any:
    """A node that depends on no input's values, for a batch of one."""

    def known(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return type(argument)(map(known, argument))
        found = resolve(argument)
        if isinstance(found, Ref):
            value = argument.meta["val"]
            return torch.empty([_of_one(size) for size in value.shape], dtype=value.dtype)
        return found

    assert callable(node.target)
    with torch.no_grad():
        found = node.target(*map(known, node.args), **{k: known(v) for k, v in node.kwargs.items()})
    # What nobody has written yet may be anything; here it is a number.
    return torch.zeros_like(found) if "empty" in str(node.target) else found


def _refs(arguments: Any) -> list[str]:
    if isinstance(arguments, Ref):
        return [arguments.name]
    if isinstance(arguments, list | tuple):
        return [name for item in arguments for name in _refs(item)]
    return []


def _of_one(size: Any) -> int:
    """A size, for a batch of one."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _sample_shape(value: Any, batch: Batch) -> tuple[int, ...]:
    if isinstance(value, list | tuple):
        return ()
    sizes = [_of_one(size) for size in value.shape]
    if batch.axis >= 0 and batch.folded == 1:
        del sizes[batch.axis]
    return tuple(sizes)
