"""Mutated ONNX files through every reader: nothing but answers and errors of one line.

    python benchmarks/fuzz_onnx.py --count 10000 --seed 0 --record

makes files (of our exporters in every form, of torch's exporter, and built by hand with control
flow, functions and data beside the file), changes bits, attributes, shapes, types, nodes, names and
tensors of them, and has each read by audit, cost, parity and the commands. Worker processes have a
limit of memory, and are watched: reported are tracebacks, readers that take more than ten seconds
of a core or too much memory, crashes of native code, messages of several lines or with control
characters, and anything that is executed, sent or written. The exit code is 1 if there is any.

Every file follows from the seed and its number: ``--first 17 --count 1 --keep folder`` makes number
17 again, and keeps it if something is found.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import Error as ProtobufError
from onnx import AttributeProto, TensorProto, helper, numpy_helper
from record import append_robustness
from torch import nn

import archnet
from archnet.cli import main as command
from archnet.errors import ArchnetError
from archnet.hardware import audit, onnx_cost
from archnet.ops import Student
from archnet.quant import Recipe

SECONDS = 10.0  # of the processor, for one reader on one file
WAITING = 120.0  # on the clock, which other work may slow down
MEMORY = 4 * 2**30  # bytes that a worker may take beside what it has when it starts
KINDS = ("traceback", "hang", "crash", "memory", "executed", "output")


# Files to start from -------------------------------------------------------------------------


class _Convolutions(nn.Module):
    """Stride, batch norm, ReLU6, a residual, a concatenation, poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 3, 1, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(13, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu6(self.norm(self.stem(x)))
        x = torch.relu(x + self.left(x))
        x = torch.cat([x, self.right(x)], 1)
        return self.head(self.pool(x).mean((2, 3)))


class _Anything(nn.Module):
    """What students do not have: grouped and transposed convolution, attention, resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 5, padding=2, groups=4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.depthwise(x)) + nn.functional.max_pool2d(x, 3, 1, 1)
        x = nn.functional.interpolate(self.up(x), scale_factor=0.5)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        return self.head((tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens)


def seed_files(folder: Path) -> tuple[list[Path], Student]:
    """Write the files to start from, and give the student that some of them were exported from."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 12, 12)
    student = archnet.convert(_Convolutions().eval(), images[:1])
    archnet.export(student, folder / "float.onnx")
    archnet.quantize(student, Recipe(4, 4), calibration=[images])
    for form in ("qdq", "subbyte", "qonnx"):
        archnet.export(student, folder / f"{form}.onnx", form=form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, axes in (("torch", None), ("torch_open", {"x": {0: "N", 2: "H", 3: "W"}})):
            torch.onnx.export(
                _Anything().eval(),
                (torch.randn(1, 4, 8, 8),),
                folder / f"{name}.onnx",
                dynamo=False,
                input_names=["x"],
                opset_version=17,
                dynamic_axes=axes,
            )
    for name, model in (("control", _control_flow()), ("functions", _functions())):
        onnx.save(model, folder / f"{name}.onnx")
    onnx.save(
        _plain(),
        folder / "beside.onnx",
        save_as_external_data=True,
        location="beside.data",
        size_threshold=0,
    )
    return sorted(folder.glob("*.onnx")), student.eval()


def _value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, Any],
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "by hand",
        [_value("x", "N", 4, 8, 8), _value("flag", kind=TensorProto.BOOL)],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions)


def _plain() -> onnx.ModelProto:
    node, ones = helper.make_node, np.ones
    nodes = [
        node("Conv", ["x", "w", "b"], ["a"], pads=[1, 1, 1, 1]),
        node("Resize", ["a", "", "scales"], ["c"], mode="linear"),
        node("QuantizeLinear", ["c", "scale", "zero"], ["d"]),
        node("DequantizeLinear", ["d", "scale", "zero"], ["e"]),
        node("Reshape", ["e", "rows"], ["f"]),
        node("DequantizeLinear", ["m", "scale", ""], ["g"]),
        node("Gemm", ["f", "g", "n"], ["y"], transB=1),
    ]
    constants = {
        "w": ones((6, 4, 3, 3), np.float32),
        "b": ones(6, np.float32),
        "scales": ones(4, np.float32),
        "scale": np.float32(0.5),
        "zero": np.uint8(3),
        "rows": np.array([-1, 384]),
        "m": ones((5, 384), np.int8),
        "n": ones(5, np.float32),
    }
    return _model(nodes, [_value("y", "N", 5)], constants)


