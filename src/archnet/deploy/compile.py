"""Files handed to vendors' tools, and what comes back held against what the file stands for."""

import copy
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from archnet.chips import Bridge, ChipError, Compiled, bridge
from archnet.chips.host import TIMEOUT
from archnet.config import DialectConfig
from archnet.deploy.doubts import doubts
from archnet.deploy.export import is_quantized, of_five, to_onnx
from archnet.deploy.integer import IntegerModel, Kind, to_integers
from archnet.deploy.latency import export_teacher
from archnet.deploy.mct import MctWriter
from archnet.deploy.runtime import load_session, run_session
from archnet.deploy.verify import steps_off
from archnet.deploy.writer import ExportError
from archnet.errors import printable
from archnet.hardware.onnx_file import load
from archnet.lower import target_of
from archnet.ops import Student
from archnet.ops.scores import Axis, axis_of, changed, each

BATCH = 64

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Judged:
    """What a tool makes of a network, and how its results agree with those expected.

    Args:
        compiled: what the tool said.
        against: what the results, those of all outputs, were expected from.
        inputs: how many were run; 0: none.
        changed: decisions that are others; None where results decide nothing.
        bit_equal: share of the results that are those expected exactly, 0 to 1; None where these
            are floats.
        max_steps: the largest difference of a result in units of the golden model's; None likewise.
        doubt: what the tool is known to compute wrongly in such a file (`deploy.doubts`), or "".
    """

    compiled: Compiled
    against: str
    inputs: int = 0
    changed: int | None = None
    bit_equal: float | None = None
    max_steps: float | None = None
    doubt: str = ""

    def summary(self) -> dict[str, Any]:
        """As plain data (JSON)."""
        return {
            **self.compiled.summary(),
            "against": self.against,
            "inputs": self.inputs,
            "changed": self.changed,
            "bit_equal": self.bit_equal,
            "max_steps": self.max_steps,
            "doubt": self.doubt,
        }


@dataclass(frozen=True)
class Asked:
    """What every network of a comparison is compiled with.

    Args:
        bridge: the tool.
        chip: as the tool calls it; "" for a runtime.
        images: (N, ...) float32 to run; N may be 0.
        calibration: (N, ...) float32, for a float network that the tool quantizes.
        timeout: seconds for each network.
        dialect: of a student's file; None: that of its own target.
    """

    bridge: Bridge
    chip: str
    images: Images
    calibration: Images
    timeout: float = TIMEOUT
    dialect: DialectConfig | None = None

    def compile(
        self,
        file: bytes | onnx.ModelProto,
        quantize: bool,
        log: Path | None,
        origins: Mapping[str, str] | None = None,
    ) -> Compiled:
        """What the tool makes of a file; it quantizes it where it can and is asked to."""
        content, outputs = file, list[str]()
        if isinstance(file, onnx.ModelProto):
            content = file.SerializeToString()
            outputs = [output.name for output in file.graph.output]
        return self.bridge.compile(
            content,
            self.chip,
            self.images,
            self.calibration if quantize and self.bridge.says("QUANTIZES") else None,
            timeout=self.timeout,
            log=log,
            origins=origins,
            outputs=outputs,
        )


def compile_student(
    student: Student, asked: Asked, log: Path | None = None, requantization: Kind = "multiplier"
) -> Judged:
    """Have a tool compile a student, and compare what it computes.

    Args:
        student: quantized, held against its golden model; or float, held against itself, and
            quantized by the tool where that is what the tool does.
        asked: the tool and what it is given.
        log: where to keep what the tool prints.
        requantization: of the golden model, as the target has it.

    Raises:
        ExportError: the student cannot be written as the tool takes it.
        ChipError: the tool is not there.
    """
    quantized, doubt, axes = is_quantized(student), "", student.graph.classes
    content: bytes | onnx.ModelProto
    if asked.bridge.says("SUFFIX") == ".tflite":
        if not quantized:
            raise ExportError(
                f"tool={asked.bridge.name} takes int8 TensorFlow Lite: quantize the student"
            )
        from archnet.deploy.tflite import to_tflite

        model: IntegerModel | None = of_five(student, "tflite")
        assert model is not None
        origins = {step.name: step.origin for step in model.steps if step.origin}
        content = to_tflite(model)
    else:
        model = to_integers(student, requantization) if quantized else None
        dialect = target_of(student).dialect if asked.dialect is None else asked.dialect
        form = asked.bridge.says("FORM") if quantized else None
        content = to_onnx(student, form, dialect=replace(dialect, batch="one"))
        origins = layers_of(content)
        doubt = doubts(content).get(asked.bridge.name, "")
    compiled = asked.compile(content, not quantized, log, origins)
    if model is None:
        return judged(compiled, asked.images, "the float student", _of(student), axes)
    return replace(against_golden(compiled, asked.images, model, axes), doubt=doubt)


