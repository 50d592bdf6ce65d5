"""The run folder that a command reads, and whether to trust it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archnet.runs import RunFolder


def folder_arguments(
    parser: argparse.ArgumentParser,
    name: str = "run",
    about: str = "run folder",
    optional: bool = False,
) -> None:
    """Declare the folder and ``trust``."""
    parser.add_argument(name, type=Path, help=about, nargs="?" if optional else None)
    parser.add_argument(
        "--trust",
        default="false",
        choices=("true", "false"),
        help="true: run code that a folder made by somebody else names (a teacher's factory)",
    )


def open_folder(options: argparse.Namespace, name: str = "run") -> "RunFolder":
    """The folder that the options name.

    Raises:
        RunError: it is none.
    """
    from archnet.runs import RunFolder

    return RunFolder.open(getattr(options, name), trusted=options.trust == "true")
