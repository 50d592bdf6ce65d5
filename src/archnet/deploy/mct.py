"""Form mct: floats that the quantizer nodes of Sony's toolkit round, for its IMX500 converter.

The nodes are those of the package mct-quantizers, which that converter reads in place of
QuantizeLinear and DequantizeLinear: WeightsSymmetricQuantizer(weight, threshold), with a threshold
for each output channel, and ActivationPOTQuantizer(x), whose threshold is a power of two. A
threshold is the scale times the levels on one side of zero. Weights stand in the file as floats
that are on their grid already, biases as floats.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from torch import Tensor

from archnet.deploy.writer import Container, ExportError, Grid, Value, Writer, positive

VERSION = "1.7.0"  # of mct-quantizers, which every node names

ACTIVATION = "ActivationPOTQuantizer"


class MctWriter(Writer):
    """A quantizer node behind every weight and activation.

    Fully connected layers at every position are no Gemm on rows: the converter refuses a Reshape
    that changes the batch.
    """

    form = "mct"
    domain = "mct_quantizers"
    rows = False

    def weight(
        self, name: str, integers: Tensor, scale: Tensor, bits: int, *, is_constant: bool = False
    ) -> str:
        width = 8 if is_constant else bits
        low, high = int(integers.min()), int(integers.max())
        if low < -(2 ** (width - 1)) or high >= 2 ** (width - 1):
            raise self.too_wide(name, low, high)
        factors = np.atleast_1d(positive(name, scale))
        along = factors.reshape(-1, *[1] * (integers.dim() - 1))
        self.constant(name, integers.detach().cpu().numpy() * along, np.float32)
        threshold = self.constant(f"{name}.threshold", factors * 2 ** (width - 1), np.float32)
        return self._quantizer(
            "WeightsSymmetricQuantizer",
            [name, threshold],
            f"{name}.float",
            width,
            signed=1,
            per_channel=int(len(factors) > 1),
            channel_axis=0,
        )

    def widened(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        # "Only 2d input (N,D) or 4d (N, D0, D1, D2) input is supported"
        return (shape[0], 1, *shape[1:]) if len(shape) == 3 else shape

    def bias(self, name: str, integers: Tensor, scale: Tensor) -> str:
        values = integers.detach().cpu().double() * scale.detach().cpu().double()
        return self.constant(name, values, np.float32)

    def container(self, name: str, low: int, high: int) -> tuple[Container, int]:
        levels = high - low + 1
        if low not in (0, -levels // 2):
            raise self.too_wide(name, low, high)
        return Container(np.dtype(np.float32), low, high), 0

    def rounded(self, tensor: str, source: str, grid: Grid, low: int, high: int) -> Grid | None:
        source = self.clipped(tensor, source, grid, low, high)
        threshold = grid.scale * (grid.high + 1)
        if math.frexp(threshold)[0] != 0.5:
            raise ExportError(
                f"step {grid.name}: its scale is no power of two, and form={self.form} knows no "
                "other: convert for hardware=imx500, or quantize with act_power_of_two=True"
            )
        self._quantizer(
            ACTIVATION,
            [source],
            tensor,
            grid.bits,
            signed=int(grid.low < 0),
            threshold=threshold,
        )
        return None

    def result(self, value: Value, seen: tuple[float, float] | None) -> Value:
        """The network's result on a grid of 8 bits: the converter takes no layer without one."""
        writers = {node.output[0]: node.op_type for node in self.nodes}
        if seen is None or writers.get(value.tensor) == ACTIVATION:
            return value
        low, high = min(seen[0], 0.0), max(seen[1], 0.0)
        largest = max(-low, high) or 1.0
        threshold = 2.0 ** math.ceil(math.log2(largest))
        ends = (-128, 127) if low < 0 else (0, 255)
        name = f"{value.name}_result"
        container, zero = self.container(name, *ends)
        grid = Grid(threshold / (ends[1] + 1), *ends, name, 8, container, zero)
        self.rounded(name, self.tensor(value), grid, *ends)
        return Value(name, name, value.moved_shape)

    def _quantizer(
        self, operator: str, inputs: list[str], output: str, bits: int, **attributes: Any
    ) -> str:
        self.node(
            operator,
            inputs,
            output,
            domain=self.domain,
            num_bits=bits,
            mctq_version=VERSION,
            **attributes,
        )
        self.note(bits)
        return output

    def model(
        self, inputs: Mapping[str, tuple[int, ...]], outputs: Mapping[str, Sequence[int]]
    ) -> onnx.ModelProto:
        """The graph with the shapes that quantizer nodes give, which ONNX infers for none of them:
        those that they read.
        """
        model = super().model(inputs, outputs)
        plain = onnx.ModelProto()
        plain.CopyFrom(model)
        for node in plain.graph.node:
            if node.domain == self.domain:
                node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output[:1]))
        written = {n.output[0] for n in model.graph.node if n.domain == self.domain}
        for value in onnx.shape_inference.infer_shapes(plain, strict_mode=True).graph.value_info:
            if value.name in written:
                model.graph.value_info.append(value)
        return model
