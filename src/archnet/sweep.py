"""A multirun knows its runs, and ends with their comparison."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from archnet.errors import ArchnetError
from archnet.runs.folder import RUNS

_folders: list[Path] = []  # of the multiruns that this process has started


class Sweep(Callback):
    """Hydra's, of ``conf/config.yaml``: remembers where a multirun keeps the list of its runs."""

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        _folders.append(Path(config.hydra.sweep.dir).absolute())


def note(folder: Path) -> None:
    """Add a run to the list of the multirun that it belongs to, if it belongs to one.

    Called in the process that runs it, which is another than the multirun's on a cluster.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return
    sweep = Path(HydraConfig.get().sweep.dir)
    sweep.mkdir(parents=True, exist_ok=True)
    with (sweep / RUNS).open("a", encoding="utf-8") as file:
        file.write(os.path.relpath(folder, sweep) + "\n")


@contextmanager
def compared_at_end() -> Iterator[None]:
    """What multiruns started in the block have made is compared at its end, however that comes."""
    try:
        yield
    finally:
        while _folders:
            _compare(_folders.pop(0))


def _compare(sweep: Path) -> None:
    from archnet.report import comparison

    if not (sweep / RUNS).is_file():
        return
    try:
        found = comparison.compare(comparison.find([sweep]))
        comparison.show(found)
        for path in comparison.write(found, sweep):
            print(path)
    except ArchnetError as error:
        print(f"archnet: the runs of {sweep} are not compared: {error}", file=sys.stderr)
