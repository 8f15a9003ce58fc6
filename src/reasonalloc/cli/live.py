"""Text as it is generated on stdout, and a progress line where a person looks."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from reasonalloc.cli import output


class Screen:
    """Streams text to stdout with a progress line below it, or on stderr if that is the terminal.

    In a pipe the text comes out exactly as generated, without the line.

    Args:
        show_text: False if stdout is for something else (``--json``).
    """

    def __init__(self, show_text: bool) -> None:
        self._console = output.stderr()
        watched = self._console.is_terminal
        self._raw = show_text and not (watched and sys.stdout.isatty())
        self._inside = show_text and not self._raw
        if self._inside:
            self._console = output.stdout()
        self._partial = ""
        self._status = ""
        self._live = (
            Live(
                console=self._console,
                transient=True,
                refresh_per_second=8,
                redirect_stdout=self._inside,  # a file or a pipe must get what is printed
            )
            if watched
            else None
        )

    def __enter__(self) -> Screen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._inside and self._partial:
            _print(self._console, self._partial)
            self._partial = ""

    def update(self, status: str, text: str = "") -> None:
        """Show the next piece of text (it may be empty) and the new progress line."""
        self._status = status
        if text and self._raw:
            sys.stdout.write(text)
            sys.stdout.flush()
        elif text and self._inside:
            self._add(text)
        if self._live is not None:
            line = Text(status, style="dim", no_wrap=True, overflow="ellipsis")
            self._live.update(Group(Text(self._partial), line) if self._partial else line)

    def _add(self, text: str) -> None:
        """Whole lines go above the live region; only the last one is still being written."""
        *whole, self._partial = (self._partial + text).split("\n")
        for line in whole:
            _print(self._console, line)
        *full, last = Text(self._partial).wrap(self._console, self._console.width) or [Text()]
        for part in full:
            _print(self._console, part.plain)
        if full:
            self._partial = last.plain


def _print(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False)
