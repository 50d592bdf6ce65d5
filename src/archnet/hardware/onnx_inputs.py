"""The inputs of an ONNX file: the sizes that its figures are for, and which axis is the batch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from archnet.errors import ConfigError
from archnet.hardware.onnx_file import MAX_ELEMENTS, TYPES, AuditError

Shape = tuple[int | None, ...]
Sizes = Mapping[str, Sequence[int]]

MAX_SIZE = 2**31 - 1
# Names that exporters give to every axis they know nothing of: two alike need not be the same.
_BATCH = re.compile(r"n|b|bs|.*batch.*", re.IGNORECASE)
_NAMELESS = re.compile(r"\?|-1|None|unk__\d+|p2o\.DynamicDimension\.\d+|")


def input_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """The shapes that a key ``input=`` states, by input; "" is the only input of a file.

    Example: "1x3x640x640" is {"": (1, 3, 640, 640)}; "ids:1x16,mask:1x16" names two inputs.

    Raises:
        ConfigError: a part is not [name:]1x3x640x640, or a name comes twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    # Names may hold commas and colons: a comma ends a part where a size is before it.
    for part in re.split(r"(?<=\d),", text):
        name, _, sizes = part.rpartition(":")
        if not re.fullmatch(r"\d{1,10}(x\d{1,10})*", sizes) or name in found:
            raise ConfigError(
                f"input={text} is no list of shapes: write input=1x3x640x640, "
                "or input=name:1x3x640x640,other:1x4 for several inputs"
            )
        found[name] = tuple(int(size) for size in sizes.split("x"))
    return found


@dataclass(frozen=True)
class Inputs:
    """What a run would be given.

    Attributes:
        shapes: of the inputs; None is a size that neither the file nor the user states.
        batch: samples that a run takes, 1 where the file leaves that open.
        batched: names of the inputs that grow with the batch.
        symbols: sizes of the named axes of the file, as far as they are known.
    """

    shapes: Mapping[str, Shape]
    batch: int
    batched: frozenset[str]
    symbols: Mapping[str, int]

    def dims(self, info: onnx.ValueInfoProto) -> Shape | None:
        """The shape that a file declares for a value; None where it declares none."""
        if not info.type.tensor_type.HasField("shape"):
            return None
        axes = _axes(info)
        return tuple(self.symbols.get(x) if isinstance(x, str) else x for x in axes)


def settle(graph: onnx.GraphProto, given: Sizes | None = None) -> Inputs:
    """Sizes of the inputs and the batch.

    The batch is the open axis of the first input (of two axes or more) that is called N, B, bs or
    batch, else its first axis, if that is open: one sample, unless ``given`` says more. It is every
    axis of that name, or called a batch, and an open first axis without a name; other open axes
    have nothing to do with it. Where the first axis is fixed, the batch is that of the first input
    (of two axes or more) whose size an output begins with as well.

    Args:
        graph: of the file.
        given: sizes by input, the name "" for the only one.

    Raises:
        AuditError: a declared size is impossible.
        ConfigError: a given shape does not fit the file.
    """
    known = {item.name for item in graph.initializer}
    axes = {
        item.name: _axes(item)
        for item in graph.input
        if item.name not in known and item.type.HasField("tensor_type")
    }
    stated = _checked(axes, given or {})
    symbols: dict[str, int] = {}
    for name, shape in stated.items():
        for axis, size in zip(axes[name], shape, strict=True):
            if isinstance(axis, str) and symbols.setdefault(axis, size) != size:
                raise ConfigError(
                    f"input {name}: {axis} is {size} here, and {symbols[axis]} before"
                )
    # The first input that is more than a number or a row of them.
    main = max(axes.values(), key=lambda shape: min(len(shape), 2), default=())
    named = next((axis for axis in main if _is_batch(axis)), main[0] if main else 1)
    if fixed := isinstance(named, int):
        batch = _fixed_batch(graph, axes)
    else:
        first = [stated[key][0] for key, shape in axes.items() if key in stated and shape is main]
        found = symbols.get(named) if named is not None else next(iter(first), None)
        batch = 1 if found is None else found
    names = {axis for shape in axes.values() for axis in shape if _is_batch(axis) or axis == named}
    for axis in names - {None}:
        if isinstance(axis, str):
            symbols.setdefault(axis, batch)
    batched = {
        key
        for key, shape in axes.items()
        if shape and (shape[0] is None or names & {*shape} - {None} or (fixed and batch in shape))
    }
    shapes: dict[str, Shape] = {}
    for name, declared in axes.items():
        sizes = [symbols.get(axis) if isinstance(axis, str) else axis for axis in declared]
        if declared and declared[0] is None:
            sizes[0] = batch
        shapes[name] = stated.get(name, tuple(sizes))
    return Inputs(shapes, batch, frozenset(batched), symbols)


