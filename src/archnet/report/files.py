"""What a report reads of a run folder beside ``metrics.json``: tables and curves.

Not every run has each of them, and one that is damaged is left out with a warning: the report of a
run is no place to fail.
"""

import csv
import io
import logging
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from archnet.report.verdict import verdict
from archnet.runs import RunError, read_json, read_text

_log = logging.getLogger(__name__)

EVALUATION, LAYERS = "evaluation.json", "layers.json"
CONVERSION, FORMS = "conversion.json", "forms.json"
SEARCH = "search.json"
_LARGEST_LOG = 1 << 28  # bytes

# What is read of the rows of tables.
_NUMBER = (int, float)
_ROWS: dict[str, dict[str, Any]] = {
    CONVERSION: {"path": str, "operator": str, "rule": str, "error": (*_NUMBER, NoneType)},
    FORMS: {
        "path": str, "compact": _NUMBER, "faithful": _NUMBER, "cost": _NUMBER, "total": _NUMBER,
    },
    SEARCH: {
        "name": str, "kind": str, "widths": str, "agreement": _NUMBER, "seconds": _NUMBER,
        "drop": (*_NUMBER, NoneType),
    },
    LAYERS: {
        "layer": str, "operators": str, "tap": str, "macs": _NUMBER, "bops": _NUMBER,
        "cycles": _NUMBER, "weight_bytes": _NUMBER,
        "error_before": (*_NUMBER, NoneType), "error_after": (*_NUMBER, NoneType),
        "weight_bits": (int, NoneType), "act_bits": (int, NoneType),
    },
}  # fmt: skip


def _is_confusion(found: Any) -> bool:
    if not (isinstance(found, dict) and found.get("rows") in ("label", "teacher")):
        return False
    counts = found.get("counts")
    return isinstance(counts, list) and all(
        isinstance(row, list)
        and len(row) == len(counts)
        and all(type(n) is int and n >= 0 for n in row)
        for row in counts
    )


def _is_disagreement(row: Any) -> bool:
    if not isinstance(row, dict) or type(row.get("index")) is not int:
        return False
    texts = [row[key] for key in ("source", "reference") if key in row]
    if texts:
        return all(
            isinstance(row.get(k), str) for k in ("source", "reference", "teacher", "student")
        )
    classes = [row[key] for key in ("label", "teacher", "student") if key in row]
    return (
        all(type(number) is int and number >= 0 for number in classes)
        and isinstance(row.get("picture", ""), str)
        and isinstance(row.get("changed", 0), _NUMBER)
    )


def _is_length(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(
            isinstance(row.get(k), _NUMBER) for k in ("words", "sentences", "teacher", "student")
        )
        and isinstance(row.get("below"), (*_NUMBER, NoneType))
    )


def _all(sound: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, list) and all(map(sound, found))


_DETAILS: dict[str, Callable[[Any], bool]] = {
    "classes": _all(lambda name: isinstance(name, str)),
    "usage": lambda text: isinstance(text, str),
    "disagreements": _all(_is_disagreement),
    "disagreeing": lambda count: type(count) is int,
    "confusion": _is_confusion,
    "by_length": _all(_is_length),
}

Points = list[tuple[int, float]]
Curves = dict[str, Points]


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    """A table of a run; empty where it has none, or a damaged one, of which a warning tells.

    That of a search stands beside the keys that its user gave.
    """
    path = folder / name
    if not os.path.lexists(path):
        return []
    try:
        whole = read_json(path, dict) if name == SEARCH else {"trials": read_json(path, list)}
        found = whole.get("trials")
        if not isinstance(found, list):
            raise RunError(f"{path} is damaged: it lacks trials")
        for row in found:
            for key, kind in _ROWS[name].items():
                if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                    raise RunError(f"{path} is damaged: a row without {key}")
    except RunError as error:
        _log.warning("%s; the report is written without it", error)
        return []
    return list(found)


def evaluation(folder: Path) -> dict[str, Any]:
    """What the evaluation left for the report; empty where there is nothing, or damaged."""
    path = folder / EVALUATION
    if not os.path.lexists(path):
        return {}
    try:
        found = read_json(path, dict)
        for key, sound in _DETAILS.items():
            if key in found and not sound(found[key]):
                raise RunError(f"{path} is damaged: {key} is not what a run writes there")
    except RunError as error:
        _log.warning("%s; the report is written without it", error)
        return {}
    return {key: found[key] for key in _DETAILS if key in found}


def curves(folder: Path) -> Curves:
    """Every logged figure as (step, value) pairs, all sessions of a resumed run together.

    Named as it was logged: ``loss/<stage>/<where>``, ``val/<figure>``. Rows that are no figures
    are left out, with a warning.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for log in sorted((folder / "logs" / "csv").glob("*/metrics.csv")):
        damaged = 0
        try:
            lines = list(csv.DictReader(io.StringIO(read_text(log, _LARGEST_LOG))))
        except (RunError, csv.Error) as error:
            _log.warning("%s: %s; the report is written without it", log, error)
            continue
        for row in lines:
            for name, value in row.items():
                if value and isinstance(name, str) and name.startswith(("loss/", "val/")):
                    try:
                        step, figure = int(float(row["step"])), float(value)
                    except (KeyError, TypeError, ValueError, OverflowError):
                        damaged += 1
                        continue
                    # A later session repeats the steps after the last checkpoint.
                    found[name][step] = figure
        if damaged:
            _log.warning("%s: %d figures are damaged and left out", log, damaged)
    return {name: sorted(points.items()) for name, points in sorted(found.items())}


def by_stage(lines: Curves) -> dict[str, Curves]:
    """The losses of each stage, in the order of the stages; a stage's own have no stage before.

    >>> by_stage({"loss/joint/logits": [(10, 0.1)], "loss/b1/b1": [(5, 0.2)], "val/x": [(5, 1.0)]})
    {'b1': {'b1': [(5, 0.2)]}, 'joint': {'logits': [(10, 0.1)]}}
    """
    found: dict[str, Curves] = {}
    for name, points in lines.items():
        kind, _, rest = name.partition("/")
        if kind != "loss" or not points:
            continue
        stage, _, where = rest.partition("/")
        # Runs of before have no stages in their names.
        found.setdefault(stage if where else "", {})[where or stage] = points
    return dict(sorted(found.items(), key=lambda item: min(p[0][0] for p in item[1].values())))


def trend(lines: Curves) -> float | None:
    """Points of agreement on the validation split that the last quarter of training won."""
    points = [
        (step, value) for step, value in lines.get("val/agreement", []) if math.isfinite(value)
    ]
    if len(points) < 4:
        return None
    end = points[-1][0]
    start = [value for step, value in points if step <= end * 3 / 4]
    return points[-1][1] - start[-1] if start else None


def judged(
    folder: Path, metrics: Mapping[str, Any], max_cost: float | None = None
) -> dict[str, Any]:
    """The verdict on a run from its figures, and from the tables and curves in its folder."""
    return verdict(metrics, rows(folder, LAYERS), trend(curves(folder)), max_cost)
