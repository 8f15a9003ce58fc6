"""Several jobs at a time, each worker with its own model; Ctrl-C keeps what was finished.

Threads are enough: a decode step spends most of its time in PyTorch's kernels, outside of Python.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from reasonalloc.evaluation.arms import ArmResult
from reasonalloc.evaluation.batch import Job, Stopped, Watch

#: Runs one job: what a worker does with its own model.
Runner = Callable[[Job, Watch], ArmResult]
_POLL_SECONDS = 0.1


class Observer(Protocol):
    """Is told how the work goes, from the workers' threads."""

    def stepped(self, worker: int, job: Job, steps: int) -> None:
        """A worker generated so many tokens per sequence of a job."""

    def finished(self, worker: int, result: ArmResult) -> None:
        """A worker finished a job."""


def idle_cores(most: int) -> int:
    """Cores that this process may use, at most ``most`` and at least 1."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        count = os.cpu_count() or 1
    return max(1, min(most, count))


def run_jobs(
    jobs: Sequence[Job],
    runners: Sequence[Runner],
    observer: Observer,
    until: float | None = None,
) -> tuple[list[ArmResult], bool]:
    """Run all jobs, one after another on each runner.

    Args:
        jobs: what to run, in this order.
        runners: one for each worker.
        observer: is told how it goes.
        until: ``time.monotonic()`` after which no job is started.

    Returns:
        The results in the order of ``jobs`` (only the finished ones), and whether Ctrl-C ended it.

    Raises:
        Exception: the first error of a worker, once all of them have stopped.
    """
    pool = _Pool(jobs, observer, until)
    threads = [
        threading.Thread(target=pool.work, args=(number, runner), daemon=True)
        for number, runner in enumerate(runners)
    ]
    interrupted = False
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(_POLL_SECONDS)
    except KeyboardInterrupt:
        interrupted = True
    finally:
        pool.stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    if pool.errors and not interrupted:
        raise pool.errors[0]
    return [pool.results[index] for index in sorted(pool.results)], interrupted


class _Pool:
    def __init__(self, jobs: Sequence[Job], observer: Observer, until: float | None) -> None:
        self._until = until
        self.stop = threading.Event()
        self.results: dict[int, ArmResult] = {}
        self.errors: list[BaseException] = []
        self._observer = observer
        self._todo: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
        for entry in enumerate(jobs):
            self._todo.put(entry)

    def work(self, number: int, runner: Runner) -> None:
        """Take jobs until there are none, or until something stops everybody."""
        torch.set_num_threads(1)  # of this thread: the workers share the cores
        try:
            while not self.stop.is_set() and not self._late:
                index, job = self._todo.get_nowait()
                result = runner(job, self._watch(number, job))
                self.results[index] = result
                self._observer.finished(number, result)
        except (queue.Empty, Stopped):
            pass
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    @property
    def _late(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def _watch(self, number: int, job: Job) -> Watch:
        def watch(steps: int) -> bool:
            self._observer.stepped(number, job, steps)
            return not self.stop.is_set()

        return watch
