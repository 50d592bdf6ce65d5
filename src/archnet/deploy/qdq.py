"""Form qdq: integers in ONNX's own types of 2, 4 and 8 bits, the narrowest that holds them."""

from typing import Any

import ml_dtypes
import numpy as np
from torch import Tensor

from archnet.deploy.writer import ExportError, Grid, Writer

# Narrowest first; (type, the first opset that has it). A width without a type of its own sits in
# the next larger one.
_SIGNED = ((ml_dtypes.int2, 25), (ml_dtypes.int4, 21), (np.int8, 10))
_UNSIGNED = ((ml_dtypes.uint2, 25), (ml_dtypes.uint4, 21), (np.uint8, 10))


class QdqWriter(Writer):
    """QuantizeLinear and DequantizeLinear behind every activation, zero points of 0.

    What lies between them are the integers; operators, layout moves included, work on the floats
    that they stand for, because runtimes have no 4-bit kernels.
    """

    form = "qdq"

    def weight(self, name: str, integers: Tensor, scale: Tensor, bits: int) -> str:
        high = 2 ** max(1, bits - 1) - 1
        dtype = self._type(f"{name}: its {bits} bits", -high - 1, high)
        if dtype is None:
            raise ExportError(f"{name}: its {bits} bits fit no type of form={self.form}: 8 at most")
        return self.scaled(name, integers, scale, dtype)

    def rounded(self, tensor: str, source: str, grid: Grid, high: int) -> Grid | None:
        label = f"step {grid.name}: its integers {grid.low} to {grid.high}"
        dtype = self._type(label, grid.low, grid.high)
        if dtype is None:
            raise self.too_wide(grid)
        bounds = [
            # Away from the type's own bounds, at which a QuantizeLinear saturates.
            self.constant(f"{tensor}.{key}", bound * np.float32(grid.scale), np.float32)
            if bound != limit
            else ""
            for key, bound, limit in zip(
                ("low", "high"), (grid.low, high), _range(dtype), strict=True
            )
        ]
        if any(bounds):
            source = self.node("Clip", [source, *bounds], f"{tensor}.clipped")
        constants = [
            self.constant(f"{grid.name}.scale", grid.scale, np.float32),
            self.constant(f"{grid.name}.zero", 0, dtype),
        ]
        integers = self.node("QuantizeLinear", [source, *constants], f"{tensor}.integers")
        self.node("DequantizeLinear", [integers, *constants], tensor)
        return None

    def _type(self, label: str, low: int, high: int) -> Any:
        """The narrowest type for the integers ``low`` to ``high``; None if 8 bits are too few."""
        for dtype, opset in _SIGNED if low < 0 else _UNSIGNED:
            lowest, highest = _range(dtype)
            if lowest <= low and high <= highest:
                if opset > self.opset:
                    raise ExportError(
                        f"{label} need {np.dtype(dtype)}, which opset={self.opset} lacks: "
                        f"export with opset={opset} or more, or form=qcdq"
                    )
                return dtype
        return None


def _range(dtype: Any) -> tuple[int, int]:
    info = ml_dtypes.iinfo(dtype)
    return int(info.min), int(info.max)
