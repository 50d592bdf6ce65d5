"""Can this student be shipped? One sentence from what a run has measured, and what would help."""

from collections.abc import Mapping, Sequence
from typing import Any

from archnet.errors import printable
from archnet.report.table import METRICS, UNITS

MOST_ADVICE = 3
# A student of so few more cycles or bit operations costs the same: rounding of tiles, a classifier.
SAME_COST = 1.01
SMALL_LOSS, WIDE = 0.5, 3.0  # points


def verdict(
    metrics: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]] = (),
    trend: float | None = None,
    max_cost: float | None = None,
) -> dict[str, Any]:
    """What a run's figures say together.

    Args:
        metrics: of ``metrics.json``.
        layers: rows of ``layers.json``.
        trend: points of agreement on the validation split that the last quarter of training won;
            None: not known.
        max_cost: `convert.max_cost` of the run.

    Returns:
        ``sentence``; ``bad_deal``, whether the teacher at 8 bits alone would be better;
        ``metric`` that was judged, its ``difference`` in points, ``low`` and ``high`` bounds (None
        where not known); ``cost_ratio`` to the teacher on the target and its ``measure``; ``pure``;
        ``verified``; ``kept``, whether the promise of `goal` is (None: there is none); and
        ``advice``, sentences about what would help next.
    """
    key, quality, difference = _quality(metrics)
    low, high = _bounds(metrics, key)
    ratio, cost = _cost(metrics)
    file, pure, verified = _file(metrics)
    bad, why = _deal(metrics, ratio, high)
    parts = [quality, *([cost] if cost else []), file]
    sentence = f"{', '.join(parts[:-1])}; {parts[-1]}."
    sentence = sentence[0].upper() + sentence[1:]
    goal = metrics.get("goal")
    if goal:
        sentence = f"{_promised(goal, metrics)} {sentence}"
    if bad:
        sentence = f"A bad deal: {why}. {sentence}"
    return {
        "sentence": sentence,
        "bad_deal": bad,
        "metric": key,
        "difference": difference,
        "low": low,
        "high": high,
        "cost_ratio": ratio,
        "measure": _on_target(metrics).get("measure"),
        "pure": pure,
        "verified": verified,
        "kept": goal["kept"] if goal else None,
        "advice": _advice(metrics, ratio, high, layers, trend, max_cost),
    }


