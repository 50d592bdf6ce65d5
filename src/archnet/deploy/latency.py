"""How long files take in ONNX Runtime, one beside the other."""

import copy
import os
import statistics
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from archnet.deploy.runtime import load_session
from archnet.deploy.writer import ExportError
from archnet.ops import Activation, Student, WeightedOperator

WARM_UP = 5


def latencies(
    files: Mapping[str, str | os.PathLike[str]], images: Tensor, runs: int = 100, threads: int = 1
) -> dict[str, float]:
    """Median milliseconds of a run of each file.

    The files take turns (a, b, c, a, b, c, ...), so that whatever else the machine does falls on
    all of them alike.

    Args:
        files: ONNX files with one input, by name.
        images: (B, C, H, W), what each run is given.
        runs: of each file; some more before them are not counted.
        threads: of one operator.

    Raises:
        ExportError: a file cannot be loaded.
    """
    sessions = {name: load_session(path, threads) for name, path in files.items()}
    feed = np.ascontiguousarray(images.cpu().numpy(), np.float32)
    feeds = {name: {one.get_inputs()[0].name: feed} for name, one in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(WARM_UP + runs):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, feeds[name])
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(taken[WARM_UP:]) for name, taken in seconds.items()}


def without_quantizers(student: Student) -> Student:
    """A copy of a student that computes in float, with the weights as they are."""
    floating = copy.deepcopy(student)
    for module in floating.modules():
        if isinstance(module, WeightedOperator):
            module.weight_quantizer = module.bias_quantizer = None
        elif isinstance(module, Activation):
            module.quantizer = None
    return floating


def export_teacher(teacher: nn.Module, example: Tensor, path: Path) -> Path:
    """Write any network as an ONNX file by torch's own exporter, to time it.

    Args:
        teacher: the network; it is left untouched.
        example: (1, C, H, W).
        path: the file.

    Raises:
        ExportError: torch cannot export this network.
    """
    network = copy.deepcopy(teacher).eval()
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            # The newer exporter needs a package (onnxscript) that nothing else here needs.
            torch.onnx.export(
                network, (example,), path, dynamo=False, input_names=["x"], opset_version=17
            )
    except Exception as error:  # Whatever a network of others may raise while it is traced.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"torch cannot export this teacher: {reason}") from error
    return path
