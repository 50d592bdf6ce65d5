"""Tables and plots of a run, from its ``metrics.json`` and CSV logs alone."""

from archnet.report.page import write
from archnet.report.table import rows, show

__all__ = ["rows", "show", "write"]
