"""Teacher in, Arch-Net out: `python train.py task=... teacher=... quant=... hardware=...`.

Every key is in ``conf/``; `--cfg job` prints what a command composes to, `-m` sweeps.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from archnet.compose import check, register, to_config
from archnet.errors import ArchnetError
from archnet.files import discard_output
from archnet.jobs.registry import check_data
from archnet.overrides import overridden
from archnet.ranks import RUN_FOLDER, follow_leader
from archnet.sweep import compared_at_end
from archnet.usage import usage, version_line

CONF = Path(__file__).resolve().parent / "conf"


def fail(error: ArchnetError) -> None:
    """End with one line and exit code 2."""
    print(f"archnet: {error}", file=sys.stderr)
    sys.exit(2)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def job(tree: DictConfig) -> list[float] | None:
    """One job, alone or of a sweep."""
    try:
        config = to_config(tree)
        if not config.resume:
            check_data(config)
        # Imported here, so that neither composing a config nor a wrong folder loads torch.
        from archnet.jobs.conductor import run
        from archnet.report.comparison import objectives
        from archnet.runs import read_json

        # What a sweep over two objectives, such as Optuna's, is told of the run.
        return objectives(read_json(run(config, overridden()).metrics, dict))
    except ArchnetError as error:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise  # the sweep notes the failure and goes on with the next job
        fail(error)
        return None


def main() -> None:
    """Check the whole command line, sweeps included; then let Hydra run it."""
    if RUN_FOLDER in os.environ:
        follow_leader()
        from archnet.jobs.conductor import join

        join(Path(os.environ[RUN_FOLDER]))
        return
    words = sys.argv[1:]
    if {"-h", "--help", "--version"} & set(words):
        try:
            print(version_line() if "--version" in words else usage(CONF), flush=True)
        except BrokenPipeError:
            discard_output()
        return
    # Errors of a sweep's jobs come back here instead of being printed with a traceback.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        sys.argv[1:] = check(CONF, words)
        register()
        with compared_at_end():
            job()
    except ArchnetError as error:
        fail(error)


if __name__ == "__main__":
    main()
