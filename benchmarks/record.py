"""Results as rows of ``benchmarks/results/<name>.csv``, each with its command and its cost.

    python benchmarks/record.py <run folder> --into cifar10

adds the row of a finished run. The other scripts of this folder measure something themselves and
use `append`.
"""

import argparse
import csv
import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

from archnet.compose import compose
from archnet.config import Config, keys
from archnet.errors import ArchnetError
from archnet.runs import RunFolder, read_json

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
RESULTS = ROOT / "benchmarks" / "results"

# Shared by all tables. Accuracies are in points (0 to 100), bits of 32 mean float, `macs_ratio`
# is the student's multiply-accumulates over the teacher's, `bops` and `weight_bytes` are the
# student's, `inputs_seen` counts images or sentences through the whole network, `minutes` those of
# training.
COLUMNS = (
    "date",
    "task",
    "teacher",
    "hardware",
    "weight_bits",
    "act_bits",
    "metric",
    "teacher_value",
    "student_value",
    "agreement",
    "macs_ratio",
    "bops",
    "weight_bytes",
    "inputs_seen",
    "minutes",
    "seed",
    "versions",
    "command",
)
ROBUSTNESS = (
    "date",
    "what",
    "count",
    "tracebacks",
    "hangs",
    "crashes",
    "executed",
    "seconds",
    "versions",
    "seed",
    "command",
)
_PACKAGES = ("archnet", "torch", "torchvision", "lightning", "onnx", "onnxruntime")
# Keys that say where a run leaves its files, not what it computes.
# Not the name: convert.student finds a run by it.
_PLACES = ("resume", "output_dir", "logger", "teacher.cache_dir", "trainer.progress")


def append(name: str, row: Mapping[str, Any]) -> Path:
    """Add one row to a table; columns that it does not know yet are added at the end.

    Args:
        name: the table, without folder or suffix.
        row: values by column; date, versions and commit are filled in where they are missing.

    Returns:
        The table's file.
    """
    now = datetime.now()
    filled = {"date": f"{now:%Y-%m-%d}", "versions": versions(), **row}
    filled.setdefault("commit", commit_before(now))
    path = RESULTS / f"{name}.csv"
    rows: list[dict[str, Any]] = [*read(name), filled]
    columns = list(dict.fromkeys([*COLUMNS, *(key for each in rows for key in each)]))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    part.replace(path)
    return path


def append_robustness(
    what: str,
    count: int,
    found: Mapping[str, int],
    seconds: float,
    command: str,
    seed: int | None = None,
) -> Path:
    """Add a row to ``robustness.csv``: what was tried, and how often it ended as nothing should.

    Args:
        what: was tried.
        count: of it.
        found: how many ended in ``tracebacks``, ``hangs`` or ``crashes``, or ``executed`` code;
            what a driver does not look for is left out, and its cell stays empty.
        seconds: on the clock.
        command: that tries it again.
        seed: of whatever was drawn; None: nothing was.
    """
    path = RESULTS / "robustness.csv"
    row = {
        "date": f"{datetime.now():%Y-%m-%d}",
        "what": what,
        "count": count,
        **found,
        "seconds": round(seconds),
        "versions": versions(),
        "seed": "" if seed is None else seed,
        "command": command,
    }
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, ROBUSTNESS, restval="", lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    return path


def read(name: str) -> list[dict[str, str]]:
    """The rows of a table; none if there is no such table yet."""
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def versions(installed: Mapping[str, str] | None = None) -> str:
    """Package versions in one cell, as a run noted them, or else of this environment."""
    found = {name: version(name) for name in _PACKAGES} if installed is None else installed
    return "; ".join(f"{name} {number}" for name, number in found.items())


