"""Speed and peak memory of distillation: ResNet-18 at 224x224, all block taps, TAM and RFA.

    python benchmarks/speed.py --threads 2

runs `archnet.distill.distill` on random images with random weights, each schedule in a process of
its own, and adds a row a schedule to ``results/speed.csv``. Times are medians over steps, between
one request for a batch and the next, so that they hold all that a step does. Under `local` an image
is counted when it has been through every block once; its features are read from disk, and the
teacher's single pass over the images, which writes them, is timed apart.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from record import CONF, append
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import models

import archnet
from archnet.capture import capture
from archnet.compose import compose
from archnet.distill import train
from archnet.quant import Recipe

IMAGE_SIZE, CLASSES = 224, 1000
WEIGHT_BITS, ACT_BITS = 2, 4
SCHEDULES = ("joint", "local")


class RandomImages:
    """Images that carry nothing, and the time at which each batch of them was asked for.

    Attributes:
        requests: for every loader in order, seconds at each request for a batch.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.images = torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE)
        sizes = SimpleNamespace(batch_size=batch_size, eval_batch_size=batch_size)
        self.config = SimpleNamespace(data=sizes)
        self.requests: list[list[float]] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> Tensor:
        return self.images[[index for index, _ in draws]]

    def unlabelled(self) -> "RandomImages":
        return self

    def step_loader(
        self,
        dataset: Any,
        batch_size: int,
        steps: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[Any]:
        times: list[float] = []
        self.requests.append(times)
        for step in range(start, steps):
            times.append(time.perf_counter())
            yield dataset.__getitems__(
                [((step * batch_size + i) % len(dataset), 0) for i in range(batch_size)]
            )
        times.append(time.perf_counter())

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        one: Any = [(self.images[:1], torch.zeros(1, dtype=torch.long))]
        return DataLoader(one, batch_size=None)


def peak_mb() -> float:
    """Largest resident memory of this process so far, MB (Linux counts in KB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def median_step(times: Sequence[float]) -> float:
    """Seconds of a step; the first one, which allocates, is left out where there are others."""
    gaps = [after - before for before, after in pairwise(times)]
    return statistics.median(gaps[1:] or gaps)


def measure(schedule: str, batch_size: int, steps: int, threads: int) -> dict[str, Any]:
    """One schedule; to be called in a fresh process, whose peak memory is part of the result."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = RandomImages(2 * batch_size, batch_size)
    teacher = models.resnet18(weights=None).eval().requires_grad_(False)
    graph = capture(teacher, data.images[:1])
    student = archnet.convert(graph)
    archnet.quantize(
        student, Recipe(WEIGHT_BITS, ACT_BITS, equalize=False), calibration=[data.images[:2]]
    )
    features = graph.features([tap.node for tap in student.taps])
    marks = [time.perf_counter()]
    with torch.no_grad():
        for _ in range(steps):
            features(data.images[:batch_size].contiguous(memory_format=torch.channels_last))
            marks.append(time.perf_counter())
    setup = peak_mb()
    config = compose(
        CONF,
        [
            f"distill={schedule}",
            "distill.attention=true",
            "distill.adaptation=true",
            "distill.inputs=teacher",
            f"distill.steps={steps}",
            "distill.joint_steps=0",
            f"distill.val_every={10**9}",
            f"distill.checkpoint_every={10**9}",
            "trainer=cpu",
            "trainer.progress=false",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        train(features, student, data, config.distill, trainer=config.trainer, folder=Path(folder))
    # Beside the periods `local` asks for one more loader, to write the features from; the first
    # period, which asks for it, waits for it.
    training = data.requests if schedule == "joint" else data.requests[1:]
    step = sum(map(median_step, training))
    return {
        "step_seconds": round(step, 3),
        "images_per_s": round(batch_size / step, 3),
        "teacher_images_per_s": round(batch_size / median_step(marks), 3),
        "peak_mb": round(peak_mb()),
        "setup_peak_mb": round(setup),
        "taps": len(student.taps),
        "periods": len(training),
    }


def main() -> None:
    """Measure each schedule in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("schedules", nargs="*", default=SCHEDULES, help="joint or local")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--steps", type=int, default=10, help="steps to measure (a block)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dry-run", action="store_true", help="print the figures, add no row")
    options = parser.parse_args()
    for schedule in options.schedules:
        # Not forked: memory that this process has touched is not the child's.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            arguments = (schedule, options.batch_size, options.steps, options.threads)
            found = pool.apply(measure, arguments)
        print(schedule, json.dumps(found), flush=True)
        if options.dry_run:
            continue
        speed = found.pop("images_per_s")
        flags = f"--threads {options.threads} --steps {options.steps}"
        row = {
            "task": f"random images {IMAGE_SIZE}x{IMAGE_SIZE}",
            "teacher": "resnet18",
            "hardware": "arch5",
            "weight_bits": WEIGHT_BITS,
            "act_bits": ACT_BITS,
            "metric": "images/s in distillation",
            "student_value": speed,
            "seed": 0,
            "command": f"python benchmarks/speed.py {schedule} {flags}"
            f" --batch-size {options.batch_size}",
            "schedule": schedule,
            "threads": options.threads,
            "batch_size": options.batch_size,
        }
        append("speed", {**row, **found})


if __name__ == "__main__":
    main()
