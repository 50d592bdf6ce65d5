"""A training step of distillation: the kernels that it launches, and its time on a CPU.

    python benchmarks/training_step.py --reference 8ec53d2

runs `archnet.distill.distill` on random images with random weights, all taps, TAM and RFA, for a
ResNet-18 (W2A4), the CIFAR ConvNeXt (W4A4) and the CIFAR ViT with attention by pairs (W4A4), and
adds a row a network to ``results/training_step.csv``; with a reference, a row of that commit, too,
the two taking their steps by turns.

Launches are those of a device that is no CPU, counted on the meta device, which computes nothing:
operators of PyTorch below autograd, in the second step. Views and whatever only allocates launch
nothing; an operator on a list of tensors launches as CUDA's does, so many tensors at once. They are
told apart by where they are: the teacher's forward pass, the student's, the rest of the forward
pass (losses, their adapters and the log), the backward pass, and what the optimizer does.

Times are CPU seconds, medians over steps, between one request for a batch and the next, so that
they hold all that a step does; the teacher's forward pass alone is timed in between.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from record import CONF, ROOT, append
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import archnet
from archnet.capture import capture
from archnet.compose import compose
from archnet.convert import Approximation
from archnet.distill import train as distill
from archnet.ops import Student
from archnet.runs.quant import run_quant
from archnet.teachers import NETS, member, random_network

aten = torch.ops.aten
# Beside views: what allocates, and what only hands on or reads what is there.
LAUNCH_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("lift_fresh", "_unsafe_view", "_local_scalar_dense", "item", "set_", "resize_"),
}
# Of CUDA's multi_tensor_apply: tensors of a launch by how many lists it walks, and its blocks.
TENSORS, BLOCKS, CHUNK = (110, 64, 48, 36, 30), 320, 2**16
WAITS = "waits\n"  # what a worker prints before each step
KERNELS = ("foreach", "fused")  # of optimizers, which PyTorch has for devices that it lists


@dataclass(frozen=True)
class Network:
    """What is distilled: a teacher, the side of its images, and what configures its student."""

    size: int
    batch_size: int
    weight_bits: int
    act_bits: int
    attention: str = "context"


NETWORKS = {
    "resnet18": Network(224, 8, 2, 4),
    "cifar_convnext": Network(32, 64, 4, 4),
    "cifar_vit": Network(32, 64, 4, 4, "pairs"),
}


class Launches(TorchDispatchMode):
    """Counts kernels, by the part of a step that is entered; nothing waits for a value here."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.counts = "optimizer", Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        fused = name.startswith("_fused_")
        self.counts[self.part] += launches(func, name, args)
        if func is aten._local_scalar_dense.default:
            return 1.0  # the meta device has no values: a finite one
        if func is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return args[0]  # at the end, what was trained, of which there is nothing
        if name.startswith("_fake_quantize"):  # of which the meta device has no kernel
            return torch.empty_like(args[0]), torch.empty_like(args[0], dtype=torch.bool)
        return None if fused else func(*args, **(kwargs or {}))

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        outer, self.part = self.part, part
        yield
        self.part = outer

    def wrapped(self, part: str, function: Any) -> Any:
        """The function, with what it launches counted as this part."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return counted


def launches(func: Any, name: str, args: Sequence[Any]) -> int:
    """How many kernels an operator launches."""
    lists = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], Tensor)]
    if lists and name.startswith(("_foreach_", "_fused_")):
        # An optimizer's steps are numbers beside its four lists.
        lists = lists[:4] if name.startswith("_fused_") else lists
        first, *others = lists
        if any(x.shape != y.shape for other in others for x, y in zip(first, other, strict=False)):
            return len(first)  # CUDA's kernel wants like shapes
        blocks = sum(-(-tensor.numel() // CHUNK) for tensor in first)
        return max(-(-len(first) // TENSORS[min(len(lists), 5) - 1]), -(-blocks // BLOCKS))
    if func.namespace != "aten" or func.is_view or name in LAUNCH_NOTHING:
        return 0
    return 1


class Meta(SingleDeviceStrategy):
    """Training on the meta device, its launches counted part by part."""

    def __init__(self, count: Launches) -> None:
        super().__init__("meta", accelerator=_AnyDevice())
        self.count = count

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.count.within("losses"):
            return super().training_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.count.within("backward"):
            return super().backward(*args, **kwargs)


class _AnyDevice(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class Images:
    """A batch of images that carry nothing, given again at every step; the task as seen by
    distillation.

    Attributes:
        asked: called at each request for a batch.
    """

    def __init__(self, batch: Tensor, asked: Any) -> None:
        self.batch, self.asked = batch, asked
        self.config = SimpleNamespace(
            data=SimpleNamespace(batch_size=len(batch), eval_batch_size=len(batch))
        )

    def unlabelled(self) -> Sequence[Tensor]:
        return self.batch

    def step_loader(self, dataset: Any, size: int, steps: int, **_: Any) -> Iterator[Tensor]:
        for step in range(steps):
            self.asked(step)
            yield self.batch
        self.asked(steps)

    def val_dataloader(self) -> Sequence[Any]:
        return [self.batch]  # which nobody comes to


class _Enough(Exception):  # noqa: N818
    """All steps are done that were asked for."""


def made(name: str) -> tuple[nn.Module, Student, Tensor]:
    """The teacher with its features at the taps, a quantized student, and a batch."""
    network = NETWORKS[name]
    config = compose(
        CONF,
        [
            "quant=lsq",
            f"quant.weight_bits={network.weight_bits}",
            f"quant.act_bits={network.act_bits}",
            f"convert.attention={network.attention}",
        ],
    )
    torch.manual_seed(0)
    if name in NETS:
        teacher = NETS[name](num_classes=10, in_channels=3).eval().requires_grad_(False)
    else:
        teacher = random_network(member(name))
    images = torch.randn(2 * network.batch_size, 3, network.size, network.size)
    batch = images[: network.batch_size]
    graph = capture(teacher, images[:1])
    asked = config.convert
    form = Approximation(
        asked.attention, asked.attention_hinges, asked.hinges, asked.norm_hinges, asked.gate_hinges
    )
    student = archnet.convert(graph, calibration=images, approximation=form)
    run_quant(config, student, [images[: min(len(images), 64)]], {})
    return graph.features([tap.node for tap in student.taps]), student, batch


def train(teacher: nn.Module, student: Student, data: Any, strategy: Any, steps: int) -> None:
    """The given steps of the joint schedule, and no more: nothing is validated or kept."""
    config = compose(
        CONF,
        [
            "distill=joint",
            f"distill.steps={steps + 1}",
            f"distill.val_every={10**9}",
            f"distill.checkpoint_every={10**9}",
        ],
    )
    trainer = SimpleNamespace(
        accelerator="cpu" if strategy == "auto" else "auto",
        devices=1,
        strategy=strategy,
        precision="32-true",
        progress=False,
        progress_seconds=30,
    )
    with tempfile.TemporaryDirectory() as folder, suppress(_Enough):
        distill(teacher, student, data, config.distill, trainer=trainer, folder=Path(folder))


def counted(teacher: nn.Module, student: Student, batch: Tensor) -> dict[str, int]:
    """Launches of the second step by part, and in all."""
    # Planned here: a plan looks at weights, which the meta device has not.
    targets = [*(tap.value for tap in student.taps), student.graph.outputs[0]]
    with torch.no_grad():
        student.run({student.graph.inputs[0]: batch[:1]}, targets)
    student, teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    count, found = Launches(), Counter[str]()

    def asked(step: int) -> None:
        if step == 2:
            found.update(count.counts)
            raise _Enough
        count.counts.clear()

    teacher.forward = count.wrapped("teacher", teacher.forward)  # type: ignore[method-assign]
    student.run = count.wrapped("student", student.run)  # type: ignore[method-assign]
    kinds = {f"_get_{kind}_kernels_supported_devices": lambda: ["meta"] for kind in KERNELS}
    plain = patch.object(torch, "autocast", lambda *_, **__: nullcontext())  # it has none there
    with count, plain, patch.multiple(import_module("torch.optim.optimizer"), **kinds):
        train(teacher, student, Images(batch, asked), Meta(count), 2)
    parts = ("teacher", "student", "losses", "backward", "optimizer")
    return {
        "launches": sum(found.values()),
        **{f"launches_{part}": found[part] for part in parts},
    }


def timed(teacher: nn.Module, student: Student, batch: Tensor, steps: int) -> dict[str, float]:
    """CPU seconds of a step and of the teacher's forward pass, each after a line of the input."""
    took: dict[str, list[float]] = {"step": [], "teacher": []}
    began = [0.0]
    images = batch.contiguous(memory_format=torch.channels_last)

    def asked(step: int) -> None:
        if step:
            took["step"].append(time.process_time() - began[0])
        print(WAITS, end="", flush=True)
        input()
        start = time.process_time()
        with torch.no_grad():
            teacher(images)
        took["teacher"].append(time.process_time() - start)
        if step == steps:
            raise _Enough
        began[0] = time.process_time()

    train(teacher, student, Images(batch, asked), "auto", steps)
    # The first ones allocate.
    step, forward = (statistics.median(took[key][2:]) for key in ("step", "teacher"))
    return {
        "step_seconds": round(step, 4),
        "teacher_seconds": round(forward, 4),
        "step_ratio": round(step / forward, 2),
    }


