"""Writes become values: a captured program in which no operator changes a tensor that is there.

`torch.export` lists what a network does, writes included: ``y[:, :4] = 0`` is a slice of ``y`` and
a ``fill_`` of that slice, and who reads ``y`` afterwards reads what was written. Here every write
gives a new value instead, which goes back through the views it was written through (a slice is
scattered into what it was taken from); readers behind it read the new values, and a view that was
made before is taken once more. PyTorch's own functionalization does the same, but it breaks up
operators that rules know as wholes (batch norm, dropout, chunk); here all others stay as they are.

Which tensors share memory is read from the storage of the capture's fake tensors, so that what
copies only sometimes (reshape, contiguous, to) is a view exactly where it was one.
"""

import functools
import itertools
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

from archnet.capture.nodes import module_path, named_arguments, place, stem
from archnet.errors import CaptureError

aten = torch.ops.aten
# Views, by what takes a written value back to the tensor that they were taken from.
_RESHAPES = (
    *("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "ravel"),
    *("squeeze", "unsqueeze", "_unsafe_view", "_reshape_alias"),
)
_TURNS = (
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"),
    *("t", "numpy_T", "matrix_H", "mT", "mH", "adjoint"),
)


# Operators that give booleans.
_TESTS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "less", "less_equal", "greater", "greater_equal"),
    *("not_equal", "logical_and", "logical_or", "logical_xor", "logical_not"),
)
_PARTS = ("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit")


def functionalize(program: ExportedProgram) -> None:
    """Rewrite a captured program in place: it gives what it gave, and writes to nothing.

    Raises:
        CaptureError: a write goes through a view that has no way back, or the network changes a
            tensor of its own and reads it, so that no two calls are alike.
    """
    if any(_written(node) is not None or _is_view_in_place(node) for node in program.graph.nodes):
        _Functional(program).run()


