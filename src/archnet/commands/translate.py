"""`archnet translate`: sentences from standard input, their translations to standard output."""

import argparse
import sys
from dataclasses import replace
from itertools import islice

from archnet.commands.folder import folder_arguments, open_folder

HELP = "translate lines of text with a run's student or teacher"
SAID = 20  # lines with unknown characters that are named one by one
CHUNK = 4096  # lines that are read, sorted by length and translated together


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


def run(options: argparse.Namespace) -> int:
    """Write one line for every line read, in order; an empty one for an empty one."""
    from archnet.errors import ArchnetError
    from archnet.jobs import conductor
    from archnet.jobs.translation import Translation
    from archnet.tasks import decoded
    from archnet.translate import translate, unknown

    folder = open_folder(options)
    job = conductor.job_of(folder)
    if not isinstance(job, Translation):
        raise ArchnetError(f"{folder.path} is no run of a translation task")
    for name in ("beam", "batch"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ArchnetError(f"{name}={value} must be at least 1")
    search = replace(job.search, beam=options.beam or job.search.beam)
    tokenizer = job.tokenizer()
    model = job.translator(options.network, options.runtime, len(tokenizer))
    lines = decoded(sys.stdin.buffer, "standard input")
    first, said = 1, 0
    while chunk := list(islice(lines, CHUNK)):
        for index, characters in unknown(tokenizer, chunk).items():
            said += 1
            if said <= SAID:
                what = ", ".join(map(_shown, characters)) or "some of its words"
                print(
                    f"archnet: line {first + index}: the tokenizer does not know {what}; left out",
                    file=sys.stderr,
                )
        found = translate(model, tokenizer, chunk, search, batch=options.batch, first_line=first)
        for line in found:
            sys.stdout.buffer.write(" ".join(line.split()).encode() + b"\n")
        sys.stdout.buffer.flush()
        first += len(chunk)
    if said > SAID:
        print(
            f"archnet: {said - SAID:,} more lines have characters that the tokenizer does not know",
            file=sys.stderr,
        )
    return 0


def _shown(character: str) -> str:
    """A character with its code point; the code point alone where a terminal could not show it."""
    code = f"U+{ord(character):04X}"
    return f"{character} ({code})" if character.isprintable() else code
