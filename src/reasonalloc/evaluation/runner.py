"""Take all samples of a run that are not there yet, batch by batch, and mark them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any, Protocol

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.batch import FULL, Job, Watch
from reasonalloc.evaluation.chunks import Chunk, Item, Outcome
from reasonalloc.evaluation.folder import Key, RunFolder, key
from reasonalloc.evaluation.kv_share import SIZES
from reasonalloc.evaluation.progress import Observer
from reasonalloc.evaluation.sampling import sample_seed
from reasonalloc.evaluation.tasks.base import Problem, Task


class Executor(Protocol):
    """Completes chunks, here or elsewhere."""

    def outcomes(self, todo: deque[Chunk]) -> Generator[tuple[Chunk, Outcome], None, None]:
        """Take chunks from the left until there are none; more may be put there meanwhile."""


class Completes(Protocol):
    """A ``Solver``, or what stands for one."""

    def solve(self, chunk: Chunk, watch: Watch) -> Outcome:
        """See ``Solver.solve``."""


class InProcess:
    """Completes one chunk after another with one model."""

    def __init__(self, solver: Completes, observer: Observer) -> None:
        self._solver, self._observer = solver, observer

    def outcomes(self, todo: deque[Chunk]) -> Generator[tuple[Chunk, Outcome], None, None]:
        """See ``Executor``."""
        while todo:
            chunk = todo.popleft()

            def watch(steps: int, chunk: Chunk = chunk) -> bool:
                self._observer.stepped(0, chunk, steps)
                return True

            yield chunk, self._solver.solve(chunk, watch)


def make_jobs(arms: Sequence[str], budgets: Sequence[int | str]) -> list[Job]:
    """The full cache first, then budget by budget."""
    full = [Job(FULL)] if FULL in arms else []
    return full + [Job(arm, size) for size in budgets for arm in arms if arm != FULL]


def plan_chunks(
    jobs: Sequence[Job],
    problems: Sequence[Problem],
    samples: int,
    seed: int,
    batch: int,
    done: set[Key],
) -> list[Chunk]:
    """What is left to do, in batches; jobs take turns, so that all are equally far at any time."""
    lists = []
    for job in jobs:
        items = [
            Item(problem.id, problem.prompt, sample, sample_seed(seed, problem.id, sample))
            for problem in problems
            for sample in range(samples)
            if key(job, problem.id, sample) not in done
        ]
        record = key(job, problems[0].id, 0) not in done
        lists.append(Chunk(job, tuple(items), record).split(batch))
    turns = itertools.zip_longest(*lists)
    return [chunk for turn in turns for chunk in turn if chunk is not None]


def run(
    name: str,
    task: Task,
    problems: Sequence[Problem],
    chunks: Sequence[Chunk],
    folder: RunFolder,
    executor: Executor,
    observer: Observer,
) -> None:
    """Complete and mark all chunks; what is finished is on disk.

    Raises:
        UsageError: one sequence alone does not fit into memory, or the folder cannot be written.
    """
    by_id = {problem.id: problem for problem in problems}
    todo = deque(chunks)
    with closing(executor.outcomes(todo)) as outcomes:
        for chunk, outcome in outcomes:
            if outcome.rows is None:
                _halve(chunk, outcome.reason, todo, observer)
                continue
            rows = [_mark(name, task, by_id[row["problem"]], row) for row in outcome.rows]
            folder.add(rows, outcome.events)
            observer.finished(chunk, sum(row["completion_tokens"] for row in rows))


def _mark(name: str, task: Task, problem: Problem, row: dict[str, Any]) -> dict[str, Any]:
    """The line of a completed sample in ``samples.jsonl``."""
    verdict = task.grade(problem, row["completion"])
    marked = {"answer": verdict.answer, "gold": problem.gold, "correct": verdict.correct}
    values = {"task": name, **row, **marked}
    return {field: values[field] for field in FIELDS}


#: The fields of a line of ``samples.jsonl``, in their order.
FIELDS = (
    "task",
    "arm",
    "budget",
    "problem",
    "sample",
    "seed",
    "prompt",
    "completion",
    "prompt_tokens",
    "completion_tokens",
    "finish",
    "answer",
    "gold",
    "correct",
    "compressions",
    "kv_bytes",
    "full_kv_bytes",
    *SIZES,
    "batch",
    "seconds",
    "peak_bytes",
)


def _halve(chunk: Chunk, reason: str, todo: deque[Chunk], observer: Observer) -> None:
    """Put a chunk that did not fit back in smaller ones, and cut its job's other chunks as well."""
    size = len(chunk.items) // 2
    if size == 0:
        raise UsageError(
            f"one sequence alone does not fit into memory ({chunk.job}, problem "
            f"{chunk.items[0].problem!r}): give fewer --max-new-tokens, a smaller budget or a "
            f"smaller dtype; what is finished is kept ({reason[:200]})"
        )
    observer.halved(chunk, size, reason)
    smaller = chunk.split(size)
    for other in todo:
        smaller.extend(other.split(size) if other.job == chunk.job else [other])
    todo.clear()
    todo.extend(smaller)
