r"""What Rockchip's compiler says of networks and their students, after its own INT8 quantization.

    archnet compile --install rknn
    python benchmarks/rknn.py resnet18

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
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lowering import LEFT_OUT, file_of, size_of
from record import append
from torch import Tensor, nn

import archnet
from archnet.chips import Compiled, Placed, bridge
from archnet.convert import Approximation
from archnet.deploy import to_onnx
from archnet.deploy.compile import for_one
from archnet.errors import ArchnetError
from archnet.teachers import MEMBERS, Member, random_network
from archnet.teachers.nets import NETS

HARDWARE = ("rk3588", "arch5", "arch5_conv")
TEACHER = "teacher itself"
CALIBRATION, PICTURES = 20, 50
OWN = 32, 10  # side of the pictures and classes of archnet's own teachers
SHOWN = 4  # rows that cost most


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


def counted(rows: Sequence[Placed]) -> str:
    """How many rows of which operator, most first."""
    return " ".join(f"{k}:{v}" for k, v in Counter(r.operator for r in rows).most_common())


def figures(found: Compiled, own: Tensor, teacher: Tensor) -> dict[str, Any]:
    """Columns of one file: what was compiled, and against the scores (pictures, classes) of the
    float file and the float teacher what was simulated.
    """
    row: dict[str, Any] = {}
    if found.operators:
        costliest = sorted(found.operators, key=lambda row: -(row.cycles or 0))[:SHOWN]
        row = {
            "rows": len(found.operators),
            "rows_off_npu": len(found.off),
            "cycles": found.figures["cycles"],
            "read_kb": found.figures["read_kb"],
            "off_npu": counted(found.off),
            "operators": counted(found.operators),
            "costliest": " ".join(f"{r.operator}:{r.name}:{r.cycles}" for r in costliest),
        }
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
    tool = bridge("rknn")
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
            f"{bound}--seed {options.seed} --timeout {options.timeout}",
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
                model, own = (
                    to_onnx(student, "float", opset=tool.says("OPSET")),
                    scores_of(student, pictures),
                )
        except ArchnetError as error:
            row["error"] = str(error)
        else:
            row["nodes"] = sum(node.op_type not in LEFT_OUT for node in model.graph.node)
            found = tool.compile(
                for_one(model, tool).SerializeToString(),
                options.platform,
                pictures.numpy(),
                calibration.numpy(),
                timeout=options.timeout,
            )
            if hardware == TEACHER:
                teacher_cycles = found.figures.get("cycles", 0)
            row |= figures(found, own, teacher)
            row |= {
                "compiler": found.version,
                "compile_s": round(found.seconds, 1),
                "error": found.error,
            }
            if found.operators and teacher_cycles:
                row["cycles_ratio"] = round(found.figures["cycles"] / teacher_cycles, 3)
        append("rknn", row)
        shown = ("nodes", "rows", "rows_off_npu", "cycles", "cycles_ratio", "changed", "error")
        print(f"{name}, {hardware}: " + ", ".join(f"{k} {row.get(k, '-')}" for k in shown))


def main() -> None:
    """Measure and add the rows to ``results/rknn.csv``, each network in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("networks", nargs="+", help="in archnet.teachers.MEMBERS, or cifar_vit")
    parser.add_argument("--hardware", nargs="*", default=HARDWARE, help="targets of the students")
    parser.add_argument(
        "--platform", default="rk3588", choices=list(bridge("rknn").chips), help="the chip"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures")
    parser.add_argument("--max-cost", type=float, help="convert.max_cost of the students")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one file")
    options = parser.parse_args()
    if bridge("rknn").missing:
        parser.error(bridge("rknn").missing)
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
    for key in ("platform", "seed", "timeout", "max_cost"):
        if getattr(options, key) is not None:
            given += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    for name in options.networks:
        subprocess.run([sys.executable, __file__, name, *given], check=False)


if __name__ == "__main__":
    main()
