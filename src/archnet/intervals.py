"""95 % intervals of what is measured on a limited number of test samples.

Teacher and student see the same samples, so that their *difference* is known better than either
figure: what both get right, or both wrong, says nothing of it.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Z = 1.959963984540054  # of the normal distribution, 2.5 % on either side
RESAMPLES = 1000


def wilson(hits: int, count: int) -> tuple[float, float]:
    """A share of ``count`` independent samples (Wilson 1927): low and high, 0 to 1.

    >>> [round(bound, 3) for bound in wilson(100, 100)]
    [0.963, 1.0]
    """
    share, spread = hits / count, Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def standard_error(low: float, high: float) -> float:
    """Of a figure with this 95 % interval, were it normal."""
    return (high - low) / (2 * Z)


def of_pairs(teacher_alone: int, student_alone: int, count: int) -> tuple[float, float]:
    """The difference of two shares of the same ``count`` samples, student - teacher: low and high.

    Half a sample is added to each of the four cells (Agresti & Min 2005), so that no difference on
    few samples is not taken for no difference at all.

    Args:
        teacher_alone: samples that only the teacher has right.
        student_alone: samples that only the student has right.
        count: all samples.

    >>> [round(bound, 4) for bound in of_pairs(0, 0, 1000)]
    [-0.002, 0.002]
    """
    fewer, more, size = teacher_alone + 0.5, student_alone + 0.5, count + 2
    difference = (more - fewer) / size
    half = Z * math.sqrt(fewer + more - (more - fewer) ** 2 / size) / size
    return max(-1.0, difference - half), min(1.0, difference + half)


def of_mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values, by Student's t: low and high."""
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return (-math.inf, math.inf)
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found))
    return float(found.mean() - half), float(found.mean() + half)


def of_groups(whole: float, without: Sequence[float]) -> tuple[float, float]:
    """Any figure of samples in groups of like size, by the jackknife (Quenouille 1956).

    Args:
        whole: the figure on all samples.
        without: the figure on all but one group, for each group.
    """
    found, groups = np.asarray(without, dtype=float), len(without)
    error = math.sqrt((groups - 1) / groups * float(np.square(found - found.mean()).sum()))
    half = float(stats.t.ppf(0.975, groups - 1)) * error
    return whole - half, whole + half


def by_resampling(
    count: int, difference: Callable[[NDArray[np.int64]], float], seed: int = 0
) -> tuple[float, float]:
    """The difference of two figures on the same samples, by the paired bootstrap (Koehn 2004).

    Args:
        count: of samples.
        difference: from how often each sample was drawn, (count,).
        seed: of the drawing.
    """
    draw = np.random.default_rng(seed)
    found = [
        difference(draw.multinomial(count, np.full(count, 1 / count))) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)
