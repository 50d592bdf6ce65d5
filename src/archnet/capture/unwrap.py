"""From what users hold to what can be captured: the network, its inputs, its results.

Networks come in wrappings (`DataParallel`, `torch.compile`, TorchScript), inputs as arrays and
mappings, results as mappings and dataclasses. What is wrapped is unwrapped; what cannot be is one
line that says what to give instead.
"""

import copy
import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    free_unbacked_symbols,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode

from archnet.capture.simplify import named_arguments, stem
from archnet.errors import CaptureError
from archnet.loaders import Inputs, inputs_of

# Where each wrapping keeps the network.
_WRAPPINGS: dict[type[nn.Module], str] = {
    DataParallel: "module",
    DistributedDataParallel: "module",
    AveragedModel: "module",
    OptimizedModule: "_orig_mod",
}
_EXPORTED = "an exported program: give the torch.nn.Module that it was exported from"
_TORCH = Path(torch.__file__).parent


# The network ---------------------------------------------------------------------------------


def unwrap(teacher: object) -> nn.Module:
    """The network inside `DataParallel`, `DistributedDataParallel`, averages and `torch.compile`.

    Raises:
        CaptureError: it is no network.
    """
    while kinds := [kind for kind in _WRAPPINGS if isinstance(teacher, kind)]:
        teacher = getattr(teacher, _WRAPPINGS[kinds[0]])
    if isinstance(teacher, nn.Module):
        return teacher
    raise CaptureError(f"the teacher is {_kind(teacher)}")


def _kind(teacher: object) -> str:
    if isinstance(teacher, ExportedProgram):
        return _EXPORTED
    if isinstance(teacher, Mapping):
        return (
            "a mapping (a state dict?), not a torch.nn.Module: build the network and fill it "
            "with network.load_state_dict(...)"
        )
    if isinstance(teacher, str | Path):
        return f"the path {str(teacher)!r}, not a torch.nn.Module: build the network and load it"
    if isinstance(teacher, type):
        return f"the class {teacher.__name__}, not an instance of it: call {teacher.__name__}(...)"
    kind = type(teacher).__name__
    if callable(teacher):
        return f"a {kind}, not a torch.nn.Module: call it in the forward of a module"
    return f"a {kind}, not a torch.nn.Module"


def view(teacher: nn.Module) -> nn.Module:
    """A copy in eval mode that computes in float32, itself and all it holds unwrapped.

    Its modules are its own. Weights in float32 lie in the teacher's memory; others are converted.

    Raises:
        CaptureError: it cannot be copied, or has weights without values.
    """
    memo: dict[int, Any] = {}
    for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            raise CaptureError(
                f"the teacher's {name} has no values yet: load its weights, or run its lazy "
                "layers once, before it is converted"
            )
        shared = tensor.detach()
        memo[id(tensor)] = (
            nn.Parameter(shared, tensor.requires_grad)
            if isinstance(tensor, nn.Parameter)
            else shared
        )
    for module in teacher.modules():
        # What a forward has left behind, as `weight_norm` does, cannot be copied with its history.
        left = [x for x in vars(module).values() if isinstance(x, Tensor) and not x.is_leaf]
        memo.update((id(x), x.detach()) for x in left)
    try:
        made = copy.deepcopy(teacher, memo)
    except Exception as error:
        raise CaptureError(
            f"{type(teacher).__name__} cannot be copied ({_line(error)}): build it anew and fill "
            "it with load_state_dict"
        ) from error
    for module in [*made.modules()]:
        if _is_script(module):
            continue
        for name, wrapped in [*module.named_children()]:
            module._modules[name] = child = unwrap(wrapped)
            if _is_script(child):
                raise CaptureError(
                    f"the teacher's {name} is TorchScript, which can only be converted as a whole "
                    "network: put the module there that it was scripted from"
                )
    kinds = {x.dtype for x in (*made.parameters(), *made.buffers()) if x.is_floating_point()}
    try:
        made.eval()
        return made if kinds <= {torch.float32} else made.float()
    except NotImplementedError:  # of the module of an exported program
        raise CaptureError(f"the teacher is {_EXPORTED}") from None


