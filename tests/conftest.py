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

import copy
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from archnet.compose import compose
from archnet.config import Config
from archnet.runs import RunFolder

# No test depends on the clock: other work may hold up any of them for any time.
settings.register_profile("any_load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_load")

# Files that take longest, roughly in that order.
SLOWEST = (
    *("translation_run", "conductor", "lower", "convert", "foreign_folders", "translation"),
    *(
        "sentences",
        "search",
        "ranks",
        "quant",
        "verify",
        "teachers",
        "mixed",
        "distill",
        "approximate",
        "onnx_cost",
    ),
    *("own_data", "coverage", "errors_of_rules", "pairs", "unwrap", "integer", "tflite"),
    *("jobs", "outputs", "api", "c_header", "tasks"),
)

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files begin first, so that no worker is left with one of them at the end."""
    rank = {f"test_{name}": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@cache
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose(CONF, overrides)


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """The config that a command line composes to; its outputs and caches go to ``tmp_path``.

    Each command line is composed once: Hydra takes a fifth of a second for it.
    """

    def make(*overrides: str) -> Config:
        config = copy.deepcopy(_composed(overrides))
        given = {override.partition("=")[0] for override in overrides}
        if "output_dir" not in given:
            config.output_dir = f"{tmp_path}/outputs"
        if "teacher.cache_dir" not in given:
            config.teacher.cache_dir = f"{tmp_path}/teachers"
        return config

    return make


@pytest.fixture(scope="session")
def _untrained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    from archnet.jobs import conductor

    options = ["trainer=debug", "trainer.progress=false", "teacher.train=false"]
    options += ["distill.steps=0", "distill.joint_steps=0"]
    return conductor.run(
        compose(CONF, [*options, f"output_dir={tmp_path_factory.mktemp('untrained')}"])
    )


@pytest.fixture(scope="module")
def untrained(_untrained: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run without any training, a module's own: what is asked for are its files."""
    path = tmp_path_factory.mktemp("run") / "mnist5k" / _untrained.path.name
    shutil.copytree(_untrained.path, path)
    return RunFolder.open(path)


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
