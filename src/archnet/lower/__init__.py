"""From whole operators to what a target runs: `lower(student, target)`."""

from archnet.lower import convolution, linear, pooling, segments, sums
from archnet.lower.check import TargetError, check_layers, check_memory
from archnet.lower.lowering import Lowered, deployed, deployed_cost, lower, target_of

WAYS_IN = (convolution, linear, pooling, segments, sums)  # whose import registers their ways

__all__ = [
    "Lowered",
    "TargetError",
    "check_layers",
    "check_memory",
    "deployed",
    "deployed_cost",
    "lower",
    "target_of",
]
