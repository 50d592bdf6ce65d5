"""From whole operators to what a target runs: `lower(student, target)`."""

from archnet.lower import convolution, hinges, linear, pooling, segments, sentences, sums
from archnet.lower.check import TargetError, check_layers, check_memory
from archnet.lower.lowering import (
    Lowered,
    SampleCost,
    deployed,
    deployed_cost,
    lower,
    sample_cost,
    target_of,
)

# Their import registers the ways in which operators are written.
WAYS_IN = (convolution, hinges, linear, pooling, segments, sentences, sums)

__all__ = [
    "Lowered",
    "SampleCost",
    "TargetError",
    "check_layers",
    "check_memory",
    "deployed",
    "deployed_cost",
    "lower",
    "sample_cost",
    "target_of",
]
