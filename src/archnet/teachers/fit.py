"""Training a teacher on labels: the one place where labels and training meet."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from archnet.checkpoints import Checkpoints, resumable
from archnet.files import atomic, remove, remove_leftovers
from archnet.progress import progress_lines
from archnet.teachers.load import TeacherError, TeacherSource, fill, read_weights

_log = logging.getLogger(__name__)

UNLABELLED = -1  # an image, or a pixel, without a class

# Options that say how fast or where a task is read, not what a teacher learns from it.
_IRRELEVANT_DATA = ("batch_size", "download", "eval_batch_size", "unlabelled", "workers")
_IRRELEVANT_TEXT = ("beam", "length_penalty", "cache_dir", "test", "translations")
# What images do not read, and keys that older caches did not have, by the value they then mean.
_LATER_KEYS: dict[str, Any] = {"optimizer": "sgd", "average": 0}
_CHECKSUM = "sha256"  # of the tensors, in the metadata of the file that holds them
# Keys of images, which text does not read, by the values that they had in older caches.
_OLDER_TEXT_DATA = {"image_size": 32, "resize": None, "mean": [0.5] * 3, "std": [0.5] * 3}
_LATER_DATA: dict[str, Any] = {"interpolation": None, "labels": "auto"}
_LATER_TASK: dict[str, Any] = {
    "classes": "auto",
    "ignored": 255,
    "datamodule": None,
    "datamodule_kwargs": {},
    "metric": None,
    "metric_kwargs": {},
}


class FitOptions(Protocol):
    """What is read of `teacher.fit`."""

    optimizer: str
    epochs: int
    restarts: list[int]
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    warmup: float
    average: int


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


class PairedText(Protocol):
    """What training needs of translation, as `archnet.tasks.TranslationData` gives it."""

    config: Any
    train: Any

    def setup(self, stage: str | None = None) -> None: ...
    def batches_an_epoch(self) -> int: ...
    def step_batches(
        self, text: Any, steps: int, *, start: int = 0, rank: int = 0, world: int = 1
    ) -> Any: ...
    def valid_batches(self) -> Any: ...


def train_teacher(
    model: nn.Module,
    data: Any,
    config: TrainableTeacher,
    *,
    seed: int,
    accelerator: str = "auto",
    devices: int = 1,
    strategy: str = "auto",
    precision: Any = None,
    progress: bool = True,
    progress_seconds: float = 30.0,
    checkpoint_every: int = 100,
) -> nn.Module:
    """The model trained on the labels of `data`'s training part, in eval mode and frozen.

    SGD with Nesterov momentum or Adam, a learning rate that rises linearly to its peak and falls
    linearly to zero (Smith 2018, arXiv 1803.09820, "one-cycle"), and label smoothing (Szegedy et
    al. 2015).
    `fit.restarts` adds cycles, each from the weights that the last one ended with (Loshchilov &
    Hutter 2017, arXiv 1608.03983, "warm restarts"); every cycle is cached, so that a teacher that
    turns out too weak is trained on rather than again. Only the last weights count; nothing is
    selected on test, and val is only looked at.

    The result lies in `cache_dir/<name>-<key>/`, the key a hash of task, teacher and seed: a later
    call with the same three returns at once, and one that was killed goes on at its last checkpoint
    as if it had not been.

    Args:
        model: the network, trained in place.
        data: the task: `LabelledData`, or `PairedText` for translation.
        config: `teacher`, of which `fit` says how long and how fast.
        seed: of whatever is random inside the network; the data have their own.
        accelerator: Lightning's.
        devices: Lightning's.
        strategy: Lightning's.
        precision: Lightning's; None is bfloat16 autocast (float16 where it must be) on CUDA and
            float32 elsewhere.
        progress: show the time left, in a bar, or in lines where there is no terminal.
        progress_seconds: between such lines.
        checkpoint_every: steps between checkpoints.

    Raises:
        TeacherError: nothing of the network can learn, the loss is no longer finite, or training
            was interrupted.
    """
    folder = teacher_folder(data.config, config, seed)
    remove_leftovers(folder)
    if _taken(model, folder / "teacher.safetensors"):
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
            progress_seconds=progress_seconds,
            checkpoint_every=checkpoint_every,
        )
    data.setup()
    if data.config.kind != "translation":
        _require_gradient(model, data.labelled()[0][0][None], config.name)
    model.train().requires_grad_(True)
    kind = _TranslationTraining if data.config.kind == "translation" else _ClassifierTraining
    learner = kind(model, data, config.fit, seed)
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
        plugins=[Checkpoints()],
        callbacks=[
            *progress_lines("teacher", progress, progress_seconds),
            ModelCheckpoint(
                folder,
                filename="last",
                every_n_train_steps=checkpoint_every,
                enable_version_counter=False,
            ),
        ],
    )
    began = time.monotonic()
    with warnings.catch_warnings():
        # A resumed run finds its folder filled, and its batches are numbered by step (see
        # `train_dataloader`), which Lightning cannot know.
        warnings.filterwarnings("ignore", ".*(not resumable|exists and is not empty).*")
        trainer.fit(learner, ckpt_path=resumable(last, learner), weights_only=True)
    if trainer.global_step < learner.steps:
        raise TeacherError(
            f"teacher stopped at step {trainer.global_step} of {learner.steps}; run again to go on"
        )
    model.eval().requires_grad_(False).cpu().to(memory_format=torch.contiguous_format)
    if trainer.is_global_zero:
        _keep(model, folder, learner, time.monotonic() - began)
    return model


def _require_gradient(model: nn.Module, images: Tensor, name: str) -> None:
    """Refuse a network whose answer tells no weight where to go."""
    with torch.enable_grad():
        result = model.eval().requires_grad_(True)(images)
    if not result.requires_grad:
        raise TeacherError(
            f"teacher.train=true cannot train {name}: its result has no gradient, as after an "
            "argmax; let it end with the scores of the classes, or train it elsewhere and set "
            "teacher.train=false"
        )


def teacher_folder(task: Any, teacher: Any, seed: int) -> Path:
    """Where the teacher for this task, teacher (config dataclasses both) and seed is cached."""
    asked: dict[str, Any] = {"task": asdict(task), "teacher": asdict(teacher), "seed": seed}
    asked["teacher"].pop("cache_dir")
    if not asked["teacher"]["fit"]["restarts"]:
        # The first cycle is the same teacher whether others follow or not, in older caches too.
        asked["teacher"]["fit"].pop("restarts")
    data = asked["task"]["data"]
    for name in _IRRELEVANT_DATA:
        data.pop(name)
    for name, value in _LATER_DATA.items():
        if data[name] == value:
            data.pop(name)
    for name, value in _LATER_TASK.items():
        if asked["task"][name] == value:
            asked["task"].pop(name)
    data["resize"] = data["resize"] or None  # 0, which older caches called null
    for name, value in _LATER_KEYS.items():
        if asked["teacher"]["fit"][name] == value:
            asked["teacher"]["fit"].pop(name)
    text = asked["task"].pop("text")
    if asked["task"]["kind"] == "translation":
        data.update(_OLDER_TEXT_DATA)
        asked["text"] = {k: v for k, v in text.items() if k not in _IRRELEVANT_TEXT}
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


def _taken(model: nn.Module, path: Path) -> bool:
    """Fill the model from the cache; False, with a warning, where the file there is damaged."""
    if not os.path.lexists(path):
        return False
    try:
        state = read_weights(path)
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get(_CHECKSUM)
        if expected is not None and expected != _digest(state):
            raise TeacherError(f"{path} is damaged: its tensors have another checksum")
        fill(model, state, path)
    except TeacherError as error:
        line = str(error).splitlines()[0]
        _log.warning("%s: the teacher is trained again", line)
        remove(path)
        return False
    _log.info("teacher read from %s", path)
    return True


def _digest(state: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _keep(model: nn.Module, folder: Path, learner: _TeacherTraining, seconds: float) -> None:
    """Write the weights, whole or not at all, and what is known of them."""
    facts = {**learner.facts(), "seconds_since_start_or_resume": round(seconds, 1)}
    with atomic(folder / "teacher.json", TeacherError) as partial:
        partial.write_text(json.dumps(facts, indent=2) + "\n")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic(folder / "teacher.safetensors", TeacherError) as partial:
        save_file(state, partial, {_CHECKSUM: _digest(state)})
    (folder / "last.ckpt").unlink(missing_ok=True)
    # Of labels or tokens.
    _log.info("teacher saved in %s, %.2f %% right on validation", folder, learner.accuracy)


class _TeacherTraining(lightning.LightningModule):
    """What training has in common for all tasks: cycles, batches numbered by step, val, rates.

    Attributes:
        steps: of this cycle; ``before`` counts those of earlier cycles, as batches are numbered
            through all of them.
        accuracy: on val, in points; of images, or of target tokens.
    """

    def __init__(self, model: nn.Module, options: FitOptions, epoch: int, seed: int) -> None:
        super().__init__()
        self.model, self.options, self.seed = model, options, seed
        *earlier, self.epochs = options.epochs, *options.restarts
        self.steps = self.epochs * epoch
        self.before = sum(earlier) * epoch
        self.accuracy = 0.0
        self._seen = torch.zeros(2)
        # The sum of the weights of the last epochs, and how many they were.
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

    def facts(self) -> dict[str, Any]:
        """What is kept beside the weights."""
        return {"val_accuracy": self.accuracy}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout, too, must be a function of the step for a resumed run to end as an unbroken one.
        torch.manual_seed((self.seed << 32) + self.before + self.trainer.global_step)

    def checked(self, loss: Tensor) -> Tensor:
        """Log a loss, which has to be finite."""
        if not torch.isfinite(loss):
            raise TeacherError(
                f"the teacher's loss is {loss.item()} at step {self.trainer.global_step}: "
                "lower teacher.fit.lr"
            )
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._seen = torch.zeros(2, device=self.device)

    def on_validation_epoch_end(self) -> None:
        hits, count = self.trainer.strategy.reduce(self._seen, reduce_op="sum").tolist()
        self.accuracy = 100 * hits / max(count, 1)
        self.log("val_accuracy", self.accuracy, prog_bar=True)
        left = (self.steps - self.trainer.global_step) / max(1, self.steps / self.epochs)
        if round(left) < self.options.average:
            for name, weight in self.model.state_dict().items():
                self._sums[name] = self._sums.get(name, 0) + weight.double().cpu()
            self._summed += 1

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["averaged"] = {"sums": self._sums, "count": self._summed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._sums = checkpoint["averaged"]["sums"]
        self._summed = checkpoint["averaged"]["count"]

    def on_fit_end(self) -> None:
        """The average of the last epochs' weights takes their place (1706.03762, section 6.1)."""
        if self._summed:
            state = self.model.state_dict()
            averaged = {k: (v / self._summed).to(state[k]) for k, v in self._sums.items()}
            self.model.load_state_dict(averaged)

    def configure_optimizers(self) -> Any:
        options = self.options
        optimizer: torch.optim.Optimizer
        if options.optimizer == "adam":
            optimizer = torch.optim.AdamW(
                self.model.parameters(),
                lr=options.lr,
                betas=(0.9, 0.98),
                eps=1e-9,
                weight_decay=options.weight_decay,
            )
        else:
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


