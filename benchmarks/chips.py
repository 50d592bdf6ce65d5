"""Networks and their students in the chips' own compilers and in runtimes, side by side.

    python benchmarks/chips.py                   # all networks, every tool that is installed
    python benchmarks/chips.py cifar_vit --tools rknn:rv1106 openvino
    python benchmarks/chips.py resnet50 --tools rknn:rk3588 --students rk3588 arch5 arch5_conv
    python benchmarks/chips.py --write           # docs/chips.md from the rows

Weights and pictures are random. The teacher's file is torch's own export. A tool that quantizes by
itself gets teacher and student in float, and quantizes both to INT8 on the same pictures; all
others get the teacher in float and the student at W8A8. ``off`` counts operators that are not on
the accelerator, ``off_more`` those of the student that the teacher has none of. ``changed`` counts
predictions of the tool that are not those of the file's own network: of the float network, or of
the golden integer model. ``answers`` says how many classes the float teacher gives to the pictures:
where it is one, as of deep networks with random weights, ``changed`` says nothing.
"""

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lowering import size_of
from record import RESULTS, append, read
from torch import Tensor, nn
from torchvision.models import SwinTransformer

import archnet
from archnet.chips import Bridge, Compiled, Placed, bridge, tools
from archnet.convert import Approximation
from archnet.deploy.compile import Asked, Judged, compile_student, compile_teacher
from archnet.errors import ArchnetError, printable
from archnet.hardware import Target
from archnet.ops.scores import axis_of
from archnet.teachers import MEMBERS, Member, random_network
from archnet.teachers.nets import NETS

SMALL, CALIBRATION, PICTURES = 64, 20, 50
# Name in the table -> name among archnet's own teachers or torchvision's, side of the pictures.
NETWORKS = {
    "resnet18": SMALL,
    "mobilenet_v2": SMALL,
    "mobilenet_v3_small": SMALL,
    "cifar_convnext": 32,
    "cifar_vit": 32,
    "swin": 32,
}
DOCS = Path(__file__).resolve().parents[1] / "docs" / "chips.md"
BEGIN, END = "<!-- the table: python benchmarks/chips.py --write -->", "<!-- end of the table -->"


def network_named(name: str, seed: int) -> nn.Module:
    """A network with random weights, in eval mode.

    Raises:
        ArchnetError: there is none of that name.
    """
    if name == "swin":
        # Two stages, shifted windows in each, a merging of patches between: the kinds of swin_t.
        torch.manual_seed(seed)
        return SwinTransformer(
            [4, 4], 32, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.0, num_classes=10
        ).eval()
    found = next((item for item in MEMBERS if item.name == name), None)
    if found is not None:
        return random_network(found, seed=seed)
    if name not in NETS:
        raise ArchnetError(f"{name} is neither in archnet.teachers.MEMBERS nor an own teacher")
    own = Member("archnet", name, 32, "archnet")
    return random_network(own, num_classes=10, seed=seed)


def places(names: Sequence[str]) -> list[tuple[Bridge, str, str]]:
    """(tool, target, chip) of what ``--tools`` names, such as ``rknn:rk3588``; all if none is."""
    found = []
    for name in names or tools():
        tool, _, target = name.partition(":")
        one = bridge(tool)
        for each in [target] if target else (one.chips or [""]):
            found.append((one, each, one.chip(each)))
    return found


class Students:
    """The students of one network by target and kind, each made once."""

    def __init__(self, network: nn.Module, calibration: Tensor, max_cost: float | None) -> None:
        self.network, self.calibration, self.max_cost = network, calibration, max_cost
        self.made: dict[tuple[str, bool], Any] = {}

    def of(self, hardware: str, quantized: bool) -> Any:
        """A float student, or one at W8A8.

        Raises:
            ArchnetError: the network cannot be converted.
        """
        key = hardware, quantized
        if key not in self.made:
            bound = Approximation(max_cost=self.max_cost)
            student = archnet.convert(self.network, self.calibration, hardware, approximation=bound)
            if quantized:
                archnet.quantize(student, weight_bits=8, act_bits=8, calibration=[self.calibration])
                archnet.settle(student)  # as every run ends
            self.made[key] = student
        return self.made[key]

    def judged(self, asked: Asked, hardware: str, quantized: bool) -> Judged:
        """What a tool makes of a student.

        Raises:
            ArchnetError: the network cannot be converted, or not be handed over.
        """
        return compile_student(self.of(hardware, quantized), asked)


