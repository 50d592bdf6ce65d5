"""`archnet train`: from a teacher to a run folder, `archnet train task=... teacher=... quant=...`.

Its words are Hydra's: keys and groups of ``conf/``, `--cfg job`, `-m`, `--config-dir` for groups of
one's own.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from archnet.errors import ArchnetError
from archnet.files import discard_output
from archnet.ranks import RUN_FOLDER, follow_leader

if TYPE_CHECKING:
    from omegaconf import DictConfig

HELP = "make, train and check a student (all of train.py); --help lists groups and keys"

_PACKAGE = Path(__file__).resolve().parents[1]


def conf_folder() -> Path:
    """The config tree: the package's own where it is installed, else the repository's."""
    installed = _PACKAGE / "conf"
    return installed if installed.is_dir() else _PACKAGE.parents[1] / "conf"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare nothing: the words go to Hydra (`start`)."""


def run(options: argparse.Namespace) -> int:
    """Run with the defaults of every key."""
    return start([])


def start(words: Sequence[str]) -> int:
    """Check the whole command line, sweeps included; then let Hydra run it.

    Args:
        words: the command line without the program's name.

    Returns:
        The exit code: 0; 2 for errors, told in one line.
    """
    if RUN_FOLDER in os.environ:
        follow_leader()
        from archnet.jobs.conductor import join

        join(Path(os.environ[RUN_FOLDER]))
        return 0
    conf = conf_folder()
    try:
        if {"-h", "--help", "--version"} & set(words):
            return _tell(conf, words)
        from archnet.compose import check, register

        checked = check(conf, words)
        register()
    except ArchnetError as error:
        return _fail(error)
    # Errors of a sweep's jobs come back here instead of being printed with a traceback.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    return _run(conf, checked)


def _tell(conf: Path, words: Sequence[str]) -> int:
    from archnet.usage import usage, version_line

    try:
        print(version_line() if "--version" in words else usage(conf), flush=True)
    except BrokenPipeError:
        discard_output()
    return 0


def _fail(error: ArchnetError) -> int:
    print(f"archnet: {error}", file=sys.stderr)
    return 2


def _run(conf: Path, words: Sequence[str]) -> int:
    """Hydra's part, with words that were checked."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from archnet.compose import to_config
    from archnet.jobs import check_data
    from archnet.overrides import named, overridden
    from archnet.sweep import compared_at_end

    @hydra.main(version_base="1.3", config_path=str(conf), config_name="config")
    def job(tree: "DictConfig") -> list[float] | None:
        """One job, alone or of a sweep."""
        try:
            config = to_config(tree)
            if not config.resume:
                check_data(config)
            # Imported here, so that neither composing a config nor a wrong folder loads torch.
            from archnet.jobs.conductor import run as run_all
            from archnet.report.comparison import objectives
            from archnet.runs import read_json

            # What a sweep over two objectives, such as Optuna's, is told of the run.
            return objectives(read_json(run_all(config, overridden(), named()).metrics, dict))
        except ArchnetError as error:
            if HydraConfig.get().mode is RunMode.MULTIRUN:
                raise  # the sweep notes the failure and goes on with the next job
            sys.exit(_fail(error))

    # Hydra reads the process's own words; those that are started to train along get these, too.
    sys.argv[1:] = words
    try:
        with compared_at_end():
            job()
    except ArchnetError as error:
        return _fail(error)
    return 0
