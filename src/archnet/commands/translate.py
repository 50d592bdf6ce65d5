"""`archnet translate`: sentences from standard input, their translations to standard output."""

import argparse
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO

from archnet.commands.folder import folder_arguments, open_folder
from archnet.errors import ArchnetError

if TYPE_CHECKING:
    from archnet.tasks import Subwords

HELP = "translate lines of text with a run's student or teacher"
SAID = 20  # lines with unknown characters that are named one by one
CHUNK = 4096  # lines of a file that are read, sorted by length and translated together
READ = 1 << 16  # bytes that are taken from a pipe at once
SECONDS = 10.0  # between two lines of progress


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    folder_arguments(parser, about="run folder of a translation task")
    parser.add_argument(
        "--runtime",
        choices=("pytorch", "onnxruntime"),
        default="pytorch",
        help="pytorch, or the exported files in onnxruntime (default: pytorch)",
    )
    parser.add_argument(
        "--network", choices=("student", "teacher"), default="student", help="default: student"
    )
    parser.add_argument("--beam", type=int, help="hypotheses (default: task.text.beam of the run)")
    parser.add_argument("--batch", type=int, default=32, help="sentences together (default: 32)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: the runtime's choice)")
    parser.add_argument(
        *("--n_best", "--n-best"),
        type=int,
        metavar="N",
        help="the N best of every line, one a line: number of the line, score (log-probability "
        "over length ** task.text.length_penalty) and translation, with tabs between",
    )


def run(options: argparse.Namespace) -> int:
    """Write one line for every line read, in order; an empty one for an empty one.

    What comes through a pipe is answered line by line, as it comes; of a file many lines are
    translated together.
    """
    import torch

    from archnet.jobs import conductor
    from archnet.jobs.translation import Translation
    from archnet.translate import translations

    folder = open_folder(options)
    job = conductor.job_of(folder)
    if not isinstance(job, Translation):
        raise ArchnetError(f"{folder.path} is no run of a translation task")
    for name in ("beam", "batch", "threads", "n_best"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ArchnetError(f"{name}={value} must be at least 1")
    search = replace(job.search, beam=options.beam or job.search.beam)
    if (options.n_best or 1) > search.beam:
        raise ArchnetError(
            f"n_best={options.n_best} is more than the search keeps, beam={search.beam}: say "
            f"beam={options.n_best}"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tokenizer = job.tokenizer()
    threads = options.threads or 0
    model = job.translator(options.network, options.runtime, len(tokenizer), threads)
    source = sys.stdin.buffer
    lines = lines_of_file(source)
    chunks = lines_of_pipe(source, options.batch) if lines is None else _chunks(source)
    told = _Unknown(tokenizer)
    advance = progress(lines)
    first = 1
    for chunk in chunks:
        sentences, error = _decoded(chunk, first)
        told.tell(sentences, first)
        found = translations(
            model,
            tokenizer,
            sentences,
            search,
            batch=options.batch,
            first_line=first,
            progress=advance,
        )
        for number, items in enumerate(found, start=first):
            for score, text in items[: options.n_best or 1]:
                words = " ".join(text.split())
                row = words if options.n_best is None else f"{number}\t{score:.4f}\t{words}"
                sys.stdout.buffer.write(row.encode() + b"\n")
        sys.stdout.buffer.flush()
        if error is not None:
            raise error
        first += len(chunk)
    told.end()
    return 0


def lines_of_file(source: BinaryIO) -> int | None:
    """How many lines are left of a file; None where a pipe or a person writes them."""
    try:
        is_file = stat.S_ISREG(os.fstat(source.fileno()).st_mode)
    except OSError:
        return None
    if not is_file:
        return None
    start = source.tell()
    count = sum(1 for _ in source)
    source.seek(start)
    return count


def _chunks(source: BinaryIO) -> Iterator[list[bytes]]:
    while chunk := list(islice(source, CHUNK)):
        yield chunk


def lines_of_pipe(source: BinaryIO, most: int) -> Iterator[list[bytes]]:
    """Lines as they come, those that are there already together, ``most`` at a time."""
    rest = b""
    while data := source.read1(READ):  # type: ignore[attr-defined]
        *lines, rest = (rest + data).split(b"\n")
        for first in range(0, len(lines), most):
            yield lines[first : first + most]
    if rest:
        yield [rest]


def _decoded(chunk: Sequence[bytes], first: int) -> tuple[list[str], ArchnetError | None]:
    """The lines up to the first that is no UTF-8, and what is wrong with that."""
    from archnet.tasks import decoded

    found: list[str] = []
    try:
        for line in decoded(chunk, "standard input", first):
            found.append(line)
    except ArchnetError as error:
        return found, error
    return found, None


def progress(lines: int | None) -> Callable[[int], None] | None:
    """What tells how far a file is, on standard error; None for a pipe."""
    if lines is None:
        return None
    import time
    from datetime import timedelta

    began = told = time.monotonic()
    done = 0
    seconds = 1.0 if sys.stderr.isatty() else SECONDS

    def advance(count: int) -> None:
        nonlocal done, told
        done, now = done + count, time.monotonic()
        if now - told >= seconds:
            told = now
            left = timedelta(seconds=round((now - began) / done * (lines - done)))
            print(f"archnet: {done:,} of {lines:,} lines, {left} left", file=sys.stderr)

    return advance


class _Unknown:
    """Says which lines have characters that the tokenizer does not know."""

    def __init__(self, tokenizer: "Subwords") -> None:
        self.tokenizer, self.said = tokenizer, 0

    def tell(self, sentences: Sequence[str], first: int) -> None:
        from archnet.translate import unknown

        for index, characters in unknown(self.tokenizer, sentences).items():
            self.said += 1
            if self.said <= SAID:
                what = ", ".join(map(_shown, characters)) or "some of its words"
                print(
                    f"archnet: line {first + index}: the tokenizer does not know {what}; left out",
                    file=sys.stderr,
                )

    def end(self) -> None:
        if self.said > SAID:
            print(
                f"archnet: {self.said - SAID:,} more lines have characters that the tokenizer does "
                "not know",
                file=sys.stderr,
            )


def _shown(character: str) -> str:
    """A character with its code point; the code point alone where a terminal could not show it."""
    code = f"U+{ord(character):04X}"
    return f"{character} ({code})" if character.isprintable() else code
