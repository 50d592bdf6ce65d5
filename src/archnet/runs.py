"""Run folders: made once, written atomically, and continued stage by stage."""

import json
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from archnet import files
from archnet.compose import to_config
from archnet.config import Config, keys
from archnet.errors import ArchnetError, ConfigError

_log = logging.getLogger(__name__)

# Keys that a resumed run may change: they say where and how it runs, not what it computes.
_FREE = ("resume", "trainer", "logger", "task.data.workers", "task.data.eval_batch_size")


class RunError(ArchnetError):
    """A run folder that cannot be read, written or continued."""


def atomic(path: Path) -> AbstractContextManager[Path]:
    """`archnet.files.atomic` in a run folder."""
    return files.atomic(path, RunError, " and continue with resume=<run folder>")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunError: the file is missing or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def _now() -> str:
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


class RunFolder:
    """``<output_dir>/<task>/<date>_<time>_<id>/`` with all that a run leaves.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: Config) -> "RunFolder":
        """Make a new folder, distinct from that of every run started in the same second.

        Raises:
            RunError: the folder cannot be made.
        """
        parent = Path(config.output_dir) / config.task.name
        started = _now()
        attempt = 1
        while True:
            name = config.name or secrets.token_hex(2)
            if config.name and attempt > 1:
                name += f"-{attempt}"
            folder = cls(parent / f"{started}_{name}")
            try:
                parent.mkdir(parents=True, exist_ok=True)
                # The one call that only one of several processes can succeed at.
                folder.path.mkdir()
            except FileExistsError:
                attempt += 1
                continue
            except OSError as error:
                raise RunError(f"{folder.path} cannot be made: {error.strerror}") from error
            folder.checkpoints.mkdir()
            folder.write_config(config)
            return folder

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """A folder that a run has left.

        Raises:
            RunError: there is none.
        """
        folder = cls(Path(path))
        if not (folder.path / "config.yaml").is_file():
            raise RunError(f"{path} is no run folder: it holds no config.yaml")
        return folder

    @property
    def checkpoints(self) -> Path:
        """Weights: of the teacher trained here, and of the student before and after training."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def onnx(self) -> Path:
        return self.path / "student.onnx"

    def write_config(self, config: Config) -> None:
        """Write ``config.yaml``, from which the run can be repeated or continued."""
        with atomic(self.path / "config.yaml") as temporary:
            OmegaConf.save(OmegaConf.structured(config), temporary)

    def config(self) -> Config:
        """The config the folder was made with.

        Raises:
            RunError: it cannot be read.
        """
        path = self.path / "config.yaml"
        try:
            tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        except (OSError, OmegaConfBaseException, ValueError) as error:
            raise RunError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
        assert isinstance(tree, DictConfig)
        return to_config(tree)

    def resumed(self, given: Config, overridden: Sequence[str]) -> Config:
        """The folder's own config, with what ``given`` may change about where it runs.

        Args:
            given: the config composed for the command with ``resume=``.
            overridden: the keys and groups that the command names.

        Raises:
            ConfigError: the command contradicts the folder's config.
        """
        stored = self.config()
        tree = OmegaConf.structured(stored)
        before, after = dict(keys(stored)), dict(keys(given))
        for name in overridden:
            named = [k for k in after if f"{k}.".startswith(f"{name}.") or name.startswith(f"{k}.")]
            for key in named or list(after):  # an experiment may set anything
                if any(key == free or key.startswith(f"{free}.") for free in _FREE):
                    OmegaConf.update(tree, key, after[key])
                elif before[key] != after[key]:
                    raise ConfigError(
                        f"{key}={after[key]} contradicts {self.path}/config.yaml "
                        f"({key}={before[key]}): a checkpoint from another config; "
                        f"leave {name} out, or start a new run"
                    )
        return to_config(tree)

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``work`` returns (plain data), with its ``seconds``; from a file if done before.

        A stage that was resumed returns the seconds it took before that as ``earlier``. Files that
        ``work`` leaves must be written before it returns: the stage's own file is what says that
        it is finished.
        """
        path = self.path / "stages" / f"{name}.json"
        if path.is_file():
            _log.info("%s: finished earlier", name)
            return read_json(path)
        started = time.perf_counter()
        result = work()
        elapsed = time.perf_counter() - started
        result["seconds"] = round(elapsed + result.pop("earlier", 0.0), 2)
        write_json(path, result)
        _log.info("%s: %.1f s", name, result["seconds"])
        return result

    def seconds(self) -> dict[str, float]:
        """What each finished stage took, in the order of the stages.

        Training that was interrupted counts up to the checkpoint it was resumed from; another stage
        from where it was begun again.
        """
        files = sorted(
            (self.path / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime_ns
        )
        return {path.stem: read_json(path)["seconds"] for path in files}