def counted(rows: Sequence[Placed]) -> str:
    """How many of which operator, most first."""
    return " ".join(f"{k}:{v}" for k, v in Counter(row.operator for row in rows).most_common())


def more_off(student: Compiled, teacher: Compiled) -> int:
    """Operators of the student off the accelerator, beyond the teacher's of the same kind."""
    before = Counter(row.operator for row in teacher.off)
    return sum((Counter(row.operator for row in student.off) - before).values())


def columns(side: str, one: Judged) -> dict[str, Any]:
    """The figures of one network in the row."""
    found, row = one.compiled, {}
    if found.operators:
        row = {"rows": len(found.operators), "off": len(found.off), "off_what": counted(found.off)}
    for key in ("cycles", "milliseconds", "inferences_per_second", "sram_bytes", "read_kb"):
        if key in found.figures:
            row[key] = round(found.figures[key], 4)
    if one.changed is not None:
        row |= {"changed": one.changed, "of": one.inputs}
    if one.max_steps is not None:
        row |= {"max_steps": one.max_steps, "bit_equal": round(one.bit_equal or 0, 4)}
    row |= {"compile_s": round(found.seconds, 1), "error": found.error}
    return {f"{side}_{key}": value for key, value in row.items()}


def measure(name: str, options: argparse.Namespace) -> None:
    """Add the rows of one network."""
    side = side_of(name)
    generator = torch.Generator().manual_seed(options.seed)
    images = torch.randn(CALIBRATION + PICTURES, 3, side, side, generator=generator)
    calibration, pictures = images.split([CALIBRATION, PICTURES])
    network = network_named(name, options.seed)
    with torch.no_grad():
        scores = torch.cat([network(part) for part in pictures.split(10)])
    classes = axis_of(scores.shape[1:])
    answers = len(scores.argmax(1).unique())
    students = Students(network, calibration, options.max_cost)
    bound = "" if options.max_cost is None else f" --max-cost {options.max_cost:g}"
    for tool, target, chip in places(options.tools):
        label = f"{tool.name}:{target}" if target else tool.name
        if tool.missing:
            print(f"{name}, {label}: {tool.missing}")
            continue
        asked = Asked(tool, chip, pictures.numpy(), calibration.numpy(), options.timeout)
        quantized = not tool.says("QUANTIZES") or tool.says("FORM") is not None
        before, teacher = judged_of("teacher", compile_teacher, network, asked, [classes])
        own = target or "arch5"
        dialect = Target.named(own).dialect
        for hardware in options.students or [own]:
            beside = "" if hardware == own else f" --students {hardware}"
            row: dict[str, Any] = {
                "task": f"random images {side}x{side}",
                "teacher": name,
                "hardware": hardware,
                "weight_bits": 8,
                "act_bits": 8,
                "seed": options.seed,
                "command": f"python benchmarks/chips.py {name} --tools {label}{beside}{bound} "
                f"--seed {options.seed}",
                "max_cost": "" if options.max_cost is None else options.max_cost,
                "tool": label,
                "chip": chip,
                "student_form": "W8A8" if quantized else "float, INT8 by the tool",
                "answers": answers,
                **teacher,
            }
            after, student = judged_of(
                "student", students.judged, replace(asked, dialect=dialect), hardware, quantized
            )
            row |= student
            if before is not None and after is not None:
                row |= compared(row, before.compiled, after.compiled)
            append("chips", row)
            shown = [key for key in row if key.startswith(("teacher_", "student_", "off_more"))]
            print(
                f"{name}, {label}, {hardware}: "
                + ", ".join(f"{k} {row[k]}" for k in shown if row[k] != "")
            )


def side_of(name: str) -> int:
    """The side of a network's pictures."""
    return NETWORKS[name] if name in NETWORKS else size_of(name)


def judged_of(
    side: str, run: Callable[..., Judged], *given: Any
) -> tuple[Judged | None, dict[str, Any]]:
    """What a tool made of one network, if anything, and its columns in the row."""
    try:
        found = run(*given)
    except ArchnetError as error:
        return None, {f"{side}_error": printable(error)}
    return found, columns(side, found)


