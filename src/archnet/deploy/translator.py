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

from archnet.deploy.emitters import emit, emits, parameters
from archnet.deploy.export import form_named, is_quantized
from archnet.deploy.runtime import load_session
from archnet.deploy.sentences import Sentences, embedding_of, widened
from archnet.deploy.subbyte import SubbyteWriter
from archnet.deploy.writer import ExportError, Grid, Value, Writer
from archnet.files import atomic
from archnet.lower import target_of
from archnet.ops import (
    FullyConnected,
    MergeHeads,
    SplitHeads,
    Stepwise,
    Student,
    TokenEmbedding,
    Window,
)

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


class SubbyteSentenceWriter(SubbyteWriter, SentenceWriter):
    """The same with weights in the narrowest type."""


WRITERS: Mapping[str, type[SentenceWriter]] = {
    "float": SentenceWriter,
    "qdq": SentenceWriter,
    "subbyte": SubbyteSentenceWriter,
}
LENGTH = 16  # tokens that a TensorFlow Lite encoder reads where nothing is said
FORMS = (*WRITERS, "c", "tflite")
Memory = dict[str, Value]


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


def export_translator(
    parts: Stepwise, folder: str | os.PathLike[str], form: str, length: int | None = None
) -> list[Path]:
    """Write a translator's files.

    Args:
        parts: of the student.
        folder: of the files; each is replaced as a whole.
        form: "float", or for a quantized student "qdq" or "subbyte", ``student.encoder.onnx`` and
            ``student.decoder.onnx``; "c", ``student.h`` with both; or "tflite",
            ``student.encoder.tflite`` and ``student.decoder.tflite``. The last two are for
            students without attention.
        length: tokens of the sentences that a TensorFlow Lite encoder reads; None: `LENGTH`. Of
            other forms: None.

    Returns:
        The paths.

    Raises:
        ExportError: another form, one that the student has not, or a file that cannot be written.
    """
    kind, folder = form_named(form), Path(folder)
    if form not in FORMS:
        raise ExportError(f"form={form}: a translator is written as {', '.join(FORMS)}")
    if is_quantized(parts.encoder) != kind.integers:
        raise ExportError(
            f"this student has no quantizers, and form={form} holds integers: export it with "
            "form=float"
            if kind.integers
            else "this student is quantized: export it with form=qdq"
        )
    if length is not None and form != "tflite":
        raise ExportError(f"length={length} is for form=tflite: form={form} takes any length")
    if form in WRITERS:
        contents = _onnx(parts, form, kind.opset)
    elif form == "c":
        from archnet.deploy.c_header import translator_to_c

        contents = {"student.h": translator_to_c(parts).encode()}
    else:
        from archnet.deploy.tflite import translator_to_tflite

        encoder, decoder = translator_to_tflite(parts, LENGTH if length is None else length)
        contents = {"student.encoder.tflite": encoder, "student.decoder.tflite": decoder}
    for name, content in contents.items():
        with atomic(folder / name, ExportError) as part:
            part.write_bytes(content)
    return [folder / name for name in contents]


@torch.no_grad()
def _onnx(parts: Stepwise, form: str, opset: int) -> dict[str, bytes]:
    """The content of both ONNX files, by name."""
    sentences = Sentences.of(parts)
    dialect = target_of(parts.encoder).dialect
    dialect = replace(dialect, opset=max(dialect.opset, opset))

    def writer() -> SentenceWriter:
        made = WRITERS[form](dialect)
        made.form = form
        return made

    encoder, results = _encoder(sentences, writer())
    decoder = _decoder(sentences, writer(), results)
    return {
        "student.encoder.onnx": encoder.SerializeToString(),
        "student.decoder.onnx": decoder.SerializeToString(),
    }


def _encoder(sentences: Sentences, writer: SentenceWriter) -> tuple[onnx.ModelProto, Memory]:
    student = sentences.encoder.student
    values = {"source": Value("source", "source", (-1, -1, _width(student)))}
    _emit(student, writer, values, free=True)
    results = {name: values[value] for name, value in sentences.memory.items()}
    inputs = [_declared("source", ["batch", "length", _width(student)], None)]
    outputs = [
        _declared(writer.tensor(value), _free(value.moved_shape, "length"), value.grid)
        for value in results.values()
    ]
    return _model(writer, inputs, outputs, {}), results


def _decoder(sentences: Sentences, writer: SentenceWriter, memory: Memory) -> onnx.ModelProto:
    student, parts = sentences.decoder.student, sentences.parts
    shapes = dict(student.graph.shapes)
    values = {"target": Value("target", "target", (-1, 1, _width(student)))}
    inputs = [_declared("target", ["batch", 1, _width(student)], None)]
    states: dict[str, Any] = {}
    read: dict[str, Grid | None] = {}
    quantizers = sentences.state_quantizers()
    for name in (*parts.memory, *parts.states):
        found = quantizers.get(name)
        if name in memory:
            grid = memory[name].grid
        else:
            grid = writer.placed(*found) if found is not None else None
        sizes: list[Any] = ["batch", *shapes[name]]
        if len(sizes) == 4:
            sizes[2] = "length" if name in memory else f"{name}.past"
        read[name] = grid
        values[name] = Value(name, name, (-1, *shapes[name]), grid)
        inputs.append(_declared(name, sizes, grid))
    values["position"] = values["target"]
    _emit(student, writer, values, free=False)
    scores = values[sentences.scores]
    outputs = [_declared(writer.floating(scores), ["batch", 1, scores.moved_shape[-1]], None)]
    for name, result in sentences.states.items():
        value = values[result]
        sizes = ["batch", *shapes[result]]
        if len(sizes) == 4:
            sizes[2] = f"{name}.next"
        tensor = writer.tensor(value)
        if tensor in values or any(tensor == item.name for item in outputs):
            tensor = writer.node("Identity", [tensor], f"{name}.result")
        outputs.append(_declared(tensor, sizes, value.grid))
        states[name] = {"result": tensor, "start": list(sentences.start(name))}
    embedding = embedding_of(student)
    facts = {
        "tokens": embedding.tokens,
        "positions": embedding.positions,
        "memory": {name: value.name for name, value in memory.items()},
        "length": sentences.columns,
        "states": states,
        "zeros": {name: grid.zero if grid else 0 for name, grid in read.items()},
        "scores": outputs[0].name,
    }
    return _model(writer, inputs, outputs, facts)


def _emit(student: Student, writer: SentenceWriter, values: dict[str, Value], free: bool) -> None:
    """Write all steps; with ``free`` lengths, layers at positions take any."""
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


def _width(student: Student) -> int:
    embedding = embedding_of(student)
    return embedding.tokens + embedding.positions


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
        if "zeros" not in self.facts:  # of earlier versions
            states = self.facts["states"].items()
            self.facts["zeros"] = {name: state["zero"] for name, state in states}
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
            state[name] = torch.from_numpy(widened(value, length))
        kinds = {item.name: item.type for item in self._decoder.get_inputs()}
        for name, facts in self.facts["states"].items():
            dtype = torch.uint8 if "uint8" in kinds[name] else torch.float32
            state[name] = torch.full(
                (len(source), *facts["start"]), self.facts["zeros"][name], dtype=dtype
            )
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
