"""What a run tells CSV, TensorBoard and Weights & Biases: they listen until it ends.

A resumed run goes on where the one before has stopped writing. What cannot be written (no room, no
permission, no network) is told in one line, and the run goes on without that logger.
"""

import base64
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf
from PIL import Image

from archnet.config import Config
from archnet.report import files as report_files
from archnet.report.files import LAYERS
from archnet.runs.folder import RunError, RunFolder

_log = logging.getLogger(__name__)

_COLUMNS = (
    "layer", "operators", "weight_bits", "act_bits", "macs", "bops", "cycles", "weight_bytes",
    "tap", "error_before", "error_after",
)  # fmt: skip
_SENTENCES = ("source", "reference", "teacher", "student")


class Guarded(Logger):
    """A logger that a run does not depend on: its first failure is one line, and its last."""

    def __init__(self, inner: Any, name: str) -> None:
        super().__init__()
        self.inner, self.kind, self.works = inner, name, True

    def attempt(self, act: Callable[[Any], Any]) -> Any:
        """What ``act`` makes of the logger; None where it fails, now or before."""
        if not self.works:
            return None
        try:
            return act(self.inner)
        except Exception as error:  # of a service, a disk, a library: whatever it is
            self.works = False
            line = " ".join(str(error).split())[:200] or type(error).__name__
            _log.warning("logger %s: %s; the run goes on without it", self.kind, line)
            return None

    @property
    def name(self) -> str:
        return self.kind

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str | None:
        return self.inner.save_dir

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.attempt(lambda inner: inner.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.attempt(lambda inner: inner.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        self.attempt(lambda inner: inner.save())

    def finalize(self, status: str) -> None:
        """At the end of training; the run is not at its end, and `close` is what ends it."""
        self.save()


class RunLoggers:
    """The loggers of a run.

    Attributes:
        active: what Lightning is given.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.active: list[Guarded] = []
        for name, make in _makers(config, folder):
            try:
                self.active.append(Guarded(make(), name))
            except Exception as error:
                line = " ".join(str(error).split())[:200] or type(error).__name__
                _log.warning("logger %s: %s; the run goes on without it", name, line)

    def begin(self) -> None:
        """Tell the whole config, so that a run that does not end is known as well."""
        config = plain(self.config)
        for logger in self._of("tensorboard"):
            logger.attempt(lambda inner: inner.log_hyperparams(_flat(config)))
            logger.save()
        for logger in self._of("wandb"):
            logger.attempt(
                lambda inner: inner.experiment.config.update(config, allow_val_change=True)
            )

    def end(self, metrics: Mapping[str, Any], exported: Sequence[Path]) -> None:
        """Tell the figures of ``metrics.json``, the tables, what the networks disagree on, and
        the files.
        """
        path = self.folder.path
        files = [path / name for name in ("report.html", "metrics.json", "config.yaml")]
        files += exported
        layers = report_files.rows(path, LAYERS)
        details = report_files.evaluation(path)
        for logger in self._of("tensorboard"):
            logger.attempt(
                lambda inner: _to_tensorboard(inner, self.config, metrics, layers, details)
            )
        for logger in self._of("wandb"):
            logger.attempt(lambda inner: _to_wandb(inner, metrics, layers, details, files))

    @property
    def written(self) -> list[str]:
        """The kinds that work."""
        return sorted(logger.kind for logger in self.active if logger.works)

    def close(self) -> None:
        """End all; the next run of a sweep would write to W&B's otherwise."""
        for logger in self.active:
            if logger.kind == "wandb":
                # Even one that failed: a run of it may have begun.
                _finish(logger)
            else:
                logger.attempt(lambda inner: inner.finalize("success"))

    def _of(self, kind: str) -> list[Guarded]:
        return [logger for logger in self.active if logger.kind == kind]


@contextmanager
def run_loggers(config: Config, folder: RunFolder) -> Iterator[RunLoggers]:
    """Loggers that live as long as the block."""
    loggers = RunLoggers(config, folder)
    try:
        yield loggers
    finally:
        loggers.close()


def kinds(config: Config) -> list[str]:
    """The kinds of loggers that a config asks for."""
    asked = config.logger
    wandb = asked.wandb.enabled and asked.wandb.mode != "disabled"
    which = {"csv": asked.csv, "tensorboard": asked.tensorboard, "wandb": wandb}
    return [kind for kind, wanted in which.items() if wanted]


def require_told(config: Config, done: Mapping[str, Any]) -> None:
    """Raise `RunError` where a logger that is asked for was not told how the run ended."""
    written = done.get("written", ())
    if missing := [kind for kind in kinds(config) if kind not in written]:
        raise RunError(f"{', '.join(missing)} does not have all of this run")


def _makers(config: Config, folder: RunFolder) -> Iterator[tuple[str, Callable[[], Logger]]]:
    logs, wandb = folder.path / "logs", config.logger.wandb

    def csv() -> Logger:
        # Lightning empties the folder of an earlier session, which a resumed run must not.
        session = len(list((logs / "csv").glob("*")))
        return CSVLogger(logs, name="csv", version=f"{session:03d}")

    def tensorboard() -> Logger:
        return TensorBoardLogger(logs, name="tensorboard", version="", default_hp_metric=False)

    def to_wandb() -> Logger:
        import wandb as library

        online = wandb.mode == "online" or (wandb.mode == "auto" and "WANDB_API_KEY" in os.environ)
        logs.mkdir(parents=True, exist_ok=True)
        logger = WandbLogger(
            name=folder.path.name,
            id=folder.path.name,
            save_dir=logs,
            offline=not online,
            project=wandb.project,
            group=config.task.name,
            tags=tags(config),
            # The same id is the same run: a resumed one goes on with it.
            resume="allow" if online else None,
            # A run speaks for itself; W&B's own lines would stand between.
            settings=library.Settings(silent=True, console="off", x_disable_meta=not online),
        )
        # Of no use any more, and W&B says so in every run.
        logger._wandb_init.pop("anonymous", None)
        return logger

    makers = {"csv": csv, "tensorboard": tensorboard, "wandb": to_wandb}
    for kind in kinds(config):
        yield kind, makers[kind]


def plain(config: Config) -> dict[str, Any]:
    """The config as plain data."""
    found: Any = OmegaConf.to_container(OmegaConf.structured(config))
    return found


def tags(config: Config) -> list[str]:
    """Teacher, target and widths."""
    quant = config.quant
    width = "float" if quant.method == "none" else f"W{quant.weight_bits}A{quant.act_bits}"
    # W&B takes no longer ones.
    return [
        tag[:64] for tag in (config.task.name, config.teacher.name, config.hardware.name, width)
    ]


def summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of ``metrics.json`` by path, as ``cost/bops/student``, and the verdict."""
    found: dict[str, Any] = {}
    kept = ("teacher", "student", "goal", "paired", "cost", "audit", "parity", "seconds")
    for key in (*kept, "verdict"):
        found |= _numbers(metrics.get(key, {}), f"{key}/")
    sentence = metrics.get("verdict", {}).get("sentence")
    return found | ({"verdict": sentence} if sentence else {})


def _numbers(tree: Any, prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float):
            found[f"{prefix}{key}"] = value
    return found


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Keys with dots, as on the command line; lists as text."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            simple = isinstance(value, bool | int | float | str)
            found[f"{prefix}{key}"] = value if simple else json.dumps(value)
    return found


def _pixels(picture: str) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    return np.asarray(image.convert("RGB"))


def _caption(row: Mapping[str, Any], classes: Sequence[str]) -> str:
    def named(value: Any) -> str:
        is_class = isinstance(value, int) and value < len(classes)
        return classes[value] if is_class else str(value)

    shown = [f"{key} {named(row[key])}" for key in ("label", "teacher", "student") if key in row]
    if "changed" in row:
        shown.append(f"{row['changed']} % of its decisions")
    return f"{row['index']}: {', '.join(shown)}"


def _to_tensorboard(
    logger: TensorBoardLogger,
    config: Config,
    metrics: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    details: Mapping[str, Any],
) -> None:
    figures, writer = summary(metrics), logger.experiment
    verdict = figures.pop("verdict", "")
    numbers = {key: float(value) for key, value in figures.items()}
    logger.log_hyperparams(_flat(plain(config)), numbers)
    if verdict:
        advice = "".join(f"\n* {line}" for line in metrics["verdict"]["advice"])
        writer.add_text("verdict", verdict + "\n" + advice)
    if layers:
        writer.add_text("layers", _table(_COLUMNS, layers))
    rows = details.get("disagreements", [])
    if sentences := [row for row in rows if "source" in row]:
        writer.add_text("disagreements", _table(_SENTENCES, sentences))
    classes = details.get("classes", [])
    for number, row in enumerate(row for row in rows if "picture" in row):
        writer.add_image(f"disagreements/{number}", _pixels(row["picture"]), dataformats="HWC")
        writer.add_text(f"disagreements/{number}", _caption(row, classes))
    logger.save()
    writer.flush()


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""

    def line(cells: Sequence[Any]) -> str:
        texts = ("" if cell is None else str(cell).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(texts)} |"

    shown = [line([row[key] for key in columns]) for row in rows]
    return "\n".join([line(columns), line(["---"] * len(columns)), *shown])


def _to_wandb(
    logger: WandbLogger,
    metrics: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    details: Mapping[str, Any],
    files: Sequence[Path],
) -> None:
    import wandb

    run = logger.experiment
    logged: dict[str, Any] = {}
    if layers:
        data = [[row[key] for key in _COLUMNS] for row in layers]
        logged["layers"] = wandb.Table(columns=list(_COLUMNS), data=data)
    rows = details.get("disagreements", [])
    if sentences := [row for row in rows if "source" in row]:
        data = [[row[key] for key in _SENTENCES] for row in sentences]
        logged["disagreements"] = wandb.Table(columns=list(_SENTENCES), data=data)
    classes = details.get("classes", [])
    if pictures := [row for row in rows if "picture" in row]:
        logged["disagreements"] = [
            wandb.Image(_pixels(row["picture"]), caption=_caption(row, classes)) for row in pictures
        ]
    if logged:
        run.log(logged)
    run.summary.update(summary(metrics))
    artifact = wandb.Artifact(f"run-{run.id}", type="archnet-run")
    for path in files:
        if path.is_file():
            artifact.add_file(str(path), name=path.name)
    run.log_artifact(artifact)


def _finish(logger: Guarded) -> None:
    """End W&B's run, which may have no end if its beginning failed."""
    run = getattr(logger.inner, "_experiment", None)
    if run is None:
        return
    try:
        run.finish()
    except Exception as error:
        if logger.works:
            _log.warning("logger wandb: %s", " ".join(str(error).split())[:200])
