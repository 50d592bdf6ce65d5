"""Run folders: made once, written atomically, and continued stage by stage.

A folder may come from somebody else, or from a disk that has damaged it: whatever is read of one is
plain data, checked, and what cannot be read is one sentence that names the file.
"""

import hashlib
import io
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from archnet import files, origin
from archnet.compose import to_config
from archnet.config import Config, keys, require_kinds
from archnet.errors import ArchnetError, ConfigError

_log = logging.getLogger(__name__)

# Keys that a resumed run may change: they say where and how it runs, not what it computes.
_FREE = ("resume", "trust", "trainer", "logger", "task.data.workers", "task.data.eval_batch_size")

# Bytes that a file of a run folder may have: many times what any run writes.
_LARGEST_JSON = 1 << 28
_LARGEST_CONFIG = 1 << 20
_CHECKSUM = "sha256"  # key of a stage's file that holds the digest of the others
_SHOWN_EDITS = 5
_ORIGIN = "origin.json"
RUNS = "runs.txt"  # in the folder of a multirun: its runs, one a line, relative to it


class RunError(ArchnetError):
    """A run folder that cannot be read, written or continued."""


def atomic(path: Path) -> AbstractContextManager[Path]:
    """`archnet.files.atomic` in a run folder."""
    return files.atomic(path, RunError, " and continue with resume=<run folder>")


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path, kind: type = object) -> Any:
    """Read JSON.

    Args:
        path: the file.
        kind: what it must hold, ``dict`` or ``list``.

    Raises:
        RunError: the file is missing, no JSON, or holds something else.
    """
    try:
        content = json.loads(read_text(path, _LARGEST_JSON))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {_line(error)}") from error
    if not isinstance(content, kind):
        raise RunError(
            f"{path} cannot be read: it holds a {type(content).__name__}, not a {kind.__name__}"
        )
    return content


