"""`archnet.distill`: train a student on a loader, without a config."""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from archnet.config import DistillConfig
from archnet.distill import DistillError, options_of, require_student, train
from archnet.distill.teacher import features_of
from archnet.loaders import Batches, LabelledBatch, Loadable, Takes
from archnet.ops import Student
from archnet.quant import describe, settle
from archnet.tasks.sampling import StepBatchSampler

_log = logging.getLogger(__name__)


def distill(
    student: Student,
    teacher: nn.Module,
    data: Loadable,
    *,
    steps: int = 1000,
    val: Loadable | None = None,
    schedule: str | None = None,
    folder: str | Path | None = None,
    logger: Logger | Sequence[Logger] | None = None,
    accelerator: str = "auto",
    precision: str = "32-true",
    progress: bool = True,
    seed: int = 0,
    **fields: Any,
) -> dict[str, Any]:
    """Train a student in place so that it follows its teacher, without labels; then settle it.

    As `train.py` does it, with the same module, schedules and defaults.

    Args:
        student: from `convert`, quantized or not.
        teacher: the network that it was converted from; it stays as it is.
        data: what `archnet.loaders` reads: a DataLoader, any iterable, a function that makes one.
            Labels are dropped. A step takes one batch; data that end are begun again.
        steps: of the whole network, or as much work.
        val: looked at every ``val_every`` steps, up to ``val_images`` samples.
        schedule: "joint", "progressive" or "local" (`archnet.distill.plan`); None: "local", each
            block alone and then all together, where the student has taps and one input, else
            "joint". "local" keeps features of ``cache_images`` samples on disk.
        folder: for checkpoints, cached features; a call that was stopped goes on from there, with
            batches from the beginning of the data. None: a temporary folder, without checkpoints.
        logger: Lightning's.
        accelerator: "auto", "cpu", "gpu" or "mps". "auto" follows a student or teacher that is on
            a GPU, and else takes what Lightning takes.
        precision: as Lightning's.
        progress: whether to show it: a bar in a terminal or a notebook, else lines in the log.
        seed: of random choices while training, such as the weights of the adapters; the caller's
            random state is left alone.
        fields: more keys of `distill` in the config: ``lr=1e-3, grid_lr=0.01, joint_steps=100``.

    Returns:
        ``steps``, ``inputs_seen`` (samples through the whole network, or sample-blocks divided by
        the number of blocks), ``unlabelled`` (distinct samples; None of a stream that nobody has
        counted), ``earlier`` (seconds before it was resumed) and ``images_per_s``. The student is
        in the mode and on the device that it was in.

    Raises:
        DistillError: student or teacher is none, or of another pair; a loss is not finite;
            training was interrupted.
        TaskError: the data do not fit the network, or end and cannot be begun again.
        ConfigError: an unknown or impossible option.
    """
    require_student(student, teacher)
    if schedule is None:
        schedule = schedules(student)[-1]
    options = options_of({"steps": steps, "schedule": schedule, **fields})
    if not describe(student):
        _log.warning("the student has no quantizers: it is trained in floats; quantize() it first")
    takes = Takes.of(student)
    looked_at = None if val is None else Batches(val, takes, "val")
    place = nullcontext(str(folder)) if folder is not None else tempfile.TemporaryDirectory()
    if folder is None:
        options = replace(options, checkpoint_every=10**9)
    loggers = [logger] if isinstance(logger, Logger) else list(logger or ())
    trainer = Trainer.following(student, teacher, accelerator, precision, progress)
    with place as where, kept_as_it_was(student):
        facts = trained(
            student, teacher, Batches(data, takes), options, trainer, Path(where), seed,
            val=looked_at, loggers=loggers,
        )  # fmt: skip
        settle(student.cpu())
    return facts


def schedules(student: Student) -> list[str]:
    """Those of `distill.schedule` that a student can be trained by, the best one alone last."""
    has_taps = any(not tap.inner for tap in student.taps)
    return ["joint", "local"] if has_taps and len(student.graph.inputs) == 1 else ["joint"]


