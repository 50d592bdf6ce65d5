"""Parallel text: read line by line from files, kept on disk as token numbers.

Neither the lines nor their tokens are ever held in memory as a whole: WMT14's 4.5 million pairs
take 0.6 GB on disk, and a training run reads the pages it needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from archnet.errors import TaskError
from archnet.files import digest, full_disk, remove, remove_leftovers, temporary_beside
from archnet.tasks.tokenizer import Subwords

_log = logging.getLogger(__name__)

CHUNK = 4096  # lines that are read and encoded at a time

_KINDS = ("tokens", "ends")  # of files, for each side
_CHECKSUM = "sha256"  # of these files together

Pair = tuple[str, str]
TokenPair = tuple[Sequence[int], Sequence[int]]


class ParallelText(Protocol):
    """Sentence pairs of the splits ``train``, ``valid`` and ``test``."""

    def pairs(self, split: str) -> Iterator[Pair]:
        """Source and target sentences, stripped, in order; either may be empty."""
        ...

    def size(self, split: str) -> int:
        """How many pairs there are, empty ones included."""
        ...

    def fingerprint(self, split: str) -> str:
        """A hash of the content, by which what is made of it is cached."""
        ...

    def check(self) -> None:
        """Raise `TaskError` where a split is missing."""
        ...


@dataclass(frozen=True)
class TextFiles:
    """``<root>/<name>.<language>``, one sentence a line, or parquet files in Hugging Face's layout.

    Args:
        root: the folder.
        names: of the files of each split, without the language.
        languages: source and target, such as ("en", "de").
    """

    root: Path
    names: dict[str, str]
    languages: tuple[str, str]

    @classmethod
    def of(cls, root: Path, text: Any) -> TextFiles:
        """The files that `task.text` names."""
        names = {split: getattr(text, split) for split in ("train", "valid", "test")}
        return cls(root, names, (text.source, text.target))

    def files(self, split: str) -> list[Path]:
        """The two text files of a split, or its parquet files.

        Raises:
            TaskError: there are neither; both places are named.
        """
        name = self.names[split]
        texts = [self.root / f"{name}.{language}" for language in self.languages]
        if all(path.is_file() for path in texts):
            return texts
        parquet = sorted(
            path
            for path in self.root.rglob("*.parquet")
            if path.name.split("-")[0].removesuffix(".parquet") == name
            or (split == "valid" and path.name.startswith("validation"))
        )
        if parquet:
            return parquet
        missing = next(path for path in texts if not path.is_file())
        raise TaskError(
            f"{missing} is missing, and task.data.root={self.root} holds no parquet files of "
            f"'{name}' either: one sentence a line in {texts[0].name} and {texts[1].name}; "
            f"task.text.{split} names the files"
        )

    def check(self) -> None:
        for split in self.names:
            self.files(split)

    def pairs(self, split: str) -> Iterator[Pair]:
        files = self.files(split)
        return _parquet(files, self.languages) if files[0].suffix == ".parquet" else _lines(files)

    def size(self, split: str) -> int:
        files = self.files(split)
        if files[0].suffix == ".parquet":
            import pyarrow.parquet as pq

            return sum(pq.read_metadata(path).num_rows for path in files)
        with files[0].open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))

    def fingerprint(self, split: str) -> str:
        digest = hashlib.sha256()
        for path in self.files(split):
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            digest.update(b"\0")
        return digest.hexdigest()[:16]


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file without what ends them.

    Only line feeds end a line (a carriage return before one goes): text holds other characters
    that Python's ``splitlines`` would break at, and the number of lines would differ.

    Raises:
        TaskError: the file cannot be read, or a line is not UTF-8, naming both.
    """
    try:
        with path.open("rb") as file:
            yield from decoded(file, str(path))
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror or error}") from error


def decoded(lines: Iterable[bytes], name: str, first: int = 1) -> Iterator[str]:
    """As `read_lines`, from lines of bytes; ``name`` and the ``first`` number are for errors."""
    for number, line in enumerate(lines, start=first):
        try:
            yield line.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise TaskError(
                f"{name}, line {number}: not UTF-8 (byte {error.start + 1} of the line): "
                "convert it, for example with iconv"
            ) from error


def _lines(files: list[Path]) -> Iterator[Pair]:
    streams = [read_lines(path) for path in files]
    for number, lines in enumerate(_longest(*streams), start=1):
        if None in lines:
            short = files[lines.index(None)]
            raise TaskError(
                f"{files[0]} and {files[1]} do not belong together: {short.name} ends after line "
                f"{number - 1} and the other goes on; line n of one must translate line n of the "
                "other"
            )
        yield lines[0].strip(), lines[1].strip()


def _longest(first: Iterator[str], second: Iterator[str]) -> Iterator[tuple[Any, Any]]:
    while True:
        pair = next(first, None), next(second, None)
        if pair == (None, None):
            return
        yield pair