def read_text(path: Path, largest: int) -> str:
    """The text of a file of a run folder.

    Raises:
        RunError: it is missing, no file, larger than ``largest`` bytes, or no UTF-8.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise RunError(f"{path} is {'no file' if path.exists() else 'missing'}")
        if path.stat().st_size > largest:
            raise RunError(f"{path} cannot be read: it is larger than {largest >> 20} MB")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


def _now() -> str:
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S}"


class RunFolder:
    """``<output_dir>/<task>/<date>_<time>_<id>/`` with all that a run leaves.

    Attributes:
        path: the folder.
        trusted: whether the user has said that whatever its config names may run.
    """

    def __init__(self, path: Path, *, trusted: bool = False) -> None:
        self.path, self.trusted = path, trusted
        self._config: Config | None = None
        self._is_worked_in = True

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
            folder = cls(parent / f"{started}_{name}", trusted=True)
            try:
                parent.mkdir(parents=True, exist_ok=True)
                # The one call that only one of several processes can succeed at.
                folder.path.mkdir()
            except FileExistsError:
                if not parent.is_dir():
                    raise RunError(f"{folder.path} cannot be made: Not a directory") from None
                attempt += 1
                continue
            except OSError as error:
                raise RunError(f"{folder.path} cannot be made: {error.strerror}") from error
            folder.write_config(config)
            folder.checkpoints.mkdir(exist_ok=True)
            return folder

    @classmethod
    def open(cls, path: str | Path, *, trusted: bool = False) -> "RunFolder":
        """A folder that a run has left, to be read; `locked` is for going on with it.

        Raises:
            RunError: there is none.
        """
        folder = cls(Path(path), trusted=trusted)
        try:
            found = (folder.path / "config.yaml").is_file()
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error.strerror}") from error
        if not found:
            raise RunError(f"{path} is no run folder: it holds no config.yaml")
        folder._is_worked_in = False
        return folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working in this folder, and clear what dead ones have left.

        Raises:
            RunError: another process works in it.
        """
        with files.locked(self.path / ".lock", RunError, str(self.path)):
            for place in (self.path, self.checkpoints, self.path / "stages"):
                files.remove_leftovers(place)
            self._is_worked_in = True
            yield

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
        """Write ``config.yaml``, from which the run can be repeated or continued.

        A folder of somebody else stays theirs, unless this user trusts it.
        """
        sealed = self.trusted or self.is_own()
        with atomic(self.path / "config.yaml") as temporary:
            OmegaConf.save(OmegaConf.structured(replace(config, trust=False)), temporary)
        self._config = None
        if sealed:
            made = _recorded(config)
            write_json(self.path / _ORIGIN, {"config": made, "code": origin.seal(made)})

    def config(self) -> Config:
        """The config as the folder has it; a warning says what was edited since it was made.

        Raises:
            RunError: it cannot be read, or holds more than plain data.
        """
        if self._config is None:
            self._config = self._read_config()
            if edits := self.edits():
                _log.warning("%s was edited since this run was made: %s", self._place, edits)
        return self._config

    @property
    def _place(self) -> Path:
        return self.path / "config.yaml"

    def _read_config(self) -> Config:
        try:
            stored = _plain_yaml(self._place)
            require_kinds(OmegaConf.to_container(stored))
            tree = OmegaConf.merge(OmegaConf.structured(Config), stored)
            assert isinstance(tree, DictConfig)
            return to_config(tree)
        except RunError:
            raise
        except _UNREADABLE as error:
            raise RunError(f"{self._place} cannot be read: {_line(error)}") from error

    def _origin(self) -> tuple[origin.Record, Any]:
        """What the run was made with, and the seal on it; nothing of an older folder."""
        path = self.path / _ORIGIN
        if not os.path.lexists(path):
            return {}, None
        try:
            found = read_json(path, dict)
        except RunError as error:
            _log.warning("%s: whether this run's config was edited is not known", error)
            return {}, None
        made = found.get("config")
        return (made, found.get("code")) if isinstance(made, dict) else ({}, None)

    def is_own(self) -> bool:
        """Whether this user made the folder, with the very config that it has now."""
        made, code = self._origin()
        return origin.verifies(made, code) and not self.edits()

    def edits(self) -> str:
        """What ``config.yaml`` says otherwise than when the run was made; empty: nothing."""
        made, _ = self._origin()
        now = _recorded(self._config or self._read_config()) if made else {}
        # Keys of one alone belong to another version of archnet.
        changed = [key for key in now if key in made and now[key] != made[key]]
        shown = [f"{key}={now[key]}, made with {made[key]}" for key in changed[:_SHOWN_EDITS]]
        more = len(changed) - len(shown)
        return "; ".join([*shown, *([f"and {more} keys more"] if more else [])])

    def require_trust(self, what: str) -> None:
        """Raise `RunError` where ``what`` would run and this user neither made nor trusts it."""
        if not (self.trusted or self.is_own()):
            raise RunError(
                f"{self._place} would run {what}, and somebody else made or changed this folder: "
                "if you trust them, add trust=true"
            )

    def resumed(self, given: Config, overridden: Sequence[str]) -> Config:
        """The folder's own config, with what ``given`` may change about where it runs.

        Args:
            given: the config composed for the command with ``resume=``.
            overridden: the keys and groups that the command names.

        Raises:
            ConfigError: the command contradicts the folder's config, or that was edited.
        """
        stored = self._read_config()
        if edits := self.edits():
            raise ConfigError(
                f"{self._place} was edited since this run was made ({edits}), so that it does not "
                "match its checkpoints: undo the edit, or start a new run"
            )
        tree = OmegaConf.structured(stored)
        before, after = dict(keys(stored)), dict(keys(given))
        for name in overridden:
            named = [k for k in after if f"{k}.".startswith(f"{name}.") or name.startswith(f"{k}.")]
            for key in named or list(after):  # an experiment may set anything
                if _is_free(key):
                    OmegaConf.update(tree, key, after[key])
                elif before[key] != after[key]:
                    raise ConfigError(
                        f"{key}={after[key]} contradicts {self.path}/config.yaml "
                        f"({key}={before[key]}), with which its checkpoints were made: "
                        f"leave {name} out, or start a new run"
                    )
        return to_config(tree)

    def stage(
        self,
        name: str,
        work: Callable[[], dict[str, Any]],
        *,
        needs: Sequence[str] = (),
        intact: Callable[[dict[str, Any]], object] = lambda result: None,
    ) -> dict[str, Any]:
        """What ``work`` returns (plain data), with its ``seconds``; from a file if done before.

        A stage that was resumed returns the seconds it took before that as ``earlier``. Files that
        ``work`` leaves must be written before it returns: the stage's own file is what says that
        it is finished. Where that file is damaged, or one that ``work`` left, the stage is done
        again, with a warning; in a folder that is only read, that is an error.

        Args:
            name: of the stage and its file.
            work: does it.
            needs: keys of the result that are read later.
            intact: is given the result of earlier, and raises `ArchnetError` where a file that
                ``work`` has left cannot be read.

        Raises:
            RunError: the folder is only read, and the stage is not finished or damaged.
        """
        path = self.path / "stages" / f"{name}.json"
        try:
            result = _read_stage(path, needs)
            intact(result)
        except ArchnetError as error:
            if not self._is_worked_in:
                raise RunError(f"{error}: finish the run with resume={self.path}") from error
            if os.path.lexists(path):
                _log.warning("%s: %s is done again", error, name)
                files.remove(path)
        else:
            _log.info("%s: finished earlier", name)
            return result
        started = time.perf_counter()
        result = work()
        elapsed = time.perf_counter() - started
        result["seconds"] = round(elapsed + result.pop("earlier", 0.0), 2)
        # As it would be read, so that its digest is that of what is read.
        result = json.loads(json.dumps(result))
        write_json(path, {**result, _CHECKSUM: _digest(result)})
        _log.info("%s: %.1f s", name, result["seconds"])
        return result

    def fingerprints(self, paths: Sequence[Path]) -> dict[str, str]:
        """SHA-256 of files of this folder by name, for `require_files`."""
        return {path.name: files.digest(path) for path in paths}

    def require_files(self, fingerprints: Any) -> None:
        """Raise `RunError` where a file is missing or another than when its digest was taken."""
        for name, expected in fingerprints.items() if isinstance(fingerprints, dict) else ():
            path = self.path / Path(name).name
            if not path.is_file():
                raise RunError(f"{path} is missing")
            try:
                found = files.digest(path)
            except OSError as error:
                raise RunError(f"{path} cannot be read: {error.strerror}") from error
            if found != expected:
                raise RunError(f"{path} is damaged: its content has another checksum")

    def seconds(self) -> dict[str, float]:
        """What each finished stage took, in the order of the stages.

        Training that was interrupted counts up to the checkpoint it was resumed from; another stage
        from where it was begun again.
        """
        found = sorted(
            (self.path / "stages").glob("*.json"), key=lambda path: path.stat().st_mtime_ns
        )
        seconds = {}
        for path in found:
            try:
                seconds[path.stem] = _read_stage(path)["seconds"]
            except RunError as error:  # of a stage that this run does not have
                _log.warning("%s; its seconds are left out", error)
        return seconds


