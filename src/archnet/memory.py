"""Memory that the allocator keeps is given back to the system."""

import ctypes
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """`malloc_trim` of glibc; None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def release() -> None:
    """Give back what was freed: for after work of large, short-lived tensors.

    The allocator of glibc keeps such blocks for the next of their size. A validation has larger
    batches than training, so that what it leaves would be held until the next one, beside all that
    training uses.
    """
    if (trim := _trim()) is not None:
        trim(0)
