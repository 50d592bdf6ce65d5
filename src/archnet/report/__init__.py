"""Tables and plots of a run, from its ``metrics.json`` and CSV logs alone."""

from archnet.report.files import judged
from archnet.report.page import write
from archnet.report.table import rows, show

__all__ = ["judged", "rows", "show", "write"]
