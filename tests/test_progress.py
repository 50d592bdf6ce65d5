"""Lines of progress where there is no terminal: few, and with what one wants to know."""

import logging
import re
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from archnet import progress
from archnet.progress import Lines, TrainingLines, progress_lines


class Clock:
    """Seconds that pass when a test says so."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_line_says_step_loss_and_time_left(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    lines = Lines("distillation", "step", 1400, 30, first=200)
    clock.now += 60
    with caplog.at_level(logging.INFO):
        lines.tell(400, loss=0.123456)
    assert caplog.messages == ["distillation: step 400 of 1,400, loss 0.1235, 0:05:00 left"]


@pytest.mark.parametrize("seconds", [0.0, 30.0, 45.0])
def test_lines_are_as_far_apart_as_asked(
    seconds: float, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    callback = TrainingLines("teacher", seconds)
    trainer = cast(Any, SimpleNamespace(global_step=0, max_steps=100))
    callback.on_train_start(trainer, cast(Any, None))
    told = []
    with caplog.at_level(logging.INFO):
        for step in range(1, 101):
            clock.now += 7
            trainer.global_step = step
            before = len(caplog.messages)
            callback.on_train_batch_end(
                trainer, cast(Any, None), {"loss": torch.tensor(0.5)}, None, step
            )
            told += [clock.now] * (len(caplog.messages) - before)
    assert all(later - earlier >= seconds for earlier, later in pairwise(told))
    assert len(told) == 100 // max(1, -(-int(seconds) // 7))
    assert all(re.fullmatch(r"teacher: step \d+ of 100, loss 0.5, [\d:]+ left", m)
               for m in caplog.messages)  # fmt: skip


def test_only_the_leading_process_writes(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    callback = TrainingLines("teacher", 0)
    callback.disable()
    trainer = cast(Any, SimpleNamespace(global_step=1, max_steps=2))
    callback.on_train_start(trainer, cast(Any, None))
    with caplog.at_level(logging.INFO):
        callback.on_train_batch_end(trainer, cast(Any, None), torch.tensor(0.5), None, 0)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("shown", "terminal", "count"), [(True, True, 0), (True, False, 1), (False, False, 0)]
)
def test_a_bar_where_there_is_a_terminal(
    shown: bool, terminal: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda: terminal, raising=False)
    assert len(progress_lines("teacher", shown, 30)) == count
