"""The teacher of a run: trained for it and kept in its folder, or as its weights say."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import nn

from archnet.config import Config, TeacherConfig
from archnet.runs import RunFolder, atomic
from archnet.teachers.fit import train_teacher


def run_teacher(
    config: Config, folder: RunFolder, data: Any, load: Callable[[TeacherConfig], nn.Module]
) -> nn.Module:
    """The trained teacher, in eval mode and frozen.

    Args:
        config: of the run.
        folder: keeps a teacher that is trained here, so that a resumed run has the same one.
        data: the task.
        load: builds a teacher with the weights that a config names.
    """
    if not config.teacher.train:
        return load(config.teacher)
    kept = folder.checkpoints / "teacher.pt"

    def train() -> dict[str, Any]:
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

    folder.stage("teacher", train)
    return load(replace(config.teacher, weights=str(kept)))
