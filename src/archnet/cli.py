"""The `archnet` command: a run, and what comes after it."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import archnet
from archnet.commands import COMMANDS, train
from archnet.config import nearest
from archnet.errors import ArchnetError
from archnet.files import discard_output, full_disk
from archnet.ranks import RUN_FOLDER


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None: that of the process.
            Options are written as for `train.py`, key=value.

    Returns:
        The exit code: 0; 1 when a check finds something; 2 for errors, told in one line.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if RUN_FOLDER in os.environ or list(given[:1]) == ["train"]:
        # A run, or a process that takes part in one: its words are Hydra's.
        return train.start(given[1:])
    try:
        options = _parse([re.sub(r"^(?=[a-z_]+=)", "--", text) for text in given])
        code = int(options.run_command(options))
        sys.stdout.flush()
        return code
    except ArchnetError as error:
        print(f"archnet: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        discard_output()
        return 1
    except OSError as error:
        print(f"archnet: {full_disk(error, [Path()]) or error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """Ends with one line, as all of archnet does, instead of with argparse's usage."""

    def error(self, message: str) -> NoReturn:
        raise ArchnetError(f"{message}; {self.prog} --help says more")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        best = nearest(words[0], COMMANDS)
        raise ArchnetError(f"{words[0]} is not a command of archnet; nearest valid: {best}")
    options, unknown = _parser().parse_known_args(words)
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        known = [text.lstrip("-") for text in options.known_options]
        raise ArchnetError(
            f"{name} is not an option of archnet {words[0]}; nearest valid: {nearest(name, known)}"
        )
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="archnet", description=__doc__)
    parser.add_argument("--version", action="version", version=f"archnet {archnet.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(command)
        known = [text for action in command._actions for text in action.option_strings]
        command.set_defaults(run_command=module.run, known_options=known)
    return parser


if __name__ == "__main__":
    sys.exit(main())
