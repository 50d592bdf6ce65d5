"""What the README says runs: its Python, its commands, its tables."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from archnet.chips import tools
from archnet.cli import main as archnet_command
from archnet.compose import check, compose

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCS = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(language: str) -> list[str]:
    pattern = rf"```{language}\n(.*?)```"
    return [block for text in DOCS for block in re.findall(pattern, text, flags=re.DOTALL)]


def commands() -> list[list[str]]:
    """Every command of README and docs, in blocks and in the README's running text, as words.

    benchmarks/readme_commands.py runs those in blocks.
    """
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += re.findall(r"`((?:python|archnet|make) [^`<…]+)`", README)
    return [shlex.split(line, comments=True) for line in lines]


TRAIN = [words[2:] for words in commands() if words[:2] == ["python", "train.py"]]


def test_python_runs(tmp_path: Path) -> None:
    # In order and in one folder: the last one runs the file that the first one writes.
    for snippet in blocks("python"):
        ran = subprocess.run(
            [sys.executable, "-c", snippet],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        assert (tmp_path / "student.onnx").is_file()


@pytest.mark.parametrize("arguments", TRAIN, ids=" ".join)
def test_training_commands_compose(arguments: list[str]) -> None:
    check(ROOT / "conf", arguments)


def test_cfg_job_prints_the_config_of_the_readme() -> None:
    (arguments,) = [words for words in TRAIN if "--cfg" in words]
    shown = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "bits: 6" in shown


# Coverage alone needs no file: it would measure every family.
ARCHNET = [w for w in commands() if w[0] == "archnet" and w[1:] != ["coverage"]]


@pytest.mark.parametrize("words", ARCHNET, ids=" ".join)
def test_archnet_commands_are_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their files do not exist here: that they end with our error shows that they were parsed.
    monkeypatch.chdir(tmp_path)
    assert archnet_command(words[1:]) == 2


def test_targets_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands():
        if words[0] == "make":
            chip, _, tool = words[1].partition("-")
            assert f"\n{f'{chip}-%' if tool else chip}:" in makefile
            assert not tool or tool in tools()
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file()
    for link in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / link).is_file()


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    assert tables.filled(README) == README, "run python benchmarks/tables.py"


def test_recorded_commands_compose() -> None:
    """Every row of the results names a command that still exists, and makes what the row says."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                words = shlex.split(row["command"])
                assert (ROOT / words[1]).is_file(), row["command"]
                if words[1] == "train.py":
                    quant = compose(ROOT / "conf", words[2:]).quant
                    widths = (str(quant.weight_bits), str(quant.act_bits))
                    assert widths == (row["weight_bits"], row["act_bits"]), row["command"]
