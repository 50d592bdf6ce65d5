"""Arch-Distillation of a translator: on the teacher's own translations of unlabelled text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F

from archnet.distill.comparison import TapComparison
from archnet.distill.run import Speed, TrainerOptions, fit
from archnet.distill.schedule import Period, plan
from archnet.distill.training import ArchDistillation, DistillOptions
from archnet.ops import Student, Tap
from archnet.ops.scores import accuracy, agreement


class Sentences(Protocol):
    """What is read of a batch, as `archnet.tasks.TextBatch` gives it."""

    source: Tensor
    target_in: Tensor
    target_out: Tensor

    @property
    def source_pad(self) -> Tensor: ...
    @property
    def real(self) -> Tensor: ...


class TextData(Protocol):
    """What distillation asks of a translation task."""

    def step_batches(
        self, text: Any, steps: int, *, start: int = 0, rank: int = 0, world: int = 1
    ) -> Any: ...
    def valid_batches(self) -> Any: ...


class OwnBatch(Protocol):
    """A batch of a step with the student's own translations beside the teacher's."""

    def __call__(self, student: Student, batch: Any, step: int, rank: int) -> Any: ...


class AttentionComparison(nn.Module):
    """1 - cosine similarity of attention maps, row by row (arXiv 2111.01135, for text)."""

    def forward(self, student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
        """Maps (B, H, T, S); rows where ``real`` (B, T) is false do not count."""
        ours, theirs = (maps.transpose(1, 2)[real] for maps in (student, teacher))
        return 1 - F.cosine_similarity(ours, theirs, dim=-1).mean()


class _Inputs(NamedTuple):
    """The student's inputs, and the teacher's answers to them."""

    values: dict[str, Tensor]
    features: Mapping[str, Tensor]
    scores: Tensor
    real: dict[str, Tensor]


class TextDistillation(ArchDistillation):
    """`ArchDistillation` on sentences.

    Args:
        teacher: `archnet.teachers.TappedTeacher` at the student's taps.
        student, periods, options: as there.
        data: the task.
        text: source text with the teacher's translations.
        own: makes the batches of the last steps (``options.on_policy``); None: they are as others.

    Only real positions count in any loss. A period with a source trains all blocks at once, each
    alone on what the teacher has before it: one pass for all of them, at the cost of a step of the
    network.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: Student,
        periods: Sequence[Period],
        options: DistillOptions,
        data: TextData,
        text: Any,
        own: OwnBatch | None = None,
    ) -> None:
        super().__init__(teacher, student, periods, options)
        self.data, self.text, self.own = data, text, own
        last = self.periods[-1].last
        self._own_from = last - round(options.on_policy * last)

    def features(self, teacher: nn.Module, student: Student) -> nn.Module:
        return teacher

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch  # sentences, as `Sentences` has them

    def comparison(self, tap: Tap) -> nn.Module:
        if tap.path.endswith(".weights"):
            return AttentionComparison()
        shape, options = self.student.graph.shapes[tap.value], self.options
        return TapComparison(shape, options.attention, options.adaptation)

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        return self.data.step_batches(
            self.text,
            self.periods[-1].last,
            start=trainer.global_step,
            rank=trainer.global_rank,
            world=trainer.world_size,
        )

    def val_dataloader(self) -> Any:
        return self.data.valid_batches()

    def _asked(self, batch: Sentences) -> _Inputs:
        pad = batch.source_pad
        features, scores = self.teacher(batch.source, batch.target_in, pad)
        names = self.student.graph.inputs
        values = dict(zip(names, (batch.source, batch.target_in, pad), strict=True))
        return _Inputs(values, features, scores, {"encoder": ~pad, "decoder": batch.real})

    def _losses(
        self, period: Period, asked: _Inputs, results: Mapping[int, Tensor], scores: Tensor | None
    ) -> dict[str, Tensor]:
        losses = {}
        for index, result in results.items():
            path = self.student.taps[index].path
            real = asked.real[path.split(".")[0]]
            losses[path] = self.comparisons[index](result, asked.features[path], real)
        losses = self.weighted(period, losses)
        if scores is not None:
            real = asked.real["decoder"]
            losses |= self._compare_results([scores], [asked.scores], real)
        return losses

    def _through_the_network(self, batch: Any, period: Period) -> dict[str, Tensor]:
        if self.own is not None and self.global_step >= self._own_from:
            batch = self.own(self.student, batch, self.global_step, self.global_rank)
        asked, graph = self._asked(batch), self.student.graph
        targets = [self.student.taps[index].value for index in period.weights]
        targets += graph.outputs if period.logits else []
        results = self.run(asked.values, targets)
        scores = results[-1] if period.logits else None
        by_tap = dict(zip(period.weights, results, strict=False))
        return self._losses(period, asked, by_tap, scores)

    def _through_a_block(self, batch: Any, period: Period) -> dict[str, Tensor]:
        asked, graph = self._asked(batch), self.student.graph
        known, results = dict(asked.values), dict[int, Tensor]()
        waiting: list[int] = []
        for index in period.weights:
            tap = self.student.taps[index]
            waiting.append(index)
            if tap.path.endswith(".weights"):
                continue  # a block's own map, computed on the way to its result
            found = self.run(known, [self.student.taps[i].value for i in waiting])
            results |= dict(zip(waiting, found, strict=True))
            waiting = []
            known |= self.enter(index, asked.features[tap.path])
        (scores,) = self.run(known, graph.outputs)
        return self._losses(period, asked, results, scores)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        asked = self._asked(batch)
        scores, real = self.student(*asked.values.values()), batch.real
        ours, theirs = scores[real], asked.scores[real]
        words = batch.target_out[real]
        figures = {
            "val/agreement": agreement(ours, theirs, -1) * 100,
            "val/accuracy": accuracy(ours, words, -1) * 100,
            "val/loss": F.cross_entropy(ours, words),
        }
        self.log_dict(figures, prog_bar=True, sync_dist=True, batch_size=len(words))


