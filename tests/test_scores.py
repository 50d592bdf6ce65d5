"""What results mean: classes along any axis, or none."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from archnet.ops.scores import (
    Comparison,
    Loss,
    accuracy,
    agreement,
    axis_of,
    changed,
    count,
    decisions,
    divergence,
    loss,
    unexplained,
)

KINDS = {"vector": ((5,), 1), "map": ((5, 3, 4), 1), "tokens": ((3, 5), -1)}
SEEDS = st.integers(0, 2**31 - 1)


def results(kind, seed, batch=4):
    """Scores of two networks, the axis of their classes, and both as rows (N, K)."""
    generator = torch.Generator().manual_seed(seed)
    shape, axis = KINDS[kind]
    ours, theirs = (torch.randn(batch, *shape, generator=generator) for _ in range(2))
    rows = (x.movedim(axis, -1).reshape(-1, 5) for x in (ours, theirs))
    return ours, theirs, axis, *rows


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_any_axis_means_what_rows_of_scores_mean(kind, seed):
    ours, theirs, axis, our_rows, their_rows = results(kind, seed)
    assert count(ours.shape, axis) == len(our_rows)
    assert torch.equal(decisions(ours, axis).flatten(), our_rows.argmax(1))
    equal = our_rows.argmax(1) == their_rows.argmax(1)
    assert torch.equal(changed(theirs, ours, axis).flatten(), ~equal)
    assert float(agreement(ours, theirs, axis)) == pytest.approx(float(equal.float().mean()))
    for name in ("kl", "cosine"):
        rows = divergence(name, our_rows, their_rows, 1)
        torch.testing.assert_close(divergence(name, ours, theirs, axis).flatten(), rows)
        torch.testing.assert_close(loss(name, ours, theirs, axis), rows.mean())


@pytest.mark.parametrize("kind", [*KINDS, None])
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, cut=st.integers(1, 6))
def test_totals_of_batches_are_those_of_the_whole(kind, seed, cut):
    ours, theirs, axis, *_ = results(kind or "vector", seed, batch=7)
    axis = axis if kind else None
    whole, parts, far = Comparison(axis), Comparison(axis), Loss(axis)
    whole.add(theirs.numpy(), ours.numpy())
    for part in (slice(cut), slice(cut, None)):
        parts.add(theirs[part], ours[part])
    far.add(ours, theirs)
    assert (parts.changed, parts.decisions) == (whole.changed, whole.decisions)
    assert parts.decisions == count(ours.shape, axis)
    assert (parts.agreement is None) is (axis is None)
    assert parts.largest == pytest.approx(float((ours - theirs).abs().max()))
    error = float((ours - theirs).norm() / theirs.norm())
    assert parts.relative_error == pytest.approx(error, rel=1e-5)
    angle = float(F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0))
    assert parts.cosine == pytest.approx(angle, abs=1e-5)
    if axis is not None:
        assert far.value == pytest.approx(float(loss("kl", ours, theirs, axis)), rel=1e-4)
    else:
        variance = (ours.numel() - 1) / ours.numel()  # one has the sample's, one the whole's
        assert far.value * variance == pytest.approx(float(unexplained(ours, theirs)), rel=1e-4)


@pytest.mark.parametrize("axis", [1, -1, 2])
def test_equal_scores_are_a_tie(axis):
    expected = torch.tensor([[1.0, 2.0, 2.0], [0.0, -4.0, 4.0]])
    found = torch.tensor([[0.0, 2.0, 2.0 + 1e-6], [5.0, -4.0, 4.0]])
    expected, found = (x[:, :, None].movedim(1, axis) for x in (expected, found))
    assert changed(expected, found, axis).flatten().tolist() == [False, True]
    assert changed(found, expected, axis).flatten().tolist() == [False, True]


def test_what_is_no_number_decides_nothing_right():
    expected = np.array([[1.0, 2.0], [1.0, 2.0], [math.nan, 2.0]])
    found = np.array([[math.nan, 2.0], [1.0, math.inf], [1.0, 2.0]])
    assert changed(expected, found, 1).tolist() == [True, True, True]
    total = Comparison(1)
    total.add(expected, found)
    assert math.isnan(total.largest)


def test_labels_outside_the_classes_do_not_count():
    scores = torch.eye(3)[None].expand(2, 3, 3)  # (B, K, T): position t has class t
    labels = torch.tensor([[0, 1, 255], [2, 1, -1]])
    assert float(accuracy(scores, labels, 1)) == pytest.approx(3 / 4)


def test_positions_that_are_not_real_do_not_count():
    ours, theirs, axis, *_ = results("tokens", 0)
    real = torch.tensor([[True, True, False]]).expand(4, 3)
    spoilt = ours.masked_fill(~real[..., None], 1e3)
    for kept in (axis, None):
        wanted = loss("kl", ours[:, :2], theirs[:, :2], kept)
        torch.testing.assert_close(loss("kl", spoilt, theirs, kept, real), wanted)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((10,), 1),
        ((1,), None),
        ((21, 8, 8), 1),
        ((1, 8, 8), None),
        ((7, 30), -1),
        ((7, 1), None),
        ((2, 3, 4, 5), None),
        ((), None),
    ],
)
def test_the_rule_for_a_result_that_says_nothing(shape, axis):
    assert axis_of(shape) == axis
