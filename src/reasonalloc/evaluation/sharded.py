"""A run whose model is divided among the processes of a ``torchrun`` (tensor parallelism).

The first process owns the folder and hands every batch to the others; all of them generate it
together, with the same tokens, since the logits are gathered.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.chunks import Chunk, Outcome
from reasonalloc.evaluation.progress import Observer
from reasonalloc.evaluation.solver import Solver


def first_rank() -> bool:
    """Whether this is the first process of a ``torchrun``, or none was started."""
    return os.environ.get("RANK", "0") == "0"


class Leader:
    """Completes chunks together with the processes that ``follow``."""

    def __init__(self, solver: Solver, observer: Observer) -> None:
        self._solver, self._observer = solver, observer

    def outcomes(self, todo: deque[Chunk]) -> Generator[tuple[Chunk, Outcome], None, None]:
        """See ``Executor``.

        Raises:
            UsageError: a batch does not fit into memory: the processes are out of step then.
        """
        while todo:
            chunk = todo.popleft()
            _share(chunk)

            def watch(steps: int, chunk: Chunk = chunk) -> bool:
                self._observer.stepped(0, chunk, steps)
                return True

            yield chunk, _joined(self._solver.solve(chunk, watch), chunk)
        _share(None)
        dist.destroy_process_group()


def follow(solver: Solver) -> None:
    """Complete whatever the first process hands over, until it has nothing left."""
    while (chunk := _share(None)) is not None:
        _joined(solver.solve(chunk, lambda _: True), chunk)
    dist.destroy_process_group()


def _share(chunk: Chunk | None) -> Chunk | None:
    """The first process's chunk, in every process."""
    box: list[Any] = [chunk]
    dist.broadcast_object_list(box, src=0)
    shared: Chunk | None = box[0]
    return shared


def _joined(outcome: Outcome, chunk: Chunk) -> Outcome:
    """An outcome with the head budgets of all processes, in the order of the heads.

    A process whose heads already fit skips a compression; such an event is left out.
    """
    if outcome.rows is None:
        raise UsageError(
            f"{len(chunk.items)} sequences do not fit into memory ({chunk.job}): start again with "
            f"a smaller --batch-size; what is finished is kept ({outcome.reason[:200]})"
        )
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, outcome.events)
    budgets = [{(e["tokens"], e["layer"]): e["budgets"] for e in part} for part in parts]
    events = []
    for event in outcome.events:
        own = [part.get((event["tokens"], event["layer"])) for part in budgets]
        if all(heads is not None for heads in own):
            events.append(event | {"budgets": [b for heads in own for b in heads or ()]})
    return replace(outcome, events=events)
