"""The compiler: a captured teacher becomes a student of five operators."""

from archnet.convert.builder import ConversionError, TargetLimits
from archnet.convert.walk import convert

__all__ = ["ConversionError", "TargetLimits", "convert"]
