"""Sentences in, as many sentences out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from archnet.translate.search import (
    BOS,
    EOS,
    UNK,
    Hypothesis,
    SearchOptions,
    Translator,
    hypotheses,
    scores_along,
)

_log = logging.getLogger(__name__)


class Subwords(Protocol):
    """What is asked of a tokenizer."""

    def encode(self, sentences: Sequence[str]) -> list[list[int]]: ...
    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]: ...


def translate(
    model: Translator,
    tokenizer: Subwords,
    sentences: Sequence[str],
    options: SearchOptions,
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
    first_line: int = 1,
) -> list[str]:
    """Translate sentences; an empty one stays empty, and the number of lines stays the same.

    Characters that the tokenizer does not know are lost (`unknown` names them); a sentence longer
    than ``options.longest`` tokens is cut there, with a warning.

    Args:
        model: what translates.
        tokenizer: the one that it was trained with.
        sentences: in any order and of any length.
        options: of the search.
        batch: sentences that are translated together; those of one length are.
        device: where the network is.
        progress: told how many sentences a batch had, after each.
        first_line: number of the first sentence, for the warning.
    """
    found = translations(
        model,
        tokenizer,
        sentences,
        options,
        batch=batch,
        device=device,
        progress=progress,
        first_line=first_line,
    )
    return [best[0][1] for best in found]


def translations(
    model: Translator,
    tokenizer: Subwords,
    sentences: Sequence[str],
    options: SearchOptions,
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
    first_line: int = 1,
) -> list[list[tuple[float, str]]]:
    """As `translate`; for each sentence the scores (`Hypothesis`) and texts of all that the search
    found, the best first. An empty sentence has an empty one.
    """
    rows = tokenizer.encode([sentence.strip() for sentence in sentences])
    room = options.longest - 1
    cut = [number for number, row in enumerate(rows, start=first_line) if len(row) > room]
    if cut:
        _log.warning(
            "%d sentence(s) are longer than %d tokens and were cut; the first is line %d",
            len(cut),
            room,
            cut[0],
        )
    found = hypotheses_of(
        model, [row[:room] for row in rows], options, batch=batch, device=device, progress=progress
    )
    texts = iter(tokenizer.decode([item.tokens for items in found for item in items]))
    return [[(item.score, next(texts)) for item in items] for items in found]


def unknown(tokenizer: Subwords, sentences: Sequence[str]) -> dict[int, str]:
    """The characters of sentences that a tokenizer does not know, each once.

    Returns:
        By the index of the sentence; empty text where single characters are known and what they
        make together is not.
    """
    found = {}
    for index, row in enumerate(tokenizer.encode([sentence.strip() for sentence in sentences])):
        if UNK in row:
            characters = [c for c in dict.fromkeys(sentences[index]) if not c.isspace()]
            rows = tokenizer.encode(characters)
            lost = [c for c, tokens in zip(characters, rows, strict=True) if UNK in tokens]
            found[index] = "".join(lost)
    return found


def translate_tokens(
    model: Translator,
    rows: Sequence[Sequence[int]],
    options: SearchOptions,
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """As `translate`, from token numbers without marks to such."""
    found = hypotheses_of(model, rows, options, batch=batch, device=device, progress=progress)
    return [items[0].tokens for items in found]


def hypotheses_of(
    model: Translator,
    rows: Sequence[Sequence[int]],
    options: SearchOptions,
    *,
    batch: int = 32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[list[Hypothesis]]:
    """As `translations`, from token numbers without marks to such."""
    found = [[Hypothesis(0.0, [])] for _ in rows]
    for group in groups(rows, batch):
        source = torch.tensor([[*rows[index], EOS] for index in group], device=device)
        for index, items in zip(group, hypotheses(model, source, options), strict=True):
            found[index] = items
        if progress is not None:
            progress(len(group))
    return found


def scores_of(
    model: Translator,
    rows: Sequence[Sequence[int]],
    translations: Sequence[Sequence[int]],
    *,
    batch: int = 16,
) -> Iterator[Tensor]:
    """Scores of given translations; those of sentences of one length are run together.

    Args:
        model: what gives the scores.
        rows: sentences as token numbers without marks.
        translations: theirs.
        batch: sentences that are run together, whose scores are in memory at once.

    Yields:
        Of every sentence that is not empty, by length and then in order: the scores (T + 1, V) of
        what follows the first mark and each of its translation's T tokens.
    """
    for group in groups(rows, batch):
        source = torch.tensor([[*rows[index], EOS] for index in group])
        lengths = [len(translations[index]) for index in group]
        # Tokens after a translation have no part in the scores before it.
        target = torch.full((len(group), max(lengths) + 1), EOS)
        for row, index in enumerate(group):
            target[row, : lengths[row] + 1] = torch.tensor([BOS, *translations[index]])
        scores_BTV = scores_along(model, source, target)
        for length, scores_TV in zip(lengths, scores_BTV, strict=True):
            yield scores_TV[: length + 1]


def groups(rows: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Numbers of rows that have one length, at most ``batch`` at a time; empty ones are left."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if row:
            by_length.setdefault(len(row), []).append(index)
    for length in sorted(by_length):
        members = by_length[length]
        for first in range(0, len(members), batch):
            yield members[first : first + batch]