# What reading YAML into the typed config raises, for content of any kind.
_UNREADABLE = (
    ArchnetError,
    OmegaConfBaseException,
    yaml.YAMLError,
    OSError,  # which OmegaConf raises of what is no mapping
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    RecursionError,
)


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _recorded(config: Config) -> origin.Record:
    """The keys that say what a run computes."""
    return origin.record({key: value for key, value in keys(config) if not _is_free(key)})


def _plain_yaml(path: Path) -> DictConfig:
    """Stored YAML, in which nothing refers to anything else.

    Raises:
        RunError: it holds an interpolation, which would read this machine's environment, an
            alias, which can make little text enormous, or no mapping.
    """
    text = read_text(path, _LARGEST_CONFIG)
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        line = f"{path}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise RunError(f"{line}: an alias, and a stored config holds values alone")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise RunError(
                f"{line}: {event.value[:80]} is an interpolation, and a stored config holds values "
                "alone: write its value"
            )
    tree = OmegaConf.load(io.StringIO(text))
    if not isinstance(tree, DictConfig) or not tree:
        raise RunError(f"{path} cannot be read: it holds no mapping of keys")
    return tree


def _digest(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _read_stage(path: Path, needs: Sequence[str] = ()) -> dict[str, Any]:
    result = read_json(path, dict)
    expected = result.pop(_CHECKSUM, None)
    if expected is not None and expected != _digest(result):
        raise RunError(f"{path} is damaged: its content has another checksum")
    for key in ("seconds", *needs):
        if key not in result:
            raise RunError(f"{path} is damaged: it lacks {key}")
    seconds = result["seconds"]
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        raise RunError(f"{path} is damaged: seconds={seconds!r}")
    return result
