"""What TensorBoard and Weights & Biases are told, read from their files, without network."""

import itertools
import json
import logging
import struct
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2 as wandb_records

from archnet.compose import compose
from archnet.config import Config, keys
from archnet.jobs import conductor
from archnet.jobs.loggers import Guarded, RunLoggers, summary
from archnet.report import files as report_files
from archnet.runs import RunFolder, read_json
from conftest import CONF

Make = Callable[..., Config]
DIGITS = ("trainer=debug", "quant.bits=3", "distill.steps=60", "distill.joint_steps=20",
          "trainer.limit_eval=400")  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("logged")
    places = [f"output_dir={root}/outputs", f"teacher.cache_dir={root}/teachers"]
    told = ["logger=all", "logger.wandb.mode=offline", "trainer.progress=false"]
    return conductor.run(compose(CONF, [*DIGITS, *told, *places]))


def records(folder: RunFolder) -> list[Any]:
    """The records of a run's offline file: chunks of LevelDB's log format, of 32 KB blocks."""
    (path,) = (folder.path / "logs" / "wandb").glob("offline-run-*/*.wandb")
    content, found, place, whole = path.read_bytes(), [], 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", content[place : place + 7])
        if kind == 0:
            break
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_records.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def items(update: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in update}


def require_wandb(finished: RunFolder) -> None:
    """W&B's offline file has the config, the curves, the figures, the tables and the files."""
    metrics, config = read_json(finished.metrics), finished.config()
    found = records(finished)
    told: dict[str, Any] = {}
    history: dict[str, list[float]] = {}
    ended: dict[str, Any] = {}
    artifacts, run = [], None
    for record in found:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            told |= items(run.config.update)
        elif kind == "config":
            told |= items(record.config.update)
        elif kind == "history":
            for key, value in items(record.history.item).items():
                history.setdefault(key, []).append(value)
        elif kind == "summary":
            ended |= items(record.summary.update)
        elif kind == "request" and record.request.HasField("log_artifact"):
            artifacts.append(record.request.log_artifact.artifact)
        elif kind == "artifact":
            artifacts.append(record.artifact)
    assert run is not None
    assert {config.teacher.name, config.hardware.name, config.task.name} < set(run.tags)
    assert "W3A3" in run.tags or config.task.name == "phrases"
    assert told["quant"]["weight_bits"] == config.quant.weight_bits
    assert told["distill"]["steps"] == config.distill.steps
    for key, value in summary(metrics).items():
        if not key.startswith("seconds/"):
            assert ended[key] == pytest.approx(value), key
    assert ended["verdict"] == metrics["verdict"]["sentence"]
    stages = {key.split("/")[1] for key in history if key.startswith("loss/")}
    assert "joint" in stages
    assert len(stages) > 1
    kinds = {key: value[0] for key, value in history.items() if key.endswith("/_type")}
    assert kinds["layers/_type"] == "table-file"
    pictured = config.task.name == "mnist5k"
    assert kinds["disagreements/_type"] == ("images/separated" if pictured else "table-file")
    (artifact,) = [found for found in artifacts if found.type == "archnet-run"]
    names = {entry.path for entry in artifact.manifest.contents}
    exported = {path.name for path in finished.path.glob("student*.onnx")}
    assert {"report.html", "metrics.json", *exported} <= names


def require_tensorboard(finished: RunFolder) -> None:
    """TensorBoard's events have the same."""
    metrics, config = read_json(finished.metrics), finished.config()
    place = finished.path / "logs" / "tensorboard"
    kept = yaml.safe_load((place / "hparams.yaml").read_text())
    assert {key for key, value in keys(config) if not isinstance(value, dict)} <= set(kept)
    assert kept["quant.weight_bits"] == config.quant.weight_bits
    events = EventAccumulator(str(place), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert any(tag.startswith("loss/joint/") for tag in scalars)
    for key, value in summary(metrics).items():
        if key not in ("verdict",) and not key.startswith("seconds/"):
            assert events.Scalars(key)[-1].value == pytest.approx(float(value), rel=1e-5), key
    texts = set(events.Tags()["tensors"])
    assert {"verdict/text_summary", "layers/text_summary"} <= texts
    said = events.Tensors("verdict/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert metrics["verdict"]["sentence"] in said
    if config.task.name == "phrases":
        assert "disagreements/text_summary" in texts
    else:
        assert "disagreements/0" in events.Tags()["images"]


def test_both_have_all_of_a_run(finished: RunFolder) -> None:
    require_wandb(finished)
    require_tensorboard(finished)


def test_no_curve_leaves_its_stage(finished: RunFolder) -> None:
    stages = list(report_files.by_stage(report_files.curves(finished.path)).values())
    assert len(stages) > 1
    for before, after in itertools.pairwise(stages):
        last = max(step for points in before.values() for step, _ in points)
        assert last < min(step for points in after.values() for step, _ in points)


def test_a_finished_run_is_told_once_and_a_new_logger_all_of_it(
    finished: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    sessions = set((finished.path / "logs" / "wandb").glob("offline-run-*"))
    config = compose(CONF, [f"resume={finished.path}"])
    with caplog.at_level(logging.INFO):
        conductor.run(config, ["resume"])
    assert "log: finished earlier" in caplog.text
    assert set((finished.path / "logs" / "wandb").glob("offline-run-*")) == sessions


def test_what_cannot_be_written_is_one_line_and_the_run_goes_on(
    make_config: Make, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("logger=all", "logger.wandb.mode=offline")
    folder = RunFolder.create(config)
    (folder.path / "logs").mkdir()
    (folder.path / "logs" / "tensorboard").write_text("in the way")
    loggers = RunLoggers(config, folder)
    broken = next(logger for logger in loggers.active if logger.kind == "wandb")

    class Refusing:
        save_dir = str(folder.path)

        @property
        def experiment(self) -> Any:
            raise PermissionError("no permission\nto write to project archnet")

        def log_metrics(self, *given: Any) -> None:
            _ = self.experiment

    broken.inner = Refusing()
    loggers.begin()
    for logger in loggers.active:
        for step in (10, 20):
            logger.log_metrics({"loss": 1.0}, step)
        logger.finalize("success")
    loggers.end({}, [])
    loggers.close()
    lines = [record.getMessage() for record in caplog.records if "logger" in record.getMessage()]
    assert len(lines) == 2
    assert all("the run goes on without it" in line and "\n" not in line for line in lines)
    assert loggers.written == ["csv"]
    assert "1.0" in next(folder.path.glob("logs/csv/*/metrics.csv")).read_text()


def test_a_guarded_logger_is_asked_no_more_after_it_failed() -> None:
    asked = []

    class Inner:
        def log_metrics(self, metrics: dict[str, float], step: int | None) -> None:
            asked.append(step)
            raise OSError("gone")

    logger = Guarded(Inner(), "tensorboard")
    for step in range(3):
        logger.log_metrics({}, step)
    assert asked == [0]
    assert not logger.works