def trained(
    student: Student,
    teacher: nn.Module,
    data: Batches,
    options: DistillConfig,
    trainer: "Trainer",
    folder: Path,
    seed: int,
    *,
    val: Batches | None = None,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Train a student in place, without settling it; the facts of `distill`."""
    with _quiet(), _float32(), isolate_rng():
        torch.manual_seed(seed)
        return train(
            features_of(teacher, student),
            student,
            _LoaderData(data, val, seed, options.cache_images, options.val_images),
            options,
            trainer=trainer,
            folder=folder,
            loggers=list(loggers),
        )


@contextmanager
def kept_as_it_was(student: Student) -> Iterator[None]:
    """The mode and the device of a student, given back to it."""
    device, was_training = next(student.parameters()).device, student.training
    yield
    student.to(device).train(was_training)


@dataclass(frozen=True)
class Trainer:
    """What `archnet.distill.train` reads of `trainer`."""

    accelerator: str
    devices: int | list[int]
    precision: str
    progress: bool
    strategy: str = "auto"
    progress_seconds: float = 30.0

    @classmethod
    def following(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        accelerator: str,
        precision: str,
        progress: bool,
    ) -> "Trainer":
        """On the GPU that one of the networks is on, if it is left to us."""
        devices: int | list[int] = 1
        if accelerator not in ("auto", "cpu", "gpu", "mps"):
            raise DistillError(f"accelerator={accelerator} is not one of auto, cpu, gpu, mps")
        found = {"gpu": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not found.get(accelerator, True):
            raise DistillError(
                f"accelerator={accelerator}, but torch finds none: take auto or cpu, or install a "
                "torch that is built for it"
            )
        for network in (student, teacher):
            device = next((p.device for p in network.parameters()), torch.device("cpu"))
            if accelerator == "auto" and device.type == "cuda":
                accelerator, devices = "gpu", [device.index or 0]
        return cls(accelerator, devices, precision, progress)


class _LoaderData:
    """A user's loader as `archnet.distill.train` sees the data of a task."""

    def __init__(
        self, data: Batches, val: Batches | None, seed: int, cached: int, looked_at: int
    ) -> None:
        self.data, self.val, self.seed, self.cached = data, val, seed, cached
        self.looked_at = looked_at
        self._stream = data.endless()
        first = next(self._stream)
        self._stream = chain([first], self._stream)
        rows = len(first if isinstance(first, Tensor) else first[0])
        self.config = SimpleNamespace(data=SimpleNamespace(batch_size=rows, eval_batch_size=rows))
        self._kept: list[LabelledBatch] = []
        self._count: int | None = None

    @property
    def known_samples(self) -> int | None:
        """Distinct samples, where the data say so without being read."""
        return self.data.known_samples

    def __len__(self) -> int:
        """Samples of a pass, counted up to those that are cached."""
        if self._count is None:
            self._count = self.data.samples(self.cached)
        return self._count

    def unlabelled(self) -> "_LoaderData":
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
    ) -> Any:
        """The next batches of the loader, or batches ``start`` to ``steps`` - 1 of features."""
        if dataset is self:
            return islice(self._stream, steps - start)
        size = min(batch_size, len(dataset))
        sampler = StepBatchSampler(len(dataset), size, steps, self.seed, start=start)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader[LabelledBatch] | list[Any]:
        """The first batches of ``val``, kept: a generator gives them once."""
        if self.val is not None and not self._kept:
            self._kept = self.val.first(self.looked_at)
        # Of a list, Lightning would take each entry for a loader.
        return DataLoader(self._kept, None, collate_fn=_as_it_is) if self._kept else []  # type: ignore[arg-type]


def _as_it_is(batch: Any) -> Any:
    return batch


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Lightning and torch say of themselves at every fit from the caller."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for beginning in (
                "Checkpoint directory .* exists and is not empty",
                "The number of training batches .* is smaller than the logging interval",
                "`isinstance.treespec, LeafSpec.` is deprecated",
                "Total length of .list. across ranks is zero",
                "The .*dataloader.* does not have many workers",
                "You.re resuming from a checkpoint that ended before the epoch ended",
            ):
                warnings.filterwarnings("ignore", message=beginning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _float32() -> Iterator[None]:
    """Float32 that is float32, not TF32: a student computes with integers times a scale."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