def _promised(goal: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Whether the promise of a search is kept, by how much, and what the search took."""
    found, unit = goal["validation"], metrics["data"]["unit"]
    asked, was = [], []
    if goal["drop"] is not None:
        asked.append(f"at most {goal['drop']:g} points below the teacher")
    if goal["agreement"] is not None:
        asked.append(f"an agreement of at least {goal['agreement']:g} %")
    if found["drop"] is not None:
        where = "below" if found["drop"] >= 0 else "above"
        was.append(f"{abs(found['drop']):.2f} points {where}")
    if found["drop"] is None or goal["agreement"] is not None:
        was.append(f"agreement {found['agreement']:.2f} %")
    missed = "kept" if goal["kept"] else f"missed by {goal['shortfall']:.2f} points"
    if goal["kept"] and not goal["sure"]:
        missed = "kept, within the error of measuring"
    return (
        f"Promise {missed}: {' and '.join(asked)}; it is {', '.join(was)} on "
        f"{found['inputs']:,} validation {unit}s, after {goal['trials']} trials in "
        f"{goal['minutes']:.1f} minutes."
    )


def headline(metrics: Mapping[str, Any]) -> str | None:
    """The metric that a run is judged by: the first that teacher and student have a figure of."""
    for key in (*METRICS, *metrics["student"]):
        both = [metrics[side].get(key) for side in ("teacher", "student")]
        if all(isinstance(value, int | float) for value in both) and key not in UNJUDGED:
            return key
    return None


# Figures of both networks that say nothing of how good they are.
UNJUDGED = ("per_second",)


def _quality(metrics: Mapping[str, Any]) -> tuple[str | None, str, float | None]:
    """The metric, how far the student is from the teacher by it, and the difference."""
    key, student, data = headline(metrics), metrics["student"], metrics["data"]
    tested = f"{data['evaluated']:,} test {data['unit']}s"
    if key is not None:
        difference = student[key] - metrics["teacher"][key]
        unit = UNITS.get(key, "")
        away = f"{abs(difference):.2f}{unit} {'below' if difference < 0 else 'above'} its teacher"
        if round(difference, 2) == 0:
            away = "as its teacher"
        low, high = _bounds(metrics, key)
        interval = (
            f" (95 % interval of the difference {low:+.2f} to {high:+.2f} on {tested})"
            if low is not None and high is not None
            else f" (on {tested}, too few or of a metric for which no interval is known)"
        )
        title = printable(METRICS.get(key, key).partition(",")[0])
        return key, f"{title} {student[key]:.2f}, {away}{interval}", round(difference, 4)
    if student.get("agreement") is not None:
        low, high = _bounds(metrics, None)
        interval = f", 95 % interval {low:.2f} to {high:.2f}" if low is not None else ""
        text = (
            f"{student['agreement']:.2f} % of the decisions are the teacher's ({tested} without "
            f"labels{interval})"
        )
        return None, text, None
    if student.get("relative_error") is not None:
        error = student["relative_error"]
        return None, f"results {error:.2f} % from the teacher's (relative error, {tested})", None
    return None, f"not compared with its teacher on {tested}", None


def _bounds(metrics: Mapping[str, Any], key: str | None) -> tuple[float | None, float | None]:
    """Of the difference in a metric; without one of the agreement."""
    if key is not None:
        paired = metrics.get("paired", {}).get(key, {})
        return paired.get("low"), paired.get("high")
    low, high = metrics.get("agreement_interval") or (None, None)
    return low, high


def _on_target(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    found = metrics["cost"].get("on_target")
    if found:
        return found
    # Metrics of before: what every target can be compared by.
    bops = metrics["cost"]["bops"]
    return {
        "measure": "bops", "teacher": bops["teacher_w8a8"], "student": bops["student"],
        "teacher_bits": [8, 8],
    }  # fmt: skip


_MEASURES = {"bops": "the bit operations", "cycles": "the estimated cycles"}


def _cost(metrics: Mapping[str, Any]) -> tuple[float | None, str]:
    found = _on_target(metrics)
    if not found["teacher"]:
        return None, ""
    ratio = found["student"] / found["teacher"]
    weight, act = found["teacher_bits"]
    times = "1.00 times" if abs(ratio - 1) < 0.005 else f"{ratio:.3g} times"
    text = (
        f"at {times} {_MEASURES[found['measure']]} of its teacher at W{weight}A{act} on "
        f"{printable(metrics['hardware'])}"
    )
    return round(ratio, 4), text


def _file(metrics: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """What of the file is certain."""
    audit, parity = metrics["audit"], metrics["parity"]
    pure, changed = bool(audit["pure"]), parity["mismatches"]
    count = len(audit["violations"])
    said = "the file is pure" if pure else f"the file has {count} violation{'s' * (count != 1)}"
    if pure and audit.get("not_judged"):
        said = "the file is pure as far as it is judged"
    if not changed:
        return f"{said} and gives what the student gives ({parity['runtime']})", pure, True
    many = f"{changed:,} result{'s' * (changed != 1)}"
    return f"{said}, but {many} changed in {parity['runtime']}", pure, False


def _deal(metrics: Mapping[str, Any], ratio: float | None, high: float | None) -> tuple[bool, str]:
    """Whether 8 bits alone would be better, and why."""
    if ratio is None:
        return False, ""
    found = _on_target(metrics)
    weight, act = found["teacher_bits"]
    alone = (
        f"{max(weight, act)}-bit quantization of the teacher alone would be better"
        if max(weight, act) < 32
        else "the teacher alone would be better"
    )
    if found.get("runs_teacher") is False:
        alone += f", on a chip that runs it as it is, which {metrics['hardware']} does not"
    if ratio > SAME_COST:
        what = _MEASURES[found["measure"]]
        return True, f"it costs {ratio:.3g} times {what} of its teacher, and {alone}"
    quant = metrics["quant"]
    narrow = quant["method"] != "none" and min(quant["weight_bits"], quant["act_bits"]) < min(
        weight, act
    )
    if narrow and ratio >= 1 / SAME_COST and high is not None and high < 0:
        return True, f"fewer bits save nothing on {metrics['hardware']} and lose accuracy: {alone}"
    return False, ""


def _advice(
    metrics: Mapping[str, Any],
    ratio: float | None,
    high: float | None,
    layers: Sequence[Mapping[str, Any]],
    trend: float | None,
    max_cost: float | None,
) -> list[str]:
    """What would help next, the most telling first."""
    goal, quant = metrics.get("goal", {}), metrics["quant"]
    found, missed = list[str](), goal.get("kept") is False
    if trouble := metrics["teacher"].get("trouble"):
        found.append(f"What follows its teacher is no better: that {printable(trouble)}.")
    found += goal.get("advice", ())
    measure = _on_target(metrics)["measure"]
    low = _bounds(metrics, headline(metrics))[0] if headline(metrics) else None
    difference = _quality(metrics)[2]
    worse = difference is not None and (difference < -SMALL_LOSS or (high or 0.0) < 0)
    if metrics["audit"]["violations"]:
        found.append(
            f"The target does not run all of the file: {metrics['audit']['violations'][0]}"
        )
    if metrics["parity"]["mismatches"]:
        found.append("archnet verify <run> tells where the file and the student part.")
    if ratio is not None and ratio > SAME_COST:
        if quant["method"] == "none":
            found.append("Quantize it: quant=lsq quant.bits=8.")
        elif heavy := _heaviest(layers, measure):
            names, share = heavy
            few = f"{share:.0%} of the cost is in {names}: fewer bits there (quant=mixed)."
            spread = "No few layers take most of the cost: fewer bits throughout (quant.bits)."
            found.append(few if share >= 0.4 else spread)
        if metrics.get("conversion", {}).get("approximate_rules") and max_cost is None:
            found.append("Bound what approximations add: convert.max_cost=1.0.")
    if worse:
        if trend is not None and trend > 0.1:
            found.append(
                f"Agreement still rose by {trend:.2f} points in the last quarter of training: more "
                "steps (distill.steps)."
            )
        if quant["method"] != "none" and (lost := _lost(layers)):
            name, before, after = lost
            found.append(
                f"Most is lost up to {name} ({after:.1%} of its variance unexplained after "
                f"training, {before:.1%} before): more bits there (quant=mixed)."
            )
        bits = quant["weight_bits"]
        if quant["method"] != "none" and bits <= 3 and quant.get("copies", 1) == 1:
            found.append("Two copies of every map say more than one: quant.copies=2.")
    elif difference is not None and ratio is not None and ratio <= 1 and not missed:
        widths = quant["weight_bits"], quant["act_bits"]
        if quant["method"] != "none" and measure == "bops" and max(widths) > 2:
            found.append(
                "Little or nothing is lost: fewer bits may do, "
                f"quant.bits={max(2, min(widths) - 1)}."
            )
    if low is not None and high is not None and high - low > WIDE:
        found.append("More test samples would narrow the interval (trainer.limit_eval, test data).")
    return found[:MOST_ADVICE]


def _heaviest(layers: Sequence[Mapping[str, Any]], measure: str) -> tuple[str, float] | None:
    """The few layers that take half of the cost, and their share."""
    total = sum(row[measure] for row in layers)
    if not total:
        return None
    order, names, share = sorted(layers, key=lambda row: -row[measure]), list[str](), 0.0
    for row in order[:3]:
        names.append(printable(row["layer"]))
        share += row[measure] / total
        if share >= 0.5:
            break
    return ", ".join(names), share


def _lost(layers: Sequence[Mapping[str, Any]]) -> tuple[str, float, float] | None:
    """The tap before the end at which most is lost, beyond what its block was given."""
    worst, before = None, 0.0
    for row in layers:
        after = row["error_after"]
        if not row["tap"] or after is None or row["error_before"] is None:
            continue
        if after - before > (worst[3] if worst else 0.0):
            worst = row["tap"], row["error_before"], after, after - before
        before = after
    return None if worst is None else (printable(worst[0]), worst[1], worst[2])
