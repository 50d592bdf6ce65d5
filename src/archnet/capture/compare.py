"""The captured program beside the network: what was rewritten is the same function still."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from archnet.capture.functional import states
from archnet.capture.nodes import module_path, named_arguments, place
from archnet.capture.unwrap import Call, InFloat32
from archnet.errors import CaptureError

TOLERANCE = 1e-4  # what "exact" means in float32, as a relative error


def samples(examples: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Two samples for comparisons: the first of the examples, and one that is drawn at random.

    An example of zeros or ones tells one place of a map from another no more than a constant
    would, and beside it what rounding leaves would pass for a difference.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for x in examples:
        first = other = x[:1]
        if x.is_floating_point():
            values = x.detach().double().cpu()
            spread, centre = float(values.std()) if x.numel() > 1 else 0.0, float(values.mean())
            other = torch.randn(first.shape, generator=generator) * (spread or 1.0) + centre
        found.append(torch.cat([first, other.to(first)]))
    return tuple(found)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, over the places where theirs are finite; infinite where ours are
    not.
    """
    ours, theirs = (x.detach().double().cpu() for x in (ours, theirs))
    places = theirs.isfinite()
    distance, size = (ours - theirs)[places].norm(), theirs[places].norm()
    if not distance.isfinite():
        return float("inf")
    return float(distance / size) if size > 0 else float(distance)


def arguments(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What a program's graph is called with: the network's own tensors and its inputs."""
    own, given = states(program), iter(inputs)
    places = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    return [own[name] if name in own else next(given) for name in places]


def run(
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    nodes: Collection[str],
    peeled: Collection[str] = (),
) -> dict[str, Tensor]:
    """The values of a program's nodes, by name; nothing else is held, and what they do not depend
    on is not computed.

    Args:
        program: of which no operator writes to its inputs.
        inputs: as many samples as it was captured with (2), unless it takes any number.
        nodes: whose values are asked for.
        peeled: nodes that hand on what they read, as those of a head that was peeled.
    """
    values = arguments(program, inputs)
    interpreter = _Watched(program.graph_module)
    interpreter.found, interpreter.peeled = dict.fromkeys(nodes), peeled
    interpreter.needed = set()
    for node in reversed(interpreter.graph.nodes):
        if node.name in interpreter.found or node in interpreter.needed:
            interpreter.needed.update([node, *node.all_input_nodes])
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        # What is drawn is drawn alike in every run.
        torch.manual_seed(0)
        interpreter.run(*values)
    return interpreter.found


class _Watched(torch.fx.Interpreter):
    found: dict[str, Any]
    needed: set[Node]
    peeled: Collection[str]

    def run_node(self, n: Node) -> Any:
        if n not in self.needed and n.op != "placeholder":
            return None
        value = self.env[n.all_input_nodes[0]] if n.name in self.peeled else super().run_node(n)
        if n.name in self.found:
            self.found[n.name] = value
        return value


def rounding(
    program: ExportedProgram, inputs: tuple[Tensor, ...], node: str, peeled: Collection[str] = ()
) -> float:
    """How far a change of the inputs by a millionth of their size moves a node's value.

    Where differences are left of large numbers, rounding alone moves a result.
    """
    generator = torch.Generator().manual_seed(1)
    moved = tuple(
        x + (1e-6 * x.double().std() * torch.randn(x.shape, generator=generator)).to(x)
        if x.is_floating_point()
        else x
        for x in inputs
    )
    ours, theirs = (run(program, x, [node], peeled)[node] for x in (moved, inputs))
    return difference(ours, theirs)


def is_rounding(
    error: float,
    program: ExportedProgram,
    inputs: tuple[Tensor, ...],
    node: str,
    peeled: Collection[str] = (),
) -> bool:
    """Whether rounding may be all of a relative error of a node's value."""
    return error <= TOLERANCE or error <= 100 * rounding(program, inputs, node, peeled)


def _results(network: nn.Module, call: Call, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What a network gives, called so; neither its buffers nor these inputs are written to."""
    buffers = {name: tensor.clone() for name, tensor in network.named_buffers()}
    values = iter(inputs)
    given = call.each(lambda _: next(values).clone())
    with torch.no_grad(), torch.random.fork_rng(devices=[]), InFloat32():
        torch.manual_seed(1)
        found = torch.func.functional_call(network, buffers, given.args, given.kwargs)
    return torch.utils._pytree.tree_leaves(found)


def require_same(network: nn.Module, program: ExportedProgram, call: Call) -> None:
    """Compare a program with the network that it was captured from.

    Raises:
        CaptureError: they differ by more than rounding.
    """
    examples = tuple(call.tensors)
    inputs = samples(examples)
    try:
        theirs = _results(network, call, inputs)
    except Exception:
        # What is drawn is not what the network expects: a check of its own says so.
        inputs = examples
        try:
            theirs = _results(network, call, inputs)
        except Exception as failure:
            first_line = (str(failure).splitlines() or [type(failure).__name__])[0]
            raise CaptureError(
                f"{type(network).__name__} fails on the example: {first_line}"
            ) from failure
    names = [node.name for node in program.graph.output_node().args[0]]
    found = run(program, inputs, names)
    for name, wanted in zip(names, theirs, strict=True):
        error = difference(found[name], wanted)
        if not is_rounding(error, program, inputs, name):
            drawing = next(filter(_draws, program.graph.nodes), None)
            if drawing is not None:
                raise CaptureError(
                    f"{drawing.target} {place(module_path(drawing))} draws random numbers in eval "
                    "mode: pass training=self.training to a dropout, dropout_p=0.0 to an "
                    "attention, and make other random numbers a buffer"
                )
            raise CaptureError(
                f"the captured graph of {type(network).__name__} differs from the network: "
                f"relative error {error:.1e}. Does forward draw random numbers, or keep state from "
                "call to call?"
            )


def _draws(node: Node) -> bool:
    """Whether an operator draws random numbers as it is called."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = named_arguments(node)
    return bool(given.get("train", True)) and bool(given.get("dropout_p", 1.0))