class InFloat32(TorchFunctionMode):
    """Lets a forward that asks for float16, bfloat16 or float64 compute in float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        func = torch.Tensor.float if func in _OTHER_CASTS else func
        args = tuple(map(_in_float32, args))
        return func(*args, **{key: _in_float32(x) for key, x in (kwargs or {}).items()})


_OTHER_CASTS = (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double)
_OTHER_FLOATS = (torch.float16, torch.bfloat16, torch.float64)


def _in_float32(argument: Any) -> Any:
    # Anything may stand here, tensors that compare element by element too.
    is_other = isinstance(argument, torch.dtype) and argument in _OTHER_FLOATS
    return torch.float32 if is_other else argument


def _is_script(module: object) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def from_script(script: torch.jit.ScriptModule, args: tuple[Tensor, ...]) -> nn.Module:
    """TorchScript, in eval mode, as a module that `torch.export` takes.

    It computes what the script computes, which is checked on ``args``.

    Raises:
        CaptureError: torch cannot convert the script, or converts it to another function.
    """
    # Not public yet; torch.export names it where it refuses TorchScript.
    from torch._export.converter import TS2EPConverter

    name = _name_of(script)
    advice = "give the torch.nn.Module that it was made from"
    call = Call(args, {})
    if failed := _failure(script, call):
        raise CaptureError(reason(script, call, failed[1]))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            module = TS2EPConverter(script, args).convert().module()
            both = [[*outputs_of(network(*args)).values()] for network in (module, script)]
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"the TorchScript of {name} cannot be converted ({_line(error)}): {advice}"
        ) from error
    if not all(map(_alike, *both)) or len(both[0]) != len(both[1]):
        raise CaptureError(f"the TorchScript of {name} becomes another function: {advice}")
    return module


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    is_close = ours.shape == theirs.shape
    return is_close and torch.allclose(ours, theirs, 1e-4, 1e-6, equal_nan=True)


def _live(program: ExportedProgram) -> list[torch.fx.Node]:
    """The operators that the result depends on; what only assertions read is not among them."""
    nodes = list(program.graph.nodes)
    live = {nodes[-1]}
    for node in reversed(nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return [node for node in nodes if node in live and node.op == "call_function"]


def require_finite(program: ExportedProgram) -> None:
    """Refuse weights, statistics and constants that are read and make nothing but nan.

    Masks may hold -inf, which a softmax makes zero of.

    Raises:
        CaptureError: naming the tensor.
    """
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    for node in _live(program):
        given = named_arguments(node)
        for role, source in given.items():
            if not isinstance(source, torch.fx.Node) or source.name not in names:
                continue
            name = names[source.name]
            held = program.state_dict.get(name, program.constants.get(name))
            if not isinstance(held, Tensor) or not held.is_floating_point() or not held.numel():
                continue
            low, high = held.aminmax()
            may_mask = stem(node.target) in _TAKE_MASKS and role not in _WEIGHTS
            if high.isfinite() and (low.isfinite() or (may_mask and low == -torch.inf)):
                if role != "running_var" or low + given["eps"] > 0:
                    continue
                problem = f"a variance of {float(low):.4g}, which no batch has"
            else:
                bad = int((~held.isfinite()).sum())
                problem = f"{bad:,} of {held.numel():,} values that are not finite (nan or inf)"
            raise CaptureError(
                f"the teacher's {name} has {problem}: load the weights of another checkpoint"
            )


# Arguments that are multiplied or divided by, and operators that bring a mask to its softmax.
_WEIGHTS = ("weight", "bias", "running_mean", "running_var")
_TAKE_MASKS = (
    *("add", "where", "masked_fill", "scaled_dot_product_attention", "slice", "select", "index"),
    *("expand", "unsqueeze", "squeeze", "view", "reshape", "repeat", "to", "_to_copy", "clone"),
    *("detach", "alias", "transpose", "permute", "contiguous", "narrow"),
)


def require_known(program: ExportedProgram) -> None:
    """Refuse a graph in which sizes or numbers follow from what is in a tensor.

    They would be taken for constants.

    Raises:
        CaptureError: naming the operator and its module.
    """
    for node in _live(program):
        value = node.meta.get("val")
        if isinstance(value, torch.SymFloat | torch.SymBool) or free_unbacked_symbols(value):
            path = [*node.meta.get("nn_module_stack", {"": ("", "")}).values()][-1][0]
            at = f" at '{path}'" if path else ""
            raise CaptureError(
                f"{node.target}{at} makes a Python number from a tensor, or a tensor whose size "
                "depends on values (.item(), int(x), a mask as an index): keep it a tensor of "
                "fixed size"
            )


def tidy_script(program: ExportedProgram) -> None:
    """Make of a captured script what a captured module is.

    Convolutions of any kind are one operator in a trace, and operators have lost their modules:
    each gets the path of the weights that it reads.
    """
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in program.graph.nodes:
        read = [names[source.name] for source in node.all_input_nodes if source.name in names]
        if read:
            path = read[0].rpartition(".")[0]
            node.meta["nn_module_stack"] = {path: (path, "")}
        if node.target is torch.ops.aten.convolution.default:
            x, weight, bias, stride, padding, dilation, is_transposed, more, groups = node.args
            maps = node.meta["val"].dim() - 2
            kind = f"conv_transpose{maps}d" if is_transposed else f"conv{maps}d"
            packet = getattr(torch.ops.aten, kind)
            node.target = packet.input if is_transposed and maps > 1 else packet.default
            rest = (more, groups, dilation) if is_transposed else (dilation, groups)
            node.args = (x, weight, bias, stride, padding, *rest)


# Its inputs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """What a network is called with."""

    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        """All inputs, in the order in which a captured graph has them."""
        return [*self.args, *self.kwargs.values()]

    def each(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The same with every tensor changed."""
        return Call(
            tuple(map(change, self.args)),
            {name: change(x) for name, x in self.kwargs.items()},
        )


