"""What an installed archnet has: the config tree, `archnet train`, groups of one's own."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from archnet.cli import main
from archnet.commands.train import conf_folder
from conftest import CONF, ROOT


def files(folder: Path) -> dict[str, str]:
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.yaml")}
    return dict(sorted(found.items()))


@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools builds the wheel"
)
def test_a_wheel_brings_the_config_tree_and_the_files_of_the_package(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(CONF, tmp_path / "conf")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignored)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    built = tmp_path / "built" / "archnet"
    assert files(built / "conf") == files(CONF)
    for kind in ("*.py", "*.yaml", "*.html", "*.h", "*.txt", "py.typed"):
        made = {str(path.relative_to(built)) for path in built.rglob(kind)}
        wanted = {
            str(path.relative_to(ROOT / "src/archnet"))
            for path in ROOT.glob(f"src/archnet/**/{kind}")
        }
        assert wanted <= made, kind


def test_the_config_tree_is_found() -> None:
    assert conf_folder().samefile(CONF)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a task of one's own."""
    task = tmp_path / "own" / "task" / "mine.yaml"
    task.parent.mkdir(parents=True)
    text = (CONF / "task" / "mnist5k.yaml").read_text()
    task.write_text(text.replace("name: mnist5k", "name: of_my_own"))
    return tmp_path / "own"


def composed(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "archnet", "train", *words, "--cfg", "job"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_train_composes_in_any_folder_with_groups_of_ones_own(own: Path, tmp_path: Path) -> None:
    found = composed(["--config-dir", "own", "task=mine", "hardware=rk3588"], tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    assert "name: of_my_own" in found.stdout
    assert "name: rk3588" in found.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=mine2"], "task=mine2 is not an option of task; nearest valid: task=mine"),
        (["quant.bits=9"], "quant.bits=9 is not a width"),
        (["--config-dir", "elsewhere"], "--config-dir=elsewhere: there is no such folder"),
    ],
)
def test_what_train_cannot_do_is_one_line(words, message, own, monkeypatch, capsys) -> None:
    monkeypatch.chdir(own.parent)
    given = words if "--config-dir" in words else ["--config-dir", "own", *words]
    assert main(["train", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("archnet: ")
    assert message in line


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_train_has_the_help_of_train_py(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", flag]) == 0
    assert "archnet" in capsys.readouterr().out
