"""Tables for people: with rich where it is installed, as plain text, and as HTML for notebooks."""

from __future__ import annotations

import html
import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_STEPS = "KMGT"
_UNBROKEN = 18  # characters; shorter cells, such as names, are never folded


def human(size: int) -> str:
    """Bytes as text: ``1.50 GiB``."""
    if abs(size) < 1024:
        return f"{size} B"
    value = float(size)
    for letter in _STEPS:
        value /= 1024
        if abs(value) < 1024 or letter == _STEPS[-1]:
            break
    return f"{value:.2f} {letter}iB"


def grid(columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[str]], title: str) -> Any:
    """A table of rich with a header; a column is ``(title, whether it holds numbers)``."""
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


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns.

    Attributes:
        title: what the table is of.
        columns: per column its title and whether it holds numbers, which stand on the right.
        rows: cells, one text per column.
    """

    title: str
    columns: Sequence[tuple[str, bool]]
    rows: Sequence[Sequence[str]]

    def shown(self) -> Any:
        """Return a table of rich, or the plain text where rich is not installed."""
        if importlib.util.find_spec("rich") is None:
            return self.text()
        return grid(self.columns, self.rows, self.title)

    def text(self) -> str:
        """Return the table as plain text."""
        head = [name for name, _ in self.columns]
        lines = [head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

        def joined(line: Sequence[str]) -> str:
            cells = [
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, (_, number) in zip(line, widths, self.columns, strict=True)
            ]
            return "  ".join(cells).rstrip()

        return "\n".join([self.title, *map(joined, lines)])

    def html(self) -> str:
        """Return the table as HTML; all texts are escaped."""
        sides = ["right" if number else "left" for _, number in self.columns]

        def row(cells: Iterable[str], tag: str) -> str:
            inner = "".join(
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )
            return f"<tr>{inner}</tr>"

        head = row([name for name, _ in self.columns], "th")
        body = "".join(row(cells, "td") for cells in self.rows)
        return (
            f"<table><caption>{html.escape(self.title)}</caption><thead>{head}</thead>"
            f"<tbody>{body}</tbody></table>"
        )
