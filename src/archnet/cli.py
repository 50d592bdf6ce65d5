"""The `archnet` command: what comes after training."""

import argparse
import re
import sys
from collections.abc import Sequence

from archnet.commands import COMMANDS
from archnet.errors import ArchnetError, printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the command line without the program's name; None: that of the process.
            Options are written as for `train.py`, key=value.

    Returns:
        The exit code: 0; 1 when a check finds something; 2 for errors, told in one line.
    """
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args([re.sub(r"^(?=[a-z_]+=)", "--", text) for text in given])
    try:
        return int(options.run_command(options))
    except ArchnetError as error:
        print(f"archnet: {printable(error, None)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="archnet", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.__doc__)
        module.arguments(command)
        command.set_defaults(run_command=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
