"""Caches that take turns, step by step: what disturbs a machine meets all of them alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from reasonalloc.benchmark.decode import Contender, one_step, opened


def decoder(
    stack: ExitStack, model: Any, contender: Contender, ids: Tensor, tokens: int = 0
) -> Callable[[], None]:
    """Return a step on a cache of its own, filled with prompts and so many new tokens.

    Args:
        stack: keeps what the cache needs until it is left.
        model: on a CPU, without a budget; its weights are shared.
        contender: which cache; not ``full-static``, whose length is not known here.
        ids: [batch, prompt] int64.
        tokens: decode steps that are done before it returns.

    Returns:
        What decodes one more token of every sequence, greedily.
    """
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    cache = stack.enter_context(opened(twin, contender, ids, tokens))
    last = [ids]

    @torch.inference_mode()
    def step() -> None:
        last[0] = one_step(twin, cache, last[0])

    for _ in range(tokens + 1):
        step()
    return step


def in_turns(
    sides: Sequence[Callable[[], object]],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Return seconds of ``count`` steps of each side; nobody always comes first."""
    seconds: list[list[float]] = [[] for _ in sides]
    places = list(range(len(sides)))
    for turn in range(count):
        first = turn % len(sides)
        for side in places[first:] + places[:first]:
            start = clock()
            sides[side]()
            seconds[side].append(clock() - start)
    return seconds
