"""Runs the commands of the README and of docs/ as written, one after another, in a copy.

    python benchmarks/readme_commands.py --record    # training shortened, in minutes
    python benchmarks/readme_commands.py --whole     # as written, in hours

Every line of every bash block is run by bash in a temporary copy of the repository, with what it
names put in place: photos and a network of one's own, a run folder of the name that the README
gives its example, data beside the repository (small ones are made up where there are none).
`SHORT` is what the short form adds to a training command, and each line that is printed says so.
Then the sweep must have left three different students. The exit code is 1 if anything failed;
`--record` adds a row to `results/robustness.csv`.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from record import append_robustness

ROOT = Path(__file__).resolve().parents[1]
# Added to training commands: next to no work. A resumed run has the keys of its folder.
SHORT = [
    "distill.steps=8",
    "distill.joint_steps=2",
    "task.data.unlabelled=128",
    "teacher.fit.epochs=1",
    "trainer.limit_eval=100",
    "quant.calibration_batches=1",
]
# With less, a teacher translates everything into nothing.
PHRASES = ["teacher.fit.epochs=4", "task.data.unlabelled=300"]
MADE_UP = [
    "teacher=transformer_tiny",
    "teacher.fit.epochs=20",
    "task.text.batch_tokens=256",
    "task.text.vocabulary=300",
]
# And to those whose teacher is downloaded, or trained for long.
SHORTER = {
    "task=cifar10": ["teacher.train=false"],
    "task=imagenet": ["teacher.weights=null", "task.data.batch_size=4", "convert.calibration=2"],
    "experiment=phrases": PHRASES,
    "task=wmt14": MADE_UP,
    "task=multi30k": MADE_UP,
    "-m": ["distill.cache_images=128"],
}
# The README's own example of a run folder.
EXAMPLE = "2026-01-31_12-00-00_ab12"
NETWORK = """
from torch import nn


def make(**kwargs):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )
"""


def commands() -> list[str]:
    """The lines of all bash blocks, in order, without comments."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(), flags=re.DOTALL):
            found += [shlex.join(shlex.split(line, comments=True)) for line in block.splitlines()]
    return [line for line in found if line]


def shortened(command: str) -> list[str]:
    """What the short form adds to a command."""
    words = command.split()
    if words[:2] != ["python", "train.py"] or "resume=" in command:
        return []
    more = [text for part, texts in SHORTER.items() if part in words for text in texts]
    return [*SHORT, *more]


def reason_to_skip(command: str, whole: bool) -> str | None:
    """Why a command is not run here, if so."""
    words = command.split()
    if words[0] == "make" and words[1] == "test":
        return "it runs this repository's tests"
    if words[0] == "make" and words[1].startswith("chip-"):
        return "makes the environment of a vendor's tool"
    if words[0] == "make" and not whole:
        return "its command is run below, shortened"
    if words[:2] == ["archnet", "compile"]:
        return "needs the environment of a vendor's tool"
    if words[:2] == ["archnet", "coverage"] and len(words) == 2 and not whole:
        return "measures all families"
    return None


def prepare(place: Path, whole: bool) -> Path:
    """A copy of the repository in ``place``, with what the commands name."""
    copy = place / "archnet"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    (copy / ".venv").symlink_to(Path(sys.prefix))
    shims = place / "bin"
    shims.mkdir()
    for name, words in (("python", ""), ("archnet", "-m archnet")):
        (shims / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (shims / name).chmod(0o755)
    shared = ROOT.parent / "shared"
    if whole and shared.is_dir():
        (place / "shared").symlink_to(shared)
    else:
        _data(place / "shared" / "data")
    _photos(place / "imagenet", 30)
    _photos(copy / "photos", 60)
    package = copy / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for module in (package / "module.py", copy / "mynet.py"):
        module.write_text(NETWORK)
    save = "import torch, package.module as p; torch.save(p.make().state_dict(), 'weights.pt')"
    subprocess.run([sys.executable, "-c", save], cwd=copy, check=True)
    return copy


def _data(root: Path) -> None:
    """Small data of the kinds that the README's commands read."""
    _photos(root / "cifar10", 30, 32)
    drawn = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(drawn.choice(letters, drawn.integers(3, 9))) for _ in range(400)]
    for name in ("wmt_news", "multi30k"):
        (root / name).mkdir(parents=True)
        for split in ("train", "valid", "val", "test", "test_2016_flickr"):
            rows = drawn.integers(0, len(words), (300, 6))
            for language, step in (("en", 1), ("de", -1)):
                lines = [" ".join(words[index][::step] for index in row) for row in rows]
                (root / name / f"{split}.{language}").write_text("\n".join(lines) + "\n")


