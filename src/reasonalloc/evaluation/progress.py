"""How a run goes: what it tells whoever watches, and a bar of tqdm."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.chunks import Chunk


class Observer:
    """Is told how a run goes. This one passes notes on to stderr and shows nothing else."""

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Return a context inside of which something takes its time, such as loading the model."""
        return nullcontext()

    def note(self, text: str) -> None:
        """Say one line that the user should know."""
        print(f"note: {text}", file=sys.stderr)

    def counted(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Return a context whose value is called with (done, total)."""
        return nullcontext(lambda done, total: None)

    def started(self, samples: int, max_new_tokens: int) -> AbstractContextManager[Any]:
        """Return a context inside of which so many samples are taken."""
        return nullcontext()

    def stepped(self, worker: int, chunk: Chunk, steps: int) -> None:
        """Take note that a worker generated so many tokens per sequence of a chunk."""

    def halved(self, chunk: Chunk, size: int, reason: str) -> None:
        """Say that a chunk did not fit into memory: its job goes on in batches of ``size``."""
        self.note(
            f"out of memory with {len(chunk.items)} sequences ({chunk.job}): it goes on in batches "
            f"of {size}"
        )

    def died(self, worker: int, chunk: Chunk) -> None:
        """Say that a worker died; another one takes the chunk up again."""
        self.note(f"worker {worker} died ({chunk.job}): another one takes its batch up again")

    def finished(self, chunk: Chunk, tokens: int) -> None:
        """Take note that a chunk's samples are on disk; they have ``tokens`` tokens together."""


class Bar(Observer):
    """Shows a bar of ``tqdm.auto``: a widget in a notebook, else a line on stderr."""

    def __init__(self) -> None:
        self._bar: Any = None

    def note(self, text: str) -> None:
        """See ``Observer``."""
        from tqdm.auto import tqdm

        tqdm.write(f"note: {text}", file=sys.stderr)

    @contextmanager
    def counted(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """See ``Observer``."""
        with self._shown(None, title, "") as bar:

            def tell(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield tell

    @contextmanager
    def started(self, samples: int, max_new_tokens: int) -> Iterator[None]:
        """See ``Observer``."""
        with self._shown(samples, "Sampling", "sample"):
            yield

    def stepped(self, worker: int, chunk: Chunk, steps: int) -> None:
        """See ``Observer``."""
        self._bar.set_postfix_str(f"{chunk.job}, {steps} tokens", refresh=False)
        self._bar.update(0)

    def finished(self, chunk: Chunk, tokens: int) -> None:
        """See ``Observer``."""
        self._bar.update(len(chunk.items))

    @contextmanager
    def _shown(self, total: int | None, title: str, unit: str) -> Iterator[Any]:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=title, unit=unit, leave=False) as bar:
            self._bar = bar
            yield bar


def make_observer(progress: Observer | bool | None) -> Observer:
    """Return what watches a run: the given observer, a bar (None, True), or none (False)."""
    if isinstance(progress, Observer):
        return progress
    if progress not in (None, True, False):
        raise UsageError(f"progress={progress!r} must be True, False, None or an Observer")
    return Observer() if progress is False else Bar()