def call_of(network: nn.Module, given: Inputs) -> Call:
    """Which argument of the network's forward each input is, for two samples.

    A batch of one would be taken for a constant, so the batch is always two.

    Raises:
        CaptureError: what `inputs_of` raises, or inputs that the forward does not take.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    tensors = [
        x[:1].to(device).expand(2, *x.shape[1:]).contiguous() for x in inputs_of(given).values()
    ]
    try:
        signature = inspect.signature(network.forward)
    except ValueError:  # TorchScript tells of none
        return Call(tuple(tensors), {})
    parameters = signature.parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keywords = [p for p in parameters if p.kind == p.KEYWORD_ONLY]
    takes = f"{type(network).__name__}.forward{signature}"
    takes_any_name = any(p.kind == p.VAR_KEYWORD for p in parameters)
    if isinstance(given, Mapping):
        call = Call((), dict(zip(map(str, given), tensors, strict=True)))
        known = {p.name for p in (*positional, *keywords)}
        for name in call.kwargs:
            if name not in known and not takes_any_name:
                raise CaptureError(f"example_inputs has {name!r}, which {takes} does not take")
    else:
        several = any(p.kind == p.VAR_POSITIONAL for p in parameters)
        count = len(tensors) if several else min(len(positional), len(tensors))
        # Those that need a value come before those that have one.
        keywords.sort(key=lambda p: p.default is not p.empty)
        names = [p.name for p in keywords][: len(tensors) - count]
        call = Call(tuple(tensors[:count]), dict(zip(names, tensors[count:], strict=False)))
        if count + len(names) < len(tensors):
            more = ": give a mapping from their names" if takes_any_name else ""
            raise CaptureError(
                f"example_inputs are {len(tensors)} tensors, but {takes} takes "
                f"{count + len(keywords)}{more}"
            )
    given_names = {p.name for p in positional[: len(call.args)]} | set(call.kwargs)
    missing = [
        p.name
        for p in (*positional, *keywords)
        if p.default is p.empty and p.name not in given_names
    ]
    if missing:
        raise CaptureError(
            f"example_inputs lack {', '.join(missing)} of {takes}: give a tuple of all its inputs"
        )
    return call


# Its results ---------------------------------------------------------------------------------


def outputs_of(result: Any) -> dict[str, Tensor]:
    """Every tensor in a network's result, by name: "output" for a tensor alone, else what is
    written to reach it (the key of a mapping, the place in a list).

    Raises:
        CaptureError: there is none.
    """
    named: dict[str, Tensor] = {}
    for place, tensor in _found(result):
        # A name of an ONNX value, unlike those of the others.
        words = re.sub(r"\W+", "_", place, flags=re.ASCII).strip("_")
        name = f"output_{words}".rstrip("_") if not words or words[0].isdigit() else words
        while name in named:
            name += "_"
        named[name] = tensor
    return named


def _found(result: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a result, each once, with what is written behind the result to reach them."""
    # By memory: a mapping may hold one tensor under two names.
    found = {id(tensor): (place, tensor) for place, tensor in reversed([*_tensors(result)])}
    if not found:
        raise CaptureError(
            f"the teacher returns {_name(result)}, in which there is no tensor: its forward has "
            "to return its scores"
        )
    return [*found.values()][::-1]


def answer(result: Any) -> Tensor:
    """The one tensor in a network's result.

    Raises:
        CaptureError: there is none, or there are several.
    """
    several = _found(result)
    if len(several) == 1:
        return several[0][1]
    shown = ", ".join(f"result{name} {_shape(tensor)}" for name, tensor in several)
    raise CaptureError(
        f"the teacher returns {len(several)} values, {shown}: wrap it in a module whose forward "
        f"returns one of them (return self.network(x){several[0][0]})"
    )