def compared(row: dict[str, Any], before: Compiled, after: Compiled) -> dict[str, Any]:
    """Columns of the student beside its teacher."""
    found: dict[str, Any] = {"compiler": after.version}
    if before.operators and after.operators:
        found["off_more"] = more_off(after, before)
    for key in ("cycles", "milliseconds"):
        if row.get(f"teacher_{key}") and row.get(f"student_{key}"):
            found[f"{key}_ratio"] = round(row[f"student_{key}"] / row[f"teacher_{key}"], 3)
    return found


def newest() -> list[dict[str, str]]:
    """The last row of every network and tool, in the order of the networks."""
    last = {
        (row["teacher"], row["tool"]): row
        for row in read("chips")
        if row["teacher"] in NETWORKS
        and row["hardware"] == (row["tool"].partition(":")[2] or "arch5")
    }
    order = list(NETWORKS)
    return sorted(last.values(), key=lambda row: (row["tool"], order.index(row["teacher"])))


def table() -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| tool | network | off the accelerator: teacher | student | teacher has none of them | "
        "cycles or ms: teacher | student | x | changed of 50: teacher | student |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in newest():
        kind = (
            "cycles" if row.get("student_cycles") or row.get("teacher_cycles") else "milliseconds"
        )
        form = ",.0f" if kind == "cycles" else ",.2f"
        cells = [
            row["tool"],
            row["teacher"],
            _said(row, "teacher", "off"),
            _said(row, "student", "off"),
            row.get("off_more", "") or "-",
            _figure(row.get(f"teacher_{kind}", ""), form),
            _figure(row.get(f"student_{kind}", ""), form),
            row.get(f"{kind}_ratio", "") or "-",
            _said(row, "teacher", "changed"),
            _said(row, "student", "changed"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: str, form: str) -> str:
    return format(float(value), form) if value else "-"


def _said(row: dict[str, str], which: str, key: str) -> str:
    if row.get(f"{which}_error") and not row.get(f"{which}_{key}"):
        return "refused"
    return row.get(f"{which}_{key}", "") or "-"


def reasons() -> str:
    """What was refused, and why, in the tools' own words."""
    lines = []
    for row in newest():
        for which in ("teacher", "student"):
            error = row.get(f"{which}_error", "")
            if error:
                text = error.replace("|", "\\|").replace("<", "\\<")
                lines.append(f"- {row['tool']}, {row['teacher']}, {which}: {text}")
    return "\n".join(lines)


def write() -> None:
    """Put the table into ``docs/chips.md``, between its marks."""
    text = DOCS.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    refused = f"\n\nRefused, in the tools' own words:\n\n{reasons()}" if reasons() else ""
    DOCS.write_text(f"{before}{BEGIN}\n\n{table()}{refused}\n\n{END}{after}")


def main() -> None:
    """Measure and add the rows to ``results/chips.csv``, each network in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument(
        "networks", nargs="*", help="of the table, or in archnet.teachers (default: the table's)"
    )
    parser.add_argument("--tools", nargs="*", default=[], help="tool or tool:target (default: all)")
    parser.add_argument(
        "--students", nargs="*", default=[], help="targets of the students (default: the tool's)"
    )
    parser.add_argument("--max-cost", type=float, help="convert.max_cost of the students")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one file")
    parser.add_argument("--write", action="store_true", help=f"{DOCS.name} from {RESULTS.name}")
    options = parser.parse_args()
    if options.write:
        write()
        return
    names = options.networks or list(NETWORKS)
    try:
        for name in names:
            network_named(name, options.seed)
        for target in options.students:
            Target.named(target)
    except ArchnetError as error:
        parser.error(str(error))
    if len(names) == 1:
        torch.set_num_threads(1)
        measure(names[0], options)
        return
    given = ["--seed", str(options.seed), "--timeout", str(options.timeout)]
    if options.max_cost is not None:
        given += ["--max-cost", str(options.max_cost)]
    for key in ("tools", "students"):
        if getattr(options, key):
            given += [f"--{key}", *getattr(options, key)]
    for name in names:
        subprocess.run([sys.executable, __file__, name, *given], check=False)


if __name__ == "__main__":
    main()
