"""Translation: parallel text for teachers, source text alone for distillation."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import lightning
import sacrebleu

from archnet.errors import TaskError
from archnet.files import atomic, digest, remove, remove_leftovers
from archnet.tasks.batches import (
    StepBatches,
    TextBatch,
    batches_an_epoch,
    collate,
    epoch_batches,
)
from archnet.tasks.corpus import EncodedText, ParallelText, TextFiles, TokenPair, encoded
from archnet.tasks.phrases import Phrases
from archnet.tasks.tokenizer import Subwords, Tokenizer, train_tokenizer

_log = logging.getLogger(__name__)

TRANSLATED = 2048  # sentences that are translated before what is done is written down


class TextOptions(Protocol):
    """What is read of `task.text`."""

    source: str
    target: str
    train: str
    valid: str
    test: str
    vocabulary: int
    tokenizer_sentences: int
    max_tokens: int
    batch_tokens: int
    cache_dir: str


class TranslationData(lightning.LightningDataModule):
    """Sentence pairs as token numbers, cached by content.

    Args:
        config: `task` of the config.
        seed: of shuffling.
        tokenizer: a published teacher's own; None: one is trained on the training text.

    After `setup`, ``tokenizer``, ``train`` and ``valid`` are there; ``dropped`` counts training
    pairs that were empty on a side or too long.
    """

    tokenizer: Subwords
    train: EncodedText
    valid: EncodedText

    def __init__(self, config: Any, seed: int, tokenizer: Subwords | None = None) -> None:
        super().__init__()
        self._given = tokenizer
        self.config, self.seed = config, seed
        self.options: TextOptions = config.text
        self.text = self._text()
        self._folder: Path | None = None

    @property
    def languages(self) -> tuple[str, str]:
        return self.options.source, self.options.target

    def _text(self) -> ParallelText:
        data = self.config.data
        if data.source == "phrases":
            return Phrases(self.languages, self.seed)
        return TextFiles.of(Path(data.root).expanduser(), self.options)

    def setup(self, stage: str | None = None) -> None:
        """Train the tokenizer and encode the text, or find both as an earlier run left them.

        Raises:
            TaskError: text that is missing, empty, not UTF-8, or of unequal length.
        """
        if self._folder is not None:
            return
        options = self.options
        parts = [
            self.text.fingerprint("train"),
            *self.languages,
            self._given.identity if self._given is not None else options.vocabulary,
            options.tokenizer_sentences,
        ]
        folder = Path(options.cache_dir).expanduser() / f"{self.config.name}-{_key(*parts)}"
        remove_leftovers(folder)
        self.tokenizer = self._given or self._trained(folder / "tokenizer.model")
        self.train = self._encoded(folder, "train")
        self.valid = self._encoded(folder, "valid")
        self._folder = folder

    def _trained(self, model: Path) -> Tokenizer:
        if not _is_whole(model):
            sides = (side for pair in self.text.pairs("train") for side in pair)
            options = self.options
            train_tokenizer(model, sides, options.vocabulary, options.tokenizer_sentences)
            with atomic(_checksum_of(model), TaskError) as part:
                part.write_text(digest(model))
        return Tokenizer(model)

    @property
    def folder(self) -> Path:
        """Where what is made of this text is cached."""
        assert self._folder is not None, "setup() comes first"
        return self._folder

    @property
    def skipped(self) -> int:
        """Training pairs left out."""
        return sum(self.train.dropped.values())

    def _encoded(self, folder: Path, split: str) -> EncodedText:
        options = self.options
        path = folder / f"{split}-{_key(self.text.fingerprint(split), options.max_tokens)}"
        if (found := EncodedText.found(path)) is not None:
            return found
        rows = encoded(self.text.pairs(split), self.tokenizer)
        return EncodedText.write(path, rows, options.max_tokens, f"split {split}")

    def translated(
        self, name: str, translate: Callable[[list[list[int]]], list[list[list[int]]]]
    ) -> EncodedText:
        """The sources of the training text with given translations, cached as ``name``.

        References are not read. Translations that are finished are kept while the others are
        being made, so that a run that was killed goes on.

        Args:
            name: names whose translations they are.
            translate: token numbers of sources to those of one or several translations of each.
        """
        folder = self.folder / f"translated-{name}"
        if (found := EncodedText.found(folder)) is not None:
            return found
        size = min(len(self.train), self.config.data.unlabelled or len(self.train))
        parts = self.folder / f"translated-{name}.parts"
        remove_leftovers(parts)
        chunks = []
        for first in range(0, size, TRANSLATED):
            path = parts / f"{first:09d}.json"
            if _read_chunk(path) is None:
                last = min(first + TRANSLATED, size)
                sources = [self.train.pair(index)[0].tolist() for index in range(first, last)]
                rows = [
                    (source, target)
                    for source, targets in zip(sources, translate(sources), strict=True)
                    for target in targets
                ]
                with atomic(path, TaskError) as part:
                    part.write_text(json.dumps({"sha256": _rows_digest(rows), "rows": rows}))
            chunks.append(path)

        def pairs() -> Iterator[TokenPair]:
            for path in chunks:
                yield from _read_chunk(path) or ()

        text = EncodedText.write(folder, pairs(), self.options.max_tokens, "the teacher's text")
        shutil.rmtree(parts, ignore_errors=True)
        return text

    def calibration_batches(self, text: EncodedText, count: int) -> list[TextBatch]:
        """Batches without any padding: sources of one length, translations cut to the shortest.

        Values at padding mean nothing, and would count in the choice of scales.
        """
        made = []
        for batch in self.step_batches(text, count):
            lengths = (~batch.source_pad).sum(1)
            same = lengths == lengths.mode().values
            shortest = int(batch.real[same].sum(1).min())
            length = int(lengths.mode().values)
            made.append(
                TextBatch(
                    batch.source[same][:, :length],
                    batch.target_in[same][:, :shortest],
                    batch.target_out[same][:, :shortest],
                )
            )
        return made

    def pairs(self, split: str, limit: int | None = None) -> tuple[list[str], list[str]]:
        """Sentences of a split (valid, test) and their references, empty lines included."""
        sources: list[str] = []
        references: list[str] = []
        for source, reference in self.text.pairs(split):
            if limit is not None and len(sources) >= limit:
                break
            sources.append(source)
            references.append(reference)
        if not sources:
            raise TaskError(f"the {split} split is empty: task.text.{split} names its files")
        return sources, references

    def step_batches(
        self, text: EncodedText, steps: int, *, start: int = 0, rank: int = 0, world: int = 1
    ) -> StepBatches:
        """Batches of ``text`` numbered by training step."""
        tokens = self.options.batch_tokens
        return StepBatches(text, tokens, steps, self.seed, start=start, rank=rank, world=world)

    def batches_an_epoch(self) -> int:
        """Batches in the first epoch of the training text; other epochs differ by a few."""
        return batches_an_epoch(self.train, self.options.batch_tokens, self.seed)

    def valid_batches(self) -> WholeSplit:
        """The whole validation split."""
        return WholeSplit(self.valid, self.options.batch_tokens)


class WholeSplit:
    """Every pair of a split once, in batches."""

    def __init__(self, text: EncodedText, tokens: int) -> None:
        self.text = text
        self._batches = list(epoch_batches(text, tokens, 0, 0))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[TextBatch]:
        return (collate(self.text, index) for index in self._batches)


def _checksum_of(model: Path) -> Path:
    return model.with_name(f"{model.name}.sha256")


def _is_whole(model: Path) -> bool:
    """Whether a tokenizer is there as it was written; a warning where it is damaged."""
    if not os.path.lexists(model):
        return False
    try:
        written = _checksum_of(model)
        # Caches from before there were checksums are taken as they are.
        if written.exists() and written.read_text() != digest(model):
            raise TaskError(f"{model} is damaged: it has another checksum")
        Tokenizer(model)
    except (OSError, ValueError, TaskError) as error:
        _log.warning("%s; it is made again", error)
        remove(model)
        return False
    return True


def _rows_digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_chunk(path: Path) -> list[TokenPair] | None:
    """Translations that are written down; None where they are not, or not whole."""
    if not os.path.lexists(path):
        return None
    try:
        found = json.loads(path.read_text())
        rows: list[TokenPair] = found["rows"]
        if found["sha256"] != _rows_digest(rows):
            raise ValueError("another checksum")
    except (OSError, ValueError, LookupError, TypeError) as error:
        _log.warning("%s is damaged (%s); these sentences are translated again", path, error)
        remove(path)
        return None
    return rows


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def scores(translations: list[str], references: list[str]) -> dict[str, Any]:
    """``bleu`` and ``chrf`` in points, and ``signature`` of the BLEU (sacreBLEU, Post 2018)."""
    bleu = sacrebleu.BLEU()
    return {
        "bleu": round(bleu.corpus_score(translations, [references]).score, 2),
        "chrf": round(sacrebleu.CHRF().corpus_score(translations, [references]).score, 2),
        "signature": str(bleu.get_signature()),
    }