def _photos(root: Path, count: int, side: int = 64) -> None:
    """An ImageFolder of three classes that differ in colour."""
    drawn = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count // 3):
                pixels = drawn.integers(0, 100, (side, side, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(folder / f"{index}.png")


def run(command: str, copy: Path) -> tuple[int, str]:
    """The exit code of a command, and the end of what it said."""
    source = os.pathsep.join([str(copy / "src"), str(copy)])
    environment = os.environ | {
        "PATH": os.pathsep.join([str(copy.parent / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": source,
        "WANDB_MODE": "offline",
        "MAKEFLAGS": "-o .venv/.ready",  # the environment is the one that runs this
    }
    words = f"echo | {command}" if command.startswith("archnet translate") else command
    done = subprocess.run(
        ["bash", "-c", words],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, (done.stderr or done.stdout).strip()[-2000:]


def name_example(copy: Path) -> None:
    """Give the first finished run of each task the name that the README's examples have."""
    for task in filter(Path.is_dir, (copy / "outputs").glob("*")):
        runs = sorted(path.parent for path in task.glob("*/metrics.json"))
        if runs and not (task / EXAMPLE).exists():
            shutil.copytree(runs[0], task / EXAMPLE)
            if (runs[0] / "student.onnx").is_file():
                shutil.copy2(runs[0] / "student.onnx", copy / "student.onnx")


def sweep_faults(runs: Iterator[Path]) -> list[str]:
    """What is wrong with the runs of the README's sweep, which are three different students."""
    widths, students = [], set()
    for folder in runs:
        quant = json.loads((folder / "metrics.json").read_text())["quant"]
        widths.append((quant["weight_bits"], quant["act_bits"]))
        students.add((folder / "student.onnx").read_bytes())
    faults = []
    if sorted(widths) != [(2, 2), (4, 4), (8, 8)]:
        faults.append(f"the sweep over quant.bits=2,4,8 made students of {widths}")
    if len(students) != 3:
        faults.append(f"the sweep made {len(students)} different students")
    return faults


def main() -> int:
    """Run them all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--whole", action="store_true", help="as written, nothing shortened")
    parser.add_argument("--only", default="", help="pattern of those to run, beside the first")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    faults: list[str] = []
    count, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        copy = prepare(Path(place), options.whole)
        for index, command in enumerate(commands()):
            if index > 2 and not re.search(options.only, command):
                continue
            why = reason_to_skip(command, options.whole)
            if why:
                print(f"skipped, {why}: {command}", flush=True)
                continue
            count += 1
            added = [] if options.whole else shortened(command)
            before = set((copy / "outputs").glob("*/*/metrics.json"))
            began = time.monotonic()
            code, said = run(" ".join([command, *added]), copy)
            print(f"{time.monotonic() - began:6.0f} s, exit code {code}: {command}", flush=True)
            if added:
                print(f"{'':10}shortened by {' '.join(added)}")
            if code:
                faults.append(f"{command}: {said}")
                print(f"{'':10}{said}", flush=True)
            if " -m " in command and not code:
                made = set((copy / "outputs").glob("*/*/metrics.json")) - before
                faults += sweep_faults(path.parent for path in sorted(made))
            name_example(copy)
    for fault in faults:
        print(f"FAULT {fault}")
    print(f"{count} commands, {len(faults)} faults, {time.monotonic() - started:.0f} s")
    if options.record:
        tracebacks = sum("Traceback" in fault for fault in faults)
        append_robustness(
            "commands of the README and of docs/, " + ("whole" if options.whole else "shortened"),
            count,
            {"tracebacks": tracebacks, "crashes": len(faults) - tracebacks},
            time.monotonic() - started,
            " ".join(["python benchmarks/readme_commands.py", *(["--whole"] * options.whole)]),
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
