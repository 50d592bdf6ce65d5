"""Training a teacher on labels: the one place where labels and training meet."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from archnet.files import atomic
from archnet.teachers.load import TeacherError, TeacherSource, fill

_log = logging.getLogger(__name__)

# Options that say how fast or where a task is read, not what a teacher learns from it.
_IRRELEVANT_DATA = ("batch_size", "download", "eval_batch_size", "unlabelled", "workers")


class FitOptions(Protocol):
    """What is read of `teacher.fit`."""

    epochs: int
    restarts: list[int]
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    warmup: float


class TrainableTeacher(TeacherSource, Protocol):
    """What is read of `teacher` to train it; a dataclass, as its `fit` is."""

    cache_dir: str

    @property
    def fit(self) -> FitOptions: ...


class LabelledData(Protocol):
    """What training needs of a task, as `archnet.tasks.ClassificationData` gives it."""

    config: Any

    def setup(self, stage: str | None = None) -> None: ...
    def labelled(self) -> Any: ...
    def step_loader(
        self,
        dataset: Any,
        batch_size: int,
        steps: int,
        *,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> DataLoader[Any]: ...
    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]: ...


def train_teacher(
    model: nn.Module,
    data: LabelledData,
    config: TrainableTeacher,
    *,
    seed: int,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    precision: Any = None,
    progress: bool = True,
    checkpoint_every: int = 100,
) -> nn.Module:
    """The model trained on the labels of `data`'s training part, in eval mode and frozen.

    SGD with Nesterov momentum, a learning rate that rises linearly to its peak and falls linearly
    to zero (Smith 2018, arXiv 1803.09820, "one-cycle"), and label smoothing (Szegedy et al. 2015).
    `fit.restarts` adds cycles, each from the weights that the last one ended with (Loshchilov &
    Hutter 2017, arXiv 1608.03983, "warm restarts"); every cycle is cached, so that a teacher that
    turns out too weak is trained on rather than again. Only the last weights count; nothing is
    selected on test, and val is only looked at.

    The result lies in `cache_dir/<name>-<key>/`, the key a hash of task, teacher and seed: a later
    call with the same three returns at once, and one that was killed goes on at its last checkpoint
    as if it had not been.

    Args:
        model: the network, trained in place.
        data: the task.
        config: `teacher`, of which `fit` says how long and how fast.
        seed: of whatever is random inside the network; the data have their own.
        accelerator: Lightning's.
        devices: Lightning's.
        strategy: Lightning's.
        precision: Lightning's; None is bfloat16 autocast (float16 where it must be) on CUDA and
            float32 elsewhere.
        progress: show the bar with the time left.
        checkpoint_every: steps between checkpoints.

    Raises:
        TeacherError: the loss is no longer finite, or training was interrupted.
    """
    folder = teacher_folder(data.config, config, seed)
    finished = folder / "teacher.safetensors"
    if finished.is_file():
        _log.info("teacher taken from %s", finished)
        fill(model, load_file(finished), finished)
        return model.eval().requires_grad_(False)

    if config.fit.restarts:
        cycles: Any = config.fit
        earlier: Any = config
        earlier = replace(earlier, fit=replace(cycles, restarts=cycles.restarts[:-1]))
        train_teacher(
            model,
            data,
            earlier,
            seed=seed,
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            precision=precision,
            progress=progress,
            checkpoint_every=checkpoint_every,
        )
    data.setup()
    model.train().requires_grad_(True)
    learner = _TeacherTraining(model, data, config.fit, seed)
    folder.mkdir(parents=True, exist_ok=True)
    last = folder / "last.ckpt"
    trainer = lightning.Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision or _precision(accelerator),
        max_steps=learner.steps,
        max_epochs=1,
        limit_train_batches=learner.steps,
        val_check_interval=learner.steps // learner.epochs,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        callbacks=[
            ModelCheckpoint(
                folder,
                filename="last",
                every_n_train_steps=checkpoint_every,
                enable_version_counter=False,
            )
        ],
    )
    began = time.monotonic()
    with warnings.catch_warnings():
        # A resumed run finds its folder filled, and its batches are numbered by step (see
        # `train_dataloader`), which Lightning cannot know.
        warnings.filterwarnings("ignore", ".*(not resumable|exists and is not empty).*")
        trainer.fit(learner, ckpt_path=last if last.is_file() else None, weights_only=True)
    if trainer.global_step < learner.steps:
        raise TeacherError(
            f"teacher stopped at step {trainer.global_step} of {learner.steps}; run again to go on"
        )
    model.eval().requires_grad_(False).cpu().to(memory_format=torch.contiguous_format)
    if trainer.is_global_zero:
        _keep(model, folder, learner, time.monotonic() - began)
    return model


def teacher_folder(task: Any, teacher: Any, seed: int) -> Path:
    """Where the teacher for this task, teacher (config dataclasses both) and seed is cached."""
    asked: dict[str, Any] = {"task": asdict(task), "teacher": asdict(teacher), "seed": seed}
    asked["teacher"].pop("cache_dir")
    if not asked["teacher"]["fit"]["restarts"]:
        # The first cycle is the same teacher whether others follow or not, in older caches too.
        asked["teacher"]["fit"].pop("restarts")
    for name in _IRRELEVANT_DATA:
        asked["task"]["data"].pop(name)
    if asked["task"]["data"]["root"] is not None:
        asked["task"]["data"]["root"] = str(
            Path(asked["task"]["data"]["root"]).expanduser().resolve()
        )
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return Path(teacher.cache_dir).expanduser() / f"{teacher.name}-{key}"


def _precision(accelerator: str) -> Any:
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def _keep(model: nn.Module, folder: Path, learner: _TeacherTraining, seconds: float) -> None:
    """Write the weights, whole or not at all, and what is known of them."""
    facts = {
        "val_accuracy": learner.accuracy,
        "images_seen": (learner.before + learner.steps) * learner.options.batch_size,
        "seconds_since_start_or_resume": round(seconds, 1),
    }
    (folder / "teacher.json").write_text(json.dumps(facts, indent=2) + "\n")
    with atomic(folder / "teacher.safetensors", TeacherError) as partial:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, partial)
    (folder / "last.ckpt").unlink(missing_ok=True)
    _log.info("teacher kept in %s, %.2f %% on val", folder, learner.accuracy)


class _TeacherTraining(lightning.LightningModule):
    """Cross-entropy on labelled batches numbered by step."""

    def __init__(
        self, model: nn.Module, data: LabelledData, options: FitOptions, seed: int
    ) -> None:
        super().__init__()
        # Convolutions on the CPU, and half precision ones on CUDA, are faster with channels last.
        self.model = model.to(memory_format=torch.channels_last)
        self.data, self.options, self.seed = data, options, seed
        self.images = data.labelled()
        *earlier, self.epochs = options.epochs, *options.restarts
        epoch = max(1, len(self.images) // options.batch_size)
        self.steps = self.epochs * epoch
        # Steps of the cycles before this one: batches are numbered through all of them.
        self.before = sum(earlier) * epoch
        self.accuracy = 0.0
        self._seen = torch.zeros(2)

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        return self.data.step_loader(
            self.images,
            self.options.batch_size,
            self.before + self.steps,
            start=self.before + trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self.data.val_dataloader()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout, too, must be a function of the step for a resumed run to end as an unbroken one.
        torch.manual_seed((self.seed << 32) + self.before + self.trainer.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(
            self.model(images), labels, label_smoothing=self.options.label_smoothing
        )
        if not torch.isfinite(loss):
            raise TeacherError(
                f"the teacher's loss is {loss.item()} at step {self.trainer.global_step}: "
                "lower teacher.fit.lr"
            )
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._seen = torch.zeros(2, device=self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        hits = (self.model(images).argmax(1) == labels).sum()
        self._seen += torch.stack([hits, torch.tensor(len(labels), device=hits.device)])

    def on_validation_epoch_end(self) -> None:
        hits, count = self.trainer.strategy.reduce(self._seen, reduce_op="sum").tolist()
        self.accuracy = 100 * hits / max(count, 1)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        options = self.options
        optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
            nesterov=options.momentum > 0,
        )
        rising = options.warmup * self.steps

        def share_of_peak(step: int) -> float:
            rise = (step + 1) / rising if rising else 1.0
            return max(0.0, min(rise, (self.steps - step) / max(self.steps - rising, 1.0), 1.0))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