def compile_teacher(
    teacher: nn.Module, asked: Asked, classes: Sequence[Axis], log: Path | None = None
) -> Judged:
    """Have a tool compile a float teacher, quantize it where that is what the tool does, and
    compare what it computes.

    Args:
        teacher: left untouched.
        asked: the tool and what it is given; at least one image.
        classes: the axis of the classes of each of its outputs (`archnet.ops.scores`).
        log: where to keep what the tool prints.

    Raises:
        ExportError: the teacher cannot be written as the tool takes it.
        ChipError: the tool, or one that writes the teacher for it, is not there.
    """
    if asked.bridge.says("SUFFIX") == ".tflite":
        content: bytes | onnx.ModelProto = teacher_tflite(teacher, asked, log)
    else:
        example = torch.from_numpy(asked.images[:1])
        with tempfile.TemporaryDirectory() as folder:
            path = export_teacher(teacher, example, Path(folder) / "teacher.onnx")
            content = for_one(onnx.load(path), asked.bridge)
    compiled = asked.compile(content, True, log)
    return judged(compiled, asked.images, "the float teacher", _of(teacher), classes)


def teacher_tflite(teacher: nn.Module, asked: Asked, log: Path | None = None) -> bytes:
    """A float teacher as int8 TensorFlow Lite, by Google's own converter and quantizer.

    Args:
        teacher: left untouched.
        asked: with the calibration inputs.
        log: of the tool; that of the converter is kept beside it.

    Raises:
        ExportError: torch, or the converter, cannot export the teacher.
        ChipError: the converter is not there.
    """
    converter, what = bridge("litert_torch"), f"tool={asked.bridge.name} takes TensorFlow Lite"
    if converter.missing:
        raise ChipError(f"teacher=true: {what}, and {converter.missing}")
    network = copy.deepcopy(teacher).cpu().eval()
    content = io.BytesIO()
    try:
        example = torch.from_numpy(asked.calibration[:1])
        torch.export.save(torch.export.export(network, (example,), strict=False), content)
    except Exception as error:  # Whatever a network of others may raise while it is traced.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"torch cannot export this teacher: {printable(reason, 300)}") from error
    beside = None if log is None else log.with_name(f"{log.stem}_{converter.name}.log")
    found = converter.compile(
        content.getvalue(), calibration=asked.calibration, timeout=asked.timeout, log=beside
    )
    if found.made is None:
        raise ExportError(f"teacher=true: {what}, and {found.version} fails: {found.error}")
    return found.made


def compile_file(path: Path, asked: Asked, log: Path | None = None) -> Judged:
    """Have a tool compile anybody's file; an ONNX file is held against ONNX Runtime.

    Raises:
        ArchnetError: the file is none, or of another kind than the tool takes.
    """
    suffix = asked.bridge.says("SUFFIX")
    if path.suffix != suffix:
        raise ExportError(f"{path}: tool={asked.bridge.name} takes files named *{suffix}")
    if suffix != ".onnx":
        return Judged(asked.compile(path.read_bytes(), False, log), "")
    model = onnx.load(path)
    quantized = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    content = for_one(model, asked.bridge)
    compiled = asked.compile(content, not quantized, log, layers_of(model))
    if any(node.domain == MctWriter.domain for node in model.graph.node):
        return Judged(compiled, "")  # ONNX Runtime knows no such nodes
    doubt = doubts(model).get(asked.bridge.name, "")
    session = load_session(content.SerializeToString())

    def run(images: Images) -> list[NDArray[Any]]:
        return _in_batches(lambda item: run_session(session, item, str(path)), images, 1)

    axes = [
        axis_of([dim.dim_value for dim in output.type.tensor_type.shape.dim][1:])
        for output in model.graph.output
    ]
    return replace(judged(compiled, asked.images, "ONNX Runtime", run, axes), doubt=doubt)


def input_shape(path: str | os.PathLike[str], given: Mapping[str, Sequence[int]] | None) -> Any:
    """The shape of the one input of an ONNX file, for a batch of one.

    Raises:
        ArchnetError: the file is no valid one, has several inputs, or leaves sizes open.
    """
    graph = load(path).graph
    constants = {item.name for item in graph.initializer}
    inputs = [item for item in graph.input if item.name not in constants]
    if len(inputs) != 1:
        raise ExportError(f"{path} has {len(inputs)} inputs, and one is taken here")
    if given is not None:
        return tuple(next(iter(given.values())))
    sizes = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim]
    shape = (1, *sizes[1:])
    if not all(size > 0 for size in shape):
        raise ExportError(f"{path} leaves sizes of its input open: state them, input=1x3x224x224")
    return shape


