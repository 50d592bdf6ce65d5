"""Compact or faithful: the forms of approximate rules under a budget of multiply-accumulates.

Some rules know two forms of what they replace: a *compact* one, which costs little or nothing, and
a *faithful* one, which is nearer to the teacher and dearer (hinges of a smooth activation, the
context of an attention, the context path of squeeze-and-excitation). With a budget
(`convert.max_macs`) the student starts all compact, and faithful forms are taken in the order of
error saved per multiply-accumulate for as long as they fit: the greedy answer to a knapsack. One
that saves next to nothing (squeeze-and-excitation without use in a teacher) is not built
(`convert.min_gain`).
"""

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace

from archnet.capture import TeacherGraph
from archnet.convert.builder import ConversionError
from archnet.convert.rules.base import Alternative, Approximation
from archnet.ops import Refinement, Student


@dataclass(frozen=True)
class Built:
    """A student, and what is known of how it was made.

    Attributes:
        student: it.
        form: what it has; asked for again, no faithful form is judged anew.
        alternatives: by teacher node, what could have been built in a compact form instead.
        exact: the teacher's nodes that depend on no approximation.
    """

    student: Student
    form: Approximation
    alternatives: Mapping[str, Alternative]
    exact: Set[str]


def within_budget(
    build: Callable[[Approximation], Built], graph: TeacherGraph, form: Approximation
) -> Built:
    """The student whose forms are chosen under ``form.max_macs``.

    The errors of both forms are those at the node's own output, where everything in front of it is
    faithful; of errors the squares are compared, which are shares of the teacher's energy. What a
    faithful form adds is the difference that it makes to the cost of its own node and of those
    that only it needs: the layers of queries and keys, or of a context path.

    Args:
        build: makes a student.
        graph: the teacher.
        form: what `build` is asked for; without a budget it is passed on as it is.

    Raises:
        ConversionError: the compact forms alone cost more than the budget.
    """
    faithful = build(form)
    form = faithful.form
    if form.max_macs is None or not faithful.alternatives:
        _require(faithful.student, form)
        return faithful
    found = faithful.alternatives
    compact = build(
        replace(form, compact={**form.compact, **{name: a.reads for name, a in found.items()}})
    ).student
    _require(compact, form)
    added = _added(graph, faithful.student, compact, found)
    order = sorted(added, key=lambda name: _saving(found[name]) / max(added[name], 1), reverse=True)
    teacher, spent = _macs(compact)
    limit = form.max_macs * teacher
    taken: list[str] = []
    for name in order:
        if spent + added[name] <= limit:
            taken.append(name)
            spent += added[name]
    while True:
        chosen = {name: found[name].reads for name in order if name not in taken}
        built = build(replace(form, compact={**form.compact, **chosen}))
        if _macs(built.student)[1] <= limit:
            break
        # Two forms may cost more together than each alone.
        taken.pop()
    refinements = _curve(graph, found, added, order, taken, _macs(compact))
    built.student.graph.refinements = refinements
    return built


def _macs(student: Student) -> tuple[int, int]:
    """Of the teacher and of the student, by the student's report."""
    report = student.report
    return sum(row.macs_before for row in report), sum(row.macs_after for row in report)


def _require(student: Student, form: Approximation) -> None:
    before, after = _macs(student)
    if form.max_macs is not None and after > form.max_macs * before:
        least = math.ceil(100 * after / max(before, 1)) / 100
        raise ConversionError(
            f"convert.max_macs={form.max_macs} is less than the student needs in its most compact "
            f"form; nearest valid: {least}"
        )


def _saving(alternative: Alternative) -> float:
    return alternative.compact**2 - alternative.faithful**2


def _added(
    graph: TeacherGraph, faithful: Student, compact: Student, found: Mapping[str, Alternative]
) -> dict[str, int]:
    """Multiply-accumulates that the faithful form of a node adds.

    A node that costs more in the faithful student, or is there alone, is paid for by the first
    alternative that depends on it. An alternative that stands in another's context path goes with
    that one.
    """
    rows = zip(graph.nodes, faithful.report, compact.report, strict=True)
    more = {node.name: ours.macs_after - theirs.macs_after for node, ours, theirs in rows}
    left_out = {
        node.name
        for node, row in zip(graph.nodes, compact.report, strict=True)
        if row.rule == "left out"
    }
    added = {name: 0 for name in found if name not in left_out}
    payers: dict[str, str] = {}
    for node in reversed(graph.nodes):
        payer = node.name if node.name in added else payers.get(node.name, "")
        if payer:
            added[payer] += more[node.name]
            # The first reader comes last here.
            payers.update(dict.fromkeys(node.refs(), payer))
    return added


def _curve(
    graph: TeacherGraph,
    found: Mapping[str, Alternative],
    added: Mapping[str, int],
    order: list[str],
    taken: list[str],
    start: tuple[int, int],
) -> list[Refinement]:
    nodes = {node.name: node for node in graph.nodes}
    (teacher, total), rows = start, []
    for name in order:
        total += added[name]
        rows.append(
            Refinement(
                path=nodes[name].path,
                operator=nodes[name].operator,
                compact=found[name].compact,
                faithful=found[name].faithful,
                cost=added[name] / teacher,
                total=total / teacher,
                taken=name in taken,
            )
        )
    return rows