class _Functional:
    """What tensors hold, while a graph is gone through from the start.

    A tensor is named by the node that made it. ``origins`` has the tensor that a view was taken
    from; ``counts`` the number of writes to the memory of a tensor that is no view; ``values`` the
    node with what a tensor holds, and how many of those writes are in it.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program, self.graph = program, program.graph
        self.storages = {node: _storage(node) for node in self.graph.nodes}
        self.origins: dict[Node, Node] = {}
        self.results: dict[Node, Node] = {}  # of writes: the tensor that was written to
        self.counts: dict[Node, int] = {}
        self.values: dict[Node, tuple[int, Node]] = {}
        self.hidden: dict[int, Node] = {}  # by storage: a view of which no origin is known
        self.writes: dict[Node, list[tuple[str, Node]]] = {}  # by root: writes and their values
        self.spare: set[Node] = set()  # goes if nobody reads it

    def run(self) -> None:
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                written = _written(node)
                if written is not None:
                    self._write(node, self._tensor(written))
                else:
                    self._read(node)
        for node in reversed(self.graph.nodes):
            if node in self.spare and not node.users:
                self.graph.erase_node(node)
        self._require_lasting()

    def _read(self, node: Node) -> None:
        """An operator reads what its arguments hold here; a view is remembered as one."""
        origin = self._viewed(node)
        if origin is None and any(
            self.storages[node] == self.storages[read] is not None for read in node.all_input_nodes
        ):
            self.hidden[self.storages[node] or 0] = node
        node.args = torch.fx.node.map_arg(node.args, self._now)
        node.kwargs = torch.fx.node.map_arg(node.kwargs, self._now)
        if origin is not None:
            if _is_view_in_place(node) and not self._respell(node):
                raise _no_way_back(_at(node), node)
            self.origins[node] = origin
            self.values[node] = (self.counts.get(self._root(origin), 0), node)

    def _write(self, node: Node, tensor: Node) -> None:
        """An operator writes: give a value instead, and take it back to where it lies."""
        write, chain = _at(node), [tensor]
        while chain[-1] in self.origins:
            origin = self.origins[chain[-1]]
            # One of several views is of the tensor that was split.
            chain.append(origin if _is_tensor(origin) else self.origins[origin])
        root = chain[-1]
        hidden = self.hidden.get(self.storages[root] or 0)
        if hidden is not None:
            raise _no_way_back(write, hidden)
        for read in node.all_input_nodes:
            shares = self._tensor(read) is not tensor and self.storages[read] == self.storages[root]
            if shares and _overlaps(node, tensor, read):
                raise CaptureError(
                    f"{write} reads and writes overlapping memory, for which PyTorch defines no "
                    "result: read a copy, as in y[:, 1:] += y[:, :-1].clone()"
                )
        before = [self._now(item) for item in chain]
        after = node.next
        value = self._written_value(node, before[0])
        self.results[node] = tensor
        count = self.counts[root] = self.counts.get(root, 0) + 1
        self.values[tensor] = (count, value)
        with self.graph.inserting_before(after):
            for (view, origin), old in zip(itertools.pairwise(chain), before[1:], strict=True):
                if _splits_batch(view, origin):
                    raise CaptureError(
                        f"{write} writes to some samples of a batch and not to others"
                    )
                scattered = self._scattered(node, view, origin, old, value)
                if scattered is None:
                    raise _no_way_back(write, view)
                value = scattered
                self.values[origin] = (count, value)
        self.writes.setdefault(root, []).append((write, value))
        self.spare.update(item for item in chain if item in self.origins)
        self.spare.update(self.origins[item] for item in chain if item in self.origins)
        self.spare.add(node)

    # -- tensors and their values --------------------------------------------------------------

    def _tensor(self, node: Node) -> Node:
        return self.results.get(node, node)

    def _root(self, tensor: Node) -> Node:
        while tensor in self.origins:
            tensor = self.origins[tensor]
        return tensor

    def _viewed(self, node: Node) -> Node | None:
        """The tensor that a node is a view of."""
        first = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(first, Node):
            return None
        first = self._tensor(first)
        shared = self.storages[node] == self.storages[first] is not None
        # Of a list of results only views count, each of which is picked from it.
        return first if shared and (_is_tensor(first) or first in self.origins) else None

    def _now(self, node: Node) -> Node:
        """The node with what a tensor holds at this place of the graph."""
        tensor = self._tensor(node)
        known, value = self.values.get(tensor, (0, tensor))
        count = self.counts.get(self._root(tensor), 0)
        if known < count:
            origin = self._now(self.origins[tensor])
            value = self._add(tensor, tensor.target, (origin, *tensor.args[1:]), tensor.kwargs)
            self.values[tensor] = (count, value)
        return value

    # -- what is written -----------------------------------------------------------------------

    def _written_value(self, node: Node, before: Node) -> Node:
        """What an operator writes, of the shape and type of what was there before."""
        kind = str(node.target).split(".")[1]
        source = node.args[1] if len(node.args) > 1 else None
        if kind in ("copy_", "fill_") and isinstance(source, Node):
            held = self._now(source)
            is_same = kind == "copy_" and self._same_memory(node.args[0], source)
            return before if is_same else self._fitted(node, held, before)
        if kind in ("fill_", "zero_"):
            node.target = aten.full_like.default
            node.args, node.kwargs = (before, 0 if kind == "zero_" else source), {}
            return node
        node.args = torch.fx.node.map_arg(node.args, self._now)
        node.kwargs = torch.fx.node.map_arg(node.kwargs, self._now)
        if not self._respell(node):
            # The operator keeps writing, to a copy that nobody else reads.
            copy = self._add(node, aten.clone.default, (before,), like=before)
            node.replace_input_with(before, copy)
            return node
        kinds = {read.meta["val"].dtype for read in node.all_input_nodes if _is_tensor(read)}
        if len(kinds) == 1 and stem(node.target) not in _TESTS:
            return node
        given = torch.fx.node.map_arg((node.args, node.kwargs), lambda read: read.meta["val"])
        result = node.target(*given[0], **given[1])  # type: ignore[operator]
        if result.dtype == before.meta["val"].dtype:
            return node
        made = self._add(node, node.target, node.args, node.kwargs)
        made.meta["val"] = result
        return self._fitted(node, made, before)

    def _fitted(self, node: Node, value: Node, like: Node) -> Node:
        """A value in the type and the shape of another."""
        found, wanted = value.meta["val"], like.meta["val"]
        if found.dtype != wanted.dtype:
            value = self._add(node, aten.to.dtype, (value, wanted.dtype))
            value.meta["val"] = found.to(wanted.dtype)
        if not statically_known_true(sym_eq(tuple(found.shape), tuple(wanted.shape))):
            value = self._add(node, aten.expand_as.default, (value, like), like=like)
        return value

    def _respell(self, node: Node) -> bool:
        """Make an operator that writes the one that gives a value; False if there is none."""
        found = _without_writing(node.target)
        if found is None:
            return False
        node.target, left_out = found
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in left_out}
        return True

    def _same_memory(self, first: Any, second: Any) -> bool:
        """Whether two nodes are the same entries of one tensor, as in ``y[:, 1:] += 1``."""
        ours, theirs = first.meta["val"], second.meta["val"]
        return self.storages[first] == self.storages[second] and _alike(ours, theirs)

    def _scattered(
        self, node: Node, view: Node, origin: Node, old: Node, value: Node
    ) -> Node | None:
        """What ``origin``, which held ``old``, holds when its ``view`` holds ``value``; None if no
        way leads back.
        """
        whole = origin.meta["val"]
        if _alike(view.meta["val"], whole):
            return value
        kind, given = stem(view.target), named_arguments(view)

        def add(target: Any, *args: Any) -> Node:
            return self._add(node, target, args, like=origin)

        if kind == "slice":
            dim, *bounds = (given[name] for name in ("dim", "start", "end", "step"))
            return add(aten.slice_scatter.default, old, value, dim, *bounds)
        if kind == "select":
            return add(aten.select_scatter.default, old, value, given["dim"], given["index"])
        if kind == "narrow" and isinstance(start := given["start"], int):
            start %= whole.shape[given["dim"]]
            bounds = [start, start + given["length"]]
            return add(aten.slice_scatter.default, old, value, given["dim"], *bounds)
        if view.target is operator.getitem:
            several, index = view.args
            assert isinstance(several, Node)
            assert isinstance(index, int)
            kind, given = stem(several.target), named_arguments(several)
            dim = {"hsplit": 1, "vsplit": 0, "dsplit": 2}.get(kind, given.get("dim"))
            if kind == "unbind":
                return add(aten.select_scatter.default, old, value, dim, index)
            if kind in _PARTS:
                ends = list(itertools.accumulate(x.shape[dim] for x in several.meta["val"]))
                bounds = [ends[index] - view.meta["val"].shape[dim], ends[index]]
                return add(aten.slice_scatter.default, old, value, dim, *bounds)
        if kind in _RESHAPES:
            return add(aten.reshape_as.default, value, old)
        if kind in _TURNS:
            # Where the axes went, told by their sizes.
            rank = whole.dim()
            axes = torch.empty(*range(2, 2 + rank), device="meta")
            turned = view.target(axes, *view.args[1:], **view.kwargs)  # type: ignore[operator]
            order = [turned.shape.index(2 + axis) for axis in range(rank)]
            return add(aten.permute.default, value, order)
        return None

    def _add(
        self,
        place: Node,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        like: Node | None = None,
    ) -> Node:
        """A new operator of the module of ``place``, its result of the shape and type of ``like``
        (that of ``place`` when absent).
        """
        made = self.graph.call_function(target, args, dict(kwargs or {}))
        made.meta = {**place.meta, "val": (like or place).meta["val"]}
        self.spare.add(made)
        return made

    # -- what a network writes to itself -------------------------------------------------------

    def _require_lasting(self) -> None:
        """A tensor of the network that is changed and read has to stay as it is after one call."""
        names, known = state_names(self.program), states(self.program)
        (result,) = (node for node in self.graph.nodes if node.op == "output")
        reached = _ancestors(result)
        before = {node: known[node.name] for node in self.graph.nodes if node.name in known}
        after = dict(before)
        for root, writes in self.writes.items():
            if root in before and any(value in reached for _, value in writes):
                once = self._evaluated(self.values[root][1], before)
                if once is not None:
                    after[root] = once
                    continue
                raise _not_lasting(names[root.name], writes[0][0])
        for root in self.writes:
            if after.get(root) is not before.get(root):
                twice = self._evaluated(self.values[root][1], after)
                if twice is None or not torch.equal(twice, after[root]):
                    raise _not_lasting(names[root.name], self.writes[root][0][0])

    def _evaluated(self, wanted: Node, known: Mapping[Node, Tensor]) -> Tensor | None:
        """A value that follows from tensors of the network; None if it depends on an input."""
        found: dict[Node, Any] = dict(known)
        needed = _ancestors(wanted)
        with torch.no_grad():
            for node in self.graph.nodes:
                if node not in needed or node in found:
                    continue
                if node.op != "call_function":
                    return None
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                found[node] = node.target(*args, **kwargs)
        result = found[wanted]
        assert isinstance(result, Tensor)
        return result


@functools.cache
def _without_writing(target: Any) -> tuple[Any, list[str]] | None:
    """The operator that gives the value which another writes, and which arguments it has not."""
    schema = target._schema
    wanted = [(item.name, str(item.type)) for item in schema.arguments if not item.is_out]
    packet = getattr(aten, schema.name.removeprefix("aten::").removesuffix("_"), None)
    for overload in packet.overloads() if packet is not None else ():
        other = getattr(packet, overload)
        same = [(item.name, str(item.type)) for item in other._schema.arguments]
        # A dropout's first argument has two names.
        alike = len(same) == len(wanted) and same[0][1] == wanted[0][1]
        if alike and same[1:] == wanted[1:] and not other._schema.is_mutable:
            return other, [item.name for item in schema.arguments if item.is_out]
    return None


def state_names(program: ExportedProgram) -> dict[str, str]:
    """The network's own tensors: by the name of the graph's input, that in the network."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def states(program: ExportedProgram) -> dict[str, Tensor]:
    """The same tensors themselves, in the network's memory."""
    found = {}
    for node, name in state_names(program).items():
        tensor = program.state_dict.get(name, program.constants.get(name))
        assert isinstance(tensor, Tensor)
        found[node] = tensor.detach()
    return found


