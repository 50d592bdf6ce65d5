"""Form qdq: integers in ONNX's own types of 2, 4 and 8 bits, the narrowest that holds them."""

from typing import Any

import numpy as np
from onnx import TensorProto, helper
from torch import Tensor

from archnet.deploy.writer import ExportError, Grid, Writer

# Narrowest first: bits, signed and unsigned type, and the first opset that has them. A width
# without a type of its own sits in the next larger one.
_TYPES = (
    (2, TensorProto.INT2, TensorProto.UINT2, 25),
    (4, TensorProto.INT4, TensorProto.UINT4, 21),
    (8, TensorProto.INT8, TensorProto.UINT8, 10),
)


class QdqWriter(Writer):
    """QuantizeLinear and DequantizeLinear behind every activation.

    What lies between them are the integers; operators, layout moves included, work on the floats
    that they stand for, because runtimes have no 4-bit kernels.
    """

    form = "qdq"

    def weight(
        self, name: str, integers: Tensor, scale: Tensor, bits: int, *, is_constant: bool = False
    ) -> str:
        width = max(bits, 2)
        if is_constant:  # any type that this opset has
            width = max(width, min(w for w, *_, opset in _TYPES if opset <= self.opset))
        found = self._type(f"{name}: its {bits} bits", width, signed=True)
        if found is None:
            raise ExportError(f"{name}: its {bits} bits fit no type of form={self.form}: 8 at most")
        return self.scaled(name, integers, scale, found[0], bits)

    def rounded(self, tensor: str, source: str, grid: Grid, low: int, high: int) -> Grid | None:
        label = f"step {grid.name}: its integers {grid.low} to {grid.high}"
        # A grid of one bit is 0 to 1 or -1 to 1. One that begins elsewhere has a zero point.
        width = (grid.high - grid.low).bit_length()
        signed = grid.low < 0 and grid.high < 2 ** (width - 1)
        zero = 0 if signed else grid.zero
        found = self._type(label, width, signed)
        if found is None:
            raise self.too_wide(grid)
        dtype, *limits = found
        bounds = [
            # Away from the type's own bounds, at which a QuantizeLinear saturates.
            self.constant(f"{tensor}.{key}", bound * np.float32(grid.scale), np.float32)
            if bound != limit - zero
            else ""
            for key, bound, limit in zip(("low", "high"), (low, high), limits, strict=True)
        ]
        if any(bounds):
            source = self.node("Clip", [source, *bounds], f"{tensor}.clipped")
        constants = [
            self.constant(f"{grid.name}.scale", grid.scale, np.float32),
            self.constant(f"{grid.name}.zero", zero, dtype),
        ]
        integers = self.node("QuantizeLinear", [source, *constants], f"{tensor}.integers")
        self.note(grid.bits)
        self.node("DequantizeLinear", [integers, *constants], tensor)
        return None

    def _type(self, label: str, bits: int, signed: bool) -> tuple[Any, int, int] | None:
        """The narrowest type that holds ``bits`` and its bounds; None if 8 bits are too few."""
        for width, signed_type, unsigned_type, opset in _TYPES:
            if bits > width:
                continue
            dtype = helper.tensor_dtype_to_np_dtype(signed_type if signed else unsigned_type)
            if opset > self.opset:
                raise ExportError(
                    f"{label} need {dtype}, which opset={self.opset} lacks: "
                    f"export with opset={opset} or more, or form=qcdq"
                )
            low = -(2 ** (width - 1)) if signed else 0
            return dtype, low, low + 2**width - 1
        return None
