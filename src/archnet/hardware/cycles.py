"""Cycles on a systolic array, from the sizes of a network's matrix products.

The formula is that of SCALE-Sim's analytical model (Samajdar et al. 2020, "A systematic
methodology for characterizing scalability of DNN accelerators using SCALE-Sim", section III): an
array of R x C multipliers computes a tile in 2R + C + T - 2 cycles, and a product takes
ceil(S_R / R) * ceil(S_C / C) tiles, with

    dataflow   S_R (rows)   S_C (columns)   T (time)
    output     positions    filters         depth
    weight     depth        filters         positions
    input      depth        positions       filters

The simulator itself (`scalesim` 3.0) goes cycle by cycle through traces in files, and needs numba,
cython and pandas. Its demand matrices for the example of `cycles` have as many rows as this
formula gives for weight and input (1,980 and 2,808); for output it has R fewer a tile (1,392 in
all), as it does not count what drains the array.

The formula is limited by the bandwidth between the buffers on the chip and the array (a roofline):
operands are read again for each tile that needs them, each at its width, and partial sums that
leave the array take 32 bits each way.
"""

import math
from dataclasses import dataclass
from typing import Any

from archnet.errors import ConfigError
from archnet.hardware.cost import Product, StepCost

DATAFLOWS = ("output", "weight", "input")
SUM_BITS = 32


@dataclass(frozen=True)
class SystolicArray:
    """A systolic array of ``rows`` x ``columns`` multipliers; one multiplication a cycle in each.

    Args:
        rows, columns: at least 1.
        dataflow: what stays in place: "output", "weight" or "input".
        bandwidth: bytes a cycle between on-chip memory and array, both ways together.

    Raises:
        ConfigError: a size is not positive, or there is no such dataflow.
    """

    rows: int = 16
    columns: int = 16
    dataflow: str = "output"
    bandwidth: float = 64.0

    def __post_init__(self) -> None:
        for key in ("rows", "columns", "bandwidth"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}={getattr(self, key)} must be above zero")
        if self.dataflow not in DATAFLOWS:
            raise ConfigError(f"dataflow={self.dataflow} is not one of {', '.join(DATAFLOWS)}")


def cycles(step: StepCost[Any], array: SystolicArray) -> int | None:
    """Cycles of one step: of its matrix products, each bound by multipliers or by bandwidth.

    What multiplies nothing (pooling, moves, a teacher's additions) takes none here; None where the
    products of a file's layer are not known.

    Example (16x16 array, output stays, a 3x3 convolution of 16 channels to 32 on 8x8 pixels):
    4 * 2 tiles of 2*16 + 16 + 144 - 2 = 190 cycles, 1,520 in all.
    """
    if step.macs is None:
        return None
    return sum(_product_cycles(product, step, array) for product in step.products)


def _product_cycles(product: Product, step: StepCost, array: SystolicArray) -> int:
    rows, columns, time = {
        "output": (product.positions, product.filters, product.depth),
        "weight": (product.depth, product.filters, product.positions),
        "input": (product.depth, product.positions, product.filters),
    }[array.dataflow]
    down, across = math.ceil(rows / array.rows), math.ceil(columns / array.columns)
    compute = down * across * (2 * array.rows + array.columns + time - 2)
    bits = _traffic(product, step, array.dataflow, down, across)
    return product.count * max(compute, math.ceil(bits / 8 / array.bandwidth))


def _traffic(product: Product, step: StepCost, dataflow: str, down: int, across: int) -> int:
    """Bits between memory and array for one product."""
    inputs = product.positions * product.depth * step.activation_bits
    weights = product.depth * product.filters * step.weight_bits
    results = product.positions * product.filters
    written = results * step.activation_bits
    if dataflow == "output":
        return inputs * across + weights * down + written
    # Every tile but the last of a column writes partial sums, which the next one reads.
    partial = 2 * (down - 1) * results * SUM_BITS
    if dataflow == "weight":
        return weights + inputs * across + partial + written
    return inputs + weights * across + partial + written
