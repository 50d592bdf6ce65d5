"""The whole of translation on CLDR's phrases: train, stop, resume, evaluate, translate."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from archnet.cli import main as archnet
from archnet.config import Config
from archnet.jobs import conductor, translation
from archnet.runs import RunError, RunFolder, read_json
from conftest import killed_at
from test_loggers import require_tensorboard, require_wandb

Make = Callable[..., Config]
SHORT = [
    "experiment=phrases",
    "teacher.fit.epochs=2",
    "distill.steps=20",
    "distill.joint_steps=10",
    "distill.val_every=5",
    "distill.checkpoint_every=1",
    "distill.on_policy=0.4",
    "task.text.translations=2",
    "task.data.unlabelled=300",
    "trainer.limit_eval=200",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
]


@pytest.fixture(scope="module", autouse=True)
def _few_sentences() -> Iterator[None]:
    """Forty sentences, some five hundred tokens, tell as much of the files as two hundred do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(translation, "PARITY_SENTENCES", 40)
        yield


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("translation")
    return [
        f"output_dir={folder}/outputs",
        f"teacher.cache_dir={folder}/teachers",
        f"task.text.cache_dir={folder}/text",
    ]


@pytest.fixture(scope="module")
def finished(places: list[str]) -> RunFolder:
    from archnet.compose import compose
    from conftest import CONF

    told = ["logger=all", "logger.wandb.mode=offline"]
    return conductor.run(compose(CONF, [*SHORT, *places, *told]))


def test_a_search_measures_translators_on_validation_data(finished: RunFolder) -> None:
    job, student = conductor.reopen(finished)
    told = job.validate(student, 20, drop=False)
    assert told["drop"] is None
    assert 0 < told["agreement"] < 100
    assert told["agreement_error"] > 0
    whole = job.validate(student, 20, drop=True)
    assert {**whole, "drop": None} == told
    assert isinstance(whole["drop"], float)


def test_loggers_have_sentences_and_figures(finished: RunFolder) -> None:
    require_wandb(finished)
    require_tensorboard(finished)


def test_a_run_leaves_figures_files_and_a_report(finished: RunFolder) -> None:
    metrics = read_json(finished.metrics)
    assert metrics["audit"] == {"pure": True, "violations": [], "not_judged": {}}
    # Softmax in float: rounding decides a value that lies between two of four bits' levels, and
    # six steps leave a student whose sentences hang on it. Float students agree in every one.
    parity = metrics["parity"]
    assert parity["tokens_changed"] <= parity["tokens"] / 100
    assert metrics["student"]["signature"].startswith("nrefs:1|case:mixed")
    assert {"bleu", "chrf", "agreement"} <= set(metrics["student"])
    assert metrics["conversion"]["error"] > 0
    assert metrics["data"]["unlabelled"] <= 300
    # Of many sources the second best translation is empty, as the teacher is hardly trained.
    pairs = read_json(finished.path / "stages" / "translations.json")["sentences"]
    assert pairs > metrics["data"]["unlabelled"]
    assert metrics["cost"]["weight_bytes"]["student"] < metrics["cost"]["weight_bytes"]["teacher"]
    for name in (
        "student.encoder.onnx",
        "student.decoder.onnx",
        "tokenizer/tokenizer.model",
        "report.html",
    ):
        assert (finished.path / name).is_file()


def test_a_strict_student_is_pure(finished: RunFolder, places: list[str]) -> None:
    from archnet.compose import compose
    from archnet.runs.student import given_student
    from conftest import CONF

    strict = [*SHORT, *places, "hardware=arch5"]
    folder = conductor.run(compose(CONF, [*strict, "quant=none", "name=five"]))
    metrics = read_json(folder.metrics)
    assert metrics["audit"]["pure"]
    assert metrics["parity"]["mismatches"] == 0
    again = conductor.run(compose(CONF, [*strict, f"convert.student={folder.path.parent}/*_five"]))
    assert read_json(again.metrics)["audit"]["pure"]
    for given, message in (
        (f"{folder.path.parent}/*_six", "matches no finished run"),
        (finished.path, "another hardware"),
    ):
        with pytest.raises(RunError, match=message):
            given_student(compose(CONF, [*strict, f"convert.student={given}"]))


