"""Several models at once in threads of this process: one core each.

Threads are enough: a decode step spends most of its time in PyTorch's kernels, outside of Python.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

from reasonalloc.evaluation.chunks import Chunk, Outcome
from reasonalloc.evaluation.progress import Observer
from reasonalloc.evaluation.runner import Completes

_POLL_SECONDS = 0.1


def idle_cores(most: int) -> int:
    """Cores that this process may use, at most ``most`` and at least 1."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        count = os.cpu_count() or 1
    return max(1, min(most, count))


class Threads:
    """Completes chunks with several solvers at a time; Ctrl-C keeps what was finished.

    Args:
        solvers: one for each thread.
        observer: is told how it goes, from the thread that asks for the outcomes.
        until: ``time.monotonic()`` after which no chunk is started.
    """

    def __init__(
        self, solvers: Sequence[Completes], observer: Observer, until: float | None = None
    ) -> None:
        self._solvers, self._observer, self._until = solvers, observer, until
        self._stop = threading.Event()
        self._steps = [0] * len(solvers)

    def outcomes(self, todo: deque[Chunk]) -> Generator[tuple[Chunk, Outcome], None, None]:
        """See ``Executor``.

        Raises:
            Exception: the first error of a solver, once all of them have stopped.
        """
        idle = deque(range(len(self._solvers)))
        busy: dict[Future[Outcome], tuple[int, Chunk]] = {}
        with ThreadPoolExecutor(len(self._solvers), initializer=_use_one_core) as pool:
            try:
                while True:
                    while idle and todo and not self._late:
                        worker, chunk = idle.popleft(), todo.popleft()
                        busy[pool.submit(self._solve, worker, chunk)] = worker, chunk
                    if not busy:
                        return
                    for future in self._wait(busy):
                        worker, chunk = busy.pop(future)
                        idle.append(worker)
                        yield chunk, future.result()
            except KeyboardInterrupt:
                self._stop.set()
                wait(busy)
                for future, (_, chunk) in busy.items():
                    if future.exception() is None:
                        yield chunk, future.result()
                raise
            finally:
                self._stop.set()

    @property
    def _late(self) -> bool:
        return self._until is not None and time.monotonic() > self._until

    def _wait(self, busy: dict[Future[Outcome], tuple[int, Chunk]]) -> set[Future[Outcome]]:
        """Chunks that are finished; until one is, the observer hears how far all are."""
        while True:
            ready, _ = wait(busy, _POLL_SECONDS, FIRST_COMPLETED)
            if ready:
                return ready
            for worker, chunk in busy.values():
                self._observer.stepped(worker, chunk, self._steps[worker])

    def _solve(self, worker: int, chunk: Chunk) -> Outcome:
        def watch(steps: int) -> bool:
            self._steps[worker] = steps
            return not self._stop.is_set()

        self._steps[worker] = 0
        return self._solvers[worker].solve(chunk, watch)


def _use_one_core() -> None:
    torch.set_num_threads(1)  # of this thread: the workers share the cores
