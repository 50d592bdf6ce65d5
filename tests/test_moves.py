"""Chains of layout moves are written with the fewest."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from archnet import convert
from archnet.convert.moves import fewest
from archnet.ops import Permute, Reshape


@st.composite
def chains(draw):
    """A shape, and moves of values of that shape."""
    sizes = st.sampled_from([1, 1, 2, 3, 4, 6])
    start = shape = tuple(draw(st.lists(sizes, min_size=1, max_size=4)))
    moves = []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(1, len(shape) + 1)))
            moves.append(Permute((0, *order)))
            shape = tuple(shape[axis - 1] for axis in order)
        else:
            left, parts = math.prod(shape), []
            while left > 1 and len(parts) < 4:
                parts.append(
                    draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
                )
                left //= parts[-1]
            shape = (*parts, left)
            moves.append(Reshape(shape))
    return start, moves


def followed(moves, x):
    for move in moves:
        x = move(x)
    return x


@given(chains())
def test_the_fewest_moves_do_what_all_of_them_do(chain):
    shape, moves = chain
    x = torch.arange(2 * math.prod(shape)).reshape(2, *shape)
    short = fewest(shape, moves)
    assert torch.equal(followed(short, x), followed(moves, x))
    assert len(short) <= len(moves)
    # Once more changes nothing.
    assert len(fewest(shape, short)) == len(short)


@pytest.mark.parametrize(
    ("shape", "moves", "wanted"),
    [
        ((3, 4, 5), [Permute((0, 2, 3, 1)), Permute((0, 3, 1, 2))], []),
        ((6, 4), [Reshape((2, 3, 4)), Reshape((24,)), Reshape((6, 4))], []),
        ((1, 7), [Permute((0, 2, 1))], ["Reshape"]),
        ((6, 5, 1), [Reshape((2, 3, 5)), Permute((0, 3, 1, 2)), Reshape((5, 6))], 2),
        ((9, 6), [Reshape((9, 3, 2)), Permute((0, 2, 1, 3)), Reshape((3, 1, 9, 2))], 2),
    ],
)
def test_moves_that_are_no_more_needed_go(shape, moves, wanted):
    short = fewest(shape, moves)
    x = torch.randn(2, *shape)
    assert torch.equal(followed(short, x), followed(moves, x))
    if isinstance(wanted, int):
        assert len(short) == wanted
    else:
        assert [type(move).__name__ for move in short] == wanted


class Windows(nn.Module):
    """Windows of 4x4 are made, seen by a layer, and undone; a tap stands among the moves."""

    def __init__(self):
        super().__init__()
        self.same, self.layer, self.last = nn.Identity(), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        b = x.shape[0]
        x = x.permute(0, 2, 3, 1).reshape(b, 2, 4, 2, 4, 6).permute(0, 1, 3, 2, 4, 5)
        x = self.layer(x.reshape(b, 4, 16, 6)).relu().reshape(b, 2, 2, 4, 4, 6)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(b, 8, 8, 6).transpose(1, 2)
        return self.last(x.transpose(1, 2).flatten(1, 2).transpose(1, 2).transpose(1, 2))


def test_a_student_has_no_two_moves_of_one_kind_in_a_row():
    network, x = Windows().eval(), torch.randn(2, 6, 8, 8)
    student = convert(network, x)
    assert torch.allclose(student(x), network(x), atol=1e-5)
    by_name = {step.name: step for step in student.graph.steps}
    for step in student.graph.steps:
        source = by_name.get(step.inputs[0])
        if source is not None and isinstance(student.operator(step.name), Permute | Reshape):
            kinds = [type(student.operator(s.name)) for s in (step, source)]
            assert kinds[0] is not kinds[1]
