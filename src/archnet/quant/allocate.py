"""A width of its own for every layer: the least loss under a budget of bit operations or bytes."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array
from torch import Tensor

from archnet.ops import AFFINE, MatMul, Student
from archnet.quant.attach import (
    QuantizationError,
    describe,
    grids,
    insert_activations,
    shared_grids,
)
from archnet.quant.recipe import Recipe
from archnet.quant.sensitivity import Batch, sensitivity
from archnet.quant.widths import FLOAT, end_names, weighted, width_for

BudgetOf = Literal["bops", "bytes"]
WIDTHS = (2, 3, 4, 6, 8)
# Of the solver's tree, after which it gives the best choice that it has found; students take some
# tens. A limit on time would make the choice depend on the machine.
NODES = 2000
SLACK = 2e-6  # of a budget, relative: the solver takes a constraint for met within 1e-6


@dataclass(frozen=True)
class Term:
    """A part of a cost: ``amount`` times the widths of what ``holders`` name, two at most."""

    amount: float
    holders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Allocation:
    """Chosen widths, for `quantize`, and what they were chosen by.

    ``widths`` and ``losses`` (from `sensitivity`) are named by steps. ``spent``, ``uniform`` and
    ``smallest`` are costs, in bit operations or bytes: of the choice, of the student at uniform
    widths, and of the narrowest choice. ``inputs`` counts those that losses were measured on.
    """

    widths: Mapping[str, int]
    losses: Mapping[str, Mapping[int, float]]
    spent: float
    uniform: float
    smallest: float
    inputs: int


def allocate(
    student: Student,
    calibration: Iterable[Batch],
    macs: Mapping[str, int],
    recipe: Recipe | None = None,
    *,
    budget: float,
    budget_of: BudgetOf = "bops",
    weight_widths: Sequence[int] = WIDTHS,
    act_widths: Sequence[int] = WIDTHS,
    free_ends: bool = False,
) -> Allocation:
    """Choose a width for the weights of every layer and for every grid of activations.

    What a width costs in accuracy is measured layer by layer (`sensitivity`). That these losses
    add up is assumed, as HAWQ (arXiv 1905.03696, 1911.03852) and ZeroQ (2001.00281) do: how the
    errors of two layers meet is ignored. Under that assumption the choice is the best (`solve`).

    Args:
        student: float; it is left untouched.
        calibration: unlabelled batches (B, C, H, W), or tuples of all inputs of the student.
        macs: multiply-accumulates of every step (`archnet.hardware.student_cost`).
        recipe: of the uniform student, and how quantizers are built; W4A4 where absent.
        budget: share of what the uniform student costs, its first and last layer included.
        budget_of: "bops" (MACs x weight bits x activation bits) or "bytes" (of weights, biases
            and norms).
        weight_widths, act_widths: what may be chosen.
        free_ends: whether the first and the last layer may choose as well; else they keep
            ``first_bits`` and ``last_bits``.

    Raises:
        QuantizationError: no choice is within the budget (the message has the smallest that can
            be met), a width is impossible, or the student is quantized already.
    """
    recipe = (recipe or Recipe(weight_bits=4, act_bits=4)).on(student)
    if FLOAT in (recipe.weight_bits, recipe.act_bits):
        raise QuantizationError(
            f"a budget is a share of a quantized student, not of {recipe.short}"
        )
    for bits in (*weight_widths, *act_widths):
        if not 1 <= bits <= 8:
            raise QuantizationError(f"{bits} is not a width to choose from: 1 to 8")
    if describe(student):
        raise QuantizationError("the student is quantized already; convert the teacher again")
    student = copy.deepcopy(student).eval()
    insert_activations(student, fine_sums=recipe.act_bits < recipe.sum_bits)
    uniform = recipe.widths(student)
    constants = (recipe.sum_bits, bool(recipe.per_channel))
    bound = set() if free_ends else end_names(student)
    offers = {
        name: sorted({width_for(module, bits, *constants) for bits in weight_widths})
        for name, module in weighted(student).items()
    } | {group: sorted(set(act_widths)) for group in shared_grids(student).values()}
    offers = {name: widths for name, widths in offers.items() if name not in bound}
    terms = bit_operations(student, macs) if budget_of == "bops" else packed_bytes(student)
    whole = cost_of(terms, uniform)
    smallest = cost_of(terms, uniform | {name: widths[0] for name, widths in offers.items()})
    if smallest > budget * whole:
        least = math.ceil(1e4 * smallest / whole) / 1e4
        raise QuantizationError(
            f"quant.budget={budget:g} of the {budget_of} at {recipe.short} cannot be "
            f"met: the narrowest widths take {least:g}"
        )
    batches = list(calibration)
    losses = sensitivity(student, batches, offers, recipe)
    widths = uniform | solve(losses, terms, uniform, budget * whole)
    return Allocation(
        widths=widths,
        losses=losses,
        spent=cost_of(terms, widths),
        uniform=whole,
        smallest=smallest,
        inputs=sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in batches),
    )


def bit_operations(student: Student, macs: Mapping[str, int]) -> list[Term]:
    """The bit operations of a student as a function of its widths.

    Args:
        student: with a place for every activation (`insert_activations`).
        macs: multiply-accumulates by step; steps without any may be left out.
    """
    on_grid, shared = grids(student), shared_grids(student)

    def read(name: str) -> Term:
        """The width of a value: one bit for token numbers (one-hots), float off any grid."""
        for place in on_grid[name]:
            return Term(1, (shared[place],))
        return Term(1 if name in student.graph.indices else FLOAT)

    terms = []
    for step in student.graph.steps:
        if macs.get(step.name):
            first, *others = step.inputs
            module = student.operator(step.name)
            second = read(others[0]) if isinstance(module, MatMul) else Term(1, (step.name,))
            amount = macs[step.name] * read(first).amount * second.amount
            terms.append(Term(amount, second.holders + read(first).holders))
    return terms


def packed_bytes(student: Student) -> list[Term]:
    """The bytes of weights, 32-bit biases, norms and added constants as a function of widths.

    A layer whose weights do not fill its last byte takes up to one byte more.
    """
    terms = []
    for step in student.graph.steps:
        if isinstance(module := student.operator(step.name), AFFINE):
            terms.append(Term(4 * sum(numbers.numel() for numbers in module.parameters())))
    for name, module in weighted(student).items():
        terms += [Term(module.weight.numel() / 8, (name,)), Term(4 * module.bias.numel())]
    return terms


def cost_of(terms: Iterable[Term], widths: Mapping[str, int]) -> float:
    """What some widths cost."""
    return sum(term.amount * math.prod(widths[name] for name in term.holders) for term in terms)


def solve(
    losses: Mapping[str, Mapping[int, float]],
    terms: Sequence[Term],
    fixed: Mapping[str, int],
    limit: float,
) -> dict[str, int]:
    """The widths of least total loss whose cost is within a limit: an integer linear program.

    With x[u, b] = 1 where u has b bits: minimize sum loss[u, b] x[u, b] under sum_b x[u, b] = 1
    and cost <= limit. A term of two widths is bilinear; it is linear in z[b, c] = x[u, b] x[v, c],
    which sum_c z[b, c] = x[u, b] and sum_b z[b, c] = x[v, c] with z >= 0 force once x is integer.
    Solved by HiGHS (`scipy.optimize.milp`), to optimality or for `NODES`.

    Args:
        losses: of every width on offer, by name.
        terms: the cost.
        fixed: widths of what is in no offer.
        limit: of the cost, at least that of the narrowest widths.

    Returns:
        The chosen width by name.

    Raises:
        QuantizationError: the narrowest widths cost more, or the solver found nothing.
    """
    narrowest = {name: min(table) for name, table in losses.items()}
    if cost_of(terms, {**fixed, **narrowest}) > limit:
        raise QuantizationError("the narrowest widths cost more than the limit")
    # A width that loses no less than a narrower one is never the better choice.
    offers = {
        name: [b for b in sorted(table) if all(table[c] > table[b] for c in table if c < b)]
        for name, table in losses.items()
    }
    columns: dict[tuple[str | int, ...], int] = {}
    for name, widths in offers.items():
        for bits in widths:
            columns[name, bits] = len(columns)
    price: dict[int, float] = {}  # what a column costs
    equal: list[tuple[dict[int, float], float]] = []  # rows and their right-hand sides
    equal += [({columns[name, b]: 1.0 for b in widths}, 1.0) for name, widths in offers.items()]
    spent = 0.0
    for index, term in enumerate(terms):
        amount = term.amount * math.prod(fixed[n] for n in term.holders if n not in offers)
        free = [name for name in term.holders if name in offers]
        if not free:
            spent += amount
        elif len(set(free)) == 1:
            for bits in offers[free[0]]:
                column = columns[free[0], bits]
                price[column] = price.get(column, 0.0) + amount * bits ** len(free)
        else:
            left, right = free
            pairs = {}
            for b, c in product(offers[left], offers[right]):
                pairs[b, c] = columns[index, b, c] = len(columns)
                price[pairs[b, c]] = amount * b * c
            for axis, name in enumerate(free):
                for bits in offers[name]:
                    row = {pairs[pair]: 1.0 for pair in pairs if pair[axis] == bits}
                    equal.append((row | {columns[name, bits]: -1.0}, 0.0))
    matrix = lil_array((len(equal) + 1, len(columns)))
    room = limit - spent
    for line, (entries, _) in enumerate(equal):
        for column, value in entries.items():
            matrix[line, column] = value
    for column, value in price.items():
        matrix[len(equal), column] = value / max(room, 1e-9)
    sides = np.array([side for _, side in equal])
    chosen = [(name, bits) for name, widths in offers.items() for bits in widths]
    loss = np.zeros(len(columns))
    loss[: len(chosen)] = [losses[name][bits] for name, bits in chosen]
    result = milp(
        loss / max(loss.max(initial=0.0), 1e-30),
        integrality=np.arange(len(columns)) < len(chosen),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(
            matrix.tocsr(), np.append(sides, -np.inf), np.append(sides, 1 - SLACK)
        ),
        options={"node_limit": NODES, "mip_rel_gap": 1e-6},
    )
    if result.x is None:
        if result.status == 2:  # within the slack of the limit there is nothing but these
            return narrowest
        raise QuantizationError(f"no widths found in {NODES:,} nodes: {result.message}")
    taken = result.x[: len(chosen)] > 0.5
    return dict(pair for pair, one in zip(chosen, taken, strict=True) if one)
