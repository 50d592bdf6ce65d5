"""Sweeps: their runs are listed and compared, searched in two objectives, or sent to a launcher."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from archnet import sweep
from conftest import ROOT


def test_only_a_run_of_a_multirun_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = RunMode.RUN
    config = SimpleNamespace(sweep=SimpleNamespace(dir=str(tmp_path / "sweep")))
    monkeypatch.setattr(HydraConfig, "initialized", staticmethod(lambda: True))
    monkeypatch.setattr(
        HydraConfig, "get", staticmethod(lambda: SimpleNamespace(mode=mode, sweep=config.sweep))
    )
    sweep.note(tmp_path / "task" / "one")
    assert not (tmp_path / "sweep").exists()
    mode = RunMode.MULTIRUN
    for name in ("one", "two"):
        sweep.note(tmp_path / "task" / name)
    assert (tmp_path / "sweep" / sweep.RUNS).read_text() == "../task/one\n../task/two\n"


def test_a_multirun_that_fails_still_compares_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hydra = SimpleNamespace(sweep=SimpleNamespace(dir=str(tmp_path)))
    (tmp_path / sweep.RUNS).write_text("gone\n")
    with pytest.raises(ZeroDivisionError), sweep.compared_at_end():
        sweep.Sweep().on_multirun_start(SimpleNamespace(hydra=hydra))
        _ = 1 // 0
    shown = capsys.readouterr().out
    assert f"left out: {tmp_path}/gone" in shown
    assert (tmp_path / "comparison.html").is_file()
    with sweep.compared_at_end():
        pass
    assert not capsys.readouterr().out


def swept(tmp_path: Path, *words: str) -> str:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *words, "trainer=debug",
               "trainer.progress=false", f"output_dir={tmp_path}/outputs",
               f"teacher.cache_dir={tmp_path}/teachers"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(find_spec("optuna") is None, reason="without archnet[sweep]")
def test_two_objectives_are_searched_and_compared(tmp_path: Path) -> None:
    shown = swept(tmp_path, "hydra/sweeper=pareto", "hydra.sweeper.n_trials=3",
                  "quant.weight_bits=choice(2,8)", "quant.act_bits=choice(2,8)")  # fmt: skip
    assert "Number of Pareto solutions" in shown
    (table,) = tmp_path.glob("outputs/sweeps/*/comparison.csv")
    assert len(table.read_text().splitlines()) == 4


@pytest.mark.slow
@pytest.mark.skipif(find_spec("submitit") is None, reason="without archnet[sweep]")
def test_jobs_of_a_launcher_are_compared(tmp_path: Path) -> None:
    shown = swept(tmp_path, "hydra/launcher=submitit_local", "quant.bits=2,8")
    assert "no other is as good for less" in shown
    (table,) = tmp_path.glob("outputs/sweeps/*/comparison.csv")
    assert len(table.read_text().splitlines()) == 3
