"""What README and docs say is true: their Python and commands run, their tables are current."""

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from archnet.chips import tools
from archnet.chips.host import bridges
from archnet.cli import main as archnet_command
from archnet.compose import check, compose

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ]
    if path.is_file()
}
# What the README leaves to its reader: a network and data.
BROUGHT = """
import torch
from torch import nn

torch.manual_seed(0)
teacher = nn.Sequential(
    nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
)
images = torch.randn(32, 3, 16, 16)
example, batches = images[:1], [images]
loader = torch.utils.data.DataLoader(list(zip(images, torch.zeros(32))), batch_size=8)
val_loader = torch.utils.data.DataLoader(images, batch_size=8)
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the pages, in blocks and in running text, as words.

    benchmarks/readme_commands.py runs those in blocks. Commands of results are those of the rows,
    which have a test of their own.
    """
    lines: list[str] = []
    for page, text in PAGES.items():
        lines += [line for block in blocks(page, "bash") for line in block.splitlines()]
        if page not in ("CHANGELOG.md", "docs/results.md"):
            lines += re.findall(r"`((?:python|archnet|make) [^`<…]+)`", text)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


STARTS = (["python", "train.py"], ["archnet", "train"])
TRAIN = [words[2:] for words in commands() if words[:2] in STARTS]


def run_python(snippet: str, folder: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_python_of_the_readme_runs(tmp_path: Path) -> None:
    (snippet,) = blocks("README.md", "python")
    shortened = snippet.replace("steps=2000", "steps=4")
    assert shortened != snippet
    run_python(BROUGHT + shortened, tmp_path)
    assert (tmp_path / "student.onnx").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md"])
def test_python_of_the_docs_runs(page: str, tmp_path: Path) -> None:
    # In order and in one folder: a later block runs the file that an earlier one writes.
    for snippet in blocks(page, "python"):
        run_python(snippet, tmp_path)


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
ARCHNET = [
    words
    for words in commands()
    if words[0] == "archnet" and words[1:] != ["coverage"] and words[:2] not in STARTS
    if "--install" not in words  # which it would do
]


@pytest.mark.parametrize("words", ARCHNET, ids=" ".join)
def test_archnet_commands_are_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their files do not exist here: that they end with our error shows that they were parsed.
    monkeypatch.chdir(tmp_path)
    assert archnet_command(words[1:]) == 2


def test_tools_to_install_are_known() -> None:
    for words in commands():
        if "--install" in words:
            assert words[words.index("--install") + 1] in bridges()


def test_targets_and_files_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for words in commands():
        if words[0] == "make":
            chip, _, tool = words[1].partition("-")
            assert f"\n{f'{chip}-%' if tool else chip}:" in makefile
            assert not tool or tool in tools()
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page]):
        assert (ROOT / page).parent.joinpath(link).is_file(), link


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    assert tables.filled(README) == README, "run python benchmarks/tables.py"
    assert tables.page() == PAGES["docs/results.md"], "run python benchmarks/tables.py"


def test_the_page_of_keys_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import configuration

    assert configuration.page() == PAGES["docs/configuration.md"], (
        "run python docs/configuration.py"
    )
    for name, keys in configuration.meanings().items():
        assert all(keys.values()), f"{name}: a key has no comment that says what it means"


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
