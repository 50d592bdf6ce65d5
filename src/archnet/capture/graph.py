"""Teacher to graph: `torch.export` runs the network once and lists its ATen operators.

The graph knows no class names. Each node keeps the path of the module that ran it, its
arguments by the name that the operator's schema gives them, and the shape of its result.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from archnet.errors import ArchnetError


class CaptureError(ArchnetError):
    """The teacher cannot be captured as one graph."""


@dataclass(frozen=True)
class Ref:
    """The value of another node (or input) of the graph."""

    name: str


@dataclass(frozen=True)
class TeacherNode:
    """One ATen operator at work.

    ``operator`` is the overload's name (``aten.conv2d.default``), ``path`` the teacher's module
    that ran it, ``arguments`` maps schema names to plain values, tensors (weights) or `Ref`,
    ``shape`` is the result's without the batch axis.
    """

    name: str
    operator: str
    path: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]

    def refs(self) -> list[str]:
        """Names of the values that this node reads, in order, with repetitions."""
        return _refs(list(self.arguments.values()))


@dataclass
class TeacherGraph:
    """The captured teacher.

    ``program`` is what `torch.export` gave: it runs with any batch size, and from it the values
    at taps are read while distilling.
    """

    inputs: dict[str, tuple[int, ...]]
    nodes: list[TeacherNode]
    output: str
    program: ExportedProgram

    def uses(self) -> dict[str, int]:
        """How many times each value is read (the result of the network counts as a reader)."""
        counts = {self.output: 1}
        for node in self.nodes:
            for name in node.refs():
                counts[name] = counts.get(name, 0) + 1
        return counts

    def features(self, nodes: Sequence[str]) -> nn.Module:
        """The teacher as a module that returns the values of ``nodes`` and then its own result.

        The module shares the captured weights; it is in eval mode, as captured.
        """
        module = self.program.module()
        graph = module.graph
        (result,) = [node for node in graph.nodes if node.op == "output"]
        by_name = {node.name: node for node in graph.nodes}
        missing = [name for name in nodes if name not in by_name]
        if missing:
            raise CaptureError(f"the captured teacher has no node {missing[0]}")
        # torch.export returns the results as a tuple inside the output's single argument.
        (final,) = result.args[0]
        result.args = ((*[by_name[name] for name in nodes], final),)
        # Without pytree information the tuple is returned as it is.
        graph._codegen = torch.fx.graph.CodeGen()
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        assert len(placeholders) == len(self.inputs)
        module.recompile()
        return module


def capture(teacher: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> TeacherGraph:
    """Capture a network in eval mode; it is left untouched.

    The graph shares the memory of the teacher's weights: who trains the teacher further captures
    it again.

    Args:
        teacher: any `nn.Module` that `torch.export` can trace.
        example_inputs: one tensor (B, ...) or a tuple of them. The batch size is free
            afterwards, every other size is fixed.

    Raises:
        CaptureError: the network has data-dependent control flow, or several results.
    """
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    device = next((p.device for p in teacher.parameters()), torch.device("cpu"))
    # A batch of one would be taken for a constant, so the batch is always two.
    examples = tuple(x[:1].to(device).expand(2, *x.shape[1:]).contiguous() for x in examples)
    frozen = _view(teacher).eval()
    try:
        program = torch.export.export(
            frozen, examples, dynamic_shapes=tuple({0: Dim.AUTO} for _ in examples), strict=False
        )
    except Exception as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CaptureError(
            f"torch.export cannot capture {type(teacher).__name__}: {first_line} "
            "(branches on tensor values have to leave the forward pass)"
        ) from error
    return _read(program)


def _view(teacher: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose weights lie in the teacher's memory."""
    memo: dict[int, Any] = {}
    for tensor in (*teacher.parameters(), *teacher.buffers()):
        shared = tensor.detach()
        memo[id(tensor)] = (
            nn.Parameter(shared, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else shared
        )
    return copy.deepcopy(teacher, memo)


def _read(program: ExportedProgram) -> TeacherGraph:
    signature = program.graph_signature
    parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    inputs: dict[str, tuple[int, ...]] = {}
    constants: dict[str, Tensor] = {}
    nodes: list[TeacherNode] = []
    # In-place operators rebind: whoever reads x after x.relu_() reads the rectified value.
    alias: dict[str, str] = {}
    results: Sequence[Any] = ()

    def resolve(argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            if argument.name in constants:
                return constants[argument.name]
            return Ref(alias.get(argument.name, argument.name))
        if isinstance(argument, list | tuple):
            return type(argument)(resolve(item) for item in argument)
        return argument

    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in parameters:
                name = parameters[node.name]
                state = program.state_dict.get(name, program.constants.get(name))
                constants[node.name] = _detached(state)
            elif node.name in lifted:
                constants[node.name] = _detached(program.constants[lifted[node.name]])
            else:
                inputs[node.name] = _sample_shape(node)
        elif node.op == "call_function":
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt | int):
                continue  # A batch size read back from a tensor; shapes come from the results.
            nodes.append(
                TeacherNode(
                    node.name,
                    str(node.target),
                    _module_path(node),
                    _named_arguments(node, resolve),
                    _sample_shape(node),
                )
            )
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.name.endswith("_") and node.args:
                for old, new in list(alias.items()):
                    if new == node.args[0].name:
                        alias[old] = node.name
                alias[node.args[0].name] = node.name
        elif node.op == "output":
            results = node.args[0]
    if len(results) != 1:
        raise CaptureError(
            f"the teacher returns {len(results)} values; wrap it so that it returns one tensor"
        )
    return TeacherGraph(inputs, nodes, resolve(results[0]).name, program)


def _refs(arguments: Any) -> list[str]:
    if isinstance(arguments, Ref):
        return [arguments.name]
    if isinstance(arguments, list | tuple):
        return [name for item in arguments for name in _refs(item)]
    return []


def _detached(tensor: Any) -> Tensor:
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _sample_shape(node: torch.fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    if isinstance(value, list | tuple):
        return ()
    return tuple(int(size) for size in value.shape[1:])


def _module_path(node: torch.fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""


def _named_arguments(node: torch.fx.Node, resolve: Any) -> dict[str, Any]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        named = {str(index): item for index, item in enumerate(node.args)}
    else:
        named = {item.name: item.default_value for item in schema.arguments}
        named.update(zip((item.name for item in schema.arguments), node.args, strict=False))
    named.update(node.kwargs)
    return {key: resolve(value) for key, value in named.items()}
