"""Batches with the student's own translations in place of the teacher's (arXiv 2306.13649)."""

from __future__ import annotations

import numpy as np
import torch

from archnet.convert import stepwise
from archnet.ops import Student
from archnet.tasks.batches import TextBatch, padded
from archnet.tasks.sampling import mix
from archnet.tasks.tokenizer import BOS, EOS
from archnet.translate import StudentTranslator, sampled


class OwnTranslations:
    """Every second sentence of a batch gets the student's own translation as it is now.

    It is drawn from the student's distribution, and follows from the student, the batch, the seed,
    the step and the process alone: a run that is resumed draws what one that never stopped draws.
    None is longer than the longest of the teacher's in the batch.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, student: Student, batch: TextBatch, step: int, rank: int) -> TextBatch:
        """The batch of a training step with other targets for some of its sentences."""
        places = range(step % 2, len(batch.source), 2)
        if not places:
            return batch
        # Without end marks.
        sides = zip(batch.source, ~batch.source_pad, strict=True)
        sources = [row[real][:-1].tolist() for row, real in sides]
        was_training = student.training
        student.eval()
        try:
            words = sampled(
                StudentTranslator(stepwise(student)),
                [sources[place] for place in places],
                batch.target_in.shape[1] - 1,
                self._generator(step, rank),
                batch.source.device,
            )
        finally:
            student.train(was_training)
        pairs = zip(batch.target_out, batch.real, strict=True)
        targets = [row[real].tolist() for row, real in pairs]
        for place, row in zip(places, words, strict=True):
            targets[place] = [*row, EOS]
        device = batch.source.device
        return batch._replace(
            target_in=padded([[BOS, *row[:-1]] for row in targets]).to(device),
            target_out=padded(targets).to(device),
        )

    def _generator(self, step: int, rank: int) -> torch.Generator:
        word = mix(mix(np.array([self.seed], np.uint64), 11) + np.uint64(step), 12 + rank)
        return torch.Generator().manual_seed(int(word[0] >> np.uint64(1)))
