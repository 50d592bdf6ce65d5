"""``report.html``: one file, readable anywhere."""

import io
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from archnet.errors import printable
from archnet.report import files as files_of
from archnet.report.files import CONVERSION, FORMS, Curves, curves
from archnet.report.table import reading, rows
from archnet.runs import atomic, read_json, read_text

_log = logging.getLogger(__name__)


def write(folder: Path) -> Path:
    """Write ``report.html`` of a run folder that holds ``metrics.json``; returns its path.

    Raises:
        ArchnetError: the metrics cannot be read, or the page cannot be written.
    """
    metrics = read_json(folder / "metrics.json", dict)
    template = files("archnet.report").joinpath("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template)
    path = folder / "report.html"
    forms = files_of.rows(folder, FORMS)
    with reading(folder / "metrics.json"):
        text = page.render(
            name=folder.name,
            metrics=metrics,
            rows=rows(metrics),
            plot=_plot(curves(folder)),
            conversion=files_of.rows(folder, CONVERSION),
            forms=forms,
            forms_plot=_forms_plot(forms),
            config=read_text(folder / "config.yaml", 1 << 20),
        )
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _plot(lines: Curves) -> str:
    """The losses as an SVG element; empty when there are none."""
    if not lines:
        return ""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes: Any = figure.subplots()
    for name, points in lines.items():
        steps, values = zip(*points, strict=True)
        # Matplotlib reads what stands between dollars as a formula.
        label = printable(name.removeprefix("loss/")).replace("$", r"\$")
        axes.plot(steps, values, label=label, linewidth=1)
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
