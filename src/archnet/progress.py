"""Progress in lines, where a bar would fill a log file."""

import logging
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

_log = logging.getLogger(__name__)


def in_terminal() -> bool:
    """Whether a bar can be drawn."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def in_notebook() -> bool:
    """Whether the output is a notebook's."""
    return "ipykernel" in sys.modules


class Lines:
    """Writes how far some work is to the log, at most every so many seconds.

    Args:
        what: the work, with which each line begins.
        unit: what is counted: step, sentence.
        last: how many there are.
        seconds: least time between two lines.
        first: how many were done before.
    """

    def __init__(self, what: str, unit: str, last: int, seconds: float, first: int = 0) -> None:
        self.what, self.unit, self.last, self.seconds = what, unit, last, seconds
        self.first, self.began = first, time.monotonic()
        self._told = self.began

    def due(self) -> bool:
        """Whether the next line may be written."""
        return time.monotonic() - self._told >= self.seconds

    def tell(self, done: int, **figures: float) -> None:
        """Write a line such as `distillation: step 40 of 400, loss 0.1234, 0:01:30 left`."""
        self._told = time.monotonic()
        told = [f"{self.unit} {done:,} of {self.last:,}"]
        told += [f"{name} {value:.4g}" for name, value in figures.items()]
        if done > self.first:
            pace = (self._told - self.began) / (done - self.first)
            told.append(f"{timedelta(seconds=round(pace * (self.last - done)))} left")
        _log.info("%s: %s", self.what, ", ".join(told))


def progress_lines(what: str, shown: bool, seconds: float) -> list[ProgressBar]:
    """The callback that replaces Lightning's bar where the output is no terminal: a bar that a
    notebook shows with and without widgets, else lines.

    Args:
        what: is trained.
        shown: whether progress is shown at all.
        seconds: least time between two lines.
    """
    if not shown or in_terminal():
        return []
    return [NotebookBar(refresh_rate=10)] if in_notebook() else [TrainingLines(what, seconds)]


class NotebookBar(TQDMProgressBar):
    """Lightning's bar without those of validations, each of which a notebook would keep."""

    def init_validation_tqdm(self) -> Tqdm:
        """A bar that shows nothing."""
        return Tqdm(disable=True)


class TrainingLines(ProgressBar):
    """Step, loss and time left of a training, from the leading process."""

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__()
        self.what, self.seconds = what, seconds
        self.enabled = True
        self.lines: Lines | None = None

    def disable(self) -> None:
        """Write nothing, as Lightning asks of all processes but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Write again."""
        self.enabled = True

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.lines = Lines(
            self.what, "step", trainer.max_steps, self.seconds, first=trainer.global_step
        )

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if self.enabled and self.lines is not None and self.lines.due():
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            self.lines.tell(trainer.global_step, **({} if loss is None else {"loss": float(loss)}))
