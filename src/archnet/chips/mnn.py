"""MNN, Alibaba's runtime, on this computer's CPU: its converter, then its interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archnet.chips.serve import Request

ABOUT = "MNN"
PACKAGE = "mnn"
ACCELERATOR = "CPU"
SUFFIX = ".onnx"
ERRORS = (r".*(?i:not supported|can't convert|error)",)


def run(request: Request) -> None:
    """Convert and run."""
    import MNN
    import numpy as np

    made = request.folder / "network.mnn"
    converter = Path(sys.executable).with_name("mnnconvert")
    words = ["-f", "ONNX", "--modelFile", str(request.file), "--MNNModel", str(made)]
    words = [sys.executable, str(converter), *words, "--bizCode", "archnet"]
    status = subprocess.run(words, check=False).returncode
    if status or not made.is_file():
        raise RuntimeError(f"its converter ended with status {status}")
    manager = MNN.nn.create_runtime_manager(({"backend": "CPU", "numThread": 1},))
    network: Any = MNN.nn.load_module_from_file(
        str(made), [], request.outputs, runtime_manager=manager
    )

    def forward(inputs: Any) -> Any:
        variable = MNN.expr.const(np.ascontiguousarray(inputs), list(inputs.shape), MNN.expr.NCHW)
        found = network.forward([variable])
        return [MNN.expr.convert(output, MNN.expr.NCHW).read() for output in found]

    request.run(forward)