def commit_before(moment: datetime) -> str:
    """The last commit of the code before a moment; empty outside a git checkout."""
    found = subprocess.run(
        [
            "git",
            "rev-list",
            "-1",
            "--abbrev-commit",
            f"--before={moment:%Y-%m-%d %H:%M:%S}",
            "HEAD",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


def run_row(path: Path) -> dict[str, Any]:
    """The row of a finished run.

    Raises:
        RunError: the folder is no run folder, or the run has not finished.
    """
    folder = RunFolder.open(path)
    config, metrics = folder.config(), read_json(folder.metrics)
    started = datetime.strptime("_".join(folder.path.name.split("_")[:2]), "%Y-%m-%d_%H-%M-%S")
    macs, bops = metrics["cost"]["macs"], metrics["cost"]["bops"]
    seconds = metrics["seconds"]
    translates = "bleu" in metrics["student"]
    metric = next(iter(metrics["student"]))
    return {
        "date": f"{started:%Y-%m-%d}",
        "task": metrics["task"],
        "teacher": _teacher(config),
        "hardware": metrics["hardware"],
        "weight_bits": metrics["quant"]["weight_bits"],
        "act_bits": metrics["quant"]["act_bits"],
        "metric": metric,
        "teacher_value": metrics["teacher"].get(metric, ""),
        "student_value": metrics["student"][metric],
        "agreement": metrics["student"]["agreement"],
        "macs_ratio": round(macs["student"] / macs["teacher"], 4),
        "bops": bops["student"],
        "weight_bytes": metrics["cost"]["weight_bytes"]["student"],
        "inputs_seen": metrics["data"]["inputs_seen"],
        "minutes": round((seconds["convert"] + seconds["distill"]) / 60, 2),
        "seed": metrics["seed"],
        "versions": versions(metrics["versions"]),
        "command": command(config),
        "commit": commit_before(started),
        "bops_ratio": round(bops["student"] / bops["teacher_w8a8"], 4),
        "unlabelled": metrics["data"]["unlabelled"],
        "evaluated": metrics["data"]["evaluated"],
        "pure": metrics["audit"]["pure"],
        "parity_mismatches": metrics["parity"]["mismatches"],
        "parity_max_abs_diff": metrics["parity"]["max_abs_diff"],
        "schedule": config.distill.schedule,
        "attention": config.distill.attention,
        "adaptation": config.distill.adaptation,
        "block_inputs": config.distill.inputs if config.distill.schedule == "local" else "",
        "method": config.quant.method,
        "copies": config.quant.copies,
        "budget": metrics["quant"].get("budget", ""),
        "budget_of": metrics["quant"].get("budget_of", ""),
        "start": config.convert.start,
        "device": metrics.get("device", "cpu"),  # runs before the column were of the CPU
        **_validation(folder),
        **(_searched(folder, config, metrics) if "goal" in metrics else {}),
        **(_translation(config, metrics) if translates else {}),
    }


def _translation(config: Config, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What only rows of translation have."""
    return {
        "chrf_teacher": metrics["teacher"]["chrf"],
        "chrf_student": metrics["student"]["chrf"],
        "signature": metrics["student"]["signature"],
        "languages": f"{config.task.text.source}-{config.task.text.target}",
        "test": config.task.text.test,
        "beam": config.task.text.beam,
        "minutes_teacher_text": round(metrics["seconds"]["translations"] / 60, 2),
    }


def _searched(folder: RunFolder, config: Config, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What only rows of a goal have; their trials are kept beside the tables."""
    goal, asked = metrics["goal"], config.goal
    name = f"{folder.path.name.split('_')[0]}_{metrics['task']}_{config.teacher.name}"
    quant = metrics["quant"]
    kept = RESULTS / "search" / f"{name}_w{quant['weight_bits']}a{quant['act_bits']}"
    kept = kept.with_name(f"{kept.name}_{metrics['hardware']}_seed{config.seed}.json")
    kept.parent.mkdir(exist_ok=True)
    kept.write_bytes((folder.path / "search.json").read_bytes())
    return {
        "goal_drop": "" if asked.drop is None else asked.drop,
        "goal_agreement": "" if asked.agreement is None else asked.agreement,
        "goal_minutes": "" if asked.minutes is None else asked.minutes,
        "goal_cost": "" if asked.cost is None else asked.cost,
        "kept": goal["kept"],
        "val_drop": "" if goal["validation"]["drop"] is None else goal["validation"]["drop"],
        "val_agreement": goal["validation"]["agreement"],
        "val_inputs": goal["validation"]["inputs"],
        "trials": goal["trials"],
        "minutes": goal["minutes"],
        "search": f"search/{kept.name}",
        # A search has several schedules.
        "schedule": "",
        "block_inputs": "",
        "attention": False,
        "adaptation": False,
    }


def _teacher(config: Config) -> str:
    """The teacher's name with whatever is not its default."""
    extras = [f"{key} {value}" for key, value in config.teacher.kwargs.items()]
    return ", ".join([config.teacher.name, *extras])


def _validation(folder: RunFolder) -> dict[str, float]:
    """The last validation while training, from the log: what variants are chosen by."""
    found: dict[str, float] = {}
    for path in sorted((folder.path / "logs" / "csv").glob("*/metrics.csv")):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                for figure in ("accuracy", "agreement"):
                    if line.get(f"val/{figure}"):
                        found[f"val_{figure}"] = round(float(line[f"val/{figure}"]), 4)
    return found


def command(config: Config) -> str:
    """The shortest command that composes to a config, up to where files are left.

    Tried are every experiment, with other groups in it, and the groups that carry the config's
    names; keys that differ from what these compose to are given one by one.
    """
    quant = f"quant={config.quant.method if config.quant.budget is None else 'mixed'}"
    hardware = f"hardware={config.hardware.name}"
    named = (f"teacher={config.teacher.name}", quant, hardware)
    # More groups first: of commands that are equally long the one with a group says more.
    others = [list(some) for count in (3, 2, 1, 0) for some in combinations(named, count)]
    experiments = [
        [f"experiment={path.stem}", *groups]
        for path in sorted((CONF / "experiment").glob("*.yaml"))
        for groups in others
    ]
    translates = config.task.kind == "translation"
    group = hardware if translates else f"distill={config.distill.schedule}"
    teachers = dict.fromkeys([config.teacher.name, config.teacher.source, *_teachers(config)])
    groups = [
        [f"task={config.task.name}", f"teacher={teacher}", *some]
        for teacher in teachers
        for some in ([quant, group], [])
    ]
    written = []
    # A goal is there so that no experiment is needed.
    for start in [[], *([] if config.goal.asked else experiments), *groups]:
        try:
            written.append([*start, *_differences(compose(CONF, start), config)])
        except ArchnetError:
            continue  # these groups do not exist, or need keys of their own
    best = min(written, key=len)
    # A key may set another one, as quant.bits does.
    best += _differences(compose(CONF, best), config)
    return " ".join(["python train.py", *best])


def _teachers(config: Config) -> list[str]:
    """Options of the group whose teacher is that of a config."""
    found = []
    for path in sorted((CONF / "teacher").glob("*.yaml")):
        try:
            composed = compose(CONF, [f"task={config.task.name}", f"teacher={path.stem}"])
        except ArchnetError:
            continue  # it needs keys of its own
        if composed.teacher == config.teacher:
            found.append(path.stem)
    return found


def _differences(base: Config, config: Config) -> list[str]:
    before = dict(keys(base))
    found = []
    for key, value in keys(config):
        if value == before[key] or key.startswith(_PLACES):
            continue
        if isinstance(value, dict):
            new = {k: v for k, v in value.items() if before[key].get(k) != v}
            found += [
                f"{'' if k in before[key] else '+'}{key}.{k}={_shown(v)}" for k, v in new.items()
            ]
        else:
            found.append(f"{key}={_shown(value)}")
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).replace(" ", "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Add the rows of run folders to a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="run", help="finished run folder")
    parser.add_argument("--into", required=True, metavar="name", help="table, such as cifar10")
    options = parser.parse_args(arguments)
    for run in options.runs:
        print(append(options.into, run_row(run)))


if __name__ == "__main__":
    main()
