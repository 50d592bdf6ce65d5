"""Running an exported file, and comparing it with the student in PyTorch."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from archnet.deploy.writer import ExportError
from archnet.ops import Student


@dataclass(frozen=True)
class Parity:
    """A file against PyTorch: largest difference of an output, and predictions that changed."""

    runtime: str
    max_abs_diff: float
    mismatches: int
    count: int


def load_session(path: str | os.PathLike[str], threads: int = 0) -> onnxruntime.InferenceSession:
    """Open an exported file in ONNX Runtime, on the CPU.

    Args:
        path: the ONNX file.
        threads: of one operator; 0 leaves the choice to the runtime.

    Raises:
        ExportError: the file is missing or broken, or holds an operator the runtime lacks.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # The default kernels on AVX2 add pairs of products in 16 bits, where 8-bit weights saturate.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # The runtime's exceptions have no common base.
        raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error


def parity(
    student: Student,
    path: str | os.PathLike[str],
    inputs: Tensor,
    batch_size: int = 64,
) -> Parity:
    """Run the student in PyTorch and its file in ONNX Runtime on the same inputs.

    Args:
        student: the student that was exported.
        path: its ONNX file.
        inputs: (N, C, H, W), on any device.
        batch_size: inputs a run, in both.

    Returns:
        The largest absolute difference of any output, and how many predictions changed, of
        ``count`` (one for each row along the last axis).

    Raises:
        ExportError: the file cannot be loaded.
    """
    session = load_session(path)
    (feed,) = [item.name for item in session.get_inputs()]
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    was_training = student.training
    student.eval()
    difference, mismatches, count = 0.0, 0, 0
    try:
        with torch.no_grad():
            for batch in inputs.split(batch_size):
                expected = student(batch.to(device)).cpu().numpy()
                (found,) = session.run(None, {feed: batch.cpu().numpy()})
                # Unlike max(), np.maximum keeps a NaN.
                difference = float(np.maximum(difference, np.abs(expected - found).max()))
                changed = _changed(expected, found)
                mismatches, count = mismatches + int(changed.sum()), count + changed.size
    finally:
        student.train(was_training)
    return Parity(f"onnxruntime {onnxruntime.__version__}", difference, mismatches, count)


def _changed(expected: NDArray[Any], found: NDArray[Any]) -> NDArray[np.bool_]:
    """Rows whose largest entry is another one. Equal scores, which few bits make common, are a
    tie that float rounding decides: either winner is right.
    """
    winner = np.take_along_axis(expected, found.argmax(-1)[..., None], -1)[..., 0]
    rounding = 1e-5 * np.abs(expected).max(-1)
    return ~(expected.max(-1) - winner <= rounding)
