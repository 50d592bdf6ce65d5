"""Form subbyte: form qdq with weights packed in ONNX's own types of 2 and 4 bits.

A Cast to INT8 stands behind them. It is arithmetic on constants, which runtimes do once while they
load; from there on the file is that of form qdq with the fewest Clips. Without it ONNX Runtime
1.32 fuses weights of 2 bits into kernels that do not take them and refuses its own graph, and
Qualcomm's HTP computes something else. Activations, of which a file holds none, stay in 8 bits.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from torch import Tensor

from archnet.config import DialectConfig
from archnet.deploy.writer import ExportError, Writer

# Narrowest first: bits, type, and the first opset that has it. A width without a type of its own
# sits in the next larger one.
_TYPES = (
    (2, TensorProto.INT2, 25),
    (4, TensorProto.INT4, 21),
    (8, TensorProto.INT8, 10),
)


class SubbyteWriter(Writer):
    """Weights in the narrowest type that holds them."""

    form = "subbyte"
    bias_zeros = False

    def __init__(self, dialect: DialectConfig) -> None:
        # The fewest nodes: beside packed weights the others count.
        super().__init__(replace(dialect, clip="needed"))

    def weight(
        self, name: str, integers: Tensor, scale: Tensor, bits: int, *, is_constant: bool = False
    ) -> str:
        width = max(bits, 2)
        if is_constant:  # any type that this opset has
            width = max(width, min(w for w, _, opset in _TYPES if opset <= self.opset))
        packed = self._type(name, bits, width)
        return self.scaled(name, integers, scale, np.int8, bits, packed)

    def _type(self, name: str, bits: int, width: int) -> Any:
        """The narrowest type that holds ``width`` bits; None where that is INT8."""
        for most, kind, opset in _TYPES:
            if width > most:
                continue
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            if opset > self.opset:
                raise ExportError(
                    f"{name}: its {bits} bits need {dtype}, which opset={self.opset} lacks: "
                    f"export with opset={opset} or more, or form=qdq"
                )
            return None if dtype == np.int8 else dtype
        raise ExportError(f"{name}: its {bits} bits fit no type of form={self.form}: 8 at most")