def _control_flow() -> onnx.ModelProto:
    node = helper.make_node
    branches = {
        f"{name}_branch": helper.make_graph(
            [node(operator, ["x"], [name])], name, [], [_value(name, "N", 4, 8, 8)]
        )
        for name, operator in (("then", "Relu"), ("else", "Sigmoid"))
    }
    body = helper.make_graph(
        [node("Identity", ["going"], ["goes"]), node("Conv", ["state", "w"], ["next"])],
        "body",
        [
            _value("turn", kind=TensorProto.INT64),
            _value("going", kind=TensorProto.BOOL),
            _value("state", "N", 4, 8, 8),
        ],
        [_value("goes", kind=TensorProto.BOOL), _value("next", "N", 4, 8, 8)],
    )
    nodes = [
        node("If", ["flag"], ["a"], **branches),
        node("Shape", ["a"], ["sizes"]),
        node("Loop", ["turns", "flag", "a"], ["b"], body=body),
        node("Reshape", ["b", "sizes"], ["c"]),
        node("Split", ["c"], ["d", "e"], axis=1, num_outputs=2),
        node("GlobalMaxPool", ["d"], ["y"]),
        node("LSTM", ["sequence", "lstm", "again"], ["", "z"], hidden_size=2),
    ]
    constants = {
        "w": np.ones((4, 4, 1, 1), np.float32),
        "turns": np.int64(3),
        "sequence": np.ones((3, 1, 4), np.float32),
        "lstm": np.ones((1, 8, 4), np.float32),
        "again": np.ones((1, 8, 2), np.float32),
    }
    return _model(nodes, [_value("y", "N", 2, 1, 1), _value("e", "N", 2, 8, 8)], constants)


