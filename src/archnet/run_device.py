"""Where a run computes, and with what arithmetic."""

import torch

from archnet.config import TrainerConfig


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
    """What stands beside a run's minutes: the accelerator's name, or cpu."""
    device = device_of(trainer)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
