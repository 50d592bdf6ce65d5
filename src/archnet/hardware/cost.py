"""What a network costs: multiply-accumulates, bit operations, bytes.

A MAC is one multiplication of a weight (or of an activation, in attention) by an activation.
BOPs are MACs times weight bits times activation bits; what is not quantized has 32 bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from archnet.ops import (
    Activation,
    AddConstant,
    BatchNorm,
    Concat,
    LayerNorm,
    MatMul,
    MaxPooling,
    Student,
    WeightedOperator,
)
from archnet.ops.layout import LayoutMove, Reshape

# Figures of students and teachers are numbers; some of a file's may be None, for not known.
Count_co = TypeVar("Count_co", bound="int | None", covariant=True)
FLOAT_BITS = 32
BIAS_BITS = 32


@dataclass(frozen=True)
class Product:
    """``count`` products of a (positions, depth) matrix with a (depth, filters) matrix.

    Example (3x3 convolution of 16 channels to 32, on 8x8 pixels): 64 positions, 144 deep, 32
    filters, once; depthwise on 16 channels: 64 positions, 9 deep, 1 filter, 16 times.
    """

    positions: int
    depth: int
    filters: int
    count: int = 1

    @property
    def macs(self) -> int:
        return self.count * self.positions * self.depth * self.filters


@dataclass(frozen=True)
class StepCost(Generic[Count_co]):
    """One step of a student, one module of a teacher or one node of a file, on one sample.

    ``activation_bits`` are those of what it reads; ``live_bytes`` is all that memory holds while
    it runs: what it reads and writes, and what later steps still need. ``products`` are the
    matrix products that the MACs belong to. Figures are None where they are not known.
    """

    name: str
    operator: str
    origin: str
    macs: Count_co
    bops: Count_co
    parameters: int
    weight_bits: int
    activation_bits: int
    weight_bytes: int
    live_bytes: Count_co
    products: tuple[Product, ...] = ()


@dataclass(frozen=True)
class Cost(Generic[Count_co]):
    """A network on one sample. ``activation_bytes`` is the peak; None where it is not known.

    ``uncounted`` has the number of operators that no figure but the bytes counts, by name.
    Of a file, ``unknown`` names the layers whose MACs are not known, which leaves none in all;
    ``inputs`` are the shapes that the figures are for, of a ``batch`` of so many samples.
    """

    macs: Count_co
    bops: Count_co
    parameters: int
    weight_bytes: int
    activation_bytes: int | None = None
    steps: tuple[StepCost[Count_co], ...] = field(default=(), repr=False)
    uncounted: Mapping[str, int] = field(default_factory=dict, repr=False)
    unknown: tuple[str, ...] = field(default=(), repr=False)
    inputs: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict, repr=False)
    batch: int = 1

    def totals(self) -> dict[str, int | None]:
        """The figures in all, as plain data."""
        keys = ("macs", "bops", "parameters", "weight_bytes", "activation_bytes")
        return {key: getattr(self, key) for key in keys}


def student_cost(student: Student, input_bits: Mapping[str, int] | None = None) -> Cost[int]:
    """The cost of a student from its shapes and the quantizers on its operators.

    Batch norms, activations, pooling and moves do no MACs. Weights are packed at their width, a
    bias takes 32 bits, a batch norm a 32-bit scale and shift per channel, a constant
    that is added 32 bits a number. For the peak of the
    activations an operator, the activation after it and a reshape share one buffer (that is how
    integer kernels run them), every other step writes a buffer of its own, packed at its width.

    Args:
        student: as it is deployed (`archnet.lower.lower`), or whole.
        input_bits: of inputs that are integers already; others are floats.
    """
    shapes, bits = student.graph.shapes, _value_bits(student, input_bits or {})
    live = _live_bytes(student, bits)
    rows = []
    for step in student.graph.steps:
        module = student.operator(step.name)
        read_bits = max(bits[name] for name in step.inputs)
        macs = parameters = weight_bytes = 0
        weight_bits = FLOAT_BITS
        products: tuple[Product, ...] = ()
        if isinstance(module, WeightedOperator):
            # Each of the O results is a sum over one row of the weight.
            filters, depth = len(module.weight), module.weight[0].numel()
            products = (Product(math.prod(shapes[step.name]) // filters, depth, filters),)
            macs = products[0].macs
            weight_bits = _bits(module.weight_quantizer)
            parameters = module.weight.numel() + module.bias.numel()
            weight_bytes = _bytes(module.weight.numel(), weight_bits)
            weight_bytes += _bytes(module.bias.numel(), BIAS_BITS)
        elif isinstance(module, MatMul):
            depth, (*_, filters) = shapes[step.inputs[0]][-1], shapes[step.name]
            products = (Product(math.prod(shapes[step.name]) // filters, depth, filters),)
            macs, weight_bits = products[0].macs, bits[step.inputs[1]]
            read_bits = bits[step.inputs[0]]
        elif isinstance(module, BatchNorm | LayerNorm):
            parameters = 2 * module.channels
            weight_bytes = _bytes(parameters, FLOAT_BITS)
        elif isinstance(module, AddConstant):
            parameters = module.bias.numel()
            weight_bytes = _bytes(parameters, FLOAT_BITS)
        rows.append(
            StepCost(
                name=step.name,
                operator=type(module).__name__,
                origin=step.origin,
                macs=macs,
                bops=macs * weight_bits * read_bits,
                parameters=parameters,
                weight_bits=weight_bits,
                activation_bits=read_bits,
                weight_bytes=weight_bytes,
                live_bytes=live[step.name],
                products=products,
            )
        )
    return Cost(
        macs=sum(row.macs for row in rows),
        bops=sum(row.bops for row in rows),
        parameters=sum(row.parameters for row in rows),
        weight_bytes=sum(row.weight_bytes for row in rows),
        activation_bytes=max((row.live_bytes for row in rows), default=0),
        steps=tuple(rows),
    )


def teacher_cost(
    teacher: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    weight_bits: int = FLOAT_BITS,
    act_bits: int = FLOAT_BITS,
) -> Cost[int]:
    """The cost of any network on one sample, as it would be at the given widths throughout.

    Counted are convolutions of any kind, linear layers and matrix products, attention's
    included, by running the network once; a step is a module that has weights or multiplies. For
    the peak of the activations a batch norm and what works element by element write over an input
    that nobody reads later, and views share the memory of what they show.

    Args:
        teacher: the network; it is left untouched.
        example_inputs: (B, ...) or a tuple of such; the first sample is used.
        weight_bits: of every weight, for BOPs and bytes. Biases and batch norms count as well.
        act_bits: of every activation, for BOPs and bytes.
    """
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    was_training = [(module, module.training) for module in teacher.modules()]
    # Fused attention and fused encoder layers are single operators whose products nobody counts.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    teacher.eval()
    # Copies: what shares memory with the other samples would count with them.
    samples = tuple(x[:1].clone() for x in examples)
    trace = _Trace(samples, teacher)
    try:
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            trace,
        ):
            result = teacher(*samples)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in was_training:
            module.training = mode
    macs = counter.get_total_flops() // 2
    live = trace.live_bytes(result, act_bits)
    parameters, rows = 0, []
    known: set[nn.Parameter] = set()
    for path, module in trace.in_order(teacher):
        own = [item for item in module.parameters(recurse=False) if item not in known]
        known.update(own)
        products = tuple(use.product for use in trace.uses if use.path == path and use.product)
        if not own and not products:
            continue
        count, products_macs = sum(item.numel() for item in own), sum(p.macs for p in products)
        parameters += count
        rows.append(
            StepCost(
                name=path,
                operator=type(module).__name__,
                origin=path,
                macs=products_macs,
                bops=products_macs * weight_bits * act_bits,
                parameters=count,
                weight_bits=weight_bits,
                activation_bits=act_bits,
                weight_bytes=_bytes(count, weight_bits),
                live_bytes=max(
                    (size for use, size in zip(trace.uses, live, strict=True) if use.path == path),
                    default=0,
                ),
                products=products,
            )
        )
    missed = macs - sum(row.macs for row in rows)
    return Cost(
        macs=macs,
        bops=macs * weight_bits * act_bits,
        parameters=parameters,
        weight_bytes=_bytes(parameters, weight_bits),
        activation_bytes=max(live, default=0),
        steps=tuple(rows),
        uncounted={"MACs of no module": missed} if missed else {},
    )


@dataclass
class _Use:
    """One operator that ran: where, what it multiplied, and the storages it touched."""

    path: str
    product: Product | None
    reads: list[int]
    writes: list[int]
    in_place: bool


class _Trace(TorchDispatchMode):
    """Everything that a network computes from its inputs, operator by operator."""

    def __init__(self, inputs: Sequence[Tensor], network: nn.Module) -> None:
        super().__init__()
        self.uses: list[_Use] = []
        self._network = network
        self._path = [""]
        self._order: dict[str, None] = {}
        self._hooks: list[Any] = []
        # Kept to the end, so that no two buffers are at the same address.
        self._kept: list[Tensor] = list(inputs)
        self._elements: dict[int, int] = {}
        self._weights = {_address(t) for t in (*network.parameters(), *network.buffers())}
        self._inputs = self._known(inputs)

    def __enter__(self) -> Any:
        for path, module in self._network.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(path)))
            self._hooks.append(module.register_forward_hook(self._leaving, always_call=True))
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for hook in self._hooks:
            hook.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._path.append(path)
            self._order.setdefault(path)

        return hook

    def _leaving(self, *_: Any) -> None:
        self._path.pop()

    def in_order(self, network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Modules as they ran, then those that did not."""
        modules = dict(network.named_modules())
        for path in dict.fromkeys([*self._order, *modules]):
            yield path, modules[path]

    def _known(self, values: Any) -> list[int]:
        """Addresses of the activations among some arguments or results."""
        found = []
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and value.numel():
                address = _address(value)
                if address not in self._weights:
                    storage = value.untyped_storage()
                    self._elements[address] = storage.nbytes() // value.element_size()
                    self._kept.append(value)
                    found.append(address)
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        reads, writes = self._known((args, kwargs)), self._known(result)
        in_place = torch.Tag.pointwise in func.tags or "batch_norm" in func.name()
        product = _product(func.overloadpacket, args, result)
        self.uses.append(_Use(self._path[-1], product, reads, writes, in_place))
        return result

    def live_bytes(self, result: Any, bits: int) -> list[int]:
        """For every use the bytes of all buffers that are alive while it runs."""
        last_read = {item: index for index, use in enumerate(self.uses) for item in use.reads}
        buffer = {item: item for item in self._elements}
        for index, use in enumerate(self.uses):
            fresh = [item for item in use.writes if item not in use.reads]
            for item in use.reads if use.in_place and fresh else ():
                dies = last_read[item] == index and item not in self._inputs
                if dies and self._elements[item] == self._elements[fresh[0]]:
                    buffer[fresh[0]] = buffer[item]
                    break
        outputs = self._known(result)
        # What nobody reads, such as the indices of a max-pooling, is never stored.
        wanted = {*last_read, *outputs}
        accesses = [
            [buffer[item] for item in (*use.reads, *use.writes) if item in wanted]
            for use in self.uses
        ]
        size = {item: _bytes(count, bits) for item, count in self._elements.items()}
        held = [buffer[item] for item in self._inputs]
        return live_bytes(accesses, size, held, [buffer[item] for item in outputs])


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _product(operator: Any, args: Any, result: Any) -> Product | None:
    """The matrix product that an ATen operator computes, or None."""
    aten = torch.ops.aten
    if operator in (aten.convolution, aten._convolution):
        weight, transposed, groups = args[1], args[6], args[8]
        # Of a transposed convolution every input pixel is multiplied by all of its filter.
        positions = (args[0] if transposed else result)[0, 0].numel()
        filters = (args[0] if transposed else result).shape[1] // groups
        return Product(positions, weight[0].numel(), filters, groups)
    if operator in (aten.mm, aten.addmm):
        left, right = args[-2:]
        return Product(left.shape[0], left.shape[1], right.shape[1])
    if operator in (aten.bmm, aten.baddbmm):
        left, right = args[-2:]
        return Product(left.shape[1], left.shape[2], right.shape[2], left.shape[0])
    return None