def _functions() -> onnx.ModelProto:
    node, opsets = helper.make_node, [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    inner = helper.make_function(
        "local",
        "Inner",
        ["a", "w"],
        ["c"],
        [node("Conv", ["a", "w"], ["b"], pads=[1, 1, 1, 1]), node("Relu", ["b"], ["c"])],
        opsets,
    )
    outer = helper.make_function(
        "local",
        "Outer",
        ["a", "w"],
        ["c"],
        [
            node("Inner", ["a", "w"], ["b"], domain="local"),
            node("Inner", ["b", "w"], ["c"], domain="local"),
        ],
        opsets,
    )
    nodes = [
        node("Outer", ["x", "w"], ["a"], domain="local"),
        node("MaxPool", ["a"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    constants = {"w": np.ones((4, 4, 3, 3), np.float32)}
    return _model(nodes, [_value("y", "N", 4, 4, 4)], constants, [outer, inner])


# Mutations -----------------------------------------------------------------------------------

NUMBERS = (-(2**63), -(2**31), -5, -1, 0, 1, 2, 3, 7, 1009, 2**16, 2**31, 2**40, 2**62, 2**63 - 1)
NAMES = (
    "",
    "[bold red]x[/]",
    "[/]",
    "a\nb",
    "\x1b[2J\x1b]0;title\x07",
    "\u202egnp.exe",
    "../../outside",
    "/etc/passwd",
    "x" * 5000,
    "name\x00",
    "${oc.env:HOME}",
    "é中",
)
# fmt: off
OPERATORS = (
    "Conv", "ConvTranspose", "MatMul", "Gemm", "Relu", "Clip", "Add", "Concat", "Reshape", "Pad",
    "Slice", "Split", "Transpose", "Resize", "MaxPool", "GlobalAveragePool", "BatchNormalization",
    "QuantizeLinear", "DequantizeLinear", "Gather", "Shape", "If", "Loop", "Scan", "Dropout",
    "Einsum", "NonZero", "Expand", "ConstantOfShape", "Range", "Tile", "Cast", "Constant",
    "Identity", "LSTM", "Softmax", "Flatten", "Squeeze", "Unsqueeze", "Size", "ReduceMean",
    "Quant", "QLinearConv", "Upsample", "TopK",
)
# fmt: on

Random = random.Random


def mutated(content: bytes, chance: Random) -> bytes:
    """The content of a file, with up to four changes of any kind."""
    if chance.random() < 0.25:
        return _bits(content, chance)
    model = onnx.load_model_from_string(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        change = chance.choice(CHANGES)
        # A change that protobuf itself refuses is none.
        with contextlib.suppress(ValueError, TypeError, IndexError, ProtobufError):
            change(model, chance)
    content = model.SerializeToString()
    return _bits(content, chance) if chance.random() < 0.1 else content


def _bits(content: bytes, chance: Random) -> bytes:
    data = bytearray(content)
    what = chance.random()
    if what < 0.1:
        return bytes(data[: chance.randrange(len(data) + 1)])
    if what < 0.2:
        first, other = sorted(chance.randrange(len(data)) for _ in range(2))
        return bytes(data[:first] + data[other:] + data[first:other])
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _graphs(model: onnx.ModelProto) -> list[Any]:
    found: list[Any] = [model.graph, *model.functions]
    for container in found:
        for node in container.node:
            for item in node.attribute:
                found += [*item.graphs, *([item.g] if item.HasField("g") else [])]
    return found


def _any_graph(model: onnx.ModelProto, chance: Random) -> Any:
    graphs = _graphs(model)
    return graphs[0] if chance.random() < 0.6 else chance.choice(graphs)


def _any_node(model: onnx.ModelProto, chance: Random) -> onnx.NodeProto:
    return chance.choice(_any_graph(model, chance).node)


def _number(chance: Random) -> int:
    return chance.choice(NUMBERS)


def _change_attribute(model: onnx.ModelProto, chance: Random) -> None:
    node = _any_node(model, chance)
    item = chance.choice(node.attribute)
    what = chance.random()
    if what < 0.1:
        node.attribute.remove(item)
    elif what < 0.2:
        item.type = chance.randint(0, 15)
    elif what < 0.3:
        item.name = chance.choice((*NAMES, "group", "kernel_shape", "axis", "value", "to", "mode"))
    elif item.type == AttributeProto.INT:
        item.i = _number(chance)
    elif item.type == AttributeProto.INTS:
        if chance.random() < 0.5:
            item.ints[chance.randrange(len(item.ints))] = _number(chance)
        elif chance.random() < 0.5:
            del item.ints[chance.randrange(len(item.ints)) :]
        else:
            item.ints.extend([_number(chance)] * chance.choice((1, 2, 50)))
    elif item.type == AttributeProto.STRING:
        item.s = chance.choice((b"", b"SAME_UPPER", b"\xff\xfe", b"cubic", b"x" * 1000))
    elif item.type == AttributeProto.TENSOR:
        _spoil(item.t, chance)
    else:
        item.f = chance.choice((float("nan"), float("inf"), -1.0, 1e38))


def _add_attribute(model: onnx.ModelProto, chance: Random) -> None:
    name = chance.choice(("group", "axis", "strides", "pads", "dilations", "transA", "auto_pad"))
    numbers = [_number(chance) for _ in range(chance.choice((0, 1, 2, 4, 100)))]
    value = chance.choice((_number(chance), numbers or [1], "SAME_LOWER", 0.5))
    _any_node(model, chance).attribute.append(helper.make_attribute(name, value))


def _change_shape(model: onnx.ModelProto, chance: Random) -> None:
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    shape = chance.choice(values).type.tensor_type.shape
    what = chance.random()
    if what < 0.5:
        chance.choice(shape.dim).dim_value = _number(chance)
    elif what < 0.7:
        del shape.dim[chance.randrange(len(shape.dim) + 1) :]
    elif what < 0.9:
        for _ in range(chance.choice((1, 3, 40))):
            shape.dim.add(dim_value=_number(chance))
    else:
        chance.choice(shape.dim).dim_param = chance.choice(NAMES)


def _change_type(model: onnx.ModelProto, chance: Random) -> None:
    graph = model.graph
    item = chance.choice([*graph.input, *graph.output, *graph.initializer])
    kind = chance.choice((*range(31), 99, -1, 2**31 - 1))
    if isinstance(item, TensorProto):
        item.data_type = kind
    elif chance.random() < 0.1:
        item.type.sequence_type.elem_type.tensor_type.elem_type = 1
    else:
        item.type.tensor_type.elem_type = kind


def _change_node(model: onnx.ModelProto, chance: Random) -> None:
    nodes = _any_graph(model, chance).node
    index = chance.randrange(len(nodes))
    node, what = nodes[index], chance.random()
    if what < 0.2:
        del nodes[index]
    elif what < 0.35:
        nodes.append(node)
    elif what < 0.55:
        node.op_type = chance.choice((*OPERATORS, "Inner", "Outer", "NoSuch"))
    elif what < 0.65:
        node.domain = chance.choice(("", "ai.onnx", "local", "com.microsoft", "ai.onnx.ml", "\n"))
    elif what < 0.75:
        other = nodes[chance.randrange(len(nodes))]
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        node.CopyFrom(other)
        other.CopyFrom(copy)
    elif what < 0.85:
        new = helper.make_node(chance.choice(OPERATORS), list(node.input), [f"new{index}"])
        nodes.insert(index, new)
        node.input[0] = f"new{index}"
    elif what < 0.95 and node.input:
        # Often a cycle, or a value that there is not.
        source = chance.choice(nodes)
        node.input[chance.randrange(len(node.input))] = chance.choice((*source.output, "", "none"))
    else:
        del node.input[chance.randrange(len(node.input) + 1) :]


def _change_name(model: onnx.ModelProto, chance: Random) -> None:
    name, node = chance.choice(NAMES), _any_node(model, chance)
    what = chance.randrange(6)
    if what == 0:
        node.name = name
    elif what == 1:
        node.op_type = name
    elif what == 2:
        node.domain = name
    elif what == 3:
        chance.choice(model.graph.initializer).name = name
    elif what == 4:
        chance.choice([*model.graph.input, *model.graph.output]).name = name
    else:
        # Everywhere, so that the file stays valid.
        old = chance.choice(node.output)
        for container in _graphs(model):
            for other in container.node:
                for names in (other.input, other.output):
                    for index, text in enumerate(names):
                        names[index] = name if text == old else text


def _spoil(tensor: TensorProto, chance: Random) -> None:
    what = chance.random()
    if what < 0.2:
        tensor.data_type = chance.randint(-1, 31)
    elif what < 0.4:
        tensor.dims[chance.randrange(len(tensor.dims))] = _number(chance)
    elif what < 0.5:
        tensor.dims.extend([_number(chance)] * chance.choice((1, 30)))
    elif what < 0.6:
        del tensor.dims[:]
    elif what < 0.7:
        tensor.raw_data = tensor.raw_data[: chance.randrange(len(tensor.raw_data) + 1)]
    elif what < 0.8:
        tensor.raw_data = bytes(chance.randrange(256) for _ in tensor.raw_data[:10_000])
    elif what < 0.9:
        tensor.int64_data.extend([_number(chance)] * 3)
    else:
        tensor.data_location = TensorProto.EXTERNAL
        place = chance.choice((*NAMES, "beside.data", "absent.data", "."))
        for key, value in (("location", place), ("offset", str(_number(chance)))):
            tensor.external_data.add(key=key, value=value)


def _change_tensor(model: onnx.ModelProto, chance: Random) -> None:
    graph, what = model.graph, chance.random()
    tensor = chance.choice(graph.initializer)
    if what < 0.1:
        graph.initializer.remove(tensor)
    elif what < 0.2:
        graph.initializer.append(tensor)
    elif what < 0.3 and tensor.external_data:
        chance.choice(tensor.external_data).value = chance.choice((*NAMES, "-1", "99999999"))
    else:
        _spoil(tensor, chance)


def _change_frame(model: onnx.ModelProto, chance: Random) -> None:
    what = chance.randrange(7)
    if what == 0:
        chance.choice(model.opset_import).version = _number(chance)
    elif what == 1:
        model.ir_version = _number(chance)
    elif what == 2:
        del model.opset_import[:]
    elif what == 3:
        del model.graph.output[:]
    elif what == 4:
        del model.graph.node[:]
    elif what == 5:
        chance.choice(model.metadata_props).value = chance.choice(("subbyte", "qonnx", *NAMES))
    else:
        model.graph.input.append(_value("more", *(_number(chance) for _ in range(3))))


def _change_function(model: onnx.ModelProto, chance: Random) -> None:
    function = chance.choice(model.functions)
    what = chance.randrange(5)
    if what == 0:
        model.functions.append(function)
    elif what == 1:
        model.functions.remove(function)
    elif what == 2:
        chance.choice(function.node).op_type = chance.choice(("Inner", "Outer"))
    elif what == 3:
        # Each calls the one before it twice.
        for index in range(chance.choice((3, 30))):
            copy = model.functions.add()
            copy.CopyFrom(model.functions[0])
            copy.name = f"F{index}"
            for node in copy.node:
                node.op_type, node.domain = f"F{index - 1}" if index else "Inner", "local"
        model.graph.node[0].op_type = copy.name
    else:
        del function.input[:]


def _repeat(model: onnx.ModelProto, chance: Random) -> None:
    """A long chain, or graphs inside of graphs."""
    graph = model.graph
    last = graph.node[-1].output[0]
    if chance.random() < 0.7:
        operator = chance.choice(("Relu", "Identity", "Neg", "Flatten", "Abs"))
        names = [last, *(f"link{index}" for index in range(chance.choice((5, 300, 3000))))]
        for source, target in pairwise(names):
            graph.node.append(helper.make_node(operator, [source], [target]))
        graph.output[0].name = names[-1]
        return
    inner = helper.make_graph([helper.make_node("Relu", [last], ["in"])], "g", [], [_value("in")])
    for depth in range(chance.choice((3, 20, 60))):
        out = f"out{depth}"
        node = helper.make_node("If", ["flag"], [out], then_branch=inner, else_branch=inner)
        if depth > 4:
            del node.attribute[1:]
        inner = helper.make_graph([node], "g", [], [_value(out)])
    graph.node.extend(inner.node)


CHANGES: tuple[Callable[[onnx.ModelProto, Random], None], ...] = (
    _change_attribute,
    _change_attribute,
    _add_attribute,
    _change_shape,
    _change_type,
    _change_node,
    _change_node,
    _change_name,
    _change_tensor,
    _change_frame,
    _change_function,
    _repeat,
)


# Readers -------------------------------------------------------------------------------------


def _readers(student: Student) -> dict[str, Callable[[Path], None]]:
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))

    def run(*words: str) -> Callable[[Path], None]:
        def reader(path: Path) -> None:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = command([words[0], str(path), *words[1:]])
            text = out.getvalue() + err.getvalue()
            lines = err.getvalue().count("\n")
            if (code == 2) != (lines == 1) or lines > 1:
                raise AssertionError(f"exit code {code}, {lines} lines on stderr")
            if not all(letter.isprintable() or letter == "\n" for letter in text):
                raise AssertionError(f"it prints what is not printable: {text[:200]!r}")

        return reader

    return {
        "audit arch5": lambda path: _ignore(audit(path, "arch5").summary()),
        "audit in memory": lambda path: _ignore(audit(_loaded(path), "imx500")),
        "cost": lambda path: _ignore(onnx_cost(path).totals()),
        "parity": lambda path: _ignore(archnet.parity(student, path, images)),
        "archnet audit": run("audit", "--hardware", "rk3588"),
        "archnet cost": run("cost"),
    }


def _loaded(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:
        raise ArchnetError("no model to hand over") from error


def _ignore(_: object) -> None:
    pass


# Workers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What went wrong: the file's number and origin, the reader, the kind of fault."""

    number: int
    origin: str
    reader: str
    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: file {self.number} ({self.origin}), {self.reader}: {self.detail}"


@dataclass
class Summary:
    """Faults by kind; ``answers`` counts by reader how many files were read, not refused."""

    count: int
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    answers: Counter[str] = field(default_factory=Counter)

    def counts(self) -> dict[str, int]:
        found = Counter(finding.kind for finding in self.findings)
        return {kind: found[kind] for kind in KINDS}


_EVENTS = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.chmod",
    "os.symlink",
    "subprocess.Popen",
    "pty.spawn",
    "socket.",
    "urllib.Request",
    "pickle.find_class",
    "ctypes.dlopen",
    "shutil.",
)


class _Sentinel:
    """Notes what is executed, sent or written while it is armed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.armed, self.seen = folder, False, ""
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event.startswith(_EVENTS):
            self.seen = f"{event} {arguments!r:.200}"
        elif event in ("exec", "compile"):
            code = arguments[-1] if event == "compile" else getattr(arguments[0], "co_filename", "")
            # Modules that are imported late run code as well; they lie in files.
            if not Path(str(code)).is_file() and not str(code).startswith("<frozen"):
                self.seen = f"{event} {code!r:.200}"
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            inside = Path(str(arguments[0])).is_relative_to(self.folder)
            self.seen = self.seen if inside else f"open {arguments[0]!r:.200} {arguments[1]}"


def _work(
    sending: Connection, numbers: Sequence[int], seed: int, files: Sequence[Path], student: Student
) -> None:
    """Read one file after the other; what happens is sent as (number, reader, kind, detail)."""
    torch.set_num_threads(1)
    readers = _readers(student)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "beside.data").write_bytes((files[0].parent / "beside.data").read_bytes())
        sentinel = _Sentinel(folder)
        for path in files:
            for reader in readers.values():
                with contextlib.suppress(ArchnetError):
                    reader(path)  # Everything that is imported late is imported now.
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY,) * 2)
        path = folder / "file.onnx"
        for number in numbers:
            path.write_bytes(file(number, seed, files)[1])
            for name, reader in readers.items():
                sending.send((number, name, "start", ""))
                sentinel.armed, sentinel.seen = True, ""
                kind, detail = _outcome(reader, path)
                sentinel.armed = False
                if sentinel.seen:
                    sending.send((number, name, "executed", sentinel.seen))
                sending.send((number, name, kind, detail))
    sending.send((-1, "", "end", ""))


def _outcome(reader: Callable[[Path], None], path: Path) -> tuple[str, str]:
    try:
        reader(path)
    except ArchnetError as error:
        message = str(error)
        if "\n" in message:
            return "output", f"several lines: {message[:200]!r}"
        if not message.isprintable():
            return "output", f"not printable: {message[:200]!r}"
        # A runtime may be asked for any amount, a reader needs little.
        return ("memory" if "bad_alloc" in message else "refused"), message
    except MemoryError as error:
        return "memory", repr(error)
    except AssertionError as error:
        return "output", str(error)
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return "answer", ""


def file(number: int, seed: int, files: Sequence[Path]) -> tuple[str, bytes]:
    """The name of the file that number ``number`` comes from, and its content."""
    chance = random.Random(f"{seed} {number}")
    origin = chance.choice(list(files))
    return origin.name, mutated(origin.read_bytes(), chance)


def fuzz(
    count: int, seed: int = 0, jobs: int = 1, first: int = 0, keep: Path | None = None
) -> Summary:
    """Make ``count`` files from number ``first`` on and have them read.

    Args:
        count: of files.
        seed: of the mutations.
        jobs: worker processes at a time.
        first: number of the first file.
        keep: a folder in which files with a finding are left.
    """
    summary, began = Summary(count), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        files, student = seed_files(Path(temporary))
        shares = [list(range(first + job, first + count, jobs)) for job in range(jobs)]
        workers = [_Worker(share, seed, files, student, summary) for share in shares if share]
        while workers:
            workers = [worker for worker in workers if worker.step()]
        for finding in summary.findings if keep else ():
            assert keep is not None
            keep.mkdir(parents=True, exist_ok=True)
            content = file(finding.number, seed, files)[1]
            (keep / f"{finding.number}.onnx").write_bytes(content)
    summary.seconds = time.monotonic() - began
    return summary


class _Worker:
    """A process that reads files, and another after it where it hangs or dies."""

    def __init__(
        self,
        numbers: list[int],
        seed: int,
        files: Sequence[Path],
        student: Student,
        summary: Summary,
    ) -> None:
        self.numbers, self.seed, self.files = numbers, seed, files
        self.student, self.summary = student, summary
        self.current: tuple[int, str] | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.receiving, sending = context.Pipe(duplex=False)
        arguments = (sending, self.numbers, self.seed, self.files, self.student)
        self.process = context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        sending.close()
        self.since, self.spent = time.monotonic(), 0.0

    def step(self) -> bool:
        """Wait for news for a moment; False when all files are read."""
        if not self.numbers and self.current is None:
            return False
        try:
            if self.receiving.poll(0.2):
                return self._hear(*self.receiving.recv())
        except EOFError:
            self.process.join()
            return self._again("crash", f"exit code {self.process.exitcode}")
        # Its start takes a while: everything is imported, and files are read once.
        if self.current is None:
            return True
        waited, spent = time.monotonic() - self.since, self._spent() - self.spent
        if spent > SECONDS or waited > WAITING:
            self.process.kill()
            self.process.join()
            return self._again("hang", f"after {spent:.0f} s of a core, {waited:.0f} on the clock")
        return True

    def _spent(self) -> float:
        """Seconds of a core that the process has taken so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _hear(self, number: int, reader: str, kind: str, detail: str) -> bool:
        if kind == "end":
            self.numbers, self.current = [], None
            self.process.join()
            return False
        if kind == "start":
            self.current, self.since, self.spent = (number, reader), time.monotonic(), self._spent()
            self.numbers = [other for other in self.numbers if other >= number]
            return True
        if kind in KINDS:
            self._found(kind, detail)
        elif kind == "answer":
            self.summary.answers[reader] += 1
        return True

    def _again(self, kind: str, detail: str) -> bool:
        """Note what happened, and go on behind the file with which it did."""
        if self.current is None:
            raise RuntimeError(f"a worker ended before its first file: {detail}")
        self._found(kind, detail)
        self.numbers = [number for number in self.numbers if number > self.current[0]]
        self.current = None
        if self.numbers:
            self._start()
        return bool(self.numbers)

    def _found(self, kind: str, detail: str) -> None:
        assert self.current is not None
        number, reader = self.current
        origin = file(number, self.seed, self.files)[0]
        self.summary.findings.append(Finding(number, origin, reader, kind, detail))


def record(summary: Summary, seed: int) -> None:
    """Add a row to ``results/robustness.csv``."""
    counts = summary.counts()
    append_robustness(
        "mutated ONNX files through audit, cost, parity and the commands",
        summary.count,
        {
            "tracebacks": counts["traceback"],
            "hangs": counts["hang"],
            "crashes": counts["crash"] + counts["memory"],
            "executed": counts["executed"],
        },
        summary.seconds,
        f"python benchmarks/fuzz_onnx.py --count {summary.count} --seed {seed}",
        seed,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    summary = fuzz(options.count, options.seed, options.jobs, options.first, options.keep)
    for finding in summary.findings:
        print(str(finding)[:500])
    print(f"{summary.count} files, {summary.seconds:.0f} s; answered: {dict(summary.answers)}")
    print(", ".join(f"{kind}: {count}" for kind, count in summary.counts().items()))
    if options.record:
        record(summary, options.seed)
    return 1 if summary.findings else 0


if __name__ == "__main__":
    sys.exit(main())
