"""A recipe that finds itself: from a promise (`goal` of the config) to the student that keeps it.

`promise` says what was asked and whether it is kept, `ladder` which widths lie between float and
those asked for, `arms` which learning rates and schedules are worth a trial and how trials are
compared, `ledger` keeps every trial in ``search.json``, and `plan` does the search. What trains,
measures and costs a student is a `Bench`; a run's is `archnet.jobs.bench`, that of
loaders `archnet.api.searching`.
"""

from archnet.search.arms import PRESET
from archnet.search.ledger import Ledger
from archnet.search.plan import Found, Search
from archnet.search.promise import Bench, Measured, Promise, SearchError

__all__ = ["PRESET", "Bench", "Found", "Ledger", "Measured", "Promise", "Search", "SearchError"]
