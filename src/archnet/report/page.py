"""``report.html``: one file, readable anywhere."""

import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from archnet.errors import printable
from archnet.report import files as parts_of
from archnet.report.chart import COLOURS, Line, Mark, lines_chart, marks_chart
from archnet.report.files import CONVERSION, FORMS, LAYERS, SEARCH, Curves
from archnet.report.table import reading, rows
from archnet.runs import atomic, read_json, read_text

_log = logging.getLogger(__name__)
_TITLES = {"val/agreement": "agreement with the teacher", "val/accuracy": "accuracy"}


def write(folder: Path) -> Path:
    """Write ``report.html`` of a run folder that holds ``metrics.json``; returns its path.

    Raises:
        ArchnetError: the metrics cannot be read, or the page cannot be written.
    """
    metrics = read_json(folder / "metrics.json", dict)
    path = folder / "report.html"
    lines, forms = parts_of.curves(folder), parts_of.rows(folder, FORMS)
    details = parts_of.evaluation(folder)
    with reading(folder / "metrics.json"):
        text = page(
            "report.html",
            name=folder.name,
            metrics=metrics,
            verdict=metrics.get("verdict") or parts_of.judged(folder, metrics),
            rows=rows(metrics),
            stages=stages(lines),
            validation=_validation(lines),
            trials=parts_of.rows(folder, SEARCH),
            layers=parts_of.rows(folder, LAYERS),
            details=details,
            matrix=_matrix(details),
            conversion=parts_of.rows(folder, CONVERSION),
            forms=forms,
            forms_plot=_forms_plot(forms),
            config=read_text(folder / "config.yaml", 1 << 20),
        )
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def page(template: str, **values: Any) -> str:
    """A page of a template of this package, with its style and script inside."""
    here = files("archnet.report")
    texts = {
        name: here.joinpath(name).read_text(encoding="utf-8")
        for name in (template, "page.css", "page.js")
    }
    made = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters["plain"] = lambda text: printable(str(text), None)
    return made.from_string(texts[template]).render(
        css=texts["page.css"], js=texts["page.js"], **values
    )


def stages(lines: Curves) -> list[dict[str, Any]]:
    """A chart for each stage of training: its name, the picture, and the names of its curves.

    Those of the highest losses are drawn, the scores' before them; the rest on demand.
    """
    found = []
    for stage, curves in parts_of.by_stage(lines).items():
        order = sorted(curves, key=lambda name: (name != "logits", -curves[name][-1][1]))
        drawn = [Line(name, curves[name]) for name in order if any(y > 0 for _, y in curves[name])]
        chart = lines_chart(drawn, "step", "not explained")
        if chart:
            names = [printable(line.name) for line in drawn]
            found.append({"name": printable(stage or "all"), "chart": chart, "names": names})
    return found


def _validation(lines: Curves) -> dict[str, Any] | None:
    shown = [Line(title, lines[name]) for name, title in _TITLES.items() if lines.get(name)]
    chart = lines_chart(shown, "step", "points", log=False)
    return {"chart": chart, "names": [line.name for line in shown]} if chart else None


def _matrix(details: Mapping[str, Any]) -> dict[str, Any] | None:
    """A confusion matrix whose cells know how deep they are coloured, 0 to 1, row by row."""
    found = details.get("confusion")
    if not isinstance(found, dict):
        return None
    counts: Sequence[Sequence[int]] = found["counts"]
    size = len(counts)
    names = [printable(name) for name in details.get("classes", [])]
    names = names if len(names) == size else [str(i) for i in range(size)]
    return {
        "rows": found["rows"],
        "names": names,
        "cells": [[(n, round(n / max(1, sum(row)), 3)) for n in row] for row in counts],
        "sized": size <= 20,
        "confused": sorted(
            (
                (counts[i][j], names[i], names[j])
                for i in range(size)
                for j in range(size)
                if i != j and counts[i][j]
            ),
            reverse=True,
        )[:12],
    }


def _forms_plot(forms: list[dict[str, Any]]) -> str:
    """What error is left at the nodes that have two forms, over the student's cost."""
    if not forms:
        return ""
    left = sum(row["compact"] ** 2 for row in forms)
    marks = [Mark("compact", forms[0]["total"] - forms[0]["cost"], left)]
    for row in forms:
        left += row["faithful"] ** 2 - row["compact"] ** 2
        marks.append(Mark("", row["total"], left, best=bool(row["taken"])))
    return marks_chart(marks, "cost, x teacher (joined: taken)", "sum of squared errors", 260)


__all__ = ["COLOURS", "page", "stages", "write"]
