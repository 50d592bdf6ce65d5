"""`train`: run the schedule with Lightning, from the last checkpoint if there is one."""

import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from archnet.checkpoints import Checkpoints, resumable
from archnet.distill.cache import CachedRows, FeatureCache
from archnet.distill.schedule import DistillError, Period, outer_taps, plan_for
from archnet.distill.training import LOG_EVERY, ArchDistillation, DistillOptions, channels_last
from archnet.ops import Student
from archnet.progress import progress_lines


class TrainerOptions(Protocol):
    """What is read of `trainer`; ``devices`` are how many, or which."""

    @property
    def accelerator(self) -> str: ...
    @property
    def devices(self) -> int | list[int]: ...
    @property
    def strategy(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def progress(self) -> bool: ...
    @property
    def progress_seconds(self) -> float: ...


class UnlabelledData(Protocol):
    """What distillation asks of a task: images, and a validation split to look at."""

    config: Any

    def unlabelled(self) -> Any: ...
    def step_loader(
        self,
        dataset: Any,
        batch_size: int,
        steps: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> Any: ...
    def val_dataloader(self) -> Any: ...


class _Batches:
    """The batches of a whole schedule, period by period, from step ``start`` on.

    ``len()`` counts from the beginning of the run, as Lightning counts.
    """

    def __init__(self, source: "_Distillation", start: int) -> None:
        self.source, self.start = source, start

    def __len__(self) -> int:
        return self.source.periods[-1].last

    def __iter__(self) -> Iterator[Any]:
        for period in self.source.periods:
            first = max(self.start, period.first)
            if first < period.last:
                yield from self.source.batches(period, first)


class _Distillation(ArchDistillation):
    """`ArchDistillation` with its data: images, or cached features for the `local` schedule."""

    def __init__(
        self,
        teacher: nn.Module,
        student: Student,
        periods: Sequence[Period],
        options: DistillOptions,
        data: UnlabelledData,
        cache: FeatureCache,
    ) -> None:
        super().__init__(teacher, student, periods, options)
        self.data, self.cache = data, cache

    def train_dataloader(self) -> _Batches:
        return _Batches(self, self.trainer.global_step)

    def val_dataloader(self) -> Any:
        return self.data.val_dataloader()

    def batches(self, period: Period, first: int) -> Any:
        """Batches of a period from optimiser step ``first`` on."""
        dataset = self.data.unlabelled() if period.source is None else self._pairs(period)
        trainer = self.trainer
        return self.data.step_loader(
            dataset,
            self.data.config.data.batch_size,
            period.last,
            start=first,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )

    def _pairs(self, period: Period) -> CachedRows:
        """What the block reads beside what the teacher gives behind it.

        Rank 0 writes what is missing while the others wait.
        """
        assert period.source is not None
        targets = self._results() if period.logits else [f"teacher{period.source + 1}"]
        source = "images" if period.source < 0 else f"teacher{period.source}"
        if self.trainer.is_global_zero and not all(n in self.cache for n in (source, *targets)):
            self._write_teacher()
        if self.options.inputs == "student" and period.source >= 0:
            before, source = period.source - 1, f"student{period.source}"
            if self.trainer.is_global_zero and source not in self.cache:
                self._write_student(before, source)
        self.trainer.strategy.barrier("features")
        return CachedRows(self.cache.read(source), *map(self.cache.read, targets))

    def _results(self) -> list[str]:
        """What the teacher's results are called in the cache."""
        return [f"scores{index}" for index in range(len(self.student.graph.outputs))]

    def _write_teacher(self) -> None:
        """One pass of the teacher over the cached images; all taps at once."""
        dataset = self.data.unlabelled()
        rows = min(self.options.cache_images, len(dataset))
        size = self.data.config.data.eval_batch_size
        # As many as there could be at most: the loader of a user's may give smaller batches.
        loader = self.data.step_loader(dataset, size, rows)
        taps = [f"teacher{index}" for index in range(len(outer_taps(self.student)))]

        def features() -> Iterator[list[Tensor]]:
            for batch in loader:
                images = channels_last(batch)
                found, results = self.teacher_features(images.to(self.device))
                yield [images, *found[: len(taps)], *results]

        self.cache.write(["images", *taps, *self._results()], rows, features())

    def _write_student(self, before: int, name: str) -> None:
        """What the trained block behind tap ``before`` makes of its own cached input."""
        start = "images" if before < 0 else f"student{before}"
        target = self.student.taps[before + 1].value
        array = self.cache.read(start)
        size = self.data.config.data.eval_batch_size

        def features() -> Iterator[list[Tensor]]:
            for first in range(0, len(array), size):
                rows = torch.from_numpy(array[first : first + size].copy()).float()
                rows = rows.to(self.device)
                with torch.no_grad():
                    values = (
                        {self.student.graph.inputs[0]: rows}
                        if before < 0
                        else self.enter(before, rows)
                    )
                    yield self.student.run(values, [target])

        self.cache.write([name], len(array), features())


class Speed(Callback):
    """Counts what is trained in this session.

    ``earlier`` are the seconds of the sessions before, up to the checkpoint it goes on from.
    """

    def __init__(self) -> None:
        self.steps, self.began, self.earlier = 0, time.monotonic(), 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.earlier + time.monotonic() - self.began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.earlier = state_dict["seconds"]

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.began = time.monotonic()

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1


def train(
    teacher: nn.Module,
    student: Student,
    data: UnlabelledData,
    options: DistillOptions,
    *,
    trainer: TrainerOptions,
    folder: Path,
    loggers: Sequence[Logger] = (),
) -> dict[str, Any]:
    """Train the student in place, without labels.

    Args:
        teacher: returns the features at the student's taps, in order, and then its results.
        student: from `convert`, quantized or not.
        data: the task; only its unlabelled images train, its validation split is looked at.
        options: `distill` of the config.
        trainer: `trainer` of the config.
        folder: for checkpoints and cached features; a run that was stopped goes on from there
            and ends with the weights of one that was not.
        loggers: Lightning's.

    Returns:
        ``steps``, ``inputs_seen`` (images through the whole network, or image-blocks divided by
        the number of blocks), ``unlabelled`` (distinct images;
        None of a stream), ``earlier`` (seconds before it was
        resumed) and ``images_per_s`` of this session.

    Raises:
        DistillError: a loss is not finite (naming tap and step), or training was interrupted.
    """
    if options.schedule == "local" and len(student.graph.inputs) > 1:
        raise DistillError(
            f"schedule=local is for networks of one input, and this one takes "
            f"{', '.join(student.graph.inputs)}: take schedule=joint or progressive"
        )
    periods = plan_for(student, options)
    batch = data.config.data.batch_size
    facts: dict[str, Any] = {
        "steps": periods[-1].last if periods else 0,
        "inputs_seen": batch * options.steps if periods else 0,
        "unlabelled": _known_length(data.unlabelled()),
    }
    if periods and all(period.source is not None for period in periods):
        facts["unlabelled"] = min(len(data.unlabelled()), options.cache_images)
    if not periods:
        return facts
    student.train().to(memory_format=torch.channels_last)
    cache = FeatureCache(folder / "features")
    module = _Distillation(teacher, student, periods, options, data, cache)
    speed = Speed()
    limit = max(1, options.val_images // data.config.data.eval_batch_size)
    if fit(module, periods, options, trainer, folder, loggers, speed, limit):
        cache.clear()
    seconds = time.monotonic() - speed.began
    student.eval().to(memory_format=torch.contiguous_format)
    student.to("cpu")
    facts["earlier"] = speed.earlier
    facts["images_per_s"] = round(speed.steps * batch / max(seconds, 1e-9), 1)
    return facts


def fit(
    module: lightning.LightningModule,
    periods: Sequence[Period],
    options: DistillOptions,
    trainer: TrainerOptions,
    folder: Path,
    loggers: Sequence[Logger],
    speed: Speed,
    limit_val_batches: int | None = None,
) -> bool:
    """Run the periods, from the newest checkpoint in ``folder`` if there is one.

    Returns:
        Whether this process is the leading one.

    Raises:
        DistillError: training was interrupted.
    """
    last = periods[-1].last
    runner = lightning.Trainer(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        strategy=_strategy(trainer),
        precision=trainer.precision,  # type: ignore[arg-type]
        max_steps=last,
        max_epochs=1,
        val_check_interval=min(options.val_every, last),
        limit_val_batches=limit_val_batches,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=list(loggers) or False,
        log_every_n_steps=LOG_EVERY,
        enable_model_summary=False,
        enable_progress_bar=trainer.progress,
        default_root_dir=folder,
        plugins=[Checkpoints()],
        callbacks=[
            speed,
            *progress_lines("distillation", trainer.progress, trainer.progress_seconds),
            ModelCheckpoint(
                folder,
                filename="step{step}",
                auto_insert_metric_name=False,
                every_n_train_steps=options.checkpoint_every,
                enable_version_counter=False,
            ),
            *([EMAWeightAveraging(decay=options.average)] if options.average else []),
        ],
    )
    try:
        runner.fit(module, ckpt_path=newest_checkpoint(folder, module), weights_only=True)
    except BaseException:
        # The others wait in an exchange with this process that will not come.
        if runner.strategy.launcher is not None:
            runner.strategy.launcher.kill(signal.SIGKILL)
        raise
    if runner.global_step < last:
        raise DistillError(f"distillation stopped at step {runner.global_step} of {last}")
    return runner.is_global_zero


def newest_checkpoint(folder: Path, module: lightning.LightningModule | None = None) -> Path | None:
    """The latest checkpoint, of ``module`` if given; a warning names newer ones that are none."""
    numbered = {
        int(path.stem.removeprefix("step")): path
        for path in folder.glob("step*.ckpt")
        if path.stem.removeprefix("step").isdecimal()
    }
    newest = (numbered[step] for step in sorted(numbered, reverse=True))
    return next(filter(None, (resumable(path, module) for path in newest)), None)


def _known_length(dataset: Any) -> int | None:
    """How many inputs there are; None of a stream that nobody has counted."""
    return dataset.known_samples if hasattr(dataset, "known_samples") else len(dataset)


def _strategy(options: TrainerOptions) -> Any:
    """Blocks outside a period get no gradient, which DDP has to expect."""
    if (
        isinstance(options.devices, int)
        and options.devices > 1
        and options.strategy in ("auto", "ddp")
    ):
        return DDPStrategy(find_unused_parameters=True)
    return options.strategy
