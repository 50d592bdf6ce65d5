"""Which job does what `task.kind` names. Nothing here loads torch before a job is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from archnet.config import Config, TaskConfig, nearest
from archnet.errors import ConfigError
from archnet.plugins import imported

if TYPE_CHECKING:
    from archnet.jobs.job import Job


@dataclass(frozen=True)
class Kind:
    """A job by the place of its class, ``package.module:Class``, and what looks at its data first.

    ``check`` is the place of a function of a config that raises `ArchnetError` where the data
    cannot be what the job reads. It is called before torch loads and before a folder is made.
    """

    job: str | type[Job]
    check: str = ""


_KINDS = {
    "classification": Kind(
        "archnet.jobs.classification:Classification", "archnet.tasks.check:check_images"
    ),
    "segmentation": Kind(
        "archnet.jobs.segmentation:Segmentation", "archnet.tasks.check:check_masks"
    ),
    "features": Kind("archnet.jobs.features:Features", "archnet.tasks.check:check_features"),
    "custom": Kind("archnet.jobs.custom:Custom"),
    "translation": Kind("archnet.jobs.translation:Translation", "archnet.tasks.check:check_text"),
}


def register(name: str, job: type[Job] | str, check: str = "") -> None:
    """Make a job known under a name of `task.kind`; one of that name is replaced."""
    _KINDS[name] = Kind(job, check)


def kinds() -> list[str]:
    """The names that are known."""
    return list(_KINDS)


def require_kind(name: str) -> None:
    """Raise `ConfigError` where no job has that name; a place of a class is looked up later."""
    if name not in _KINDS and ":" not in name:
        raise ConfigError(
            f"task.kind={name} is not one of {', '.join(_KINDS)}, nor the place of a job "
            f"(package.module:Class); nearest: {nearest(name, _KINDS)}"
        )


def runs_code(task: TaskConfig) -> str:
    """What making a job runs beyond what archnet and torchmetrics bring; empty: nothing."""
    named = {
        "kind": "" if task.kind in _KINDS else task.kind,
        "datamodule": task.datamodule,
        "metric": "" if (task.metric or "").startswith("torchmetrics.") else task.metric,
    }
    return " and ".join(f"task.{key}={place}" for key, place in named.items() if place)


def job_class(name: str) -> type[Job]:
    """The class that `task.kind` names.

    Raises:
        ConfigError: there is none.
    """
    from archnet.jobs.job import Job

    require_kind(name)
    kind = _KINDS.get(name, Kind(name))
    found = imported(kind.job, "task.kind") if isinstance(kind.job, str) else kind.job
    if not (isinstance(found, type) and issubclass(found, Job)):
        raise ConfigError(f"task.kind={name} is no archnet.jobs.Job: derive the class from it")
    return found


def check_data(config: Config) -> None:
    """Look at the data that a config names, before torch loads and a run folder is made.

    Raises:
        ArchnetError: they cannot be what the job reads.
    """
    require_kind(config.task.kind)
    place = _KINDS.get(config.task.kind, Kind("")).check
    if place:
        look: Callable[[Config], None] = imported(place, "task.kind")
        look(config)
