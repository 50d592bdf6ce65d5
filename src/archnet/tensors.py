"""Files of tensors that torch has saved, read as data and checked."""

import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO

from archnet.errors import ArchnetError
from archnet.files import atomic, remove

_log = logging.getLogger(__name__)


class DamagedError(ArchnetError):
    """A file of tensors that is missing, in pieces, or holds more than plain data."""


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
        if not path.is_file():  # a folder would stand where the next one is to go
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


def read_tensors(path: Path, what: str = "") -> Any:
    """What ``torch.save`` has written: tensors and plain data, on the CPU.

    Pickled code is never run, and the checksums that the file has of its parts are compared, which
    torch leaves out.

    Args:
        path: the file; the old format, which has no checksums, is read too.
        what: how messages call it, if not by its path.

    Raises:
        DamagedError: in one line.
    """
    name = what or str(path)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise DamagedError(f"{name} is {'no file' if path.exists() else 'missing'}")
        if zipfile.is_zipfile(path):
            _check_parts(path, name)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedError(
            f"{name} is damaged or holds more than tensors, and pickled code is never executed"
        ) from error
    except ArchnetError:
        raise
    # A damaged file makes torch and zipfile raise nearly anything.
    except Exception as error:
        raise DamagedError(f"{name} is damaged ({_line(error)})") from error


def _check_parts(path: Path, name: str) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # Torch stores its parts as they are; packed ones could be of any size once unpacked.
        plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not plain or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise DamagedError(f"{name} is damaged: torch has not written it so")
        if (broken := archive.testzip()) is not None:
            raise DamagedError(f"{name} is damaged: {broken} in it has another checksum")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
