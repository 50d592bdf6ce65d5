"""Checkpoints of Lightning, written whole or not at all, and checked before one goes on."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO

from archnet.errors import ArchnetError
from archnet.files import atomic, remove
from archnet.tensors import DamagedError, read_tensors

_log = logging.getLogger(__name__)


class Checkpoints(TorchCheckpointIO):
    """Lightning's checkpoints, written beside their place and moved there.

    Lightning itself holds them in memory a second time, and writes them to the folder for temporary
    files first: a move from another disk is no longer one step.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        with atomic(Path(path), ArchnetError, " and continue") as temporary:
            torch.save(checkpoint, temporary)


def resumable(path: Path, module: LightningModule | None = None) -> Path | None:
    """A checkpoint from which Lightning can go on; None, with a warning, where it is damaged.

    Args:
        path: the checkpoint; None without a word where there is none.
        module: whose weights it must hold; None: anybody's.
    """
    if not os.path.lexists(path):
        return None
    try:
        _require_checkpoint(path, module)
    except DamagedError as error:
        _log.warning("%s; training goes on from before it", error)
        if not path.is_file():  # a folder would be in the place of the next one
            remove(path)
        return None
    return path


# What Lightning goes on from.
_CHECKPOINT = {
    "state_dict": dict,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


def _require_checkpoint(path: Path, module: LightningModule | None) -> None:
    content = read_tensors(path)
    for key, kind in _CHECKPOINT.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise DamagedError(f"{path} holds no {key}")
    if module is not None:
        found, expected = (
            {name: getattr(tensor, "shape", None) for name, tensor in state.items()}
            for state in (content["state_dict"], module.state_dict())
        )
        if found != expected:
            raise DamagedError(f"{path} holds the weights of another network")
