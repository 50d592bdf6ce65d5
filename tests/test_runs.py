"""Run folders: distinct, written whole or not at all, continued only with their own config."""

import errno
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from archnet import runs
from archnet.config import Config
from archnet.errors import ConfigError
from archnet.runs import RunError, RunFolder, atomic, write_json

Make = Callable[..., Config]


@pytest.fixture
def folder(make_config: Make) -> RunFolder:
    return RunFolder.create(make_config())


def test_runs_of_the_same_second_have_folders_of_their_own(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("name=mine")
    monkeypatch.setattr(runs.folder, "_now", lambda: "2025-01-01_00-00-00")
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(RunFolder.create, [config] * 8))
    assert len({folder.path for folder in folders}) == 8
    assert {"2025-01-01_00-00-00_mine", "2025-01-01_00-00-00_mine-2"} <= {
        folder.path.name for folder in folders
    }
    assert all((folder.path / "config.yaml").is_file() for folder in folders)


def test_a_folder_says_task_and_config(folder: RunFolder, make_config: Make) -> None:
    assert folder.path.parent.name == "mnist5k"
    assert RunFolder.open(folder.path).config() == make_config()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        RunFolder.create(make_config(f"output_dir={tmp_path}/file"))


def test_what_is_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run folder: it holds no config\.yaml"):
        RunFolder.open(tmp_path)


def test_a_damaged_config_is_an_error(folder: RunFolder) -> None:
    (folder.path / "config.yaml").write_text("quant: {bts: 4}\n")
    with pytest.raises(RunError, match=r"config\.yaml cannot be read"):
        folder.config()


def test_a_full_disk_leaves_the_file_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"accuracy": 1})

    def full(self: Path, text: str) -> int:
        with self.open("w") as file:
            file.write(text[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"metrics\.json cannot be written \(No space left"):
        write_json(path, {"accuracy": 2})
    assert json.loads(path.read_text()) == {"accuracy": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_for_another_reason_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, 1)
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "1\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_stage_is_not_done_again(folder: RunFolder) -> None:
    first = folder.stage("export", lambda: {"bytes": 1})
    assert first["seconds"] >= 0
    assert folder.stage("export", lambda: {"bytes": 2}) == first


def test_a_resumed_stage_counts_the_time_before(folder: RunFolder) -> None:
    assert folder.stage("distill", lambda: {"earlier": 60.0})["seconds"] >= 60
    assert folder.seconds()["distill"] >= 60


def test_a_stage_that_failed_is_done_again(folder: RunFolder) -> None:
    with pytest.raises(ZeroDivisionError):
        folder.stage("export", lambda: {"bytes": 1 // 0})
    assert folder.stage("export", lambda: {"bytes": 2})["bytes"] == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([], []),
        (["quant.bits=4"], []),
        (["quant.bits=4"], ["quant.bits=4"]),
        (["task=cifar10", "task.data.batch_size=64"], ["task=cifar10", "task.data.batch_size=64"]),
        (["experiment=demo"], ["experiment=demo"]),
    ],
)
def test_resume_takes_the_config_of_the_folder(
    first: list[str], second: list[str], make_config: Make
) -> None:
    config = make_config(*first)
    folder = RunFolder.create(config)
    given = make_config(*second)
    assert folder.resumed(given, [text.partition("=")[0] for text in second]) == config


def test_resume_may_change_where_a_run_computes(folder: RunFolder, make_config: Make) -> None:
    given = make_config("trainer=ddp_cpu", "logger.tensorboard=true", "task.data.workers=1")
    config = folder.resumed(given, ["trainer", "logger.tensorboard", "task.data.workers"])
    assert config.trainer.devices == 2
    assert config.logger.tensorboard
    assert config.task.data.workers == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant.bits=4", r"quant\.bits=4 contradicts .*\(quant\.bits=8\)"),
        ("task=cifar10", r"task\.name=cifar10 contradicts"),
        ("quant=dorefa", r"quant\.method=dorefa contradicts"),
        ("experiment=demo", "contradicts"),
    ],
)
def test_a_checkpoint_from_another_config_is_an_error(
    override: str, message: str, folder: RunFolder, make_config: Make
) -> None:
    before = (folder.path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=message) as caught:
        folder.resumed(make_config(override), [override.partition("=")[0]])
    assert "with which its checkpoints were made" in str(caught.value)
    assert (folder.path / "config.yaml").read_text() == before
