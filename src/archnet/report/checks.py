"""What `verify` found, as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from archnet.report.printed import Printed

if TYPE_CHECKING:
    from archnet.deploy import Check


def checks_table(title: str, inputs: int, checks: "Sequence[Check]") -> Printed:
    """A row for every form and runtime; below, where one first differs, and what was skipped."""
    rows, notes = list[tuple[str, ...]](), list[str]()
    translates = any(check.sentences_changed is not None for check in checks)
    for check in checks:
        if check.skipped:
            notes.append(f"{check.name}: skipped, it {check.skipped}")
            continue
        rows.append(
            (
                check.name,
                check.runtime,
                *([] if translates else [f"{check.inputs:,}"]),
                f"{check.max_steps:g}",
                percent(check.bit_equal),
                f"{check.changed:,} of {check.decisions:,}" if check.decisions else "",
                *([f"{check.sentences_changed:,}"] if translates else []),
            )
        )
        if check.bit_equal < 1:
            first = check.first or "no step: it does not recur when every step is an output"
            notes.append(f"{check.name}: first difference at {first}")
            if check.hint:
                notes.append(f"{check.name}: {check.hint}")
    legend: tuple[str, ...] = (
        "steps off: largest difference of an output, in units of its accumulator",
        "bit-equal: numbers without a difference; changed: decisions (samples, pixels or tokens)",
    )
    if translates:
        legend = (
            *legend,
            "both along the integer model's translations; sentences: translated in another way",
        )
    return Printed(
        f"{title}: compared with the integer model on {inputs:,} inputs",
        (
            *("", "run by", *([] if translates else ["inputs"])),
            *("steps off", "bit-equal", "changed", *(["sentences"] if translates else [])),
        ),
        rows,
        (*legend, *notes),
        left=2,
    )


def percent(share: float) -> str:
    """Never 100 % where one output differs."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.999):.3f} %"
