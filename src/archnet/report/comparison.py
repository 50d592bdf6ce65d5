"""Runs beside each other: accuracy over cost, seeds together, tasks apart."""

import csv
import glob
import logging
import math
import os
import statistics
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from archnet.config import keys
from archnet.errors import ArchnetError, printable
from archnet.report.chart import Mark, marks_chart
from archnet.report.page import page
from archnet.report.table import METRICS, amount, plain_console, reading
from archnet.report.verdict import headline, verdict
from archnet.runs import RunError, RunFolder, atomic, read_json, read_text
from archnet.runs.folder import RUNS

_log = logging.getLogger(__name__)

NAME = "comparison"  # of the files that are written
# Keys that do not make two configs different: where and how a run computes, and its chance.
_CHANCE = ("seed", "output_dir", "name", "resume", "trust", "trainer", "logger")
_SHOWN_KEYS = 3
_MEASURES = {"bops": "bit operations", "cycles": "cycles"}


@dataclass(frozen=True)
class Run:
    """One finished run, as a row of the table.

    ``value`` is in the unit of ``metric``; ``low`` and ``high`` bound its difference from the
    teacher's. ``cost`` is a multiple of the teacher's on its target. ``config`` has the keys that
    say what was computed.
    """

    folder: Path
    group: str
    metric: str
    teacher: str
    bits: str
    value: float
    teacher_value: float | None
    low: float | None
    high: float | None
    agreement: float | None
    cost: float | None
    measure: str
    weight_bytes: float
    minutes: float
    seed: int
    bad_deal: bool
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Row:
    """One config: a run, or the runs of several seeds, of which ``value`` is the mean.

    ``spread`` is the standard deviation over seeds; ``mark`` a letter that the plot shows;
    ``best`` whether no other config is as good for less.
    """

    mark: str
    runs: tuple[Run, ...]
    differs: str
    value: float
    spread: float | None
    cost: float | None
    agreement: float | None
    minutes: float
    best: bool

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.seed) for run in self.runs)

    @property
    def interval(self) -> str:
        """Of the difference from the teacher; of several seeds their spread stands instead."""
        low, high = self.first.low, self.first.high
        if self.spread is not None or low is None or high is None:
            return ""
        return f"{low:+.2f} to {high:+.2f}"

    @property
    def shown(self) -> str:
        return f"{self.value:.2f}" + ("" if self.spread is None else f" ± {self.spread:.2f}")


@dataclass(frozen=True)
class Group:
    """Configs that may be compared: of one task, judged by one metric."""

    name: str
    metric: str
    measure: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Comparison:
    """Groups of finished runs, and why each of the others is none."""

    groups: tuple[Group, ...]
    unfinished: tuple[tuple[Path, str], ...]


def find(given: Iterable[str | Path]) -> list[Path]:
    """The run folders that paths name, each once.

    Args:
        given: run folders, folders that hold some (a multirun's has a list), or patterns.

    Raises:
        RunError: one of them names none.
    """
    found: dict[Path, None] = {}
    for text in map(str, given):
        places = sorted(glob.glob(text)) if glob.has_magic(text) else [text]
        runs = [run for place in places for run in _runs_of(Path(place))]
        if not runs:
            raise RunError(f"{text} names no run folder, and no folder that holds some")
        found.update(dict.fromkeys(runs))
    return list(found)


def _runs_of(place: Path) -> list[Path]:
    if (place / "config.yaml").is_file():
        return [place]
    if (place / RUNS).is_file():
        names = read_text(place / RUNS, 1 << 20).splitlines()
        return [Path(os.path.normpath(place / name)) for name in dict.fromkeys(names) if name]
    depths = ("*/config.yaml", "*/*/config.yaml", "*/*/*/config.yaml")
    return sorted(path.parent for depth in depths for path in place.glob(depth))


def compare(folders: Iterable[Path]) -> Comparison:
    """Read runs, and put together what belongs together."""
    runs, unfinished = [], list[tuple[Path, str]]()
    for folder in folders:
        try:
            runs.append(_read(folder))
        except ArchnetError as error:
            unfinished.append((folder, str(error)))
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.group, run.metric, run.measure), []).append(run)
    return Comparison(
        tuple(Group(*key, _rows(members)) for key, members in groups.items()), tuple(unfinished)
    )


