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
    conversion = folder / "conversion.json"
    template = files("archnet.report").joinpath("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    path = folder / "report.html"
    path.write_text(
        page.render(
            name=folder.name,
            metrics=metrics,
            rows=rows(metrics),
            plot=_plot(curves(folder)),
            conversion=json.loads(conversion.read_text()) if conversion.is_file() else [],
            config=(folder / "config.yaml").read_text(),
        ),
        encoding="utf-8",
    )
    return path


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
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream)
    return stream.getvalue().partition("<svg")[1] + stream.getvalue().partition("<svg")[2]
