"""``report.html``: one file, readable anywhere."""

import csv
import io
import json
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from archnet.report.table import rows

Curves = dict[str, list[tuple[int, float]]]


def write(folder: Path) -> Path:
    """Write ``report.html`` of a run folder that holds ``metrics.json``; returns its path."""
    metrics = json.loads((folder / "metrics.json").read_text())
    template = files("archnet.report").joinpath("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    path = folder / "report.html"
    path.write_text(
        page.render(
            name=folder.name,
            metrics=metrics,
            rows=rows(metrics),
            plot=_plot(curves(folder)),
            conversion=_rows(folder / "conversion.json"),
            forms=_rows(folder / "forms.json"),
            forms_plot=_forms_plot(_rows(folder / "forms.json")),
            config=(folder / "config.yaml").read_text(),
        ),
        encoding="utf-8",
    )
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    """A table that not every run has."""
    return json.loads(path.read_text()) if path.is_file() else []


def curves(folder: Path) -> Curves:
    """Every logged loss as (step, value) pairs, all sessions of a resumed run together."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for log in sorted((folder / "logs" / "csv").glob("*/metrics.csv")):
        with log.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and "loss" in name:
                        # A later session repeats the steps after the last checkpoint.
                        found[name][int(float(row["step"]))] = float(value)
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def _plot(lines: Curves) -> str:
    """The losses as an SVG element; empty when there are none."""
    if not lines:
        return ""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    for name, points in lines.items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name.removeprefix("loss/"), linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure)


def _forms_plot(forms: list[dict[str, Any]]) -> str:
    """What error is left at the nodes that have two forms, over the student's cost."""
    if not forms:
        return ""
    ratios, left = (
        [forms[0]["total"] - forms[0]["cost"]],
        [sum(row["compact"] ** 2 for row in forms)],
    )
    for row in forms:
        ratios.append(row["total"])
        left.append(left[-1] - row["compact"] ** 2 + row["faithful"] ** 2)
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot(ratios, left, marker=".", linewidth=1)
    taken = [i for i, row in enumerate(forms, 1) if row["taken"]]
    axes.plot([ratios[i] for i in taken], [left[i] for i in taken], "o", label="taken")
    axes.set(xlabel="MACs, x teacher", ylabel="sum of squared errors")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream)
    return stream.getvalue().partition("<svg")[1] + stream.getvalue().partition("<svg")[2]
