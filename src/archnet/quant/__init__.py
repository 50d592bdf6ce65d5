"""Quantizers, where they sit, and their calibration."""

from archnet.quant.allocate import Allocation, allocate
from archnet.quant.attach import (
    QuantizationError,
    attach,
    describe,
    grids,
    input_quantizers,
    pack,
    quantizers,
    unpack,
)
from archnet.quant.calibrate import best_scale, calibrate_weights
from archnet.quant.copies import copied_layers, copy_values, merge_copies
from archnet.quant.equalize import equalize
from archnet.quant.quantize import prepare, quantize
from archnet.quant.quantizers import (
    ActivationDoReFa,
    ActivationLSQ,
    BiasQuantizer,
    Quantizer,
    WeightDoReFa,
    WeightLSQ,
)
from archnet.quant.recipe import Recipe
from archnet.quant.settle import Margin, settle
from archnet.quant.together import Together, exact_constants
from archnet.quant.units import grid_steps
from archnet.quant.unquantize import unquantize
from archnet.quant.widths import FLOAT

__all__ = [
    "FLOAT",
    "ActivationDoReFa",
    "ActivationLSQ",
    "Allocation",
    "BiasQuantizer",
    "Margin",
    "QuantizationError",
    "Quantizer",
    "Recipe",
    "Together",
    "WeightDoReFa",
    "WeightLSQ",
    "allocate",
    "attach",
    "best_scale",
    "calibrate_weights",
    "copied_layers",
    "copy_values",
    "describe",
    "equalize",
    "exact_constants",
    "grid_steps",
    "grids",
    "input_quantizers",
    "merge_copies",
    "pack",
    "prepare",
    "quantize",
    "quantizers",
    "settle",
    "unpack",
    "unquantize",
]
