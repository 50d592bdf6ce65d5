"""Runs beside each other: tables, plots, files, seeds, tasks, and runs that are not finished."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from archnet.cli import main as archnet
from archnet.config import Config
from archnet.report import comparison
from archnet.runs import RunError, RunFolder, write_json
from archnet.sweep import RUNS
from test_verdict import changed

Make = Callable[..., Config]
Finish = Callable[..., Path]


@pytest.fixture
def finish(make_config: Make) -> Finish:
    """Leaves a run folder with figures that nobody has trained."""

    def make(*overrides: str, **figures: Any) -> Path:
        config = make_config(*overrides)
        folder = RunFolder.create(config)
        widths = {
            "quant__weight_bits": config.quant.weight_bits,
            "quant__act_bits": config.quant.act_bits,
            "seed": config.seed,
            "task": config.task.name,
        }
        write_json(folder.metrics, changed(**widths, **figures))
        return folder.path

    return make


@pytest.fixture
def runs(finish: Finish, make_config: Make) -> list[Path]:
    """Three widths, one with two seeds; one that is beaten; another task; two without an end."""

    def of(bits: int, accuracy: float, cost: int, seed: int = 0) -> Path:
        return finish(f"quant.bits={bits}", f"seed={seed}", student__accuracy=accuracy,
                      cost__on_target__student=cost)  # fmt: skip

    text = {
        "student": {"bleu": 29.0, "agreement": 60.0}, "teacher": {"name": "t", "bleu": 30.0},
        "paired": {"bleu": {"difference": -1.0, "low": -2.0, "high": 0.0, "samples": 9}},
    }  # fmt: skip
    old = finish("quant.bits=5")
    (old / "metrics.json").write_text(json.dumps({"version": 7}))
    return [
        of(2, 90.0, 400), of(4, 95.0, 1600), of(4, 97.0, 1600, seed=1), of(8, 97.5, 6400),
        of(6, 94.0, 3600), finish("experiment=phrases", **text),
        RunFolder.create(make_config("quant.bits=3")).path, old,
    ]  # fmt: skip


def test_seeds_are_together_tasks_apart_and_the_rest_is_named(runs: list[Path]) -> None:
    found = comparison.compare(runs)
    digits, phrases = found.groups
    assert (digits.name, digits.metric) == ("mnist5k", "accuracy")
    assert (phrases.name, phrases.metric) == ("phrases", "bleu")
    by_bits = {row.first.bits.partition(",")[0]: row for row in digits.rows}
    assert list(by_bits) == ["W2A2", "W4A4", "W6A6", "W8A8"]  # the cheapest first
    both = by_bits["W4A4"]
    assert both.value == 96.0
    assert both.spread == pytest.approx(2**0.5)
    assert both.seeds == "0, 1"
    assert [row.best for row in digits.rows] == [True, True, False, True]
    assert phrases.rows[0].interval == "-2.00 to +0.00"
    assert [folder for folder, _ in found.unfinished] == runs[-2:]
    assert found.unfinished[0][1] == "not finished"
    assert "does not hold what a run writes" in found.unfinished[1][1]


def test_the_command_prints_and_writes(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert archnet(["compare", str(runs[0].parent), *map(str, runs[5:]), f"output={out}"]) == 0
    shown = capsys.readouterr().out
    for text in ("96.00 ± 1.41", "W2A2, arch5", "teacher: digits 97.00", "BLEU", "0.25 x",
                 f"left out: {runs[-2]}: not finished"):  # fmt: skip
        assert text in shown
    page = (out / "comparison.html").read_text()
    assert page.count("<svg") == 2
    assert "Left out" in page
    for outside in ("src=", 'href="http', "@import", "url("):
        assert outside not in page
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_has_every_config_once(runs: list[Path]) -> None:
    group = comparison.compare(runs).groups[0]
    lines = comparison._plot(group)
    letters = "".join(line.partition("|")[2] for line in lines[1:])
    assert sorted(letter for letter in letters if letter.isalpha()) == ["A", "B", "C", "D"]


def test_a_folder_of_a_multirun_names_its_runs(runs: list[Path], tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    names = [f"../{run.relative_to(tmp_path)}" for run in runs[:2]]
    (sweep / RUNS).write_text("\n".join([*names, names[0], "../gone"]) + "\n")
    assert comparison.find([sweep]) == [*runs[:2], tmp_path / "gone"]
    found = comparison.compare(comparison.find([sweep]))
    assert [str(folder.name) for folder, _ in found.unfinished] == ["gone"]
    assert comparison.find([f"{runs[0].parent}/*", runs[0]]) == sorted(
        run for run in runs if run.parent == runs[0].parent
    )


@pytest.mark.parametrize("given", ["nothing/*", "."])
def test_what_names_no_run_is_one_line(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert archnet(["compare", given]) == 2
    assert "names no run folder" in capsys.readouterr().err
    with pytest.raises(RunError):
        comparison.find([given])


def test_nothing_finished_is_one_line(
    make_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder.create(make_config())
    assert archnet(["compare", str(folder.path)]) == 2
    assert "none of these runs is finished" in capsys.readouterr().err


def test_a_drawing_library_out_of_order_costs_the_picture_alone(
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("'nonsense' is not a valid value for backend")

    monkeypatch.setattr(comparison, "_write_png", broken)
    paths = comparison.write(comparison.compare(runs), tmp_path)
    assert [path.suffix for path in paths] == [".html", ".csv"]
    assert "comparison.png is not written: 'nonsense' is not a valid value" in caplog.text


def test_a_sweep_is_told_how_good_and_how_dear() -> None:
    assert comparison.objectives(changed()) == [96.5, 0.25]
    unlabelled = changed(teacher={"name": "x"}, student={"agreement": 88.0}, paired={})
    assert comparison.objectives(unlabelled) == [88.0, 0.25]
    features = changed(teacher={"name": "x"}, paired={},
                       student={"agreement": None, "relative_error": 0.02})  # fmt: skip
    assert comparison.objectives(features) == [-0.02, 0.25]
