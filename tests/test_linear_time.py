"""The work of a conversion grows with the number of steps, and not with its square."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import archnet
from archnet.capture import capture
from archnet.lower import lower

ROOM = str(Path(archnet.__file__).parent)


class Mixer(nn.Module):
    """Norm, layer, curve and layer, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.narrow = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(nn.functional.gelu(self.wide(self.norm(x))))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


def lines_run(work: Callable[[], object]) -> int:
    """How many lines of archnet run, every round of a loop counted."""
    count = 0

    def inside(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return inside

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        return inside if frame.f_code.co_filename.startswith(ROOM) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("block", "shape", "options"),
    [
        (Mixer, (4, 6, 8), {}),
        (Mixer, (4, 6, 8), {"taps": []}),  # then nothing but what is read later is held
        (Mixer, (4, 6, 8), {"hardware": "rk3588"}),
        (Residual, (2, 8, 6, 6), {}),
    ],
)
def test_four_times_the_blocks_take_four_times_the_work(block, shape, options):
    def work(blocks: int) -> int:
        torch.manual_seed(0)
        network = nn.Sequential(*[block(8) for _ in range(blocks)], nn.Flatten()).eval()
        graph = capture(network, torch.randn(shape))
        return lines_run(lambda: archnet.convert(graph, torch.randn(shape), **options))

    work(1)  # what is done once
    few, many = work(3), work(12)
    assert many <= 4.5 * few


def test_four_times_the_lanes_take_four_times_the_work():
    def work(channels: int) -> int:
        torch.manual_seed(0)
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        student = archnet.convert(depthwise.eval(), torch.randn(1, channels, 4, 4))
        return lines_run(lambda: lower(student))

    work(64)  # what is done once
    few, many = work(256), work(1024)
    assert many <= 4.5 * few