def _parquet(files: list[Path], languages: tuple[str, str]) -> Iterator[Pair]:
    import pyarrow.parquet as pq

    for path in files:
        try:
            table = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise TaskError(f"{path} is no parquet file: {error}") from error
        if "translation" not in table.schema_arrow.names:
            raise TaskError(
                f"{path} has no column 'translation': Hugging Face's translation sets have one, "
                f"with a field a language; found {', '.join(table.schema_arrow.names)}"
            )
        for batch in table.iter_batches(CHUNK, columns=["translation"]):
            for row in batch.column(0).to_pylist():
                try:
                    yield tuple((row[language] or "").strip() for language in languages)  # type: ignore[misc]
                except KeyError as error:
                    raise TaskError(
                        f"{path} has no language {error.args[0]}: found {', '.join(row)}"
                    ) from error


def encoded(pairs: Iterator[Pair], tokenizer: Subwords) -> Iterator[TokenPair]:
    """Pairs of sentences as token numbers, a chunk at a time."""
    while chunk := list(islice(pairs, CHUNK)):
        sources, targets = (tokenizer.encode([pair[side] for pair in chunk]) for side in (0, 1))
        yield from zip(sources, targets, strict=True)


class EncodedText:
    """Pairs as token numbers in memory-mapped files, without begin and end marks.

    Attributes:
        dropped: pairs left out, by reason (``empty``, ``long``).

    Raises:
        TaskError: a file is missing, in pieces, or another than was written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._open(folder)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise TaskError(f"{folder} is damaged: {error}") from error

    def _open(self, folder: Path) -> None:
        facts = json.loads((folder / "facts.json").read_text())
        self.dropped: dict[str, int] = facts["dropped"]
        self._size: int = facts["pairs"]
        # Caches from before there were checksums are taken as they are.
        if _CHECKSUM in facts and facts[_CHECKSUM] != digest(*_parts(folder)):
            raise ValueError("its files have another checksum")
        self._ends, self._tokens = [], []
        for side in ("source", "target"):
            self._ends.append(np.memmap(folder / f"{side}.ends", np.int64, "r"))
            self._tokens.append(np.memmap(folder / f"{side}.tokens", np.uint16, "r"))
            if len(self._ends[-1]) != self._size + 1 or self._ends[-1][-1] != len(self._tokens[-1]):
                raise ValueError(f"the {side} is not whole")

    @classmethod
    def found(cls, folder: Path) -> EncodedText | None:
        """What an earlier run has written into ``folder``.

        None where there is nothing, or nothing whole: that is removed, with a warning.
        """
        if not os.path.lexists(folder):
            return None
        try:
            return cls(folder)
        except TaskError as error:
            _log.warning("%s; it is made again", error)
            remove(folder)
            return None

    def __len__(self) -> int:
        return self._size

    def lengths(self, first: int, last: int) -> NDArray[np.int64]:
        """(2, last - first) tokens of the source and the target of some pairs."""
        return np.stack([np.diff(ends[first : last + 1]) for ends in self._ends])

    def pair(self, index: int) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
        source, target = (
            tokens[ends[index] : ends[index + 1]]
            for ends, tokens in zip(self._ends, self._tokens, strict=True)
        )
        return source, target

    def sources(self) -> int:
        """How many different sources there are, where equal ones are neighbours."""
        before: bytes | None = None
        count = 0
        for index in range(self._size):
            source = self.pair(index)[0].tobytes()
            count, before = count + (source != before), source
        return count

    @classmethod
    def write(
        cls, folder: Path, pairs: Iterator[TokenPair], max_tokens: int, what: str
    ) -> EncodedText:
        """Write pairs of token numbers into ``folder``, which appears as a whole.

        Pairs without text on one side or with more than ``max_tokens`` tokens are left out and
        counted.

        Raises:
            TaskError: nothing is left.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        part = temporary_beside(folder)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        dropped, ends = {"empty": 0, "long": 0}, [0, 0]
        kept = read = 0
        try:
            files = {
                (side, kind): (part / f"{name}.{kind}").open("wb")
                for side, name in enumerate(("source", "target"))
                for kind in _KINDS
            }
            for side in (0, 1):
                files[side, "ends"].write(np.int64(0).tobytes())
            for both in pairs:
                read += 1
                sizes = [len(tokens) for tokens in both]
                if min(sizes) == 0 or max(sizes) > max_tokens:
                    dropped["empty" if min(sizes) == 0 else "long"] += 1
                    continue
                kept += 1
                for side, tokens in enumerate(both):
                    ends[side] += len(tokens)
                    files[side, "tokens"].write(np.asarray(tokens, np.uint16).tobytes())
                    files[side, "ends"].write(np.int64(ends[side]).tobytes())
            for file in files.values():
                file.close()
            if not kept:
                raise TaskError(
                    f"{what}: no sentence pair is left of {read} lines: {dropped['empty']} are "
                    f"empty on a side, {dropped['long']} longer than task.text.max_tokens="
                    f"{max_tokens} tokens"
                )
            facts = {"pairs": kept, "dropped": dropped, _CHECKSUM: digest(*_parts(part))}
            (part / "facts.json").write_text(json.dumps(facts))
            if not folder.exists():
                part.replace(folder)
        except OSError as error:
            raise TaskError(
                f"{full_disk(error, [folder.parent]) or error}: {folder} cannot be written"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return cls(folder)


def _parts(folder: Path) -> list[Path]:
    return [folder / f"{side}.{kind}" for side in ("source", "target") for kind in _KINDS]
