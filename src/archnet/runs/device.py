"""Where a run computes, and with what arithmetic."""

import os

import torch

from archnet.config import TrainerConfig
from archnet.errors import ArchnetError


def require_device(trainer: TrainerConfig) -> None:
    """Raise `ArchnetError` where training asks for a device that this machine does not have."""
    wanted, found = trainer.accelerator, device_of(trainer).type
    if wanted in ("gpu", "mps") and found != {"gpu": "cuda"}.get(wanted, wanted):
        raise ArchnetError(
            f"trainer.accelerator={wanted}, but torch finds none: set auto or cpu, or install a "
            "torch that is built for it"
        )
    count = {"cuda": torch.cuda.device_count, "cpu": _cores}.get(found, lambda: 1)()
    if trainer.devices > count:
        what = {"cuda": "GPUs", "cpu": "CPU cores for it"}.get(found, "device of its kind")
        raise ArchnetError(
            f"trainer.devices={trainer.devices}, but this machine has {count} {what}; "
            f"nearest valid: {count}"
        )


def _cores() -> int:
    """CPU cores that this process may use, fewer than the machine has where it is pinned."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_up(trainer: TrainerConfig) -> None:
    """Threads as configured, and float32 that is float32.

    NVIDIA's convolutions otherwise round what they multiply to ten bits (TF32), which torch allows
    them. A quantized student computes with integers times a scale: so rounded, sums near the
    middle of two levels would land on other levels than in the exported file.
    """
    if trainer.threads:
        torch.set_num_threads(trainer.threads)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def device_of(trainer: TrainerConfig) -> torch.device:
    """Where evaluation runs: the accelerator that Lightning's trainer would take."""
    wanted = trainer.accelerator
    if wanted in ("auto", "gpu") and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(trainer: TrainerConfig) -> str:
    """The device that a run's minutes were measured on: the accelerator's name, or cpu."""
    device = device_of(trainer)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
