"""What commands print: sizes, tables, JSON."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from reasonalloc.errors import UsageError

_STEPS = "KMGT"
_PIPED = 132  # columns where there is no terminal
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


def parse_size(text: str) -> int:
    """Bytes from ``24GiB``, ``24G`` (both powers of 1024), ``24GB`` (of 1000) or a plain number.

    Raises:
        UsageError: it cannot be read, or is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(iB?|B)?|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"memory={text!r} is no size: write for example 24GiB or 800MB")
    number, letter, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    power = _STEPS.index(letter.upper()) + 1 if letter else 0
    size = int(float(number) * base**power)
    if size < 1:
        raise UsageError(f"memory={text!r} is too small: give at least one byte")
    return size


def stdout() -> Console:
    """Console for results; in a file or a pipe, tables are wide enough for the names of arms."""
    unknown = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=_PIPED if unknown else None)


def stderr() -> Console:
    """Console for everything that is not the result."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """One line on stderr that the user should know."""
    stderr().print(f"note: {text}", markup=False, soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """How far it is: call what comes with (done, total).

    A bar on stderr; where that is no terminal, a line at every tenth.
    """
    console, told = stderr(), 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if total and done * 10 // total > told:
            told = done * 10 // total
            note(f"{title}: {done} of {total}")

    if not console.is_terminal:
        yield tell
        return
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(data, indent=1))


def pairs(rows: Iterable[tuple[str, str]], title: str | None = None) -> Table:
    """A table of names and values."""
    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def grid(columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[str]], title: str) -> Table:
    """A table with a header; a column is ``(title, whether it holds numbers)``."""
    table = Table(
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
