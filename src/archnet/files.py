"""Files written whole or not at all."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from archnet.errors import ArchnetError


def discard_output() -> None:
    """Drop what is still to be printed, once nobody reads it (`... --help | head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def atomic(
    path: Path, error: type[ArchnetError] = ArchnetError, advice: str = ""
) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place once the block has written it.

    A block that fails, a full disk included, leaves what was at ``path`` before.

    Args:
        path: the file; its folder is made.
        error: what to raise when it cannot be written, ``advice`` being added to the message.

    Raises:
        ArchnetError: the file cannot be written (as the class that ``error`` names).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as cause:
        raise error(
            f"{path} cannot be written ({cause.strerror or cause}); "
            f"what was there is untouched: make room{advice}"
        ) from cause
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