def only_result(module: nn.Module, inputs: Any, result: Any) -> Tensor:
    """A forward hook that leaves the one tensor of a result."""
    return answer(result)


def _shape(tensor: Tensor) -> str:
    """As it is written, with B for the size of the batch."""
    sizes = [str(size) if isinstance(size, int) else "B" for size in tensor.shape]
    return f"({', '.join(sizes)})"


def _name(result: Any) -> str:
    return "None" if result is None else f"a {type(result).__name__}"


def _tensors(result: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a result, with what is written behind the result to reach it."""
    parts: dict[str, Any] = {}
    if isinstance(result, Tensor):
        yield place, result
    elif isinstance(result, Mapping):
        parts = {f"[{key!r}]": value for key, value in result.items()}
    elif isinstance(result, tuple) and hasattr(result, "_fields"):
        parts = {f".{name}": getattr(result, name) for name in result._fields}
    elif isinstance(result, list | tuple):
        parts = {f"[{index}]": value for index, value in enumerate(result)}
    elif is_dataclass(result):
        parts = {f".{field.name}": getattr(result, field.name) for field in fields(result)}
    elif hasattr(result, "__dict__") and not isinstance(result, nn.Module | type):
        parts = {f".{name}": value for name, value in vars(result).items()}
    for name, value in parts.items():
        yield from _tensors(value, place + name)


# Why it failed -------------------------------------------------------------------------------


def _name_of(network: nn.Module) -> str:
    """The class; of a script, that which it was made from."""
    return str(getattr(network, "original_name", type(network).__name__))


def reason(network: nn.Module, call: Call, error: Exception) -> str:
    """Why `torch.export` could not capture a network, and what to do, in one line."""
    name = _name_of(network)
    shapes = ", ".join(f"{tuple(x.shape)} {_dtype(x)}" for x in call.tensors)
    failed = _failure(network, call)
    if failed is None:
        place = _place(error)
        if isinstance(error, GuardOnDataDependentSymNode):
            return (
                f"torch.export cannot capture {name}: its forward branches on the values of a "
                f"tensor, or makes a number of one{place}: branches on tensor values have to leave "
                "the forward pass (torch.where keeps both sides)"
            )
        return f"torch.export cannot capture {name}: {_line(error).rstrip('.')}{place}"
    path, cause = failed
    at = f" at '{path}'" if path else ""
    if _failure(network, call.each(lambda x: x[:1])) is None:
        return (
            f"{name} runs on one sample and not on two ({_line(cause)}{at}): its forward has to "
            "take batches of any size"
        )
    floats = call.each(lambda x: x if x.is_floating_point() else x.float())
    if any(not x.is_floating_point() for x in call.tensors) and _failure(network, floats) is None:
        return (
            f"{name} does not run on a batch of {shapes}{at}, but on float32: convert them before "
            "(x.float() / 255), as its training did"
        )
    advice = "give example_inputs of the shape and kind that it was made for"
    return f"{name} does not run on a batch of {shapes}: {_line(cause)}{at}: {advice}"


def _failure(network: nn.Module, call: Call) -> tuple[str, Exception] | None:
    """Which module fails if the network runs once, and how."""
    running: list[str] = []
    hooks = []
    for path, module in network.named_modules():
        if _is_script(module):
            continue  # They take no hooks.
        hooks += [
            module.register_forward_pre_hook(lambda *_, path=path: running.append(path)),
            module.register_forward_hook(lambda *_: (running.pop(), None)[1]),
        ]
    try:
        with torch.no_grad(), InFloat32():
            network(*call.args, **call.kwargs)
    except Exception as error:
        return (running[-1] if running else ""), error
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _place(error: Exception) -> str:
    """Where in the user's own code it happened."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not Path(frame.filename).is_relative_to(_TORCH) and Path(frame.filename).is_file()
    ]
    ours = Path(__file__).parent
    frames = [frame for frame in frames if not Path(frame.filename).is_relative_to(ours)]
    if not frames:
        return ""
    return f", in {frames[-1].name} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    if not lines:
        return kind
    if "TorchScript interpreter" in lines[0]:
        return lines[-1].removeprefix("RuntimeError: ")  # below the script's own traceback
    return lines[0] if isinstance(error, RuntimeError | ValueError) else f"{kind}: {lines[0]}"
