"""What every test file may use."""

import os
import sys

# Before torch is imported: networks this small gain nothing from threads, and lose much where
# other work shares the cores. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import tempfile

# The key that seals run folders: never this user's own, nor in this user's home.
_STATE = tempfile.TemporaryDirectory(prefix="archnet-tests-")
os.environ["XDG_STATE_HOME"] = _STATE.name

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from archnet.compose import compose
from archnet.config import Config

# No test depends on the clock: other work may hold up any of them for any time.
settings.register_profile("any_load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_load")

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """The config that a command line composes to; its outputs and caches go to ``tmp_path``."""

    def make(*overrides: str) -> Config:
        paths = (f"output_dir={tmp_path}/outputs", f"teacher.cache_dir={tmp_path}/teachers")
        return compose(CONF, [*paths, *overrides])

    return make


def killed_at(step: int) -> list[str]:
    """A `train.py` that kills itself, as hard as can be, after so many steps of distillation.

    By the step, not by the clock: a killer that waits for a checkpoint may come too late.
    """
    code = f"""
import os, runpy, signal, sys
from archnet.distill.run import Speed
count = Speed.on_train_batch_end
def end(self, *given):
    count(self, *given)
    if self.steps == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
Speed.on_train_batch_end = end
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return [sys.executable, "-c", code]
