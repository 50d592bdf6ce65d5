"""Files of tensors that torch has saved, read as data and checked."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from archnet.errors import ArchnetError


class DamagedError(ArchnetError):
    """A file of tensors that is missing, in pieces, or holds more than plain data."""


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
