"""Student to ONNX file, written operator by operator: nothing is traced."""

import difflib
import os
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from archnet.deploy.emitters import emit
from archnet.deploy.writer import ExportError, Value, Writer
from archnet.files import atomic
from archnet.hardware import Audit
from archnet.hardware import audit as audit_file
from archnet.ops import Activation, Student, WeightedOperator

FORMS = ("float", "qcdq")


def to_onnx(student: Student, form: str = "float", opset: int = 21) -> onnx.ModelProto:
    """The student as an ONNX model in memory; see `export`."""
    if not isinstance(student, Student):
        raise ExportError(f"a {type(student).__name__} is no student: convert() makes one of it")
    if form not in FORMS:
        near = difflib.get_close_matches(form, FORMS, 1, 0.0)[0]
        raise ExportError(f"form={form} is not one of {', '.join(FORMS)}; nearest: {near}")
    if not 13 <= opset <= 25:
        raise ExportError(f"opset={opset} is out of range: 13 to 25 run on onnxruntime")
    if form == "float" and _is_quantized(student):
        raise ExportError('this student is quantized: export it with form="qcdq"')
    graph, writer = student.graph, Writer()
    inputs = {name: graph.shapes[name] for name in graph.inputs}
    values = {name: Value(name, name, (-1, *shape)) for name, shape in inputs.items()}
    with torch.no_grad():
        for step in graph.steps:
            writer.origin = step.origin
            values[step.name] = emit(
                writer,
                step.name,
                student.operator(step.name),
                graph.shapes[step.name],
                *(values[name] for name in step.inputs),
            )
    return writer.model(inputs, values[graph.output], opset)


def export(
    student: Student, path: str | os.PathLike[str], form: str = "float", opset: int = 21
) -> Path:
    """Write a student as an ONNX file, with a free batch size.

    Args:
        student: what `convert` made, quantized or not.
        path: the file; it is replaced as a whole, or left as it was when writing fails.
        form: "float", or "qcdq" for a quantized student: weights are stored as INT8 and biases
            as INT32, each with a DequantizeLinear; activations pass QuantizeLinear, an integer
            Clip where the width is below 8 bits, and DequantizeLinear before the next operator
            that multiplies. Operators without quantizers stay float.
        opset: 13 to 25.

    Returns:
        The path of the file.

    Raises:
        ExportError: not a student, an unknown form, numbers that do not fit their type, or a
            file that cannot be written.
    """
    path = Path(path)
    content = to_onnx(student, form, opset).SerializeToString()
    with atomic(path, ExportError) as part:
        part.write_bytes(content)
    return path


def audit(
    model: Student | onnx.ModelProto | str | os.PathLike[str], hardware: Any = "arch5"
) -> Audit:
    """Judge an ONNX file, or a student by the file that it becomes; see `archnet.hardware`.

    Raises:
        AuditError: the file is missing or no valid ONNX model.
        ExportError: the student cannot be written.
    """
    if isinstance(model, nn.Module):
        return audit_file(to_onnx(model, "qcdq"), hardware)
    return audit_file(model, hardware)


def _is_quantized(student: nn.Module) -> bool:
    return any(
        (isinstance(module, WeightedOperator) and module.weight_quantizer is not None)
        or (isinstance(module, Activation) and module.quantizer is not None)
        for module in student.modules()
    )