def translated(
    finished: RunFolder, text: bytes, monkeypatch: pytest.MonkeyPatch, *options: str
) -> tuple[int, list[bytes]]:
    class Stream:
        def __init__(self, content: bytes = b"") -> None:
            self.buffer = io.BytesIO(content)

        def write(self, _: str) -> None: ...

        def flush(self) -> None: ...

    out = Stream()
    monkeypatch.setattr(sys, "stdin", Stream(text))
    monkeypatch.setattr(sys, "stdout", out)
    code = archnet(["translate", str(finished.path), *options])
    return code, out.buffer.getvalue().split(b"\n")


def test_lines_out_are_lines_in(finished: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "5 kilometers\n\nItaly ☃\n  \nA\u2028B\n" + "long " * 200
    for runtime in ("pytorch", "onnxruntime"):
        code, lines = translated(
            finished, text.encode(), monkeypatch, "--runtime", runtime, "--beam", "2"
        )
        assert code == 0
        assert len(lines) == 7
        assert lines[-1] == lines[1] == lines[3] == b""
    code, lines = translated(finished, b"", monkeypatch)
    assert (code, lines) == (0, [b""])


def test_a_pipe_is_answered_as_lines_come() -> None:
    from archnet.commands.translate import lines_of_file, lines_of_pipe

    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as source, os.fdopen(writing, "wb", buffering=0) as sink:
        assert lines_of_file(source) is None
        chunks = lines_of_pipe(source, 2)
        for written, lines in (
            (b"a\n", [b"a"]),
            (b"\nb\nhal", [b"", b"b"]),
            (b"f\nc\nd\n", [b"half", b"c"]),
            (b"", [b"d"]),
            (b"no end", None),
        ):
            sink.write(written)
            assert lines is None or next(chunks) == lines
        sink.close()
        assert list(chunks) == [[b"no end"]]


def test_a_file_has_progress_and_n_best(
    finished: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from archnet.commands import translate

    monkeypatch.setattr(translate, "SECONDS", 0.0)
    (tmp_path / "text.en").write_text("5 kilometers\n\nItaly\n7 grams\n")
    found = {}
    for options in (["--n_best", "3"], []):
        with (tmp_path / "text.en").open() as text:
            monkeypatch.setattr(sys, "stdin", text)
            words = ["translate", str(finished.path), "--beam", "3", "--threads", "1", *options]
            assert archnet(words) == 0
        printed = capsys.readouterr()
        assert "archnet: 3 of 4 lines" in printed.err
        found[len(options)] = printed.out.splitlines()
    rows = [line.split("\t") for line in found[2]]
    assert [row[0] for row in rows] == ["1"] * 3 + ["2"] + ["3"] * 3 + ["4"] * 3
    assert rows[3] == ["2", "0.0000", ""]
    scores = [float(row[1]) for row in rows[:3]]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] < 0
    assert [rows[place][2] for place in (0, 3, 4, 7)] == found[0]


def test_unknown_characters_are_said_with_their_lines(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from archnet.commands import translate

    monkeypatch.setattr(translate, "CHUNK", 2)
    text = "5 kilometers\nItaly\n\n☃ 5 \u0e01☃\n3 \ue000 grams\n"
    assert translated(finished, text.encode(), monkeypatch, "--beam", "1")[0] == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "archnet: line 4: the tokenizer does not know ☃ (U+2603), \u0e01 (U+0E01); left out",
        "archnet: line 5: the tokenizer does not know U+E000; left out",
    ]
    assert translated(finished, "☃\n".encode() * 27, monkeypatch, "--beam", "1")[0] == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 21
    assert lines[-1].startswith("archnet: 7 more lines")


def test_a_teacher_is_looked_at_before_conversion(
    finished: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    from dataclasses import replace

    from archnet.teachers import load_translator

    facts = read_json(finished.path / "stages" / "look.json")
    assert facts["tokens_right"] > 20
    assert facts["sentences"] == 50
    config = finished.config()
    job = conductor.opened(finished)
    torch.manual_seed(1)
    job.teacher = load_translator(
        replace(config.teacher, weights=None), vocabulary=len(job.data.tokenizer), positions=32
    )
    assert job.look()["tokens_right"] < 20
    assert "hardly more than one frequent token alone" in caplog.text


def test_bad_text_and_options_end_with_one_line(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert translated(finished, b"ok\n\xff\n", monkeypatch)[0] == 2
    assert "standard input, line 2: not UTF-8" in capsys.readouterr().err
    assert translated(finished, b"", monkeypatch, "--beam", "0")[0] == 2
    assert "beam=0 must be at least 1" in capsys.readouterr().err
    assert translated(finished, b"", monkeypatch, "n_best=9", "--beam", "4")[0] == 2
    assert "n_best=9 is more than the search keeps, beam=4" in capsys.readouterr().err
    code, lines = translated(finished, b"5 grams\n\xff\n", monkeypatch, "--beam", "1")
    assert (code, len(lines)) == (2, 2)  # what came before it is translated
    capsys.readouterr()
    options = ("--network", "teacher", "--runtime", "onnxruntime")
    assert translated(finished, b"", monkeypatch, *options)[0] == 2
    assert "the teacher runs in pytorch" in capsys.readouterr().err


def test_a_tokenizer_of_another_run_is_refused(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from archnet.tasks.tokenizer import train_tokenizer

    model = finished.path / "tokenizer" / "tokenizer.model"
    before = model.read_bytes()
    try:
        train_tokenizer(model, ["five kilometers", "fünf Kilometer"] * 30, 60, 1000)
        assert translated(finished, b"5 kilometers\n", monkeypatch)[0] == 2
        assert "has 60 tokens and the student 600" in capsys.readouterr().err
    finally:
        model.write_bytes(before)


def test_evaluate_and_export_know_translators(
    finished: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert archnet(["evaluate", str(finished.path)]) == 0
    figures = json.loads(capsys.readouterr().out)
    kept = read_json(finished.metrics)
    assert figures["student"]["bleu"] == kept["student"]["bleu"]
    assert archnet(["export", str(finished.path), "--output", str(tmp_path / "files")]) == 0
    content = (tmp_path / "files" / "student.decoder.onnx").read_bytes()
    assert content == (finished.path / "student.decoder.onnx").read_bytes()
    with pytest.raises(RunError, match="has more inputs than one tensor of features"):
        conductor.job_of(finished).inputs(1)
    assert archnet(["cost", str(finished.path)]) == 0
    assert "a sentence of 16 tokens and 16 steps" in capsys.readouterr().out
    assert archnet(["verify", str(finished.path), "--inputs", "8", "--forms", "qdq,c"]) in (0, 1)
    assert "student are computed in floats" in " ".join(capsys.readouterr().out.split())
    assert read_json(finished.metrics)["verify"]["inputs"] == 8
    for options, message in (
        (["verify", "--forms", "tflite"], "form=tflite is not run here"),
        (["verify", "--forms", "wide"], "form=wide is no form of a translator"),
        (["export", "--form", "openvino"], "a translator is written as float, qdq"),
        (["export", "--form", "float"], "this student is quantized"),
        (["export", "--form", "c"], "(MatMul, Softmax) is computed in floats"),
        (["export", "--form", "qdq", "--length", "9"], "form=qdq takes any length"),
    ):
        assert archnet([options[0], str(finished.path), *options[1:]]) == 2
        assert message in capsys.readouterr().err


def test_a_killed_run_ends_with_the_same_student(
    finished: RunFolder, places: list[str], make_config: Make
) -> None:
    """Killed among the steps on its own translations."""
    command = [*killed_at(14), *SHORT, *places, "name=killed"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    outputs = Path(places[0].partition("=")[2])
    (folder,) = outputs.glob("phrases/*_killed")
    assert list((folder / "checkpoints").glob("step*.ckpt"))
    assert not (folder / "metrics.json").exists()
    conductor.run(make_config(f"resume={folder}"), ["resume"])
    ours, theirs = (
        torch.load(path / "checkpoints" / "student.pt", weights_only=True)["state"]
        for path in (folder, finished.path)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