def plan_text(options: DistillOptions, taps: Sequence[str]) -> list[Period]:
    """The periods of a schedule; `local` is one of all blocks at once and one of the network.

    Blocks are soon as close to the teacher as they get, and what is left is mended by the scores,
    so that most steps are those of the network.
    """
    if options.schedule != "local" or options.steps == 0:
        return plan(options, taps, True)
    joint = options.steps * 5 // 6 if options.joint_steps is None else options.joint_steps
    even, first = dict.fromkeys(range(len(taps)), 1.0), options.steps - joint
    periods = [
        Period("blocks", 0, first, even, True, -1),
        Period("joint", first, options.steps, even, True, None, options.joint_rate),
    ]
    return [period for period in periods if period.steps > 0]


def distill_text(
    teacher: nn.Module,
    student: Student,
    data: TextData,
    text: Any,
    options: DistillOptions,
    *,
    trainer: TrainerOptions,
    folder: Path,
    loggers: Sequence[Logger] = (),
    own: OwnBatch | None = None,
) -> dict[str, Any]:
    """Train a translating student in place; see `archnet.distill.distill`.

    Args:
        teacher: gives features at the student's taps by path, and scores.
        student: from `convert_translator`, quantized or not.
        data: the task; of its training text only sources are behind ``text``.
        text: source text with the teacher's translations, as the task encodes text.
        options, trainer, folder, loggers: as there.
        own: see `TextDistillation`.

    Returns:
        ``steps``, ``inputs_seen``, ``unlabelled`` (distinct sentences), ``earlier`` (seconds
        before it was resumed).

    Raises:
        DistillError: a loss is not finite (naming tap and step), or training was interrupted.
    """
    periods = plan_text(options, [tap.path for tap in student.taps])
    steps = periods[-1].last if periods else 0
    facts: dict[str, Any] = {"steps": steps, "inputs_seen": 0, "unlabelled": len(text)}
    if not periods:
        return facts
    student.train()
    module = TextDistillation(teacher, student, periods, options, data, text, own)
    speed = Speed()
    fit(module, periods, options, trainer, folder, loggers, speed)
    student.eval().to("cpu")
    facts["inputs_seen"] = sum(map(len, data.step_batches(text, steps).numbers()))
    facts["earlier"] = speed.earlier
    return facts
