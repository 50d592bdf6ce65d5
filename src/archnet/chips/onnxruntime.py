"""ONNX Runtime on this computer's CPU, with its default options."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "ONNX Runtime, default options"
PACKAGE = "onnxruntime"
ACCELERATOR = "CPU"
SUFFIX = ".onnx"


def run(request: Request) -> None:
    """Load, profile one run, run."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(request.folder / "profile")
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(request.file), options, providers=["CPUExecutionProvider"]
    )
    given = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    session.run(None, {given.name: np.zeros(shape, np.float32)})
    request.tell(operators=request.nodes(session.end_profiling()))
    request.run(lambda inputs: session.run(None, {given.name: inputs}))
