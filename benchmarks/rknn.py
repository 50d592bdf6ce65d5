r"""What Rockchip's compiler says of networks and their students, after its own INT8 quantization.

    python benchmarks/rknn.py resnet18 --python $RKNN/bin/python

The compiler wants an environment of its own, whose Python the option names; its torch may be
that of archnet's:

    python3.11 -m venv $RKNN && $RKNN/bin/pip install --no-deps rknn-toolkit2==2.5.0 "numpy<2" \
        protobuf==4.25.4 onnx==1.18.0 onnxruntime==1.22.1 opencv-python-headless==4.11.0.86 \
        scipy ruamel.yaml psutil tqdm flatbuffers fast-histogram ml_dtypes typing_extensions \
        coloredlogs humanfriendly packaging
    python -c "import torch; print(torch.__path__[0] + '/..')" > \
        $RKNN/lib/python3.11/site-packages/torch.pth

Weights and pictures are random. The teacher's file is torch's own export, a student's is the float
one, both for one picture. A row of the compiler's table is an operator on the chip, several of the
file fused. It charges no cycles for what it leaves to the CPU, nor for what multiplies nothing, so
that ``read_kb``, what all rows read (weights, too), stands beside them.

``changed`` counts pictures whose class differs between the compiler's simulator and the float
teacher, ``changed_own`` between the simulator and the float file, ``answers`` how many classes
the float teacher gives to these pictures: where it is one, as of many deep networks with random
weights, ``changed`` says nothing. ``distance`` is the root mean square between the scores
of the simulator and those of the float file, over that of the latter.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from lowering import LEFT_OUT, file_of, size_of
from record import append
from torch import Tensor, nn

import archnet
from archnet.convert import Approximation
from archnet.deploy import to_onnx
from archnet.errors import ArchnetError
from archnet.teachers import MEMBERS, Member, random_network
from archnet.teachers.nets import NETS

HARDWARE = ("rk3588", "arch5", "arch5_conv")
TEACHER = "teacher itself"
TOOLKIT = Path(__file__).with_name("rknn_toolkit.py")
OPSET = 17
IR = 10  # of ONNX files, the newest that the toolkit's onnx reads
CALIBRATION, PICTURES = 20, 50
ENDS = ("InputOperator", "OutputOperator")
OWN = 32, 10  # side of the pictures and classes of archnet's own teachers
SHOWN = 4  # rows that cost most
ROW = re.compile(
    r"\] (?P<number>\d+)\s+(?P<operator>\S+)\s+\S+\s+(?P<target>\S+)\s+(?P<reads>\S+)\s+"
    r"\S+\s+\d+/\d+/(?P<cycles>\d+)\s+(?P<kb>\d+)\s"  # of memory, of the array, in all
)
COLOUR = re.compile(r"\x1b\[[\d;]*m")


@dataclass(frozen=True)
class Row:
    """A row of the compiler's table; ``cycles`` are the larger of memory's and the array's."""

    operator: str
    target: str
    reads: str
    cycles: int
    kb: int


@dataclass(frozen=True)
class Compiled:
    """What came of one file: ``scores`` (pictures, classes), None where nothing was simulated."""

    rows: tuple[Row, ...]
    scores: np.ndarray | None
    error: str
    compiler: str
    seconds: float

    @property
    def cycles(self) -> int:
        return sum(row.cycles for row in self.rows)


def table(log: str) -> tuple[Row, ...]:
    """The rows of the last table in a log, without the network's inputs and outputs."""
    found: dict[int, Row] = {}
    for match in ROW.finditer(log):
        number = int(match["number"])
        if number == 0:
            found = {}
        found[number] = Row(
            match["operator"],
            match["target"],
            match["reads"],
            int(match["cycles"]),
            int(match["kb"]),
        )
    return tuple(row for row in found.values() if row.operator not in ENDS)


