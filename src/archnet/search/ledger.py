"""``search.json``: every trial with what it gave and took; an interrupted search goes on there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from archnet.search.promise import SearchError

Row = dict[str, Any]


class Ledger:
    """The trials of one search, in order.

    Args:
        path: of the file; read if it exists.
        write: writes plain data to it, whole or not at all.
        read: reads it.
        given: keys and groups of the config that the user named, which the search leaves alone; of
            a file that exists, those count that it was begun with.
    """

    def __init__(
        self,
        path: Path,
        write: Callable[[Path, Any], None],
        read: Callable[[Path], Mapping[str, Any]],
        given: Sequence[str] = (),
    ) -> None:
        self.path, self._write = path, write
        self.given, self.rows = list(given), list[Row]()
        if path.exists():
            found = read(path)
            self.given, self.rows = list(found["given"]), list(found["trials"])
        else:
            self.save()
        self._place = 0  # of the next trial

    def names(self, *keys: str) -> bool:
        """Whether the user has named one of these keys or groups."""
        return any(key in self.given for key in keys)

    @property
    def minutes(self) -> float:
        """What the trials up to now have taken: the same whenever a search is repeated."""
        return sum(row["seconds"] for row in self.rows[: self._place]) / 60

    def trial(self, about: Mapping[str, Any], work: Callable[[str], Mapping[str, Any]]) -> Row:
        """The row of a trial: as it was recorded, or what ``work`` finds now.

        Args:
            about: what the trial is, plain data. A search asks in the same order whenever it is
                repeated.
            work: is given the trial's name, does it and returns plain data; ``earlier`` in it are
                seconds of sessions before.

        Raises:
            SearchError: the file has another trial at this place.
        """
        place, self._place = self._place, self._place + 1
        asked = json.loads(json.dumps({"name": f"trial{place:02d}", **about}))
        if place < len(self.rows):
            row = self.rows[place]
            if {key: row.get(key) for key in asked} != asked:
                raise SearchError(
                    f"{self.path} has another trial {place} than this version of archnet plans: "
                    "start a new run"
                )
            return row
        began = time.monotonic()
        found = dict(work(asked["name"]))
        seconds = time.monotonic() - began + found.pop("earlier", 0.0)
        row = json.loads(json.dumps({**asked, **found, "seconds": round(seconds, 2)}))
        self.rows.append(row)
        self.save()
        return row

    def save(self) -> None:
        """Write the file."""
        self._write(self.path, {"given": self.given, "trials": self.rows})
