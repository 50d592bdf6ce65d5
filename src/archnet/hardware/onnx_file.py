"""Opening an ONNX file that anybody may have written: checked in full, its functions inlined.

ONNX's own checker looks at names and operators. Sizes, element types and the amount of data are
looked at here, before code that trusts them meets them.
"""

import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import onnx
from onnx import AttributeProto, TensorProto, helper, inliner

from archnet.errors import ArchnetError, printable

# More than any tensor of a network has; products of sizes stay far from the end of 64 bits.
MAX_ELEMENTS = 2**48
# Once functions are inlined; the largest published networks have some ten thousand.
MAX_NODES = 100_000
# Protobuf holds no more.
MAX_BYTES = 2**31

Container = onnx.GraphProto | onnx.FunctionProto
TYPES = frozenset(TensorProto.DataType.values())
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")
_PACKED_BITS: dict[int, int] = {
    TensorProto.INT2: 2,
    TensorProto.UINT2: 2,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT4E2M1: 4,
}
_STANDARD = ("", "ai.onnx")
# Attributes that count axes; far more axes than any tensor has overflow the native code.
_AXES = ("axis", "axes", "perm", "batch_axis", "time_axis", "batch_dims")
MAX_AXES = 64
_WINDOWED = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")


class AuditError(ArchnetError):
    """A file that cannot be judged, because it is no valid ONNX model."""


