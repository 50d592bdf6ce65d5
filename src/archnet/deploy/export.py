"""Student to file: ONNX written operator by operator (nothing is traced), and what others read."""

import difflib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from archnet.config import DialectConfig
from archnet.deploy.emitters import emit, emit_split
from archnet.deploy.integer import IntegerModel, to_integers
from archnet.deploy.mct import MctWriter
from archnet.deploy.qonnx import QonnxWriter
from archnet.deploy.runtime import compile_openvino
from archnet.deploy.subbyte import SubbyteWriter
from archnet.deploy.writer import ExportError, Value, Writer
from archnet.files import atomic
from archnet.hardware import Audit, Target
from archnet.hardware import audit as audit_file
from archnet.lower import TargetError, check_layers, deployed, target_of
from archnet.ops import Activation, Slice, Student, WeightedOperator
from archnet.ops.parts import partings


@dataclass(frozen=True)
class Form:
    """A kind of file that a student becomes.

    Args:
        about: one line for people.
        suffix: of the file's name.
        content: gives the file's bytes, where that is more than writing an ONNX model.
        writer: writes the ONNX model, where the form is one.
        opset: the least of the ONNX model that holds all widths, where none is asked for.
        integers: whether a student needs quantizers to take this form.
    """

    about: str
    suffix: str = ".onnx"
    content: Callable[[Student], bytes] | None = None
    writer: type[Writer] = Writer
    opset: int = 13
    integers: bool = True


def _c_header(student: Student) -> bytes:
    from archnet.deploy.c_header import to_c

    stated = student.graph.preprocessing
    head = f"/* preprocessing of the input: {json.dumps(stated)} */\n" if stated else ""
    return (head + to_c(of_five(student, "c"))).encode()


def _tflite(student: Student) -> bytes:
    from archnet.deploy.tflite import to_tflite

    return to_tflite(of_five(student, "tflite"))


def of_five(student: Student, form: str) -> IntegerModel:
    """The integers of a student lowered for arch5, whose operators a form is written of.

    Raises:
        ExportError: the student has functions that its own target computes by itself.
    """
    try:
        check_layers(student, Target.named("arch5"))
    except TargetError as error:
        raise ExportError(
            f"form={form} has five operators alone: {error}; convert with "
            "hardware.keeps_functions=false"
        ) from error
    return to_integers(student, target="arch5")


def _openvino(student: Student) -> bytes:
    content = to_onnx(student, "openvino").SerializeToString()
    compile_openvino(content)
    return content


FORMS: Mapping[str, Form] = {
    "float": Form("float32, for a student without quantizers", integers=False),
    "qdq": Form("8-bit integers between QuantizeLinear and DequantizeLinear, for most tools"),
    "subbyte": Form("qdq with weights packed in INT2 and INT4", writer=SubbyteWriter, opset=25),
    "qonnx": Form("Quant nodes of any width, for FINN and hls4ml", writer=QonnxWriter),
    "mct": Form("Sony's quantizer nodes, for its IMX500 converter", writer=MctWriter, opset=15),
    "openvino": Form("qdq, compiled by OpenVINO to check it", content=_openvino),
    "c": Form("C header: integer weights and requantization", ".h", _c_header),
    "tflite": Form("int8 TensorFlow Lite, for Vela and other chips", ".tflite", _tflite),
}


# Names of versions before, and what a form is called now.
RENAMED = {"qcdq": "qdq"}


def form_named(name: str) -> Form:
    """A row of `FORMS`.

    Raises:
        ExportError: there is no such form; the message names the nearest, or its new name.
    """
    if name in RENAMED:
        raise ExportError(f"form={name} is called {RENAMED[name]} now: form={RENAMED[name]}")
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, 1, 0.0)[0]
        raise ExportError(f"form={name} is not one of {', '.join(FORMS)}; nearest: {near}")
    return FORMS[name]


def default_form(student: nn.Module) -> str:
    """The form that most tools take: "qdq" for a quantized student, else "float"."""
    return "qdq" if is_quantized(student) else "float"


def to_onnx(
    student: Student,
    form: str | None = None,
    opset: int | None = None,
    dialect: DialectConfig | None = None,
) -> onnx.ModelProto:
    """The student as an ONNX model in memory; see `export`."""
    return write(student, form, opset, dialect)[0]


