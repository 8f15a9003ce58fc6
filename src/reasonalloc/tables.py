"""Tables of results: as text, as HTML in a notebook, and on a terminal with rich if it is there."""

from __future__ import annotations

import html
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

#: A column's title, and whether it holds numbers.
Column = tuple[str, bool]
_UNITS = "KMGT"
_PIPED = 132  # columns where there is no terminal
_UNBROKEN = 18  # characters; shorter cells, such as names, are never folded


def human(size: int) -> str:
    """Return bytes as text: ``1.50 GiB``."""
    if abs(size) < 1024:
        return f"{size} B"
    value = float(size)
    for letter in _UNITS:
        value /= 1024
        if abs(value) < 1024 or letter == _UNITS[-1]:
            break
    return f"{value:.2f} {letter}iB"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: above the table, or "".
        columns: of a table with a header; none for pairs of a name and a value.
        rows: cells.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """Return the table as plain text, aligned with blanks."""
        aligned = self.columns or [("", False)] * max(map(len, self.rows), default=0)
        lines = [[name for name, _ in self.columns], *self.rows] if self.columns else self.rows
        widths = [max((len(row[i]) for row in lines), default=0) for i in range(len(aligned))]
        text = [self.title] if self.title else []
        for row in lines:
            cells = zip(row, widths, aligned, strict=True)
            padded = (c.rjust(w) if number else c.ljust(w) for c, w, (_, number) in cells)
            text.append("  ".join(padded).rstrip())
        return "\n".join(text)

    def html(self) -> str:
        """Return the table as HTML."""
        sides = [' style="text-align: right"' if number else "" for _, number in self.columns]
        head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in self.columns)
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{sides[i] if sides else ''}>{html.escape(cell)}</td>"
                for i, cell in enumerate(row)
            )
            + "</tr>"
            for row in self.rows
        )
        title = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        return f"<table>{title}{f'<tr>{head}</tr>' if head else ''}{body}</table>"

    def rich(self) -> RichTable:
        """Return the table for a rich console."""
        from rich.markup import escape

        cells = [[escape(cell) for cell in row] for row in self.rows]
        title = escape(self.title)
        if not self.columns:
            return pairs(((row[0], row[1]) for row in cells), title or None)
        return grid(self.columns, cells, title)


def as_text(tables: Sequence[Table], heading: str = "", notes: Sequence[str] = ()) -> str:
    """Return tables as plain text, with a line above and lines below them."""
    head = [heading] if heading else []
    return "\n\n".join([*head, *(table.text() for table in tables), *notes])


def show(tables: Sequence[Table], heading: str = "", notes: Sequence[str] = ()) -> None:
    """Print tables on stdout, with a line above and lines below them."""
    if importlib.util.find_spec("rich") is None:
        print(as_text(tables, heading, notes))
        return
    console = stdout()
    if heading:  # as a table's title it would be folded
        console.print(heading, style="bold", markup=False)
    for index, table in enumerate(tables):
        if index:
            console.print()
        console.print(table.rich())
    for line in notes:
        console.print(line, markup=False)


class Shown:
    """A result that prints itself: in a terminal, and as HTML in a notebook."""

    def heading(self) -> str:
        """Return the line above everything, or ""."""
        return ""

    def tables(self) -> list[Table]:
        """Return the tables to show."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Return lines below the tables."""
        return []

    def table(self) -> str:
        """Return everything that ``show`` prints, as plain text."""
        return as_text(self.tables(), self.heading(), self.notes())

    def show(self) -> None:
        """Print heading, tables and notes on stdout."""
        show(self.tables(), self.heading(), self.notes())

    def _repr_html_(self) -> str:
        lines = [html.escape(line) for line in (self.heading(), *self.notes())]
        head, *notes = (f"<p>{line}</p>" if line else "" for line in lines)
        return head + "".join(table.html() for table in self.tables()) + "".join(notes)


def stdout() -> Console:
    """Return a console for results; in a file or a pipe it is wide enough for names of arms."""
    from rich.console import Console

    unknown = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=_PIPED if unknown else None)


def pairs(rows: Iterable[tuple[str, str]], title: str | None = None) -> RichTable:
    """Return a rich table of names and values."""
    from rich.table import Table as RichTable

    table = RichTable(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def grid(columns: Iterable[Column], rows: Iterable[Iterable[str]], title: str) -> RichTable:
    """Return a rich table with a header."""
    from rich.table import Table as RichTable

    table = RichTable(
        title=title, title_justify="left", title_style="bold", box=None, header_style="dim"
    )
    cells = [tuple(row) for row in rows]
    for index, (name, number) in enumerate(columns):
        width = max((len(row[index]) for row in cells), default=0)
        table.add_column(
            name,
            justify="right" if number else "left",
            overflow="fold",
            min_width=width if width <= _UNBROKEN else None,
        )
    for row in cells:
        table.add_row(*row)
    return table