def load(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    """A model, checked, with its functions inlined; a model in memory is copied.

    Raises:
        AuditError: the file is missing or no valid ONNX model, or larger than is read here.
    """
    name = name_of(source)
    try:
        if isinstance(source, onnx.ModelProto):
            model = onnx.ModelProto()
            model.CopyFrom(source)
            _open_sizes(model)
            _check(model, name, None)
            onnx.checker.check_model(model)
        else:
            path = Path(source)
            if not stat.S_ISREG(path.stat().st_mode):
                raise AuditError(f"cannot read {name}: it is no file")
            model = onnx.load(path, format="protobuf", load_external_data=False)
            _open_sizes(model)
            _check(model, name, path.parent)
            # By path, so that a file of any size can be checked.
            onnx.checker.check_model(os.fspath(path))
        if model.functions:
            model = inliner.inline_local_functions(model)
            # Attributes that a function takes from its call have their values now.
            _check_nodes(model, name)
        return model
    except AuditError:
        raise
    except OSError as error:
        raise AuditError(f"cannot read {name}: {error.strerror or error}") from error
    except Exception as error:  # The exceptions of onnx and of protobuf have no common base.
        refuse(name, first_line(error))


def name_of(source: str | os.PathLike[str] | onnx.ModelProto) -> str:
    """What messages call a model."""
    return "the model" if isinstance(source, onnx.ModelProto) else printable(os.fspath(source))


def first_line(error: Exception) -> str:
    """The first line of what a foreign library says, or the kind of its error."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], 300)


def refuse(name: str, reason: str) -> NoReturn:
    """End with the error of an invalid model."""
    raise AuditError(f"{name} is no valid ONNX model: {reason}")


def _open_sizes(model: onnx.ModelProto) -> None:
    """Some exporters write -1 where a size is open."""
    for item in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in item.type.tensor_type.shape.dim:
            if dim.HasField("dim_value") and dim.dim_value == -1:
                dim.ClearField("dim_value")


def _check(model: onnx.ModelProto, name: str, folder: Path | None) -> None:
    """Refuse what ONNX's checker lets pass, or would walk for too long."""
    if not model.graph.node:
        refuse(name, "its graph has no nodes")
    if not model.graph.output:
        refuse(name, "its graph has no outputs")
    for item in model.opset_import:
        newest = onnx.defs.onnx_opset_version()
        if item.domain in _STANDARD and item.version > newest:
            raise AuditError(
                f"{name} is of opset {item.version}, and the onnx that is installed knows "
                f"{newest}: pip install -U onnx, or export with an older opset"
            )
    for container in _containers(model):
        if not all(isinstance(text, str) for text in _texts(container)):
            refuse(name, "a name in it is no UTF-8")
    check_amount(model, name)
    for container in _containers(model):
        if isinstance(container, onnx.GraphProto):
            _check_values((*container.input, *container.output, *container.value_info), name)
            for item in container.initializer:
                _check_tensor(item, name, folder)
            for sparse in container.sparse_initializer:
                _check_tensor(sparse.values, name, folder)
                _check_tensor(sparse.indices, name, folder)
        for node in container.node:
            for item in node.attribute:
                for tensor in (*([item.t] if item.HasField("t") else ()), *item.tensors):
                    _check_tensor(tensor, name, folder)
                if item.name in _TYPE_ATTRIBUTES and item.type == AttributeProto.INT:
                    _check_type(item.i, f"{item.name} of {shown(node)}", name)
    _check_nodes(model, name)


def _check_nodes(model: onnx.ModelProto, name: str) -> None:
    """Refuse nodes with which native code would hang or leave its memory."""
    versions = {item.domain.removeprefix("ai.onnx"): item.version for item in model.opset_import}
    schemas: dict[str, onnx.defs.OpSchema | None] = {}
    for container in _containers(model):
        tensors = container.initializer if isinstance(container, onnx.GraphProto) else ()
        ranks = {item.name: len(item.dims) for item in tensors}
        for node in container.node:
            if node.domain not in _STANDARD:
                continue
            if node.op_type not in schemas:
                schemas[node.op_type] = _schema(node.op_type, versions.get("", 1))
            _check_left_out(node, schemas[node.op_type], name)
            _check_attributes(node, name)
            if node.op_type in _WINDOWED:
                _check_window(node, [ranks.get(item) for item in node.input], name)


def _schema(operator: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(operator, version)
    except onnx.defs.SchemaError:
        return None  # The checker says so.


def _texts(container: Container) -> Iterator[object]:
    """The names in a graph or a function; protobuf gives bytes for what is no text."""
    if isinstance(container, onnx.FunctionProto):
        yield from (container.name, container.domain, *container.input, *container.output)
    else:
        for item in (*container.input, *container.output, *container.value_info):
            yield item.name
            yield from (dim.dim_param for dim in item.type.tensor_type.shape.dim)
        yield from (item.name for item in container.initializer)
    for node in container.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (item.name for item in node.attribute)
        yield from (text for item in node.metadata_props for text in (item.key, item.value))


def _containers(model: onnx.ModelProto) -> Iterator[Container]:
    """The graph, the functions, and all graphs inside of them."""
    waiting: list[Container] = [model.graph, *model.functions]
    while waiting:
        container = waiting.pop()
        yield container
        for node in container.node:
            waiting += bodies(node)


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node of control flow."""
    for item in node.attribute:
        if item.HasField("g"):
            yield item.g
        yield from item.graphs


def drop_trailing_names(model: onnx.ModelProto) -> bool:
    """Take empty names off the end of inputs, which mean nothing; whether there were any."""
    found = False
    for container in _containers(model):
        for node in container.node:
            while node.input and not node.input[-1]:
                node.input.pop()
                found = True
    return found


def check_amount(model: onnx.ModelProto, name: str) -> None:
    """Refuse more nodes, or more bytes, than are read here once functions are inlined.

    Raises:
        AuditError: there are more, a function calls itself, or two have the same name.
    """
    functions = {_key(item): item for item in model.functions}
    if len(functions) < len(model.functions):
        refuse(name, "two of its functions have the same name")
    # (nodes, bytes) of each function; None while it is being counted.
    found: dict[tuple[str, str, str], tuple[int, int] | None] = {}
    # Depth first without recursion: a function is counted once all that it calls are.
    waiting = list(functions)
    while waiting:
        key = waiting[-1]
        called = [_called(node) for node in _nodes(functions[key])]
        missing = [one for one in called if one in functions and one not in found]
        if key not in found and missing:
            found[key] = None
            waiting += missing
            continue
        if any(one in functions and found.get(one) is None for one in called):
            refuse(name, f"its function {printable(key[1])} calls itself")
        waiting.pop()
        if found.get(key) is None:
            found[key] = _amount(functions[key], called, found)
    called = [_called(node) for node in _nodes(model.graph)]
    nodes, size = _amount(model.graph, called, found)
    if nodes > MAX_NODES:
        raise AuditError(
            f"{name} has {nodes:,} nodes, its functions inlined; at most {MAX_NODES:,} are read"
        )
    if size > MAX_BYTES:
        raise AuditError(
            f"{name} has {size:,} bytes, its functions inlined; at most {MAX_BYTES:,} are read"
        )


def _amount(
    container: Container,
    called: Sequence[tuple[str, str, str]],
    found: dict[tuple[str, str, str], tuple[int, int] | None],
) -> tuple[int, int]:
    inner = [amount for key in called if (amount := found.get(key)) is not None]
    nodes = len(called) - len(inner) + sum(count for count, _ in inner)
    return nodes, container.ByteSize() + sum(size for _, size in inner)


def _nodes(container: Container) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph or function, those of the graphs inside of it included."""
    waiting = [container]
    while waiting:
        for node in waiting.pop().node:
            yield node
            waiting += bodies(node)


def _key(function: onnx.FunctionProto) -> tuple[str, str, str]:
    return function.domain.removeprefix("ai.onnx"), function.name, function.overload


def _called(node: onnx.NodeProto) -> tuple[str, str, str]:
    return node.domain.removeprefix("ai.onnx"), node.op_type, node.overload


def _check_values(values: Iterable[onnx.ValueInfoProto], name: str) -> None:
    for item in values:
        kind = item.type.tensor_type
        where = printable(item.name)
        _check_type(kind.elem_type, where, name)
        sizes = [dim.dim_value for dim in kind.shape.dim if dim.HasField("dim_value")]
        _check_sizes(sizes, where, name)


def _check_sizes(sizes: Sequence[int], where: str, name: str) -> None:
    for size in sizes:
        if size < 0:
            refuse(name, f"{where} has an axis of size {size}")
    if any(size > MAX_ELEMENTS for size in sizes) or math.prod(sizes) > MAX_ELEMENTS:
        shape = "x".join(map(str, sizes[:8]))
        refuse(name, f"{where} is {shape}, more elements than the {MAX_ELEMENTS:,} read here")


def _check_type(kind: int, where: str, name: str) -> None:
    if kind not in TYPES:
        refuse(name, f"{where} has element type {kind}, which there is not")


def _check_tensor(tensor: TensorProto, name: str, folder: Path | None) -> None:
    where = f"tensor {printable(tensor.name)}"
    _check_type(tensor.data_type, where, name)
    _check_sizes(tensor.dims, where, name)
    if tensor.data_type == TensorProto.UNDEFINED:
        refuse(name, f"{where} has no element type")
    count = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        if len(tensor.string_data) != count:
            refuse(name, f"{where} holds {len(tensor.string_data)} of {count} strings")
        return
    needed = math.ceil(count * bits_of(tensor.data_type) / 8)
    if tensor.data_location == TensorProto.EXTERNAL:
        if folder is not None:
            _check_external(tensor, where, needed, name, folder)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != needed:
            refuse(name, f"{where} holds {len(tensor.raw_data)} of {needed} bytes")
    else:
        field = helper.tensor_dtype_to_field(tensor.data_type)
        # Narrow integers are packed in bytes there; of a complex number both parts are stored.
        each = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
        entries = needed if tensor.data_type in _PACKED_BITS else count * each
        if len(getattr(tensor, field)) != entries:
            refuse(name, f"{where} holds {len(getattr(tensor, field))} of {entries} numbers")


def _check_external(tensor: TensorProto, where: str, needed: int, name: str, folder: Path) -> None:
    """Refuse data beside the file that is elsewhere, missing or cut off."""
    entries = {item.key: item.value for item in tensor.external_data}
    location = entries.get("location", "")
    path = folder / location
    if not location or not path.resolve().is_relative_to(folder.resolve()):
        refuse(name, f"the data of {where} is not in its folder: {printable(location)!r}")
    if not path.is_file():
        raise AuditError(f"{name}: the data of {where} is missing: {printable(path)}")
    numbers = [entries.get("offset") or "0", entries.get("length") or str(needed)]
    if not all(text.isdecimal() and len(text) < 20 for text in numbers):
        refuse(name, f"the data of {where} has no place in {printable(location)}")
    offset, length = map(int, numbers)
    if length != needed:
        refuse(name, f"{where} holds {length} of {needed} bytes")
    if offset + length > path.stat().st_size:
        raise AuditError(f"{name}: the data of {where} is cut off: {printable(path)}")


def _check_left_out(node: onnx.NodeProto, schema: onnx.defs.OpSchema | None, name: str) -> None:
    """Refuse an empty name among values of any number, each of which must be there.

    ONNX's checker looks at those of a fixed number.
    """
    if schema is None:
        return
    for what, names, stated in (
        ("input", node.input, schema.inputs),
        ("output", node.output, schema.outputs),
    ):
        if stated and stated[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic:
            for index in range(len(stated) - 1, len(names)):
                if not names[index]:
                    refuse(name, f"{what} {index} of {shown(node)} has no name")


def _check_attributes(node: onnx.NodeProto, name: str) -> None:
    """Refuse attributes that fit no input."""
    # What a function takes from its call is not known here.
    stated = {item.name: item for item in node.attribute if not item.ref_attr_name}
    for key in _AXES:
        if key not in stated:
            continue
        axes = (stated[key].i, *stated[key].ints)
        lowest = 0 if key == "batch_dims" else -MAX_AXES
        for axis in axes:
            if not lowest <= axis < MAX_AXES:
                refuse(name, f"{shown(node)} has {key} {axis}")
    if node.op_type == "Split" and "num_outputs" in stated:
        count = stated["num_outputs"].i
        if count != len(node.output):
            refuse(name, f"{shown(node)} has num_outputs {count} and {len(node.output)} outputs")
    if node.op_type == "Einsum" and "equation" in stated:
        text = stated["equation"].s
        # The inference never ends at a sign that it does not know.
        if re.fullmatch(rb"[A-Za-z,. ]*(->[A-Za-z. ]*)?", text) is None:
            refuse(name, f"{shown(node)} has equation {printable(text.decode(errors='replace'))!r}")


def _check_window(node: onnx.NodeProto, ranks: Sequence[int | None], name: str) -> None:
    """Refuse a convolution or a pooling that no input makes valid; ONNX's checker looks at none."""
    stated = {item.name: item for item in node.attribute if not item.ref_attr_name}
    axes = {rank - 2 for rank in ranks[:2] if rank is not None}
    if "group" in stated and stated["group"].i < 1:
        refuse(name, f"{shown(node)} has {stated['group'].i} groups")
    for key, each in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 2)):
        if key not in stated or (not stated[key].ints and key != "kernel_shape"):
            continue
        sizes = stated[key].ints
        wrong = key != "pads" and (min(sizes, default=1) < 1 or max(sizes, default=1) >= 2**31)
        if wrong or len(sizes) % each:
            refuse(name, f"{shown(node)} has {key} {list(sizes[:8])}")
        axes.add(len(sizes) // each)
    if len(axes) > 1 or min(axes, default=1) < 1:
        counts = " and ".join(str(count) for count in sorted(axes))
        refuse(name, f"{shown(node)}: its input, weight and window have {counts} axes of pixels")


def shown(node: onnx.NodeProto) -> str:
    """A node in messages: its operator and its name."""
    return f"{printable(node.op_type)} {printable(node.name or ', '.join(node.output))}"


def bits_of(data_type: int) -> int:
    """Bits of an element as it is stored; packed types have no NumPy type of their size."""
    if data_type in _PACKED_BITS:
        return _PACKED_BITS[data_type]
    return 8 * int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)