def _bits(quantizer: Any) -> int:
    return FLOAT_BITS if quantizer is None else int(quantizer.bits)


def _bytes(count: int, bits: int) -> int:
    return math.ceil(count * bits / 8)


def _value_bits(student: Student, given: Mapping[str, int]) -> dict[str, int]:
    """Bits of every value: an activation sets them, what computes nothing hands them on.

    Token numbers reach a layer as one-hots, whose members have one bit.
    """
    bits = dict.fromkeys(student.graph.inputs, FLOAT_BITS)
    bits |= dict.fromkeys(student.graph.indices, 1)
    bits |= given
    for step in student.graph.steps:
        module = student.operator(step.name)
        if isinstance(module, Activation) and module.quantizer is not None:
            bits[step.name] = _bits(module.quantizer)
        elif isinstance(module, Activation | LayoutMove | MaxPooling | Concat):
            bits[step.name] = max(bits[name] for name in step.inputs)
        else:
            bits[step.name] = FLOAT_BITS
    return bits


def _live_bytes(student: Student, bits: dict[str, int]) -> dict[str, int]:
    """For every step the bytes of all buffers in use while it runs."""
    steps, readers = student.graph.steps, student.consumers()
    # Values that share a buffer, named by the last one.
    buffer = {name: name for name in student.graph.shapes}
    for step in reversed(steps):
        module = student.operator(step.name)
        source = step.inputs[0]
        in_place = isinstance(module, Activation | Reshape) and len(readers[source]) == 1
        if in_place and source not in student.graph.inputs:
            buffer[source] = buffer[step.name]
    size = {
        name: _bytes(math.prod(student.graph.shapes[name]), bits[name])
        for name in set(buffer.values())
    }
    accesses = [[buffer[name] for name in (*step.inputs, step.name)] for step in steps]
    held = [buffer[name] for name in student.graph.inputs]
    live = live_bytes(accesses, size, held, [buffer[name] for name in student.graph.outputs])
    return {step.name: amount for step, amount in zip(steps, live, strict=True)}


def live_bytes(
    accesses: Sequence[Sequence[Any]],
    size: Mapping[Any, int],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
) -> list[int]:
    """Bytes in use at each step, when a buffer lives from its first to its last use.

    Args:
        accesses: the buffers that each step reads or writes.
        size: bytes of a buffer.
        inputs: buffers that are there from the beginning.
        outputs: buffers that stay to the end.
    """
    last_use = {name: index for index, names in enumerate(accesses) for name in names}
    last_use.update(dict.fromkeys(outputs, len(accesses)))
    live, found = set(inputs), []
    total = sum(size[name] for name in live)
    unused = [name for name in live if name not in last_use]
    for index, names in enumerate(accesses):
        fresh = set(names) - live
        live |= fresh
        total += sum(size[name] for name in fresh)
        found.append(total)
        gone = {name for name in (*names, *unused) if last_use.get(name, -1) <= index} & live
        live -= gone
        total -= sum(size[name] for name in gone)
        unused = []
    return found
