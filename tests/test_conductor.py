"""The whole way from a config to a run folder, with next to no training in it."""

import errno
import json
import logging
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archnet.cli import main as archnet
from archnet.config import Config
from archnet.deploy import to_integers
from archnet.errors import ArchnetError
from archnet.jobs import conductor, tensors
from archnet.report.page import write as write_report
from archnet.runs import RunError, RunFolder, read_json
from archnet.runs.student import load_student
from conftest import killed_at
from test_chips import replayed

ROOT = Path(__file__).resolve().parents[1]
Make = Callable[..., Config]
DEBUG = ("trainer=debug", "trainer.progress=false", "quant.weight_bits=2", "quant.act_bits=4")
NO_STEPS = ("distill.steps=0", "distill.joint_steps=0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of every stage."""
    from archnet.compose import compose

    root = tmp_path_factory.mktemp("run")
    places = (f"output_dir={root}/outputs", f"teacher.cache_dir={root}/teachers")
    return conductor.run(
        compose(ROOT / "conf", [*places, *DEBUG, "distill.steps=20", "logger=tensorboard"])
    )


def test_a_tools_answer_is_kept_with_the_run(
    finished: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ARCHNET_CHIPS", str(tmp_path))
    replayed(tmp_path, "rknn", "print('noise'); kept['scores'] = None")
    words = ["compile", str(finished.path), "hardware=rv1106", "inputs=0", "teacher=true"]
    assert archnet(words) == 1  # an operator is on the CPU
    shown = capsys.readouterr().out
    assert "not on the NPU" in shown
    assert "student: on the CPU: exNorm" in shown
    kept = read_json(finished.metrics)["compile"]["rknn rv1106"]
    assert {side: len(kept[side]["off"]) for side in kept} == {"student": 1, "teacher": 1}
    assert (finished.path / "compile" / "rknn_rv1106.log").read_text() == "noise\n"
    assert "exNorm" in write_report(finished.path).read_text()
    # What a tool tells before it crashes is kept, and the line says where its log is.
    replayed(tmp_path / "crash", "rknn", "import os; os.kill(os.getpid(), 11)")
    monkeypatch.setenv("ARCHNET_CHIPS", str(tmp_path / "crash"))
    assert archnet(words[:4]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "it was ended by SIGSEGV; its log: " in line
    assert read_json(finished.metrics)["compile"]["rknn rv1106"]["student"]["error"]


def test_a_run_leaves_what_the_readme_says(finished: RunFolder) -> None:
    for name in ("config.yaml", "checkpoints", "student.onnx", "metrics.json", "report.html"):
        assert (finished.path / name).exists(), name
    assert list((finished.path / "logs" / "tensorboard").rglob("events.*"))


def test_metrics_have_the_keys_of_the_design(finished: RunFolder) -> None:
    metrics = read_json(finished.metrics)
    assert metrics["task"] == "mnist5k"
    assert metrics["teacher"]["name"] == "digits"
    assert 0 <= metrics["teacher"]["accuracy"] <= 100
    assert 0 <= metrics["student"]["accuracy"] <= 100
    assert 0 <= metrics["student"]["agreement"] <= 100
    assert metrics["quant"]["weight_bits"] == 2
    assert metrics["quant"]["act_bits"] == 4
    for key in ("macs", "bops", "weight_bytes"):
        assert metrics["cost"][key]["teacher"] > 0
        assert metrics["cost"][key]["student"] > 0
    assert metrics["audit"] == {"pure": True, "violations": [], "not_judged": {}}
    assert metrics["conversion"]["approximate_rules"] == []
    assert metrics["conversion"]["error"] <= 1e-4
    assert metrics["parity"]["runtime"].startswith("onnxruntime")
    assert metrics["parity"]["mismatches"] == 0
    assert metrics["data"]["unlabelled"] == 128
    assert metrics["data"]["inputs_seen"] == 20 * 16
    assert {"teacher", "convert", "distill", "evaluate", "total"} <= set(metrics["seconds"])
    assert metrics["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert metrics["seed"] == 0


def test_the_report_is_one_file_with_table_and_curves(finished: RunFolder) -> None:
    page = (finished.path / "report.html").read_text()
    assert "accuracy, points" in page
    assert "relative error at conversion" in page
    assert "<svg" in page
    for outside in ("src=", 'href="http', "@import"):
        assert outside not in page


def test_the_code_in_the_report_runs_the_file(finished: RunFolder, tmp_path: Path) -> None:
    from PIL import Image

    code = read_json(finished.path / "evaluation.json")["usage"]
    assert "onnxruntime" in (finished.path / "report.html").read_text()
    Image.new("RGB", (50, 40), "white").save(tmp_path / "picture.png")
    command = [sys.executable, "-c", code, str(tmp_path / "picture.png")]
    done = subprocess.run(command, cwd=finished.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in map(str, range(10))


def test_a_finished_run_is_not_run_again(
    finished: RunFolder, make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    before = (finished.path / "student.onnx").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        conductor.run(make_config(f"resume={finished.path}"), ["resume"])
    assert "distill: finished earlier" in caplog.text
    assert (finished.path / "student.onnx").stat().st_mtime_ns == before


def test_resume_does_what_is_missing(finished: RunFolder, make_config: Make) -> None:
    before = read_json(finished.metrics)
    (finished.path / "stages" / "evaluate.json").unlink()
    finished.metrics.unlink()
    conductor.run(make_config(f"resume={finished.path}"), ["resume"])
    assert read_json(finished.metrics)["student"] == before["student"]


def test_ctrl_c_says_how_to_continue(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conductor, "_stages", interrupt)
    with pytest.raises(SystemExit) as caught:
        conductor.run(make_config(*DEBUG))
    assert caught.value.code == 130
    assert "python train.py resume=" in capsys.readouterr().err


def test_a_full_disk_says_how_to_continue(
    make_config: Make, finished: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors, "train", full)
    cache = finished.config().teacher.cache_dir
    with pytest.raises(RunError, match=r"the disk is full; .*resume=") as caught:
        conductor.run(make_config(*DEBUG, f"teacher.cache_dir={cache}"))
    folder = Path(str(caught.value).rpartition("resume=")[2])
    assert (folder / "stages" / "convert.json").is_file()
    assert not (folder / "stages" / "distill.json").exists()


def test_an_accumulator_too_narrow_ends_before_training(
    make_config: Make, finished: RunFolder
) -> None:
    options = (*DEBUG, f"teacher.cache_dir={finished.config().teacher.cache_dir}")
    with pytest.raises(
        ArchnetError, match=r"step \w+, from .* need \d+ bits and the target has 12"
    ):
        conductor.run(make_config(*options, "hardware.accumulator_bits=12"))


def test_a_target_of_shifts_gets_scales_of_powers_of_two(
    make_config: Make, finished: RunFolder
) -> None:
    cache = finished.config().teacher.cache_dir
    options = [*DEBUG, "hardware.requantization=power_of_two", f"teacher.cache_dir={cache}"]
    folder = conductor.run(make_config(*options))
    to_integers(load_student(folder), "power_of_two")
    assert read_json(folder.metrics)["parity"]["mismatches"] == 0


def test_few_bits_begin_where_more_have_ended(make_config: Make, finished: RunFolder) -> None:
    """A quantized run gives the weights it trained, before rounding, and the grids it learned."""
    from archnet.quant import quantizers
    from archnet.runs.student import given_student, load_student

    cache = finished.config().teacher.cache_dir
    options = [f"convert.student={finished.path}", f"teacher.cache_dir={cache}"]
    config = make_config("trainer=debug", "quant.weight_bits=1", *NO_STEPS, *options)
    (given, learned), trained = given_student(config), load_student(finished, "trained")
    for name, module in given.named_parameters():
        assert torch.equal(module, trained.state_dict()[name]), name
    folder = conductor.run(config)
    assert read_json(folder.metrics)["audit"]["pure"]
    grids = quantizers(load_student(folder, "calibrated"))
    for name, quantizer in learned.items():
        same = torch.equal(grids[name].log_scale, quantizer.log_scale)
        assert same == (grids[name].bits == quantizer.bits), name
    (finished.checkpoints / "trained.pt").rename(finished.checkpoints / "away.pt")
    with pytest.raises(RunError, match=r"trained\.pt is missing"):
        given_student(config)
    (finished.checkpoints / "away.pt").rename(finished.checkpoints / "trained.pt")


def test_text_that_is_missing_ends_with_one_line_before_anything_is_made(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "task=wmt14", "quant.bits=6"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("archnet: data/wmt14/train.en is missing")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_float_student_is_the_teacher(make_config: Make, finished: RunFolder) -> None:
    cache = finished.config().teacher.cache_dir
    folder = conductor.run(
        make_config(
            *DEBUG[:2],
            "quant=none",
            *NO_STEPS,
            f"teacher.cache_dir={cache}",
        )
    )
    metrics = read_json(folder.metrics)
    assert metrics["student"]["agreement"] == 100
    assert metrics["parity"]["mismatches"] == 0
    assert metrics["cost"]["bops"]["student"] >= metrics["cost"]["macs"]["student"] * 1024


def test_a_killed_run_ends_with_the_weights_of_one_never_stopped(
    make_config: Make, finished: RunFolder, tmp_path: Path
) -> None:
    cache = finished.config().teacher.cache_dir
    options = [*DEBUG, "distill.steps=24", f"teacher.cache_dir={cache}"]
    whole = conductor.run(make_config(*options))
    command = [*killed_at(13), *options, f"output_dir={tmp_path}/killed"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == -signal.SIGKILL
    (killed,) = (tmp_path / "killed" / "mnist5k").iterdir()
    assert list((killed / "checkpoints").glob("step*.ckpt"))
    assert not (killed / "stages" / "distill.json").exists()
    resumed = conductor.run(make_config(f"resume={killed}"), ["resume"])
    before, after = (load_student(run).state_dict() for run in (whole, resumed))
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.slow
def test_two_processes_train_what_one_trains(
    make_config: Make, finished: RunFolder, tmp_path: Path
) -> None:
    cache = finished.config().teacher.cache_dir
    options = ["teacher.fit.epochs=1", "trainer.progress=false", "trainer.threads=1",
               "quant.weight_bits=2", "quant.act_bits=4", "distill.steps=60",
               f"teacher.cache_dir={cache}"]  # fmt: skip
    alone = conductor.run(make_config("trainer=cpu", *options))
    command = [sys.executable, str(ROOT / "train.py"), "trainer=ddp_cpu", *options]
    subprocess.run([*command, f"output_dir={tmp_path}/two"], cwd=tmp_path, check=True)
    (metrics,) = (tmp_path / "two" / "mnist5k").glob("*/metrics.json")
    one, two = read_json(alone.metrics), read_json(metrics)
    assert two["teacher"] == one["teacher"]
    assert two["data"]["inputs_seen"] == one["data"]["inputs_seen"]
    assert two["student"]["accuracy"] == pytest.approx(one["student"]["accuracy"], abs=2)


@pytest.mark.slow
def test_a_sweep_from_the_command_line(tmp_path: Path, finished: RunFolder) -> None:
    cache = finished.config().teacher.cache_dir
    command = [sys.executable, str(ROOT / "train.py"), "-m", "experiment=demo", "quant.bits=2,4,8",
               "trainer=debug", f"teacher.cache_dir={cache}"]  # fmt: skip
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    runs = sorted((tmp_path / "outputs" / "mnist5k").glob("*/metrics.json"))
    quants = [json.loads(path.read_text())["quant"] for path in runs]
    assert {(q["weight_bits"], q["act_bits"]) for q in quants} == {(2, 2), (4, 4), (8, 8)}
    assert len({(path.parent / "student.onnx").read_bytes() for path in runs}) == 3
    assert "\r" not in said.stdout + said.stderr, "a bar, and no terminal to draw it in"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said_before_any_work(
    make_config: Make, tmp_path: Path
) -> None:
    with pytest.raises(ArchnetError, match=r"trainer\.accelerator=gpu, but torch finds none"):
        conductor.run(make_config("trainer.accelerator=gpu"))
    assert not (tmp_path / "outputs").exists()