def _ancestors(node: Node) -> set[Node]:
    found, stack = {node}, [node]
    while stack:
        new = set(stack.pop().all_input_nodes) - found
        found |= new
        stack += new
    return found


def _storage(node: Node) -> int | None:
    """Which memory a tensor lies in; of several tensors, where all lie in one."""
    value = node.meta.get("val")
    values = list(value) if isinstance(value, list | tuple) else [value]
    if not values or not all(isinstance(item, Tensor) for item in values):
        return None
    found = {item.untyped_storage()._cdata for item in values if isinstance(item, Tensor)}
    return found.pop() if len(found) == 1 else None


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors in one memory are the same entries in the same order."""
    return statically_known_true(
        sym_eq(
            (*ours.shape, *ours.stride(), ours.storage_offset()),
            (*theirs.shape, *theirs.stride(), theirs.storage_offset()),
        )
    )


def _splits_batch(view: Node, origin: Node) -> bool:
    """Whether a view is of some entries of an axis that samples lie on."""
    if stem(view.target) not in ("slice", "select", "narrow"):
        return False
    whole, given = origin.meta["val"], named_arguments(view)
    size = whole.shape[given["dim"]]
    return isinstance(size, torch.SymInt) and not _alike(view.meta["val"], whole)


def _overlaps(node: Node, ours: Node, theirs: Node) -> bool:
    """Whether an operator that goes from entry to entry meets entries of the tensor that it writes
    in other places of one that it reads.
    """
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if not is_pointwise and stem(node.target) != "copy":
        return False
    if not _is_tensor(theirs) or _alike(ours.meta["val"], theirs.meta["val"]):
        return False
    return bool(torch.isin(*(_entries(item.meta["val"]) for item in (ours, theirs))).any())


def _entries(tensor: Tensor) -> Tensor:
    """Where the entries of a tensor lie in its memory, for the batch of the capture."""

    def number(size: Any) -> Any:
        return size.node.hint if isinstance(size, torch.SymInt) else size

    places = torch.tensor([number(tensor.storage_offset())])
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + torch.arange(number(size)) * number(stride)).flatten()
    return places


def _is_view_in_place(node: Node) -> bool:
    """Whether an operator changes the shape of a tensor and no number in it: ``unsqueeze_``."""
    return torch.Tag.inplace_view in getattr(node.target, "tags", ())


def _written(node: Node) -> Node | None:
    """The tensor that an operator writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or _is_view_in_place(node):
        return None
    given = named_arguments(node)
    written = [
        given[item.name]
        for item in schema.arguments
        if item.alias_info is not None and item.alias_info.is_write
    ]
    if not written:
        return None
    if len(written) > 1 or not isinstance(written[0], Node):
        raise CaptureError(
            f"{_at(node)} writes to several tensors at once: write to one after another"
        )
    return written[0]


def _at(node: Node) -> str:
    return f"{node.target} {place(module_path(node))}"


def _no_way_back(write: str, view: Node) -> CaptureError:
    return CaptureError(
        f"{write} writes through {view.target}, which cannot be undone: write to slices of the "
        "tensor, or build a new one (torch.cat, torch.where)"
    )


def _not_lasting(name: str, write: str) -> CaptureError:
    return CaptureError(
        f"{write} changes the network's '{name}', and the result depends on it, so that calls "
        "differ: leave that out of the forward pass in eval mode"
    )
