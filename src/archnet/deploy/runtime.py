"""Running an exported file, and comparing it with the student in PyTorch."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from archnet.deploy.qonnx import QonnxWriter
from archnet.deploy.writer import ExportError
from archnet.errors import printable
from archnet.hardware.onnx_file import AuditError, drop_trailing_names, load
from archnet.ops import Student
from archnet.ops.scores import Comparison, each


@dataclass(frozen=True)
class Parity:
    """A file against PyTorch, all its outputs together.

    Attributes:
        runtime: what ran the file, with its version.
        max_abs_diff: the largest difference of an output.
        mismatches: decisions that changed, of ``count``: samples, pixels or tokens; an output
            without classes decides nothing.
        relative_error: |file - student| / |student|, the largest of an output.
    """

    runtime: str
    max_abs_diff: float
    mismatches: int
    count: int
    relative_error: float = 0.0


def load_session(
    model: str | os.PathLike[str] | bytes, threads: int = 0
) -> onnxruntime.InferenceSession:
    """Open an exported file in ONNX Runtime, on the CPU.

    Args:
        model: the ONNX file, or the content of one that was loaded before.
        threads: of one operator; 0 leaves the choice to the runtime.

    Raises:
        ExportError: the file is missing or broken, or holds an operator the runtime lacks.
    """
    name = "the model" if isinstance(model, bytes) else printable(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # It raises its errors, and would print them as well.
    options.log_severity_level = 4
    onnxruntime.set_default_logger_severity(4)
    # The default kernels on AVX2 add pairs of products in 16 bits, where 8-bit weights saturate.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        # What it does not survive ends here; content in memory is of a file that was checked.
        content = onnx.load_from_string(model) if isinstance(model, bytes) else load(model)
        source = model if isinstance(model, bytes) else os.fspath(model)
        if drop_trailing_names(content):
            # An optional input named "" at the end is left out; its optimizers read it.
            source = content.SerializeToString()
            folder = "session.model_external_initializers_file_folder_path"
            if not isinstance(model, bytes):
                options.add_session_config_entry(folder, os.fspath(Path(model).parent))
        return onnxruntime.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # It would print, and try the same provider again.
        )
    except Exception as error:  # The exceptions of the runtime have no base of their own.
        reason = _first_line(error).removeprefix(f"{name} is no valid ONNX model: ")
        raise ExportError(f"ONNX Runtime cannot load {name}: {reason}") from error


def run_session(
    session: onnxruntime.InferenceSession, inputs: NDArray[Any], name: str
) -> list[NDArray[Any]]:
    """The outputs of a model with one input; one whose batch is one runs once an input.

    Args:
        session: from `load_session`.
        inputs: (B, C, H, W) float32.
        name: the file's, for errors.

    Raises:
        ExportError: the model takes more than one input, or other inputs than these.
    """
    feeds = session.get_inputs()
    if len(feeds) != 1:
        raise ExportError(f"{name} has {len(feeds)} inputs, a student one: export it again")
    size = 1 if feeds[0].shape[:1] == [1] else max(1, len(inputs))
    parts = [inputs[first : first + size] for first in range(0, max(1, len(inputs)), size)]
    try:
        results = [session.run(None, {feeds[0].name: part}) for part in parts]
        return [np.concatenate(outputs) for outputs in zip(*results, strict=True)]
    except Exception as error:  # See load_session.
        raise ExportError(
            f"ONNX Runtime cannot run {name} on inputs {inputs.shape}: {_first_line(error)}"
        ) from error


def compile_openvino(content: bytes, exact: bool = False) -> Any:
    """An ONNX model compiled by OpenVINO for the CPU, in float32 where it is float.

    Args:
        content: the file's content.
        exact: without integer kernels. Those for AVX2 add pairs of products in 16 bits, where
            8-bit weights saturate; OpenVINO has no option for others.

    Raises:
        ExportError: the extra is missing, or OpenVINO cannot read or compile the model.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError("OpenVINO needs the extra: pip install 'archnet[openvino]'") from error
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    if exact:
        options["LP_TRANSFORMS_MODE"] = "NO"
    try:
        core = openvino.Core()
        return core.compile_model(core.read_model(content), "CPU", options)
    except Exception as error:  # Its exceptions are plain RuntimeErrors, of many lines.
        raise ExportError(f"OpenVINO cannot compile the model: {_first_line(error)}") from error


