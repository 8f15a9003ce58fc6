"""What commands print: sizes, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from reasonalloc.sizes import parse_size
from reasonalloc.tables import grid, human, pairs, stdout

__all__ = ["grid", "human", "note", "pairs", "parse_size", "print_json", "progress", "stderr"]
__all__ += ["stdout"]


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
