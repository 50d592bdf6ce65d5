"""A translating student as two ONNX files, an encoder and a decoder's step, and their runner.

The encoder reads one-hots of a sentence of any length, (batch, length, tokens + positions); there
is no padding, and sentences that run together have one length. The decoder reads the one-hot of a
token, what the encoder gave (its memory) and the states of the token before, and gives scores and
the next states. Memory and states of a quantized student are UINT8, on the grids of the student.
What belongs to what stands in the decoder's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from archnet.deploy.emitters import common_grid, emit, emits, parameters
from archnet.deploy.runtime import load_session
from archnet.deploy.writer import ExportError, Grid, Value, Writer
from archnet.files import atomic
from archnet.lower import lower, target_of
from archnet.ops import (
    Activation,
    FullyConnected,
    MergeHeads,
    PairFullyConnected,
    SourcePool,
    SplitHeads,
    Stepwise,
    Student,
    TokenEmbedding,
    Window,
)
from archnet.quant import Quantizer, grids

FORMS = ("float", "qdq")
METADATA = "translator"
END = np.iinfo(np.int64).max  # the end of an axis, whatever its length


class SentenceWriter(Writer):
    """A `Writer` of values whose length is free: layers at positions are MatMuls, of any rank."""

    def positions(
        self, name: str, x: Value, weight: str, bias: str, shape: tuple[int, ...]
    ) -> Value:
        """A fully connected layer on the last axis; ``weight`` (O, I)."""
        across = self.node("Transpose", [weight], f"{name}.weight.across", perm=[1, 0])
        product = self.node("MatMul", [self.floating(x), across], f"{name}.product")
        self.node("Add", [product, bias], name)
        return Value(name, name, (-1, *shape))


@emits(TokenEmbedding)
def _embedding(
    writer: Writer, name: str, op: TokenEmbedding, shape: tuple[int, ...], x: Value, *_: Value
) -> Value:
    weight, _bias = parameters(writer, name, op)
    across = writer.node("Transpose", [weight], f"{name}.weight.across", perm=[1, 0])
    writer.node("MatMul", [writer.floating(x), across], name)
    return Value(name, name, shape)


@emits(Window)
def _window(writer: Writer, name: str, op: Window, shape: tuple[int, ...], x: Value) -> Value:
    pads = writer.constant(f"{name}.pads", [0, op.before, 0, 0, op.after, 0], np.int64)
    wide = writer.carried("Pad", [writer.tensor(x)], x.grid, f"{name}.wide", constants=[pads])
    views, count = [], op.before + 1 + op.after
    for start in range(count):
        stop = END if start == count - 1 else start - count + 1
        bounds = {"starts": start, "ends": stop, "axes": 1}
        constants = [
            writer.constant(f"{name}.{start}.{key}", [value], np.int64)
            for key, value in bounds.items()
        ]
        view = writer.carried("Slice", [wide], x.grid, f"{name}.{start}", constants=constants)
        views.append(view)
    writer.carried("Concat", views, x.grid, name, axis=2)
    return Value(name, name, shape, x.grid)


@emits(SplitHeads)
def _split_heads(
    writer: Writer, name: str, op: SplitHeads, shape: tuple[int, ...], x: Value
) -> Value:
    heads = writer.constant(f"{name}.shape", [0, 0, op.heads, shape[-1]], np.int64)
    source = writer.tensor(x)
    parts = writer.carried("Reshape", [source], x.grid, f"{name}.parts", constants=[heads])
    writer.carried("Transpose", [parts], x.grid, name, perm=[0, 2, 1, 3])
    return Value(name, name, shape, x.grid)


@emits(MergeHeads)
def _merge_heads(
    writer: Writer, name: str, op: MergeHeads, shape: tuple[int, ...], x: Value
) -> Value:
    order = [0, 2, 1, 3]
    parts = writer.carried("Transpose", [writer.tensor(x)], x.grid, f"{name}.parts", perm=order)
    joined = writer.constant(f"{name}.shape", [0, 0, shape[-1]], np.int64)
    writer.carried("Reshape", [parts], x.grid, name, constants=[joined])
    return Value(name, name, shape, x.grid)


@emits(PairFullyConnected)
def _pairs(
    writer: Writer, name: str, op: PairFullyConnected, shape: tuple[int, ...], x: Value, y: Value
) -> Value:
    """The target's features, once for each source position, beside the source's."""
    _, _, length, _ = shape
    grid = common_grid([x, y])
    read = writer.floating if grid is None else writer.tensor
    copies = writer.carried("Concat", [read(x)] * length, grid, f"{name}.copies", axis=1)
    writer.carried("Concat", [copies, read(y)], grid, f"{name}.joined", axis=2)
    joined = Value(f"{name}.joined", f"{name}.joined", (-1, length, op.first + op.second), grid)
    weight, bias = parameters(writer, name, op)
    rows = joined.reshaped((-1, op.first + op.second), f"{name}.rows")
    writer.node("Gemm", [writer.floating(rows), weight, bias], f"{name}.flat", transB=1)
    return Value(name, f"{name}.flat", (-1, op.out_features)).reshaped(shape, name)


@emits(SourcePool)
def _source_pool(
    writer: Writer, name: str, op: SourcePool, shape: tuple[int, ...], x: Value
) -> Value:
    """2x2 max-pooling of the source, laid out as a rectangle, until one column is left."""
    _, _, length, channels = x.moved_shape
    if length & (length - 1):
        raise ExportError(f"step {name}: {length} source positions are no power of two")
    height = 1 << ((length.bit_length()) // 2)
    size = [height, length // height]
    x = x.reshaped((-1, length, channels), f"{name}.sources")
    x = x.transposed((0, 2, 1), f"{name}.channels")
    x = x.reshaped((-1, channels, *size), f"{name}.map")
    tensor, round_ = writer.tensor(x), 0
    while size != [1, 1]:
        pads = [0, 0, size[0] % 2, size[1] % 2]
        tensor = writer.carried(
            "MaxPool",
            [tensor],
            x.grid,
            f"{name}.{round_}",
            kernel_shape=[2, 2],
            strides=[2, 2],
            pads=pads,
            dilations=[1, 1],
            ceil_mode=0,
            storage_order=0,
        )
        size, round_ = [-(-side // 2) for side in size], round_ + 1
    return Value(name, tensor, (-1, channels, 1, 1), x.grid).reshaped(shape, name)


def export_translator(parts: Stepwise, folder: str | os.PathLike[str], form: str) -> list[Path]:
    """Write ``student.encoder.onnx`` and ``student.decoder.onnx``.

    Args:
        parts: of the student.
        folder: of the files; each is replaced as a whole.
        form: "float", or "qdq" for a quantized student.

    Returns:
        Both paths.

    Raises:
        ExportError: another form, or a file that cannot be written.
    """
    if form not in FORMS:
        raise ExportError(f"form={form}: a translator is written as {' or '.join(FORMS)}")
    encoder, results = _encoder(parts, form)
    decoder = _decoder(parts, form, results)
    written = []
    for name, model in (("encoder", encoder), ("decoder", decoder)):
        path = Path(folder) / f"student.{name}.onnx"
        with atomic(path, ExportError) as part:
            part.write_bytes(model.SerializeToString())
        written.append(path)
    return written


def _encoder(parts: Stepwise, form: str) -> tuple[onnx.ModelProto, dict[str, Value]]:
    lowered, writer = lower(parts.encoder), SentenceWriter(target_of(parts.encoder).dialect)
    student, writer.form = lowered.student, form
    values = {"source": Value("source", "source", (-1, -1, _width(student)))}
    _emit(student, writer, values, free=True)
    results = {name: values[lowered.values[name]] for name in parts.memory}
    inputs = [_declared("source", ["batch", "length", _width(student)], None)]
    outputs = [
        _declared(writer.tensor(value), _free(value.moved_shape, "length"), value.grid)
        for value in results.values()
    ]
    return _model(writer, inputs, outputs, {}), results


def _decoder(parts: Stepwise, form: str, memory: Mapping[str, Value]) -> onnx.ModelProto:
    student, writer = parts.decoder, SentenceWriter(target_of(parts.decoder).dialect)
    writer.form = form
    length = _fixed_length(student)
    if length is not None:
        # The relation has one column for each source position, so their number is fixed.
        student = _at_length(student, parts.memory, length)
    lowered = lower(student)
    student = lowered.student
    shapes = dict(student.graph.shapes)
    values = {"target": Value("target", "target", (-1, 1, _width(student)))}
    inputs = [_declared("target", ["batch", 1, _width(student)], None)]
    states: dict[str, Any] = {}
    on_grid = grids(student)
    for name in (*parts.memory, *parts.states):
        result = lowered.values.get(parts.states.get(name, ""))
        grid = (
            memory[name].grid if name in memory else _state_grid(student, writer, result, on_grid)
        )
        sizes: list[Any] = ["batch", *shapes[name]]
        if len(sizes) == 4:
            sizes[2] = "length" if name in memory else f"{name}.past"
        values[name] = Value(name, name, (-1, *shapes[name]), grid)
        inputs.append(_declared(name, sizes, grid))
    values["position"] = values["target"]
    _emit(student, writer, values, free=False)
    scores = values[student.graph.outputs[0]]
    outputs = [_declared(writer.floating(scores), ["batch", 1, scores.moved_shape[-1]], None)]
    for name, state in parts.states.items():
        result = lowered.values[state]
        value = values[result]
        sizes = ["batch", *shapes[result]]
        if len(sizes) == 4:
            sizes[2] = f"{name}.next"
        tensor = writer.tensor(value)
        if tensor in values or any(tensor == item.name for item in outputs):
            tensor = writer.node("Identity", [tensor], f"{name}.result")
        outputs.append(_declared(tensor, sizes, value.grid))
        start = list(shapes[name])
        if len(sizes) == 4:
            start[1] = 0  # attention begins with no past, a window with zeros
        states[name] = {
            "result": tensor,
            "start": start,
            "zero": value.grid.zero if value.grid is not None else 0,
        }
    embedding = _embedding_of(student)
    facts = {
        "tokens": embedding.tokens,
        "positions": embedding.positions,
        "memory": {name: value.name for name, value in memory.items()},
        "length": length,
        "states": states,
        "scores": outputs[0].name,
    }
    return _model(writer, inputs, outputs, facts)


def _emit(student: Student, writer: SentenceWriter, values: dict[str, Value], free: bool) -> None:
    """Write all steps; with ``free`` lengths, layers at positions take any."""
    with torch.no_grad():
        for step in student.graph.steps:
            writer.origin = step.origin
            operator, shape = student.operator(step.name), student.graph.shapes[step.name]
            inputs = [values[name] for name in step.inputs]
            if free and isinstance(operator, FullyConnected):
                weight, bias = parameters(writer, step.name, operator)
                value = writer.positions(step.name, inputs[0], weight, bias, shape)
            else:
                value = emit(writer, step.name, operator, shape, *inputs)
            values[step.name] = value


def _state_grid(
    student: Student, writer: Writer, result: str | None, on_grid: Mapping[str, frozenset[str]]
) -> Grid | None:
    """The grid of what a state keeps: that of the values which join it."""
    assert result is not None
    for place in sorted(on_grid[result]):
        module = student.operator(place)
        assert isinstance(module, Activation)
        quantizer = module.quantizer
        if isinstance(quantizer, Quantizer):
            return writer.placed(place, quantizer)
    return None


def _embedding_of(student: Student) -> TokenEmbedding:
    return next(m for m in student.operators.values() if isinstance(m, TokenEmbedding))


def _width(student: Student) -> int:
    embedding = _embedding_of(student)
    return embedding.tokens + embedding.positions


def _fixed_length(student: Student) -> int | None:
    """Source positions of a decoder that relates to each of them; None where any number goes."""
    if not any(isinstance(m, SourcePool) for m in student.operators.values()):
        return None
    return 1 << (_embedding_of(student).positions - 1).bit_length()


def _at_length(student: Student, memory: Sequence[str], length: int) -> Student:
    shapes = dict(student.graph.shapes)
    shapes.update({name: (length, *shapes[name][1:]) for name in memory})
    changed = Student(replace(student.graph, shapes=shapes), dict(student.operators.items()))  # type: ignore[arg-type]
    changed.measure()
    return changed


def _free(shape: tuple[int, ...], length: str) -> list[Any]:
    """(B, S, C) or (B, H, S, D), batch and length free."""
    sizes: list[Any] = ["batch", *shape[1:]]
    sizes[1 if len(sizes) == 3 else 2] = length
    return sizes


def _declared(name: str, sizes: Sequence[Any], grid: Grid | None) -> onnx.ValueInfoProto:
    kind = TensorProto.FLOAT if grid is None else TensorProto.UINT8
    return helper.make_tensor_value_info(name, kind, list(sizes))


def _model(
    writer: Writer, inputs: list[Any], outputs: list[Any], facts: Mapping[str, Any]
) -> onnx.ModelProto:
    graph = helper.make_graph(
        writer.nodes, "student", inputs, outputs, list(writer.constants.values())
    )
    opsets = [helper.make_opsetid("", writer.opset)]
    model = helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        **writer.producer,
    )
    helper.set_model_props(model, {**writer.properties, METADATA: json.dumps(facts)})
    onnx.checker.check_model(model, full_check=True)
    return model


class OnnxTranslator:
    """Runs the two files in ONNX Runtime; `archnet.translate.Translator`.

    Args:
        folder: with ``student.encoder.onnx`` and ``student.decoder.onnx``.
        threads: of one operator; 0 leaves the choice to the runtime.

    Raises:
        ExportError: a file is missing, broken, or not written by `export_translator`.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int = 0) -> None:
        paths = [Path(folder) / f"student.{name}.onnx" for name in ("encoder", "decoder")]
        self._encoder, self._decoder = (load_session(path, threads) for path in paths)
        properties = onnx.load(paths[1], load_external_data=False).metadata_props
        facts = next((item.value for item in properties if item.key == METADATA), "{}")
        if "states" not in json.loads(facts):
            raise ExportError(f"{paths[1]} is no decoder that archnet wrote: export it again")
        self.facts: dict[str, Any] = json.loads(facts)
        self._names = [item.name for item in self._decoder.get_outputs()]

    def _one_hot(self, tokens_BT: np.ndarray, first: int) -> np.ndarray:
        width = self.facts["tokens"] + self.facts["positions"]
        batch, length = tokens_BT.shape
        hot = np.zeros((batch, length, width), np.float32)
        rows, columns = np.indices((batch, length))
        hot[rows, columns, tokens_BT] = 1
        hot[rows, columns, self.facts["tokens"] + first + columns] = 1
        return hot

    def start(self, source_BS: Tensor) -> dict[str, Tensor]:
        source = self._one_hot(source_BS.cpu().numpy(), 0)
        results = self._encoder.run(None, {"source": source})
        state = {}
        length = self.facts["length"]
        for name, value in zip(self.facts["memory"], results, strict=True):
            # Repeating the last position changes no maximum.
            more = 0 if length is None else length - value.shape[1]
            wide = np.pad(value, ((0, 0), (0, more), (0, 0)), "edge") if more else value
            state[name] = torch.from_numpy(wide)
        kinds = {item.name: item.type for item in self._decoder.get_inputs()}
        for name, facts in self.facts["states"].items():
            dtype = torch.uint8 if "uint8" in kinds[name] else torch.float32
            state[name] = torch.full((len(source), *facts["start"]), facts["zero"], dtype=dtype)
        state["position"] = torch.zeros(len(source), 1, dtype=torch.long)
        return state

    def step(self, tokens_B: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        state = dict(state)
        position = state.pop("position")
        feeds = {name: tensor.numpy() for name, tensor in state.items()}
        hot = self._one_hot(tokens_B[:, None].numpy(), int(position[0, 0]))
        found = dict(
            zip(self._names, self._decoder.run(None, {"target": hot, **feeds}), strict=True)
        )
        for name, facts in self.facts["states"].items():
            state[name] = torch.from_numpy(found[facts["result"]])
        state["position"] = position + 1
        return torch.from_numpy(found[self.facts["scores"]])[:, 0], state
