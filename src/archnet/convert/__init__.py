"""The compiler: a captured teacher becomes a student of five operators."""

from archnet.convert.builder import ConversionError, TargetLimits
from archnet.convert.rules.base import Approximation
from archnet.convert.stepwise import stepwise
from archnet.convert.translation import Norm, convert_translator, fit_norms
from archnet.convert.walk import convert, missing_rules, native_cycles

__all__ = [
    "Approximation",
    "ConversionError",
    "Norm",
    "TargetLimits",
    "convert",
    "convert_translator",
    "fit_norms",
    "missing_rules",
    "native_cycles",
    "stepwise",
]
