"""A table that prints itself: as text, and as HTML in a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from io import StringIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

WIDTH = 100


@dataclass(frozen=True)
class Printed:
    """A table with its notes below.

    Attributes:
        title: the line above.
        columns: their names; all but the first ``left`` are numbers, on the right.
        rows: a text for every column.
        notes: lines below.
        left: how many columns are on the left.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())
    left: int = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=self.title, title_justify="left")
        for index, name in enumerate(self.columns):
            table.add_column(name, justify="left" if index < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        yield Group(table, *(Text(note) for note in self.notes))

    def __str__(self) -> str:
        from archnet.report.table import plain_console

        written = StringIO()
        plain_console(WIDTH, written).print(self)
        return "\n".join(line.rstrip() for line in written.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """The same for a notebook."""

        def line(tag: str, cells: Sequence[str]) -> str:
            sides = ["left" if index < self.left else "right" for index in range(len(cells))]
            made = (
                f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>'
                for side, cell in zip(sides, cells, strict=True)
            )
            return f"<tr>{''.join(made)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        notes = "".join(f"<div>{escape(note)}</div>" for note in self.notes)
        return (
            f"<table><caption>{escape(self.title)}</caption>{line('th', self.columns)}{body}"
            f"</table>{notes}"
        )


class AsTable:
    """What prints as its table: as text, and as HTML in a notebook."""

    def table(self) -> Printed:
        """The figures, a row each."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()