class _ClassifierTraining(_TeacherTraining):
    """Cross-entropy on labelled images: of one class each, or one a pixel."""

    def __init__(
        self, model: nn.Module, data: LabelledData, options: FitOptions, seed: int
    ) -> None:
        self.images = data.labelled()
        epoch = max(1, len(self.images) // options.batch_size)
        # Convolutions on the CPU, and half precision ones on CUDA, are faster with channels last.
        model = model.to(memory_format=torch.channels_last)
        super().__init__(model, options, epoch, seed)
        self.data = data

    def facts(self) -> dict[str, Any]:
        seen = (self.before + self.steps) * self.options.batch_size
        return {"val_accuracy": self.accuracy, "images_seen": seen}

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

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return self.checked(
            F.cross_entropy(
                self.model(images),
                labels,
                label_smoothing=self.options.label_smoothing,
                ignore_index=UNLABELLED,
            )
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        hits = (self.model(images).argmax(1) == labels).sum()
        self._seen += torch.stack([hits, (labels != UNLABELLED).sum()])


class _TranslationTraining(_TeacherTraining):
    """Cross-entropy of the next token, averaged over the real tokens of a batch."""

    def __init__(self, model: nn.Module, data: PairedText, options: FitOptions, seed: int) -> None:
        super().__init__(model, options, data.batches_an_epoch(), seed)
        self.data = data

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        return self.data.step_batches(
            self.data.train,
            self.before + self.steps,
            start=self.before + trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )

    def val_dataloader(self) -> Any:
        return self.data.valid_batches()

    def _scores(self, batch: Any) -> tuple[Tensor, Tensor]:
        """(N, V) scores and (N,) tokens of the real target positions."""
        scores = self.model(batch.source, batch.target_in, batch.source_pad)
        return scores[batch.real], batch.target_out[batch.real]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        scores, tokens = self._scores(batch)
        return self.checked(
            F.cross_entropy(scores, tokens, label_smoothing=self.options.label_smoothing)
        )

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        scores, tokens = self._scores(batch)
        hits = (scores.argmax(1) == tokens).sum()
        self._seen += torch.stack([hits, torch.tensor(len(tokens), device=hits.device)])
