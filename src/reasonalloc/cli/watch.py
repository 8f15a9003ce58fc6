"""Live progress on the terminal: what is going on, and samples with tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Column

from reasonalloc.cli import output
from reasonalloc.evaluation.chunks import Chunk
from reasonalloc.evaluation.progress import Observer

#: Between two lines where there is no terminal for a bar, such as the log of a batch job.
LOG_SECONDS = 60.0


class Shown(Observer):
    """Shows on stderr what is going on."""

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """See ``Observer``."""
        return output.stderr().status(text)

    def note(self, text: str) -> None:
        """See ``Observer``."""
        output.note(text)

    def counted(self, title: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """See ``Observer``."""
        return output.progress(title)


class Watcher(Shown):
    """Shows samples, tokens per second and the time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16, table_column=Column(min_width=16)),
            TextColumn(
                "{task.fields[info]}",
                style="dim",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=output.stderr(),
            expand=True,
            transient=True,
        )
        self._samples = self._max_new_tokens = 0
        self._task = self._progress.add_task("", info="")
        self._began = self._logged = time.monotonic()
        self._done = self._tokens = 0
        self._now: dict[int, tuple[Chunk, int]] = {}

    @contextmanager
    def started(self, samples: int, max_new_tokens: int) -> Iterator[None]:
        """See ``Observer``."""
        self._samples, self._max_new_tokens = samples, max_new_tokens
        self._began = self._logged = time.monotonic()
        self._progress.update(self._task, total=samples)
        with self._progress:
            yield

    def note(self, text: str) -> None:
        """See ``Observer``."""
        self._progress.console.print(f"note: {text}", markup=False, soft_wrap=True)

    def stepped(self, worker: int, chunk: Chunk, steps: int) -> None:
        """See ``Observer``."""
        self._now[worker] = chunk, steps
        self._show()

    def halved(self, chunk: Chunk, size: int, reason: str) -> None:
        """See ``Observer``."""
        self._forget(chunk)
        super().halved(chunk, size, reason)

    def died(self, worker: int, chunk: Chunk) -> None:
        """See ``Observer``."""
        self._forget(chunk)
        super().died(worker, chunk)

    def finished(self, chunk: Chunk, tokens: int) -> None:
        """See ``Observer``."""
        self._forget(chunk)
        self._done += len(chunk.items)
        self._tokens += tokens
        self._show()

    def _forget(self, chunk: Chunk) -> None:
        self._now = {w: entry for w, entry in self._now.items() if entry[0] is not chunk}

    def _completed(self) -> float:
        """Samples; those under way count as if they went to the limit: time is never underrated."""
        partial = sum(len(c.items) * s / self._max_new_tokens for c, s in self._now.values())
        return self._done + partial

    def _speed(self) -> list[str]:
        """Tokens per second and the time left."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        tokens = self._tokens + sum(steps * len(c.items) for c, steps in self._now.values())
        texts, completed = [f"{tokens / seconds:.0f} tok/s"], self._completed()
        if completed > 0 and seconds > 1:
            texts.append(f"{_clock(seconds * (self._samples - completed) / completed)} left")
        return texts

    def _show(self) -> None:
        jobs = [f"{chunk.job}, {steps} tokens" for chunk, steps in self._now.values()]
        self._progress.update(
            self._task,
            description=f"{self._done} of {self._samples} samples",
            completed=min(self._completed(), self._samples),
            info=" | ".join([*self._speed(), *jobs]),
        )
        now = time.monotonic()
        if not self._progress.console.is_terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            self.note(f"{self._done} of {self._samples} samples | {' | '.join(self._speed())}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
