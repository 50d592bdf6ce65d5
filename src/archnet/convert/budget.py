"""Compact or faithful: the forms of approximate rules under a budget.

Some rules know two forms of what they replace: a *compact* one, which costs little or nothing, and
a *faithful* one, which is nearer to the teacher and dearer (hinges of a smooth activation, the
context of an attention, the context path of squeeze-and-excitation). With a budget of
multiply-accumulates (`convert.max_macs`) or of cycles on the target (`convert.max_cost`) the
student starts all compact, and faithful forms are taken in the order of error saved for their cost
for as long as they fit: the greedy answer to a knapsack. One that saves next to nothing
(squeeze-and-excitation without use in a teacher) is not built (`convert.min_gain`).
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from torch import Tensor

from archnet.capture import TeacherGraph
from archnet.convert.builder import ConversionError
from archnet.convert.rules.base import Alternative, Approximation
from archnet.ops import NodeReport, Refinement, Student


@dataclass(frozen=True)
class Built:
    """A student, and what is known of how it was made.

    Attributes:
        student: it.
        form: what it has; asked for again, no faithful form is judged anew.
        alternatives: by teacher node, what could have been built in a compact form instead.
        exact: the teacher's nodes that depend on no approximation.
        scores: results of the teacher for the calibration inputs, by node, as far as known.
    """

    student: Student
    form: Approximation
    alternatives: Mapping[str, Alternative]
    exact: Set[str]
    scores: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """A bound of what a student costs.

    Attributes:
        key: of the config.
        most: as a multiple of the teacher's cost.
        teacher: what the teacher costs.
        of: what a node of the student costs, by its row of the report.
    """

    key: str
    most: float
    teacher: float
    of: Callable[[NodeReport], float]

    def spent(self, student: Student) -> float:
        """What a student costs, as a multiple of the teacher's cost."""
        return sum(map(self.of, student.report)) / max(self.teacher, 1)

    def require(self, student: Student) -> None:
        """Refuse a student that costs more.

        Raises:
            ConversionError: naming the key and the smallest budget that can be met.
        """
        spent = self.spent(student)
        if spent > self.most:
            raise ConversionError(
                f"{self.key}={self.most} is less than the student costs with compact "
                f"approximations alone; nearest valid: {math.ceil(100 * spent) / 100}"
            )


def of_macs(most: float, student: Student) -> Budget:
    """`convert.max_macs`; the teacher's are in the report of any of its students."""
    teacher = sum(row.macs_before for row in student.report)
    return Budget("convert.max_macs", most, teacher, lambda row: row.macs_after)


def of_cycles(most: float, teacher: Student) -> Budget:
    """`convert.max_cost`; ``teacher`` is written for a target of the same costs that has every
    operator.
    """
    cycles = sum(row.cycles for row in teacher.report)
    return Budget("convert.max_cost", most, cycles, lambda row: row.cycles)


def within_budget(
    build: Callable[[Approximation], Built],
    graph: TeacherGraph,
    form: Approximation,
    budgets: Callable[[Student], Sequence[Budget]],
) -> Built:
    """The student whose forms are chosen under its budgets.

    The errors of both forms are those at the node's own output, where everything in front of it is
    faithful; of errors the squares are compared, which are shares of the teacher's energy. What a
    faithful form adds is the difference that it makes to the cost of its own node and of those
    that only it needs: the layers of queries and keys, or of a context path.

    Args:
        build: makes a student.
        graph: the teacher.
        form: what `build` is asked for; without a budget it is passed on as it is.
        budgets: the bounds, of a first student of the teacher.

    Raises:
        ConversionError: the compact forms alone cost more than a budget.
    """
    faithful = build(form)
    form = faithful.form
    bounds = budgets(faithful.student)
    if not bounds or not faithful.alternatives:
        for bound in bounds:
            bound.require(faithful.student)
        return faithful
    found = faithful.alternatives
    compact = build(
        replace(form, compact={**form.compact, **{name: a.reads for name, a in found.items()}})
    ).student
    for bound in bounds:
        bound.require(compact)
    added = [_added(graph, faithful.student, compact, found, bound) for bound in bounds]
    start = [bound.spent(compact) for bound in bounds]

    def worth(name: str) -> float:
        """Error saved for the share of what is left of a budget."""
        shares = [
            more[name] / max(bound.most - spent, 1e-9)
            for bound, more, spent in zip(bounds, added, start, strict=True)
        ]
        return _saving(found[name]) / max(*shares, 1e-9)

    order = sorted(added[0], key=worth, reverse=True)
    spent, taken = list(start), list[str]()
    for name in order:
        total = [have + more[name] for have, more in zip(spent, added, strict=True)]
        if all(have <= bound.most for have, bound in zip(total, bounds, strict=True)):
            taken.append(name)
            spent = total

    def with_first(count: int) -> Built:
        kept = taken[:count]
        chosen = {name: found[name].reads for name in order if name not in kept}
        return build(replace(form, compact={**form.compact, **chosen}))

    # Two forms may cost more together than each alone: the most that fit are found by halves.
    fitting, beyond, built = 0, len(taken) + 1, with_first(len(taken))
    count = len(taken)
    while count:
        if all(bound.spent(built.student) <= bound.most for bound in bounds):
            fitting = count
        else:
            beyond = count
        if beyond - fitting <= 1:
            break
        count = (fitting + beyond) // 2
        built = with_first(count)
    if count != fitting:
        built = with_first(fitting)
    taken = taken[:fitting]
    built.student.graph.refinements = _curve(graph, found, added[0], order, taken, start[0])
    return built


def _saving(alternative: Alternative) -> float:
    return alternative.compact**2 - alternative.faithful**2


def _added(
    graph: TeacherGraph,
    faithful: Student,
    compact: Student,
    found: Mapping[str, Alternative],
    bound: Budget,
) -> dict[str, float]:
    """What the faithful form of a node adds to a cost, as a multiple of the teacher's.

    A node that costs more in the faithful student, or is there alone, is paid for by the first
    alternative that depends on it. An alternative that stands in another's context path goes with
    that one.
    """
    rows = zip(graph.nodes, faithful.report, compact.report, strict=True)
    more = {
        node.name: (bound.of(ours) - bound.of(theirs)) / max(bound.teacher, 1)
        for node, ours, theirs in rows
    }
    left_out = {
        node.name
        for node, row in zip(graph.nodes, compact.report, strict=True)
        if row.rule == "left out"
    }
    added = {name: 0.0 for name in found if name not in left_out}
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
    added: Mapping[str, float],
    order: list[str],
    taken: list[str],
    start: float,
) -> list[Refinement]:
    nodes = {node.name: node for node in graph.nodes}
    total, rows = start, []
    for name in order:
        total += added[name]
        rows.append(
            Refinement(
                path=nodes[name].path,
                operator=nodes[name].operator,
                compact=found[name].compact,
                faithful=found[name].faithful,
                cost=added[name],
                total=total,
                taken=name in taken,
            )
        )
    return rows
