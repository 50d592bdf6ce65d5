"""File sizes and latencies of integer students beside their float form.

    python benchmarks/deploy.py outputs/cifar10/<run>

quantizes the run's student at each of the widths, by calibration alone (neither bytes nor time
depend on what the weights are), and adds a row a width to ``results/deploy.csv``; with
``--as-trained`` it takes the students as the runs left them. Latency is that of ONNX Runtime on one
image: the median of runs in which teacher, float student and integer student take turns.
"""

import argparse
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from record import append, command
from torch import nn

import archnet
from archnet.deploy.latency import export_teacher, latencies, without_quantizers
from archnet.jobs import conductor
from archnet.jobs.tensors import TensorJob
from archnet.lower import deployed_cost
from archnet.ops import Student
from archnet.quant import Recipe
from archnet.runs import RunFolder

WIDTHS = ("W8A8", "W4A4", "W2A4", "W3A6")
SIZED = ("float", "qdq", "subbyte")
# What decides how fast integers are: without one of the last three, x86 multiplies them no faster
# than floats.
EXTENSIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp")


def cpu() -> str:
    """The processor and its vector extensions, in one cell."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    name = fields.get("model name", platform.machine())
    number = f"family {fields['cpu family']} model {fields['model']}" if "model" in fields else ""
    found = " ".join(key for key in EXTENSIONS if key in flags)
    return ", ".join(part for part in (name, number, found) if part)


def bits(width: str) -> tuple[int, int]:
    """Weight and activation bits of a width such as W2A4."""
    match = re.fullmatch(r"[Ww](\d+)[Aa](\d+)", width)
    if match is None:
        raise argparse.ArgumentTypeError(f"{width} is no width such as W2A4")
    return int(match[1]), int(match[2])


def arguments(parser: argparse.ArgumentParser, widths: Sequence[str]) -> None:
    """Declare which students are looked at."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="run", help="finished run folder")
    parser.add_argument("--widths", nargs="+", type=bits, default=[bits(w) for w in widths])
    parser.add_argument("--as-trained", action="store_true", help="the students of the runs")
    parser.add_argument("--dry-run", action="store_true", help="print the figures, add no row")


def students(options: argparse.Namespace) -> Iterator[tuple[TensorJob, Student, dict[str, Any]]]:
    """The students that the arguments ask for, each with its run and what its row says of it."""
    for path in options.runs:
        job, trained = conductor.reopen(RunFolder.open(path))
        config, quant = job.config, job.config.quant
        found = (
            [(quant.weight_bits, quant.act_bits, trained)]
            if options.as_trained
            else calibrated(job, options.widths)
        )
        for weight_bits, act_bits, student in found:
            cost = deployed_cost(student)
            chosen = "--as-trained" if options.as_trained else f"--widths W{weight_bits}A{act_bits}"
            yield (
                job,
                student,
                {
                    "task": config.task.name,
                    "teacher": config.teacher.name,
                    "hardware": config.hardware.name,
                    "weight_bits": weight_bits,
                    "act_bits": act_bits,
                    "bops": cost.bops,
                    "weight_bytes": cost.weight_bytes,
                    "seed": config.seed,
                    "command": f"python {Path(sys.argv[0]).as_posix()} {path} {chosen}",
                    "as_trained": options.as_trained,
                    "run": command(config),
                },
            )


def calibrated(job: TensorJob, widths: list[tuple[int, int]]) -> Iterator[tuple[int, int, Student]]:
    """The run's teacher converted and quantized at each width."""
    batches = job.data.calibration_batches(job.config.quant.calibration_batches)
    for weight_bits, act_bits in widths:
        student = archnet.convert(job.teacher, batches[0][:1], hardware=job.config.hardware)
        archnet.quantize(
            student, Recipe(weight_bits, act_bits, equalize=False), calibration=batches
        )
        yield weight_bits, act_bits, student.eval()


def measure(job: TensorJob, student: Student, runs: int, threads: int) -> dict[str, Any]:
    """Bytes of every form and latencies."""
    example = job.test_inputs(1)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for form in SIZED:
            source = without_quantizers(student) if form == "float" else student
            files[form] = archnet.export(source, Path(folder) / form, form=form)
        teacher = export_teacher(job.teacher, example, Path(folder) / "teacher")
        timed = {"teacher": teacher, "float": files["float"], "qdq": files["qdq"]}
        taken = latencies(timed, example, runs, threads)
        sizes = {f"{form}_bytes": path.stat().st_size for form, path in files.items()}
    return {
        "teacher_value": round(taken["teacher"], 4),
        "student_value": round(taken["qdq"], 4),
        "float_student_ms": round(taken["float"], 4),
        "speedup": round(taken["float"] / taken["qdq"], 3),
        **sizes,
    }


def ceiling(runs: int, threads: int) -> float:
    """How many times faster than in floats one large convolution is in integers on job CPU.

    What the kernels give at best: a network of many layers hardly passes it.
    """
    torch.manual_seed(0)
    images = torch.randn(1, 256, 28, 28)
    layers = [nn.Conv2d(256, 256, 3, padding=1) for _ in range(3)]
    network = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()
    student = archnet.convert(network, images)
    archnet.quantize(student, Recipe(8, 8), calibration=[images])
    with tempfile.TemporaryDirectory() as folder:
        sources = {"float": without_quantizers(student), "qdq": student}
        files = {
            form: archnet.export(source, Path(folder) / form, form=form)
            for form, source in sources.items()
        }
        taken = latencies(files, images, runs, threads)
    return taken["float"] / taken["qdq"]


def main() -> None:
    """Measure and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    arguments(parser, WIDTHS)
    parser.add_argument("--repeat", type=int, default=300, help="runs of each file")
    parser.add_argument("--threads", type=int, default=1, help="of an operator")
    options = parser.parse_args()
    torch.set_num_threads(1)
    best = round(ceiling(max(1, options.repeat // 10), options.threads), 3)
    print(f"one large convolution: {best} times faster in integers", flush=True)
    for job, student, about in students(options):
        load = os.getloadavg()[0]  # what else ran, which favours neither or the smaller file
        row = measure(job, student, options.repeat, options.threads)
        print(f"{about['task']} W{about['weight_bits']}A{about['act_bits']}", row, flush=True)
        if options.dry_run:
            continue
        append(
            "deploy",
            {
                **about,
                "metric": "ms an image in ONNX Runtime (teacher float, student qdq)",
                "command": f"{about['command']} --repeat {options.repeat}"
                f" --threads {options.threads}",
                **row,
                "convolution_speedup": best,
                "threads": options.threads,
                "cpu": cpu(),
                "load": round(load, 1),
            },
        )


if __name__ == "__main__":
    main()
