"""A row for every layer of a student: operator, bits, cost, and how far it is from the teacher."""

from collections.abc import Mapping
from typing import Any

from archnet.lower import SampleCost
from archnet.ops import Activation, Student

Row = dict[str, Any]


def layers(
    student: Student,
    deployed: SampleCost,
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> list[Row]:
    """The layers of a student, one for each module of the teacher that became something.

    Args:
        student: trained.
        deployed: what it costs as it is deployed.
        before: error at every tap by its path, ``""`` at the end, as calibrated.
        after: the same, as trained.

    Returns:
        ``layer`` (the teacher's module path), ``operators``, ``weight_bits``, ``act_bits`` (of what
        it reads), ``macs``, ``bops``, ``cycles``, ``weight_bytes``, and ``error_before`` and
        ``error_after`` training, shares of unexplained variance at ``tap``, the next place at which
        student and teacher are compared.
    """
    cost = {row.name: row for row in deployed.cost.steps}
    rows: dict[str, Row] = {}
    waiting: list[Row] = []
    taps = {tap.value: tap.path for tap in student.taps if tap.path in after}
    by_step: dict[str, list[str]] = {}
    for name, whole in deployed.whole.items():
        by_step.setdefault(whole, []).append(name)
    for step in student.graph.steps:
        origin, operator = step.origin or "(no module)", student.operator(step.name)
        if origin not in rows:
            rows[origin] = {
                "layer": origin, "operators": [], "weight_bits": None, "act_bits": None,
                "macs": 0, "bops": 0, "cycles": 0.0, "weight_bytes": 0,
                "tap": "", "error_before": before.get(""), "error_after": after.get(""),
            }  # fmt: skip
            waiting.append(rows[origin])
        row = rows[origin]
        if not isinstance(operator, Activation):
            kind = type(operator).__name__
            row["operators"] += [kind] if kind not in row["operators"] else []
        for name in by_step.get(step.name, []):
            found = cost.get(name)
            row["cycles"] += deployed.cycles.get(name, 0.0)
            if found is None:
                continue
            for key in ("macs", "bops", "weight_bytes"):
                row[key] += getattr(found, key)
            if found.macs:
                for key, bits in (
                    ("weight_bits", found.weight_bits),
                    ("act_bits", found.activation_bits),
                ):
                    row[key] = max(bits, row[key] or 0)
        if step.name in taps:
            path = taps[step.name]
            for earlier in waiting:
                earlier |= {
                    "tap": path, "error_before": before.get(path), "error_after": after[path],
                }  # fmt: skip
            waiting = []
    # What only rounds and clips belongs to the layer in front.
    kept = [row for row in rows.values() if row["operators"]]
    for row in kept:
        row["operators"] = ", ".join(row["operators"])
    return kept