def for_one(model: onnx.ModelProto, bridge: Bridge) -> onnx.ModelProto:
    """A file that archnet has not written, for a batch of one, as chips' tools want it, in an IR
    that the tool reads. Students are written so (`DialectConfig`).
    """
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].dim_value:
            dims[0].dim_value = 1
    model.ir_version = min(model.ir_version, bridge.says("IR", model.ir_version))
    return model


def layers_of(model: onnx.ModelProto) -> dict[str, str]:
    """Name of a node -> the teacher's layer that it comes from, where the file says so."""
    return {
        node.name: entry.value
        for node in model.graph.node
        for entry in node.metadata_props
        if entry.key == "origin" and node.name
    }


def judged(
    compiled: Compiled,
    images: Images,
    against: str,
    run: Callable[[Images], list[NDArray[Any]]],
    classes: Sequence[Axis],
) -> Judged:
    """Float results against those of ``run``, output by output."""
    if compiled.scores is None or not len(compiled.scores):
        return Judged(compiled, against)
    expected = run(images)
    found = _parted(compiled.scores, expected)
    if found is None:
        return Judged(_with_shape(compiled, expected), against)
    wrong = _changed(expected, found, classes)
    return Judged(compiled, against, len(images), wrong)


def against_golden(
    compiled: Compiled, images: Images, model: IntegerModel, classes: Sequence[Axis]
) -> Judged:
    """The results of a quantized student against its integer model, output by output."""
    against = "the golden model"
    if compiled.scores is None or not len(compiled.scores):
        return Judged(compiled, against)
    expected = model.results(images, BATCH)
    found = _parted(compiled.scores, expected)
    if found is None:
        return Judged(_with_shape(compiled, expected), against)
    units = [model.unit(name) for name in model.outputs]
    difference = np.concatenate(
        [
            steps_off(ours / unit, theirs).reshape(-1)
            for ours, unit, theirs in zip(found, units, expected, strict=True)
        ]
    )
    values = [theirs * unit for theirs, unit in zip(expected, units, strict=True)]
    return Judged(
        compiled,
        against,
        len(images),
        _changed(values, found, classes),
        float((difference == 0).mean()),
        float(difference.max()),
    )


def _parted(scores: NDArray[Any], expected: Sequence[NDArray[Any]]) -> list[NDArray[Any]] | None:
    """The results of each output, in the shapes expected; None where their sizes are others."""
    sizes = [part[0].size for part in expected]
    if scores.size != len(expected[0]) * sum(sizes):
        return None
    parts = np.split(scores.reshape(len(expected[0]), -1), np.cumsum(sizes)[:-1], 1)
    return [part.reshape(like.shape) for part, like in zip(parts, expected, strict=True)]


def _with_shape(compiled: Compiled, expected: Sequence[NDArray[Any]]) -> Compiled:
    assert compiled.scores is not None
    wanted = ", ".join(str(part.shape) for part in expected)
    said = f"its results are {compiled.scores.shape}, and {wanted} were expected"
    return replace(compiled, error=compiled.error or said)


def _changed(
    expected: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]], classes: Sequence[Axis]
) -> int | None:
    """Decisions that are others, in all outputs; None where there are none."""
    counts = [
        int(changed(theirs, ours, axis).sum())
        for theirs, ours, axis in zip(expected, found, classes, strict=True)
        if axis is not None
    ]
    return sum(counts) if counts else None


def _in_batches(
    run: Callable[[Images], Sequence[NDArray[Any]]], images: Images, batch: int
) -> list[NDArray[Any]]:
    """All outputs of a network, (N, ...) each, run batch by batch."""
    parts = [run(images[first : first + batch]) for first in range(0, len(images), batch)]
    return [np.concatenate(output) for output in zip(*parts, strict=True)]


def _of(network: nn.Module) -> Callable[[Images], list[NDArray[Any]]]:
    """What a float network gives, batch by batch."""

    def run(images: Images) -> list[NDArray[Any]]:
        was_training = network.training
        network.eval()
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        try:
            with torch.no_grad():
                return _in_batches(
                    lambda part: [
                        output.cpu().numpy()
                        for output in each(network(torch.from_numpy(part).to(device)))
                    ],
                    images,
                    BATCH,
                )
        finally:
            network.train(was_training)

    return run