def _read(folder: Path) -> Run:
    """A run's figures.

    Raises:
        ArchnetError: it is not finished, or its files are not what a run writes.
    """
    opened = RunFolder.open(folder)
    config = opened.config()
    if not opened.metrics.is_file():
        raise RunError("not finished")
    metrics = read_json(opened.metrics, dict)
    with reading(opened.metrics):
        return _run(folder, metrics, dict(keys(config)))


def _run(folder: Path, metrics: Mapping[str, Any], config: Mapping[str, Any]) -> Run:
    found, key, student = verdict(metrics), headline(metrics), metrics["student"]
    metric, value, teacher = key or "agreement", student.get("agreement"), None
    if key is not None:
        value, teacher = student[key], metrics["teacher"][key]
    elif value is None:
        metric, value = "relative_error", student["relative_error"]
    quant = metrics["quant"]
    bits = f"W{quant['weight_bits']}A{quant['act_bits']}"
    if quant["method"] == "none":
        bits = "float"
    elif "widths" in quant:
        bits = f"mixed, {quant['share']:.2f} of {bits}"
    elif quant.get("copies", 1) > 1:
        bits += f" x {quant['copies']}"
    return Run(
        folder=folder,
        group=f"{metrics['task']}",
        metric=metric,
        teacher=metrics["teacher"]["name"],
        bits=f"{bits}, {metrics['hardware']}",
        value=float(value),
        teacher_value=teacher,
        low=found["low"] if key else None,
        high=found["high"] if key else None,
        agreement=student.get("agreement"),
        cost=found["cost_ratio"],
        measure=found["measure"],
        weight_bytes=metrics["cost"]["weight_bytes"]["student"],
        minutes=metrics["seconds"]["total"] / 60,
        seed=metrics["seed"],
        bad_deal=found["bad_deal"],
        config={k: v for k, v in config.items() if k.split(".")[0] not in _CHANCE},
    )


def _rows(runs: Sequence[Run]) -> tuple[Row, ...]:
    """A row for each config, the cheapest first."""
    configs: dict[str, list[Run]] = {}
    for run in runs:
        configs.setdefault(repr(sorted(run.config.items())), []).append(run)
    sets = sorted(configs.values(), key=lambda s: (s[0].cost is None, s[0].cost or 0.0))
    better = -1 if runs[0].metric == "relative_error" else 1
    points = [(s[0].cost, better * _mean(run.value for run in s)) for s in sets]
    rows = []
    for number, members in enumerate(sets):
        cost, value = points[number]
        beaten = cost is None or any(
            other[0] is not None
            and other[0] <= cost
            and other[1] >= value
            and other != points[number]
            for other in points
        )
        values = [run.value for run in members]
        agreements = [run.agreement for run in members if run.agreement is not None]
        rows.append(
            Row(
                mark=_mark(number),
                runs=tuple(members),
                differs=_differs(members[0], [s[0] for s in sets]),
                value=statistics.fmean(values),
                spread=statistics.stdev(values) if len({run.seed for run in members}) > 1 else None,
                cost=cost,
                agreement=_mean(agreements) if agreements else None,
                minutes=_mean(run.minutes for run in members),
                best=not beaten,
            )
        )
    return tuple(rows)


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _mark(number: int) -> str:
    """A, B, ... Z, A1, B1, ..."""
    turn, letter = divmod(number, 26)
    return string.ascii_uppercase[letter] + (str(turn) if turn else "")


