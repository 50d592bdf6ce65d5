"""What callers from Python use on data of their own, beside the functions of single rooms."""

from archnet.api.comparison import Comparison, compare
from archnet.api.distilling import distill
from archnet.api.searching import Searched, search
from archnet.api.verification import Verification, verify

__all__ = ["Comparison", "Searched", "Verification", "compare", "distill", "search", "verify"]
