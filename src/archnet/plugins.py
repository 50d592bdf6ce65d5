"""Code of the user's own, named in a config as ``package.module:callable``."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from archnet.errors import ArchnetError, ConfigError


@contextmanager
def current_folder() -> Iterator[None]:
    """Let modules of the folder that the command is called in be imported, as for `python -m`.

    What is imported later, when the code is called, is found as well, after all installed packages.
    """
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")
        if "" not in sys.path:
            sys.path.append("")


def imported(place: str, key: str, error: type[ArchnetError] = ConfigError) -> Any:
    """What ``package.module:callable`` is.

    Args:
        place: where it is.
        key: the config key that names it, for errors.
        error: the class of what is raised.

    Raises:
        ArchnetError: the place is written otherwise, or cannot be imported.
    """
    module, colon, name = place.partition(":")
    if not (module and colon and name):
        raise error(f"{key}={place}: write package.module:callable")
    with current_folder():
        # Whatever code of others raises; its traceback is chained for who debugs it.
        try:
            return getattr(importlib.import_module(module), name)
        except Exception as failure:
            raise error(f"{key}={place} cannot be imported: {first_line(failure)}") from failure


def first_line(failure: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(failure).strip().splitlines()
    return f"{type(failure).__name__}: {text[0]}" if text else type(failure).__name__