def _differs(run: Run, others: Sequence[Run]) -> str:
    """The keys in which a config is not as all others."""
    found = [
        f"{key}={value}"
        for key, value in run.config.items()
        if any(other.config.get(key) != value for other in others)
        # Those are in a column of their own, or say no more than that.
        and not key.startswith(("hardware.", "quant.bits", "quant.weight_bits", "quant.act_bits"))
    ]
    more = len(found) - _SHOWN_KEYS
    return " ".join(found[:_SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")


# What people see ------------------------------------------------------------------------------

COLUMNS = (
    "", "bits, target", "differs in", "{metric}", "95 % from teacher", "agreement", "cost",
    "weights", "minutes", "seeds",
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    first = row.first
    return [
        row.mark + (" *" if row.best else ""),
        first.bits,
        row.differs,
        row.shown,
        row.interval,
        "" if row.agreement is None else f"{row.agreement:.2f}",
        "" if row.cost is None else f"{row.cost:.3g} x" + (" (bad deal)" if first.bad_deal else ""),
        amount(first.weight_bytes, "B"),
        f"{row.minutes:.1f}",
        row.seeds,
    ]


def title(group: Group) -> str:
    """What the value of a group's rows is."""
    return METRICS.get(group.metric, group.metric.replace("_", " "))


def cost_title(group: Group) -> str:
    """What the cost of a group's rows is a multiple of."""
    return f"cost: {_MEASURES.get(group.measure, group.measure)}, x teacher at 8 bits"


def teacher_line(group: Group) -> str:
    """The teachers' own figures."""
    known = {
        f"{run.teacher} {run.teacher_value:.2f}": None
        for row in group.rows
        for run in row.runs
        if run.teacher_value is not None
    }
    return f"teacher: {', '.join(known)}" if known else ""


def show(comparison: Comparison) -> None:
    """Print tables and plots."""
    console = plain_console()
    if not console.is_terminal:
        console = plain_console(140)
    for group in comparison.groups:
        table = Table(title=group.name, title_justify="left")
        for column in COLUMNS:
            table.add_column(column.format(metric=title(group)), overflow="fold")
        for row in group.rows:
            table.add_row(*_cells(row))
        console.print(table)
        for line in (f"* no other is as good for less; {cost_title(group)}", teacher_line(group)):
            if line:
                console.print(line, highlight=False, soft_wrap=True)
        for line in _plot(group):
            console.print(line, highlight=False, soft_wrap=True)
    for folder, why in comparison.unfinished:
        console.print(f"left out: {folder}: {why}", highlight=False, soft_wrap=True)


_PLOT = (56, 12)  # characters


def _plot(group: Group) -> list[str]:
    """Value over cost in letters; nothing for less than two points."""
    points = [(row.cost, row.value, row.mark) for row in group.rows if row.cost is not None]
    if len({point[:2] for point in points}) < 2:
        return []
    (width, height), xs, ys = _PLOT, [p[0] for p in points], [p[1] for p in points]
    grid = [[" "] * (width + 4) for _ in range(height)]
    for x, y, mark in points:
        across = round((x - min(xs)) / (max(xs) - min(xs) or 1) * (width - 1))
        up = round((y - min(ys)) / (max(ys) - min(ys) or 1) * (height - 1))
        line = grid[height - 1 - up]
        while any(line[across + i] != " " for i in range(len(mark))) and across < width:
            across += 1
        for i, letter in enumerate(mark):
            line[across + i] = letter
    lines = [f"{title(group)}"]
    for number, line in enumerate(grid):
        label = {0: f"{max(ys):.2f}", height - 1: f"{min(ys):.2f}"}.get(number, "")
        lines.append(f"{label:>9} |{''.join(line).rstrip()}")
    lines.append(f"{'':>9} +{'-' * width}")
    left, right = f"{min(xs):.3g}", f"{max(xs):.3g}"
    lines.append(f"{'':>11}{left}{right:>{width - len(left)}}  {cost_title(group)}")
    return lines


def marks(group: Group) -> list[Mark]:
    """The points of a group's plot."""
    found = []
    for row in group.rows:
        if row.cost is None:
            continue
        low = high = None
        if row.spread is not None:
            low, high = row.value - row.spread, row.value + row.spread
        elif row.interval and row.first.teacher_value is not None:
            bounds = row.first.low, row.first.high
            low, high = (row.first.teacher_value + (bound or 0.0) for bound in bounds)
        found.append(Mark(row.mark, row.cost, row.value, low, high, row.best))
    return found


# Files ----------------------------------------------------------------------------------------


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the comparison as HTML, CSV and PNG; the paths of what was written.

    Raises:
        RunError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror}") from error
    paths = [folder / f"{NAME}.{kind}" for kind in ("html", "csv")]
    with atomic(paths[0]) as temporary:
        temporary.write_text(_page(comparison), encoding="utf-8")
    with atomic(paths[1]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        _write_csv(comparison, csv.writer(file))
    try:
        picture = folder / f"{NAME}.png"
        with atomic(picture) as temporary:
            _write_png(comparison, temporary)
        paths.append(picture)
    except Exception as error:  # of a drawing library that is not in order
        _log.warning("%s.png is not written: %s", NAME, " ".join(str(error).split())[:200])
    return paths


def _page(comparison: Comparison) -> str:
    groups = [
        {
            "name": group.name,
            "columns": [column.format(metric=title(group)) for column in COLUMNS],
            "rows": [(_cells(row), row) for row in group.rows],
            "plot": marks_chart(marks(group), cost_title(group), title(group)),
            "cost": cost_title(group),
            "teacher": teacher_line(group),
        }
        for group in comparison.groups
    ]
    return page(
        "comparison.html",
        groups=groups,
        unfinished=[(str(folder), printable(why)) for folder, why in comparison.unfinished],
    )


def _write_csv(comparison: Comparison, out: Any) -> None:
    """A line for each run, so that nothing is averaged away."""
    out.writerow(
        ["task", "config", "pareto", "folder", "teacher", "bits", "differs", "metric", "value",
         "teacher_value", "low", "high", "agreement", "cost_ratio", "cost_measure", "bad_deal",
         "weight_bytes", "minutes", "seed"]
    )  # fmt: skip
    for group in comparison.groups:
        for row in group.rows:
            for run in row.runs:
                out.writerow(
                    [group.name, row.mark, row.best, run.folder, run.teacher, run.bits,
                     row.differs, run.metric, run.value, run.teacher_value, run.low, run.high,
                     run.agreement, run.cost, run.measure, run.bad_deal, run.weight_bytes,
                     round(run.minutes, 3), run.seed]
                )  # fmt: skip


def _write_png(comparison: Comparison, path: Path) -> None:
    # Drawn without any of matplotlib's windows, and imported here: a broken setting of it
    # (MPLBACKEND) fails at import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [group for group in comparison.groups if marks(group)]
    figure = Figure(figsize=(7, 4 * max(1, len(groups))), layout="constrained", dpi=120)
    for number, group in enumerate(groups, 1):
        axes: Any = figure.add_subplot(len(groups), 1, number)
        points = marks(group)
        for mark in points:
            if mark.low is not None and mark.high is not None:
                axes.plot([mark.x] * 2, [mark.low, mark.high], color="0.7", linewidth=1)
            colour = "C0" if mark.best else "0.5"
            axes.plot(mark.x, mark.y, "o", color=colour)
            axes.annotate(mark.name, (mark.x, mark.y), (5, 5), textcoords="offset points")
        best = sorted((mark.x, mark.y) for mark in points if mark.best)
        axes.plot([x for x, _ in best], [y for _, y in best], color="C0", linewidth=1)
        # Matplotlib reads what stands between dollars as a formula.
        axes.set_title(printable(group.name).replace("$", r"\$"), loc="left")
        axes.set(xlabel=cost_title(group), ylabel=printable(title(group)).replace("$", r"\$"))
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def objectives(metrics: Mapping[str, Any]) -> list[float]:
    """What a sweep over two objectives is told of a run: how good, to be maximized, and its cost,
    to be minimized. Of a run without labels its agreement with the teacher is how good it is.
    """
    found, student = verdict(metrics), metrics["student"]
    key = headline(metrics)
    good = student[key] if key is not None else student.get("agreement")
    if good is None:
        good = -student.get("relative_error", math.inf)
    ratio = found["cost_ratio"]
    return [float(good), math.inf if ratio is None else float(ratio)]
