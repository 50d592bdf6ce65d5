"""The part of ``rknn.py`` that runs in the toolkit's environment: it imports nothing of archnet.

    python -I benchmarks/rknn_toolkit.py <folder> <platform>

reads ``network.onnx``, ``calibration.npy`` and ``pictures.npy`` in the folder and leaves
``result.json`` and, where the simulator ran, ``scores.npy`` there. The compiler's table goes to
the standard output. With ``-I`` the module ``rknn`` is the toolkit's, not the script beside this.
"""

import json
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def run(folder: Path, platform: str) -> str:
    """Quantize, compile and simulate one network: what went wrong, "" if nothing did."""
    toolkit: Any = import_module("rknn.api").RKNN(verbose=True)
    listed = []
    for index, picture in enumerate(np.load(folder / "calibration.npy")):
        np.save(folder / f"calibration{index}.npy", picture[None])
        listed.append(str(folder / f"calibration{index}.npy"))
    (folder / "dataset.txt").write_text("\n".join(listed))
    dataset = str(folder / "dataset.txt")
    steps = {
        "config": lambda: toolkit.config(target_platform=platform, quantized_dtype="w8a8"),
        "load_onnx": lambda: toolkit.load_onnx(model=str(folder / "network.onnx")),
        "build": lambda: toolkit.build(do_quantization=True, dataset=dataset),
        "init_runtime": toolkit.init_runtime,
    }
    for name, step in steps.items():
        if step() not in (0, None):
            return f"{name} failed"
    scores = [
        toolkit.inference(inputs=[picture[None]], data_format=["nchw"])[0].reshape(-1)
        for picture in np.load(folder / "pictures.npy")
    ]
    np.save(folder / "scores.npy", np.stack(scores))
    return ""


def main() -> None:
    """Run, and say what came of it."""
    folder = Path(sys.argv[1])
    try:
        error = run(folder, sys.argv[2])
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    found = {"error": error, "compiler": f"rknn-toolkit2 {version('rknn-toolkit2')}"}
    (folder / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
