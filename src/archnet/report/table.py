"""The table that ends a run."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from jinja2 import TemplateError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from archnet.errors import ArchnetError, printable

# Of a student, what is told in another way.
_NO_FIGURES = ("name", "agreement", "per_second")
METRICS = {
    "accuracy": "accuracy, points",
    "miou": "mean IoU, points",
    "relative_error": "relative error, %",
    "cosine": "cosine similarity",
    "bleu": "BLEU",
    "chrf": "chrF",
}
# What stands behind a difference in them.
UNITS = {"accuracy": " points", "miou": " points"}

# What reading figures raises where they are not there or of another kind.
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError)


class _PlainConsole(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        lines = (printable(line, None) for line in text.split("\n"))
        return super().render_str("\n".join(lines), **options)


def plain_console(width: int | None = None, file: IO[str] | None = None) -> Console:
    """A console that shows names as they are, in its tables too.

    Brackets and colons in them mark up nothing, and control characters are shown, not obeyed.
    What goes to a ``file`` goes nowhere else, in a notebook either.
    """
    # None: rich finds out by itself, also by what a notebook sets for its kernel.
    shown = False if file is not None else None
    return _PlainConsole(
        width=width,
        file=file,
        force_jupyter=shown,
        force_terminal=shown,
        markup=False,
        emoji=False,
    )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong in the block is the fault of what ``path`` holds, and is said so.

    Raises:
        ArchnetError: in one line.
    """
    try:
        yield
    except _MALFORMED as error:
        what = printable(f"{type(error).__name__}: {error}")
        raise ArchnetError(
            f"{path} does not hold what a run writes there ({what}): resume={path.parent} writes "
            "it again"
        ) from error


def rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, teacher, student) for every figure worth a line; an empty cell does not apply."""
    teacher, student, cost = metrics["teacher"], metrics["student"], metrics["cost"]
    quant, parity, audit = metrics["quant"], metrics["parity"], metrics["audit"]
    data = metrics["data"]
    what = data["unit"]
    uniform = f"W{quant['weight_bits']}A{quant['act_bits']}"
    name = f"{uniform}, {quant['method']}"
    if quant["method"] == "none":
        name = "float"
    elif quant.get("copies", 1) > 1:
        name = f"{uniform}, {quant['copies']} copies, {quant['method']}"
    elif "widths" in quant:
        share = f"{quant['share']:.3f} of {uniform}'s {quant['budget_of']}"
        name = f"mixed, {share}, {quant['method']}"
    lines = [
        ("network", teacher["name"], f"{metrics['hardware']}, {name}"),
        *_figures(teacher, student),
    ]
    if student.get("agreement") is not None:
        lines.append(("agreement, points", "", f"{student['agreement']:.2f}"))
        if interval := metrics.get("agreement_interval"):
            low, high = interval
            lines.append(("agreement, 95 % interval", "", f"{low:.2f} to {high:.2f}"))
    lines += _intervals(metrics)
    # Metrics of before have no such figure, nor has what was not made by conversion.
    error = metrics.get("conversion", {}).get("error")
    if error is not None:
        lines.append(("relative error at conversion, float", "", f"{error:.1e}"))
    for title, key, side, unit in (
        ("multiply-accumulates", "macs", "teacher", ""),
        ("bit operations, teacher at W8A8", "bops", "teacher_w8a8", ""),
        ("weights", "weight_bytes", "teacher", "B"),
    ):
        lines.append((title, amount(cost[key][side], unit), amount(cost[key]["student"], unit)))
    if "sample" in cost:
        lines.append(("costs are of", "", cost["sample"]))
    if cycles := cost.get("cycles"):
        known = cycles["teacher"]
        lines.append(
            (
                f"cycles on {metrics['hardware']}, estimated",
                "" if known is None else amount(known, ""),
                amount(cycles["student"], ""),
            )
        )
    if "widths" in quant:
        lines += [(what, "", counts) for what, counts in _widths(quant["widths"])]
    lines += [
        ("audit of the file", "", _audit(audit)),
        (f"parity with {parity['runtime']}", "", _parity(parity)),
        (f"unlabelled {what}s", "", f"{data['unlabelled']:,}"),
        (f"{what}-steps in training", "", f"{data['inputs_seen']:,}"),
        ("seconds", "", f"{metrics['seconds']['total']:,.0f}"),
    ]
    return lines


def show(metrics: Mapping[str, Any], folder: Path) -> None:
    """Print the table, and where the run's files are.

    Raises:
        ArchnetError: the metrics are not those of a run.
    """
    with reading(folder / "metrics.json"):
        table = Table(title=f"{metrics['task']}: teacher and student", title_justify="left")
        table.add_column("")
        table.add_column("teacher", justify="right")
        table.add_column("student", justify="right")
        for line in rows(metrics):
            table.add_row(*line)
        notes = [f"violation: {line}" for line in metrics["audit"]["violations"][:5]]
        skipped = metrics["data"]["skipped"]
        if skipped:
            notes.append(f"{len(skipped)} corrupt files skipped, first {skipped[0]}")
        found = metrics.get("verdict", {})
        said = [found["sentence"], *found["advice"]] if found else []
    shown = plain_console()
    shown.print(table)
    for line in said:
        shown.print(line, highlight=False, soft_wrap=True)
    for note in notes:
        shown.print(note)
    shown.print(f"Everything is in {folder}", soft_wrap=True)


def amount(value: float, unit: str) -> str:
    """A number in three digits with its prefix: ``amount(1_234_000, "B")`` is ``1.23 MB``."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.3g} T{unit}"