def write(
    student: Student,
    form: str | None = None,
    opset: int | None = None,
    dialect: DialectConfig | None = None,
) -> tuple[onnx.ModelProto, dict[str, Value]]:
    """The student as an ONNX model, and where each of its values stands in there, by name.

    It is written as its target runs it (`archnet.lower.lower`), with the names of that.
    """
    if not isinstance(student, Student):
        raise ExportError(
            f"a {type(student).__name__} is not a student: call convert() on it first"
        )
    form = default_form(student) if form is None else form
    kind = form_named(form)
    if kind.suffix != ".onnx":
        raise ExportError(f"form={form} is no ONNX model: export() writes its file")
    dialect = target_of(student).dialect if dialect is None else dialect
    opset = max(dialect.opset, kind.opset) if opset is None else opset
    if not 13 <= opset <= 25:
        raise ExportError(f"opset={opset} is out of range: 13 to 25 run on onnxruntime")
    _check_quantized(student, form)
    stated = student.graph.preprocessing
    student = deployed(student)
    graph, writer = student.graph, kind.writer(replace(dialect, opset=opset))
    if stated:
        writer.properties["preprocessing"] = json.dumps(stated)
    inputs = {name: graph.shapes[name] for name in graph.inputs}
    values = {name: Value(name, name, (-1, *shape)) for name, shape in inputs.items()}
    splits = _splits(student)
    with torch.no_grad():
        for step in graph.steps:
            writer.origin = step.origin
            if step.name in values:
                continue
            if step.name in splits:
                cuts = splits[step.name]
                source = values[step.inputs[0]]
                parts = emit_split(writer, list(cuts), list(cuts.values()), graph.shapes, source)
                values.update(zip(cuts, parts, strict=True))
                continue
            values[step.name] = emit(
                writer,
                step.name,
                student.operator(step.name),
                graph.shapes[step.name],
                *(values[name] for name in step.inputs),
            )
    for name, seen in itertools.zip_longest(graph.outputs, graph.output_ranges):
        values[name] = writer.result(values[name], seen)
    results = [values[name] for name in graph.outputs]
    names = writer.results(inputs, list(zip(graph.output_names, results, strict=True)))
    shapes = [value.moved_shape[1:] for value in results]
    model = writer.model(inputs, dict(zip(names, shapes, strict=True)))
    renamed = {old: new for new, old in reversed(names.items())}
    return model, {
        name: replace(value, tensor=renamed.get(value.tensor, value.tensor))
        for name, value in values.items()
    }


def _splits(student: Student) -> dict[str, Mapping[str, Slice]]:
    """Slices that part the first axis one behind the other, by the name of the first.

    Those of a last axis stay slices: Rockchip's compiler (rknn-toolkit2 2.5.0) takes a Split of
    tokens, and its simulator then gives something else (benchmarks/chips.py, cifar_vit).
    """
    return {
        next(iter(parting.cuts)): parting.cuts
        for parting in partings(student.graph.steps, student.operators)
        if parting.axis == 1 and parting.bounds[-1] == student.graph.shapes[parting.source][0]
    }


def export(
    student: Student,
    path: str | os.PathLike[str],
    form: str | None = None,
    opset: int | None = None,
    dialect: DialectConfig | None = None,
) -> Path:
    """Write a student as a file, an ONNX file in the dialect of its target.

    Args:
        student: what `convert` made, quantized or not.
        path: the file; it is replaced as a whole, or left as it was when writing fails.
        form: a name in `archnet.deploy.FORMS`; None: "qdq" for a quantized student, else "float".
            "qdq": weights are stored as INT8 and biases as INT32, each with a DequantizeLinear;
            activations pass a Clip to their width and a QuantizeLinear, and every operator works
            between a DequantizeLinear and a QuantizeLinear. "subbyte": the same with weights packed
            in INT2 and INT4; 3 bits take INT4, 5 to 7 INT8. "qonnx": floats and Quant nodes of the
            package qonnx. "openvino": the file of "qdq", once OpenVINO has compiled it. "c",
            "tflite": no ONNX. In ONNX files operators without quantizers stay float.
        opset: of an ONNX file, 13 to 25; None: that of the dialect, and 25 for "subbyte".
        dialect: how an ONNX file is written; None: as the student's target has it
            (`hardware.dialect`).

    Returns:
        The path of the file.

    Raises:
        ExportError: not a student, an unknown form, a student without quantizers where the form
            has integers, numbers that do not fit their type (naming the step), a missing extra,
            or a file that cannot be written.
    """
    path = Path(path)
    form = default_form(student) if form is None else form
    kind = form_named(form)
    if kind.content is None:
        content = to_onnx(student, form, opset, dialect).SerializeToString()
    elif not isinstance(student, Student):
        raise ExportError(
            f"a {type(student).__name__} is not a student: call convert() on it first"
        )
    elif opset is not None:
        raise ExportError(f"opset={opset} cannot be chosen for form={form}: leave it out")
    elif dialect is not None:
        raise ExportError(f"a dialect cannot be chosen for form={form}: leave it out")
    else:
        _check_quantized(student, form)
        content = kind.content(student)
    with atomic(path, ExportError) as part:
        part.write_bytes(content)
    return path


def audit(
    model: Student | onnx.ModelProto | str | os.PathLike[str],
    hardware: Any = "arch5",
    inputs: Mapping[str, Sequence[int]] | None = None,
) -> Audit:
    """Judge an ONNX file, or a student by the file that it becomes; see `archnet.hardware`.

    Raises:
        AuditError: the file is missing or no valid ONNX model, or the inputs do not fit in it.
        ConfigError: a given shape is not one that the file takes.
        ExportError: the student cannot be written.
    """
    if isinstance(model, Student):
        model = to_onnx(model)
    if isinstance(model, nn.Module):
        raise ExportError(f"a {type(model).__name__} is not a student: call convert() on it first")
    return audit_file(model, hardware, inputs)


def _check_quantized(student: Student, form: str) -> None:
    quantized = is_quantized(student)
    if quantized and not FORMS[form].integers:
        raise ExportError('this student is quantized: export it with form="qdq"')
    if not quantized and FORMS[form].integers:
        raise ExportError(
            f"this student has no quantizers, and form={form} holds integers: "
            "quantize() it, or export it with form=float"
        )


def is_quantized(student: nn.Module) -> bool:
    """Whether a student has quantizers."""
    return any(
        (isinstance(module, WeightedOperator) and module.weight_quantizer is not None)
        or (isinstance(module, Activation) and module.quantizer is not None)
        for module in student.modules()
    )
