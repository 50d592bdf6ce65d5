"""What a network is for, and the conductor that turns any of it into a checked student.

A *job* says what a purpose needs: data, a teacher, features, how both networks are judged, and the
files that are written. `register` makes one of your own known under a name of `task.kind`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from archnet.jobs.registry import check_data, kinds, register

if TYPE_CHECKING:
    from archnet.jobs.job import Job
    from archnet.jobs.tensors import TensorJob

__all__ = ["Job", "TensorJob", "check_data", "kinds", "register"]

# Imported on first use: they load torch.
_FILES = {"Job": "archnet.jobs.job", "TensorJob": "archnet.jobs.tensors"}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'archnet.jobs' has no attribute {name!r}")
    value = getattr(import_module(_FILES[name]), name)
    globals()[name] = value
    return value