def _is_batch(axis: int | str | None) -> bool:
    return isinstance(axis, str) and _BATCH.fullmatch(axis) is not None


def _fixed_batch(graph: onnx.GraphProto, axes: Mapping[str, tuple[int | str | None, ...]]) -> int:
    sizes = [shape[0] for shape in axes.values() if len(shape) > 1 and isinstance(shape[0], int)]
    ends = {axis for item in graph.output for axis in _axes(item)[:1] if isinstance(axis, int)}
    return next((size for size in sizes if size in ends or not ends), 1)


def _axes(info: onnx.ValueInfoProto) -> tuple[int | str | None, ...]:
    """The axes that a file declares: sizes, names of open ones, None for open without a name.

    Raises:
        AuditError: a size is impossible, or the element type is not ONNX's.
    """
    tensor = info.type.tensor_type
    check_type(info.name, tensor.elem_type)
    found: list[int | str | None] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value") and dim.dim_value != -1:
            if not 0 < dim.dim_value <= MAX_SIZE:
                raise AuditError(f"{info.name} has an axis of {dim.dim_value}")
            found.append(dim.dim_value)
        else:
            found.append(None if _NAMELESS.fullmatch(dim.dim_param) else dim.dim_param)
    check_size(info.name, [size for size in found if isinstance(size, int)])
    return tuple(found)


def check_type(name: str, element_type: int) -> None:
    """Raise AuditError where an element type is none of ONNX's; 0 is one that is not stated."""
    if element_type not in TYPES:
        raise AuditError(f"{name} has the element type {element_type}, which ONNX has not")


def check_size(name: str, shape: Sequence[int | None]) -> None:
    """Raise AuditError where a shape has a negative size, or more elements than any memory."""
    elements = 1
    for size in shape:
        if size is not None and not 0 <= size <= MAX_SIZE:
            elements = -1
            break
        elements *= 1 if size is None else size
        if elements > MAX_ELEMENTS:
            break
    if not 0 <= elements <= MAX_ELEMENTS:
        text = "x".join("?" if size is None else str(size) for size in shape[:8])
        raise AuditError(f"{name} would be {text}{'x…' if len(shape) > 8 else ''}")


def _checked(
    axes: Mapping[str, tuple[int | str | None, ...]], given: Sizes
) -> dict[str, tuple[int, ...]]:
    """The given shapes, by input of the file."""
    found: dict[str, tuple[int, ...]] = {}
    for key, sizes in given.items():
        name = next(iter(axes)) if key == "" and len(axes) == 1 else key
        if name not in axes:
            what = f"has no input {key}" if key else f"has {len(axes)} inputs"
            raise ConfigError(f"input: the file {what}; it has {', '.join(axes) or 'none'}")
        declared, shape = axes[name], tuple(sizes)
        fits = len(shape) == len(declared) and all(
            size == axis or not isinstance(axis, int)
            for size, axis in zip(shape, declared, strict=True)
        )
        if not fits:
            wanted = ", ".join("?" if axis is None else str(axis) for axis in declared)
            text = "x".join(map(str, shape))
            raise ConfigError(f"input {name}: {text} does not fit ({wanted}), as the file has it")
        if not all(0 < size <= MAX_SIZE for size in shape):
            raise ConfigError(f"input {name}: {'x'.join(map(str, shape))} has impossible sizes")
        check_size(f"input {name}", shape)
        found[name] = shape
    return found
