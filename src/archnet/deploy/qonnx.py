"""Form qonnx: floats that Quant nodes round, of any width (Pappalardo et al. 2022, 2206.07527).

The operator Quant(x, scale, zero point, bits) is that of the package qonnx, whose compilers for
FPGAs (FINN, hls4ml) read such files. Weights stand in them as floats in front of a Quant node.
"""

import numpy as np
from torch import Tensor

from archnet.deploy.writer import Container, ExportError, Grid, Writer, positive


class QonnxWriter(Writer):
    """A Quant node behind every weight, bias and activation."""

    form = "qonnx"
    domain = "qonnx.custom_op.general"

    def weight(
        self, name: str, integers: Tensor, scale: Tensor, bits: int, *, is_constant: bool = False
    ) -> str:
        return self._constant(name, integers, scale, bits)

    def bias(self, name: str, integers: Tensor, scale: Tensor) -> str:
        return self._constant(name, integers, scale, 32)

    def container(self, name: str, low: int, high: int) -> tuple[Container, int]:
        bits = (high - low).bit_length()
        narrow = low == -high
        signed = narrow or low == -(2 ** (bits - 1))
        zero = 0 if signed else max(0, -low)
        held = Container(np.dtype(np.float32), *quant_range(bits, signed, narrow))
        if (low + zero, high + zero) != (held.lowest, held.highest):
            raise self.too_wide(name, low, high)
        return held, zero

    def rounded(self, tensor: str, source: str, grid: Grid, low: int, high: int) -> Grid | None:
        source = self.clipped(tensor, source, grid, low, high)
        scale, bits = self.step(grid), (grid.high - grid.low).bit_length()
        signed, narrow = grid.container.lowest < 0, grid.low == -grid.high
        self._quant(source, scale, grid.name, tensor, bits, grid.zero, signed=signed, narrow=narrow)
        self.note(grid.bits)
        return None

    def _constant(self, name: str, integers: Tensor, scale: Tensor, bits: int) -> str:
        factors = positive(name, scale)
        if factors.ndim:
            factors = factors.reshape(-1, *[1] * (integers.dim() - 1))
        values = integers.detach().cpu().numpy() * factors
        if not np.isfinite(values).all():
            raise ExportError(f"{name} has values that are not finite: calibrate it")
        self.constant(name, values, np.float32)
        step = self.constant(f"{name}.scale", factors, np.float32)
        output = self._quant(name, step, name, f"{name}.float", bits, 0, signed=True, narrow=False)
        self.note(bits)
        return output

    def _quant(
        self,
        source: str,
        scale: str,
        name: str,
        output: str,
        bits: int,
        zero_point: int,
        *,
        signed: bool,
        narrow: bool,
    ) -> str:
        zero = self.constant(f"{name}.zero", zero_point, np.float32)
        width = self.constant(f"{name}.bits", bits, np.float32)
        return self.node(
            "Quant",
            [source, scale, zero, width],
            output,
            domain=self.domain,
            signed=int(signed),
            narrow=int(narrow),
            rounding_mode="ROUND",
        )


def quant_range(bits: int, signed: bool, narrow: bool) -> tuple[int, int]:
    """Lowest and highest integer of a Quant node.

    Example: 4 bits are 0 to 15, signed -8 to 7, signed and narrow -7 to 7.
    """
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