def run_qonnx(
    model: onnx.ModelProto, images: NDArray[np.float32], tensors: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """A model with Quant nodes in the executor of the package qonnx, which is an extra.

    Args:
        model: with one input.
        images: (B, C, H, W).
        tensors: names of values to give beside the output.

    Returns:
        The outputs and the values ``tensors``, by name.
    """
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.infer_shapes import InferShapes

    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    # Its executor wants every shape, the batch included.
    for item in (*fixed.graph.input, *fixed.graph.output):
        item.type.tensor_type.shape.dim[0].dim_value = len(images)
    wrapped = ModelWrapper(fixed).transform(InferShapes())
    feed = {fixed.graph.input[0].name: images}
    found = execute_onnx(wrapped, feed, return_full_exec_context=True)
    outputs = [item.name for item in fixed.graph.output]
    return {name: found[name] for name in (*outputs, *tensors)}


def missing_extra(package: str) -> str:
    """Why a runtime cannot be used; "" where it can."""
    try:
        version(package)
    except PackageNotFoundError:
        return f"needs the extra: pip install 'archnet[{package}]'"
    return ""


def parity(
    student: Student,
    path: str | os.PathLike[str],
    inputs: Tensor,
    batch_size: int = 64,
) -> Parity:
    """Run the student in PyTorch and its file on the same inputs.

    The file runs in ONNX Runtime; one of form qonnx in the package qonnx, node by node and slowly.

    Args:
        student: the student that was exported.
        path: its ONNX file.
        inputs: (N, C, H, W), on any device.
        batch_size: inputs a run, in both.

    Returns:
        The largest absolute difference of any output, and how many decisions changed, of ``count``
        (`archnet.ops.scores`).

    Raises:
        ExportError: the file cannot be loaded or run, or is that of another network.
    """
    runtime, run = _runner(path)
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    was_training = student.training
    student.eval()
    totals = [Comparison(axis) for axis in student.graph.classes]
    try:
        with torch.no_grad():
            for batch in inputs.split(batch_size):
                expected = [x.cpu().numpy() for x in each(student(batch.to(device)))]
                found = run(batch.cpu().numpy())
                require_shapes(printable(os.fspath(path)), found, expected)
                for total, ours, theirs in zip(totals, expected, found, strict=True):
                    total.add(ours, theirs)
    finally:
        student.train(was_training)
    name = f"{runtime} {version(runtime)}"
    return Parity(
        name,
        float(np.max([total.largest for total in totals])),  # which keeps a NaN
        sum(total.changed for total in totals),
        sum(total.decisions for total in totals),
        float(np.max([total.relative_error for total in totals])),
    )


def require_shapes(
    name: str, found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]
) -> None:
    """
    Raises:
        ExportError: results are not of the shapes of the student's.
    """
    ours, theirs = ([x.shape for x in results] for results in (expected, found))
    if ours != theirs:
        shown = (", ".join(map(str, shapes)) for shapes in (theirs, ours))
        raise ExportError(
            "{} gives {}, the student {}: it is another student's file".format(name, *shown)
        )


def _runner(
    path: str | os.PathLike[str],
) -> tuple[str, Callable[[NDArray[np.float32]], list[NDArray[Any]]]]:
    """The package that runs a file, and how: images to the file's outputs."""
    name = printable(os.fspath(path))
    model = _load(path)
    if not any(node.domain == QonnxWriter.domain for node in model.graph.node):
        session = load_session(path)
        return "onnxruntime", lambda images: run_session(session, images, name)
    if missing := missing_extra("qonnx"):
        raise ExportError(f"{name} is of form qonnx, which {missing}")

    def run(images: NDArray[np.float32]) -> list[NDArray[Any]]:
        try:
            return [*run_qonnx(model, images, []).values()]
        except Exception as error:  # It raises whatever its operators raise.
            raise ExportError(f"qonnx cannot run {name}: {_first_line(error)}") from error

    return "qonnx", run


def _load(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """A model as it stands in its file, checked, without data beside it."""
    try:
        return load(path)
    except AuditError as error:
        raise ExportError(str(error)) from error


def _first_line(error: Exception) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0], 300)