def first_error(text: str) -> str:
    """The line that says what went wrong: an exception's, or the first one marked as an error."""
    lines = [COLOUR.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if "Traceback" not in line]
    for mark in (r"(\w+\.)*\w+(Error|Exception): ", r"E "):
        for line in lines:
            if re.match(mark, line):
                said = re.sub(r"^E (RKNN: )?(\[[\d:.]+\] )?", "", line)
                return re.sub(r"(/[\w.@-]+){2,}", lambda path: Path(path[0]).name, said)[:300]
    return ""


def compiled(
    model: onnx.ModelProto,
    calibration: Tensor,
    pictures: Tensor,
    *,
    python: str,
    platform: str,
    timeout: int,
) -> Compiled:
    """Have the toolkit compile and simulate a file; ``timeout`` in seconds."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        onnx.save(model, folder / "network.onnx")
        np.save(folder / "calibration.npy", calibration.numpy())
        np.save(folder / "pictures.npy", pictures.numpy())
        start, error = time.monotonic(), ""
        with (folder / "log").open("w") as log:
            try:
                status = subprocess.run(
                    [python, "-I", str(TOOLKIT), str(folder), platform],
                    cwd=folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                status, error = 0, f"not done after {timeout} s"
        seconds = time.monotonic() - start
        text = (folder / "log").read_text(errors="replace")
        result = folder / "result.json"
        found = json.loads(result.read_text()) if result.is_file() else {}
        if status:
            ended = signal.Signals(-status).name if status < 0 else f"status {status}"
            error = f"the toolkit ended with {ended}"
        elif found.get("error"):
            error = found["error"].split(":")[0]
        if error:
            said = first_error(found.get("error", "") + "\n" + text)
            error = said if said.startswith(error) else f"{error}: {said}".strip(": ")
        scores = np.load(folder / "scores.npy") if (folder / "scores.npy").is_file() else None
    return Compiled(table(text), scores, error, found.get("compiler", ""), seconds)


def for_one(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same file for a batch of one, as the toolkit wants it."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    model.ir_version = min(model.ir_version, IR)
    return model


def network_named(name: str) -> tuple[Member, int, int]:
    """A network, the side of its pictures and its classes.

    Raises:
        ArchnetError: there is none of that name.
    """
    for item in MEMBERS:
        if item.name == name:
            return item, size_of(name), 1000
    if name not in NETS:
        raise ArchnetError(f"{name} is neither in archnet.teachers.MEMBERS nor an own teacher")
    return Member("archnet", name, OWN[0], "archnet"), *OWN


def counted(rows: Sequence[Row]) -> str:
    """How many rows of which operator, most first."""
    return " ".join(f"{k}:{v}" for k, v in Counter(r.operator for r in rows).most_common())


def figures(found: Compiled, own: Tensor, teacher: Tensor) -> dict[str, Any]:
    """Columns of one file: what was compiled, and against the scores (pictures, classes) of the
    float file and the float teacher what was simulated.
    """
    off = [row for row in found.rows if row.target != "NPU"]
    costliest = sorted(found.rows, key=lambda row: -row.cycles)[:SHOWN]
    row = {
        "rows": len(found.rows),
        "rows_off_npu": len(off),
        "cycles": found.cycles,
        "read_kb": sum(row.kb for row in found.rows),
        "off_npu": counted(off),
        "operators": counted(found.rows),
        "costliest": " ".join(f"{r.operator}{r.reads}:{r.cycles}" for r in costliest),
    }
    if not found.rows:
        row = {}
    if found.scores is not None:
        classes = torch.from_numpy(found.scores).argmax(1)
        gap = torch.from_numpy(found.scores).float() - own
        row["changed"] = int((classes != teacher.argmax(1)).sum())
        row["changed_own"] = int((classes != own.argmax(1)).sum())
        row["distance"] = round(float(gap.pow(2).mean().sqrt() / own.pow(2).mean().sqrt()), 3)
    return row


def scores_of(network: nn.Module, pictures: Tensor) -> Tensor:
    """Scores (pictures, classes) of a float network."""
    with torch.no_grad():
        return torch.cat([network(part).flatten(1) for part in pictures.split(10)])


def measure(name: str, options: argparse.Namespace) -> None:
    """Add the rows of one network: its own and that of each student."""
    member, side, classes = network_named(name)
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(CALIBRATION + PICTURES, 3, side, side, generator=generator)
    calibration, pictures = images.split([CALIBRATION, PICTURES])
    network = random_network(member, num_classes=classes, seed=options.seed)
    teacher = scores_of(network, pictures)
    teacher_cycles = 0
    bound = "" if options.max_cost is None else f"--max-cost {options.max_cost} "
    approximation = Approximation(max_cost=options.max_cost)
    for hardware in (TEACHER, *options.hardware):
        more = " --hardware" if hardware == TEACHER else f" --hardware {hardware}"
        row = {
            "task": f"random images {side}x{side}",
            "teacher": name,
            "hardware": hardware,
            "weight_bits": 8,
            "act_bits": 8,
            "seed": options.seed,
            "command": f"python benchmarks/rknn.py {name}{more} --platform {options.platform} "
            f"{bound}--seed {options.seed} --timeout {options.timeout} --python $RKNN/bin/python",
            "platform": options.platform,
            "answers": len(teacher.argmax(1).unique()),
        }
        try:
            if hardware == TEACHER:
                model, own = file_of(network, pictures[:1]), teacher
            else:
                student = archnet.convert(
                    network, calibration, hardware, approximation=approximation
                )
                model, own = to_onnx(student, "float", opset=OPSET), scores_of(student, pictures)
        except ArchnetError as error:
            row["error"] = str(error)
        else:
            row["nodes"] = sum(node.op_type not in LEFT_OUT for node in model.graph.node)
            found = compiled(
                for_one(model),
                calibration,
                pictures,
                python=options.python,
                platform=options.platform,
                timeout=options.timeout,
            )
            if hardware == TEACHER:
                teacher_cycles = found.cycles
            row |= figures(found, own, teacher)
            row |= {
                "compiler": found.compiler,
                "compile_s": round(found.seconds, 1),
                "error": found.error,
            }
            if found.rows and teacher_cycles:
                row["cycles_ratio"] = round(found.cycles / teacher_cycles, 3)
        append("rknn", row)
        shown = ("nodes", "rows", "rows_off_npu", "cycles", "cycles_ratio", "changed", "error")
        print(f"{name}, {hardware}: " + ", ".join(f"{k} {row.get(k, '-')}" for k in shown))


def main() -> None:
    """Measure and add the rows to ``results/rknn.csv``, each network in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("networks", nargs="+", help="in archnet.teachers.MEMBERS, or cifar_vit")
    parser.add_argument("--python", required=True, help="Python of the toolkit's environment")
    parser.add_argument("--hardware", nargs="*", default=HARDWARE, help="targets of the students")
    parser.add_argument("--platform", default="rk3588", help="the chip that is compiled for")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures")
    parser.add_argument("--max-cost", type=float, help="convert.max_cost of the students")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one file")
    options = parser.parse_args()
    python = shutil.which(options.python)
    if python is None:
        parser.error(f"--python {options.python}: there is no such program")
    options.python = str(Path(python).absolute())
    try:
        for name in options.networks:
            network_named(name)
    except ArchnetError as error:
        parser.error(str(error))
    if len(options.networks) == 1:
        torch.set_num_threads(1)
        measure(options.networks[0], options)
        return
    given = ["--hardware", *options.hardware]
    for key in ("python", "platform", "seed", "timeout", "max_cost"):
        if getattr(options, key) is not None:
            given += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    for name in options.networks:
        subprocess.run([sys.executable, __file__, name, *given], check=False)


if __name__ == "__main__":
    main()
