"""How long runtimes take for an int8 student beside the int8 teacher that they make themselves.

    python benchmarks/runtimes.py resnet18

Random weights and pictures; one picture a run, one thread, medians of runs in which all files take
turns. The teacher is torch's own export, quantized by ONNX Runtime's ``quantize_static`` (QDQ,
unsigned activations, signed weights, MinMax); the student is W8A8, calibrated, form qdq.
OpenVINO (an extra, left out where it is not installed) reads the same two files.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from deploy import cpu
from lowering import member, size_of
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from record import append
from torch import Tensor

import archnet
from archnet.deploy.latency import WARM_UP, export_teacher
from archnet.deploy.runtime import load_session
from archnet.quant import Recipe, settle
from archnet.teachers import random_network

HARDWARE = ("arch5", "rk3588")
CALIBRATION = 16
Run = Callable[[], Any]


class _Pictures(CalibrationDataReader):
    """Pictures for ONNX Runtime's calibration, one at a time."""

    def __init__(self, images: Tensor) -> None:
        self.left = iter(images.split(1))

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        image = next(self.left, None)
        return None if image is None else {"x": image.numpy()}


def int8_teacher(network: torch.nn.Module, images: Tensor, folder: Path) -> Path:
    """A network as ONNX Runtime quantizes it."""
    written = export_teacher(network, images[:1], folder / "teacher.onnx")
    ready, done = folder / "ready.onnx", folder / "int8.onnx"
    quant_pre_process(written, ready)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(ready, done, _Pictures(images), per_channel=True, **types)
    return done


def in_onnxruntime(path: Path, picture: NDArray[Any]) -> Run:
    """One run of a file in ONNX Runtime, on one thread."""
    session = load_session(path, 1)
    feed = {session.get_inputs()[0].name: picture}
    return lambda: session.run(None, feed)


def in_openvino(path: Path, picture: NDArray[Any]) -> Run | None:
    """One run of a file in OpenVINO, on one thread; None where it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    model = core.read_model(path)
    model.reshape({model.inputs[0]: list(picture.shape)})
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return lambda: request.infer([picture])


RUNTIMES = {"onnxruntime": in_onnxruntime, "openvino": in_openvino}


def medians(runs: Mapping[str, Run], count: int) -> dict[str, float]:
    """Milliseconds of each run; all take turns, so that what else the machine does falls on all."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(WARM_UP + count):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(taken[WARM_UP:]) for name, taken in seconds.items()}


def measure(name: str, options: argparse.Namespace) -> None:
    """Add the rows of one network: each runtime with each target's student."""
    side = options.size or size_of(name)
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(CALIBRATION, 3, side, side, generator=generator)
    network = random_network(member(name), seed=options.seed)
    picture = images[:1].numpy()
    with tempfile.TemporaryDirectory() as place:
        files = {"teacher": int8_teacher(network, images, Path(place))}
        for hardware in options.hardware:
            student = archnet.convert(network, images[:1], hardware, calibration=images)
            settle(archnet.quantize(student, Recipe(8, 8), calibration=[images]))
            files[hardware] = archnet.export(student, Path(place) / hardware, form="qdq")
        for runtime, opened in RUNTIMES.items():
            made = {name: opened(path, picture) for name, path in files.items()}
            runs = {name: run for name, run in made.items() if run is not None}
            if not runs:
                print(f"{runtime}: not installed")
                continue
            load = os.getloadavg()[0]
            taken = medians(runs, options.repeat)
            for hardware in options.hardware:
                ratio = round(taken[hardware] / taken["teacher"], 3)
                print(f"{name}, {hardware}, {runtime}: {ratio}", flush=True)
                if options.dry_run:
                    continue
                append(
                    "runtimes",
                    {
                        "task": f"random images {side}x{side}",
                        "teacher": name,
                        "hardware": hardware,
                        "weight_bits": 8,
                        "act_bits": 8,
                        "metric": "ms an image, one thread (int8 teacher, int8 student)",
                        "teacher_value": round(taken["teacher"], 4),
                        "student_value": round(taken[hardware], 4),
                        "runtime": f"{runtime} {version(runtime)}",
                        "ratio": ratio,
                        "cpu": cpu(),
                        "load": round(load, 1),
                        "seed": options.seed,
                        "command": f"python benchmarks/runtimes.py {name} --hardware {hardware} "
                        f"--size {side} --repeat {options.repeat} --seed {options.seed}",
                    },
                )


def main() -> None:
    """Measure and add the rows to ``results/runtimes.csv``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("networks", nargs="+", help="names in archnet.teachers.MEMBERS")
    parser.add_argument("--hardware", nargs="*", default=HARDWARE, help="targets of the students")
    parser.add_argument("--size", type=int, help="side of the pictures, pixels")
    parser.add_argument("--repeat", type=int, default=200, help="runs of each file")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures")
    parser.add_argument("--dry-run", action="store_true", help="print the figures, add no row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.networks:
        measure(name, options)


if __name__ == "__main__":
    main()
