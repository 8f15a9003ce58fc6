"""Live progress of the boxed demo: one bar for everything, one line per worker."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from reasonalloc.cli import output
from reasonalloc.evaluation.arms import ArmResult
from reasonalloc.evaluation.batch import Job


class Board:
    """Shows progress on stderr; the workers tell it from their threads.

    Args:
        console: where it is shown.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]+[/green]"),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16, table_column=Column(min_width=16)),
            TimeRemainingColumn(
                elapsed_when_finished=True, table_column=Column(min_width=7, no_wrap=True)
            ),
            TextColumn(
                "{task.fields[info]}",
                style="dim",
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console or output.stderr(),
            expand=True,
        )
        self._lock = threading.Lock()
        self._all: TaskID | None = None
        self._lines: dict[int, TaskID] = {}
        self._steps: dict[int, int] = {}
        self._done = self._jobs = self._longest = 0

    @classmethod
    def silent(cls) -> Board:
        """A board that shows nothing."""
        return cls(Console(quiet=True))

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for line in self._lines.values():
            self._progress.remove_task(line)
        self._progress.stop()

    def say(self, text: str) -> None:
        """What happens before the runs; ends the text before it."""
        self._end()
        self._all = self._progress.add_task(text, total=None, info="")

    def start(self, jobs: int, longest: int, info: str) -> None:
        """The runs begin: so many jobs of at most ``longest`` generated tokens per sequence."""
        self._end()
        self._jobs, self._longest = jobs, longest
        self._all = self._progress.add_task(f"Run 0 of {jobs}", total=jobs * longest, info=info)

    def stepped(self, worker: int, job: Job, steps: int) -> None:
        """A worker generated so many tokens per sequence of a job."""
        if self._all is None:
            return
        with self._lock:
            if worker not in self._lines:
                self._lines[worker] = self._progress.add_task("", total=self._longest, info="")
            self._steps[worker] = steps
            info = f"{steps} tokens"
            self._progress.update(
                self._lines[worker], description=f"  {job}", completed=steps, info=info
            )
            self._show()

    def finished(self, worker: int, result: ArmResult) -> None:
        """A worker finished a job."""
        if self._all is None:
            return
        with self._lock:
            self._done += 1
            self._steps[worker] = 0
            if worker in self._lines:
                self._progress.reset(self._lines[worker])
            right = f"{sum(result.correct)} of {len(result.correct)} right"
            self._progress.update(self._all, description=f"Run {self._done} of {self._jobs}")
            self._progress.update(self._all, info=f"{result.job}: {right}")
            self._show()

    def _show(self) -> None:
        if self._all is not None:
            done = self._done * self._longest + sum(self._steps.values())
            self._progress.update(self._all, completed=done)

    def _end(self) -> None:
        if self._all is not None:
            self._progress.update(self._all, total=1, completed=1)
