"""The teacher of a run: trained for it and kept in its folder, or as its weights say."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import nn

from archnet.config import Config, TeacherConfig
from archnet.errors import ArchnetError
from archnet.runs.folder import RunFolder, atomic
from archnet.teachers.fit import train_teacher
from archnet.tensors import read_tensors

# Arguments of timm that name files of weights.
_TIMM_FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


def run_teacher(
    config: Config, folder: RunFolder, data: Any, load: Callable[[TeacherConfig], nn.Module]
) -> nn.Module:
    """The trained teacher, in eval mode and frozen.

    Args:
        config: of the run.
        folder: keeps a teacher that is trained here, so that a resumed run has the same one.
        data: the task.
        load: builds a teacher with the weights that a config names.

    Raises:
        RunError: somebody else has made the folder, and its teacher would run code.
    """
    if foreign := runs_code(config.teacher):
        folder.require_trust(foreign)
    if not config.teacher.train:
        return load(config.teacher)
    kept = folder.checkpoints / "teacher.pt"

    def train() -> dict[str, Any]:
        if kept.is_file() and _is_intact(kept):
            return {}  # what was damaged is only the note that it is finished
        lightning.seed_everything(config.seed, verbose=False)
        # One process: a teacher is quick to train, and ranks would have to share its cache.
        model = train_teacher(
            load(config.teacher),
            data,
            config.teacher,
            seed=config.seed,
            accelerator=config.trainer.accelerator,
            progress=config.trainer.progress,
            progress_seconds=config.trainer.progress_seconds,
        )
        with atomic(kept) as temporary:
            torch.save(model.state_dict(), temporary)
        return {}

    folder.stage("teacher", train, intact=lambda _: read_tensors(kept))
    return load(replace(config.teacher, weights=str(kept)))


def runs_code(teacher: TeacherConfig) -> str:
    """What building a teacher runs beyond the packages that archnet itself names; empty: nothing.

    timm reads files that its own arguments or hub names point to, and may unpickle them.
    """
    if teacher.source == "custom":
        return f"teacher.factory={teacher.factory} with teacher.kwargs={teacher.kwargs}"
    if teacher.source == "timm":
        files = [key for key in teacher.kwargs if key in _TIMM_FILES]
        if files or ":" in teacher.name:
            return f"what timm loads for teacher.name={teacher.name} with {teacher.kwargs}"
    return ""


def _is_intact(path: Path) -> bool:
    try:
        read_tensors(path)
    except ArchnetError:
        return False
    return True