def work(name: str, steps: int, threads: int) -> None:
    """The worker: measures what its import path has, and prints it as a line of JSON."""
    torch.set_num_threads(threads)
    teacher, student, batch = made(name)
    found: dict[str, Any] = dict(counted(teacher, student, batch))
    if steps:
        found.update(timed(teacher, student, batch, steps))
    print(json.dumps(found), flush=True)


def worker(name: str, source: Path, steps: int, threads: int) -> subprocess.Popen[str]:
    """A process that measures the package in ``source``."""
    command = [sys.executable, __file__, name, "--steps", str(steps), "--threads", str(threads)]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*command, "--work"], env=environment, stdin=pipe, stdout=pipe, text=True
    )


def turn(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a worker found; nothing where it waits for its next turn."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
        if line == WAITS:
            return {}
    raise SystemExit(f"a worker ended without a result: exit code {process.wait()}")


def by_turns(processes: Sequence[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """What the workers find, who take a step each by turns."""
    results = [turn(process) for process in processes]
    while not all(results):
        for index, process in enumerate(processes):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            results[index] = turn(process)
    return results


def extract(commit: str, folder: str) -> Path:
    """The package as it was at a commit."""
    archive = subprocess.run(
        ["git", "archive", commit, "src"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as file:
        file.extractall(folder, filter="data")
    return Path(folder, "src")


def row(name: str, found: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The table's row of a network."""
    network = NETWORKS[name]
    flags = f"--steps {options.steps} --threads {options.threads}"
    reference = f" --reference {options.reference}" if options.reference else ""
    return {
        "task": f"random images {network.size}x{network.size}",
        "teacher": name,
        "hardware": "arch5",
        "weight_bits": network.weight_bits,
        "act_bits": network.act_bits,
        "metric": "kernel launches of a training step",
        "student_value": found.pop("launches"),
        "seed": 0,
        "command": f"python benchmarks/training_step.py {name} {flags}{reference}",
        "attention": network.attention,
        "threads": options.threads,
        "batch_size": network.batch_size,
        **found,
    }


def main() -> None:
    """Measure, print, and add the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("networks", nargs="*", help=", ".join(NETWORKS))
    parser.add_argument("--steps", type=int, default=12, help="steps to time; 0: launches only")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--reference", help="a commit whose steps are taken by turns with these")
    parser.add_argument("--dry-run", action="store_true", help="print the figures, add no row")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(*options.networks, options.steps, options.threads)
        return
    for name in options.networks or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            sources = [ROOT / "src"]
            if options.reference:
                sources.insert(0, extract(options.reference, folder))
            processes = [worker(name, s, options.steps, options.threads) for s in sources]
            results = by_turns(processes)
        commits = [{"commit": options.reference}, {}][-len(results) :]
        for found, commit in zip(results, commits, strict=True):
            print(name, *commit.values(), json.dumps(found), flush=True)
            if not options.dry_run:
                append("training_step", {**row(name, found, options), **commit})


if __name__ == "__main__":
    main()
