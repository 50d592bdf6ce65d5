"""Subwords: one SentencePiece BPE model for both languages, trained on the training text."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from archnet.errors import TaskError
from archnet.files import atomic

PAD, BOS, EOS, UNK = 0, 1, 2, 3
MODEL = "tokenizer.model"
LONGEST_LINE = 4096  # characters of a line that the vocabulary is learned from; the rest is cut


class Subwords(Protocol):
    """What is asked of a tokenizer, with the marks above."""

    def __len__(self) -> int: ...
    def encode(self, sentences: Sequence[str]) -> list[list[int]]: ...
    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]: ...
    def save(self, folder: Path) -> None: ...
    @property
    def identity(self) -> str: ...


class Tokenizer:
    """Text to token numbers and back.

    Numbers 0 to 3 mean padding, begin, end and unknown. A character that the training text did
    not have becomes ``UNK``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise TaskError(f"{path} is no SentencePiece model: {error}") from error

    def __len__(self) -> int:
        return self._model.get_piece_size()

    def encode(self, sentences: Sequence[str]) -> list[list[int]]:
        """Token numbers of each sentence, without begin and end; an empty one has none."""
        return self._model.encode(list(sentences))

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Text of each list of token numbers; padding, begin and end are left out."""
        plain = [[token for token in row if token > EOS] for row in tokens]
        return self._model.decode(plain)

    def save(self, folder: Path) -> None:
        """Copy the model to ``folder``."""
        with atomic(folder / MODEL, TaskError) as part:
            part.write_bytes(self.path.read_bytes())

    @property
    def identity(self) -> str:
        """What tells this vocabulary from others."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def train_tokenizer(
    path: Path, sentences: Iterable[str], size: int, limit: int, seed: int = 0
) -> Tokenizer:
    """Learn a BPE vocabulary (Sennrich et al. 2016, arXiv 1508.07909) and write it to ``path``.

    Args:
        path: of the model file; its folder is made.
        sentences: text of both languages, read once and not kept.
        size: tokens in the vocabulary, the four marks included.
        limit: sentences, drawn evenly from all, that it is learned from: what bounds the memory.
        seed: of that draw.

    Raises:
        TaskError: the text is too small for so many tokens.
    """
    model, troubles = io.BytesIO(), list[TaskError]()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_usable(sentences, troubles),
            model_writer=model,
            model_type="bpe",
            vocab_size=size,
            character_coverage=1.0,
            input_sentence_size=limit,
            shuffle_input_sentence=True,
            max_sentence_length=4 * LONGEST_LINE,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if troubles:
            raise troubles[0] from None  # SentencePiece made an error of its own out of it
        line = str(error).strip().splitlines()[-1]
        raise TaskError(
            f"task.text.vocabulary={size} does not suit the training text ({line}): "
            "lower it, or give more text"
        ) from error
    with atomic(path, TaskError) as part:
        part.write_bytes(model.getvalue())
    return Tokenizer(path)


def _usable(sentences: Iterable[str], troubles: list[TaskError]) -> Iterator[str]:
    found = False
    try:
        for sentence in sentences:
            if sentence:
                found = True
                yield sentence[:LONGEST_LINE]
        if not found:
            raise TaskError("the training text is empty: no sentence has any text in it")
    except TaskError as error:
        troubles.append(error)
        raise
