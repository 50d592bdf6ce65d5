"""What every test file may use."""

import os

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

from archnet.compose import compose
from archnet.config import Config

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """The config that a command line composes to; its outputs and caches go to ``tmp_path``."""

    def make(*overrides: str) -> Config:
        paths = (f"output_dir={tmp_path}/outputs", f"teacher.cache_dir={tmp_path}/teachers")
        return compose(CONF, [*paths, *overrides])

    return make