def _figures(
    teacher: Mapping[str, Any], student: Mapping[str, Any]
) -> Iterator[tuple[str, str, str]]:
    """A line for every figure, those with a title first; others have their own names."""
    for key in dict.fromkeys((*METRICS, *student)):
        if key not in student or key in _NO_FIGURES:
            continue
        sides = [side.get(key) for side in (teacher, student)]
        if any(isinstance(value, str | list | dict) for value in sides):
            continue  # how BLEU was computed, and whatever is no figure
        yield METRICS.get(key, key), _figure(sides[0], key in teacher), _figure(sides[1])


def _intervals(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """How far the student is from the teacher, in each metric where that is known."""
    rows = []
    for key, found in metrics.get("paired", {}).items():
        if found["low"] is not None:
            bounds = f"{found['low']:+.2f} to {found['high']:+.2f}"
            title = METRICS.get(key, key.replace("_", " ")).partition(",")[0]
            rows.append((f"difference in {title}, 95 % interval", "", bounds))
    return rows


def _figure(value: float | None, is_measured: bool = True) -> str:
    if value is None:
        return "no labels" if is_measured else ""
    return f"{value:.2f}" if abs(value) >= 1.005 else f"{value:.4g}"


def _widths(chosen: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """How many layers, and how many grids of activations, have which width."""
    found = []
    for what, grid in (("layers x bits of weights", False), ("grids x bits of activations", True)):
        bits = [row["bits"] for row in chosen if (row["operator"] == "Activation") == grid]
        counts = [f"{bits.count(width)} x {width}" for width in sorted(set(bits))]
        found.append((what, ", ".join(counts)))
    return found


def _audit(audit: Mapping[str, Any]) -> str:
    violations, not_judged = audit["violations"], audit.get("not_judged", {})
    if violations:
        return f"{len(violations)} violation{'s' if len(violations) > 1 else ''}"
    return f"pure as far as judged: {unjudged(not_judged)}" if not_judged else "pure"


def unjudged(counts: Mapping[str, int]) -> str:
    """What an audit did not judge, in words, from its number of nodes by operator."""
    listed = ", ".join(f"{count} {printable(name)}" for name, count in counts.items())
    return f"{listed} not judged"


def _parity(parity: Mapping[str, Any]) -> str:
    what = f"{parity['mismatches']} predictions"
    if "tokens" in parity:
        tokens = f"{parity['tokens_changed']} of {parity['tokens']} tokens"
        what = f"{parity['mismatches']} sentences, {tokens}"
    return f"{what} changed, {parity['max_abs_diff']:.1e} at most"
