"""Shapes of what operators give, computed on the meta device once for each kind."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from archnet.ops.operators import Activation, Operator


def result_shape(module: Operator, read: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that an operator gives for one sample, without the batch.

    Args:
        module: quantized or not; its weights do not matter.
        read: shapes of what it reads, without the batch.
    """
    if isinstance(module, Activation):
        return tuple(read[0])
    kind: Any = type(module)
    return _computed(kind, json.dumps([module.spec(), read]))


# A pass on the meta device takes milliseconds, and a student has thousands of alike steps.
@lru_cache(maxsize=2**14)
def _computed(kind: Any, described: str) -> tuple[int, ...]:
    arguments, read = json.loads(described)
    with torch.device("meta"), torch.no_grad():
        result = kind(**arguments)(*(torch.empty(1, *shape) for shape in read))
    return tuple(result.shape[1:])
