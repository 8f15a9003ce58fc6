"""What commands print: sizes, tables, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from reasonalloc.errors import UsageError
from reasonalloc.tables import grid, human, pairs, stdout

__all__ = ["grid", "human", "note", "pairs", "parse_size", "print_json", "progress", "stderr"]
__all__ += ["stdout"]

_STEPS = "KMGT"


def parse_size(text: str) -> int:
    """Return bytes of ``24GiB`` or ``24G`` (powers of 1024), ``24GB`` (of 1000) or a number.

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


def stderr() -> Console:
    """Return a console for everything that is not the result."""
    return Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Print one line on stderr that the user should know."""
    stderr().print(f"note: {text}", markup=False, soft_wrap=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far it is: call what comes with (done, total).

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
    """Print one JSON object on stdout."""
    print(json.dumps(data, indent=1))
