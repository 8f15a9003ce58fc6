"""Caches that take turns, step by step: what disturbs a machine meets all of them alike."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.hf import attach_config


def decoder(
    stack: ExitStack, model: Any, config: CompressionConfig | None, ids: Tensor, tokens: int = 0
) -> Callable[[], None]:
    """A cache of its own, filled with prompts and so many new tokens.

    Args:
        stack: keeps what the cache needs until it is left.
        model: on a CPU, without a budget; its weights are shared.
        config: of the budget, or None: the full cache.
        ids: [batch, prompt] int64.
        tokens: decode steps that are done before it returns.

    Returns:
        What decodes one more token of every sequence, greedily.
    """
    from transformers import DynamicCache

    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    if config is None:
        cache: Any = DynamicCache(config=twin.config)
    else:
        attachment = stack.enter_context(attach_config(twin, config))
        cache = attachment.new_cache()
        stack.enter_context(attachment.decoding(cache))
    last = [ids]

    def step() -> None:
        with torch.inference_mode():
            logits = twin(input_ids=last[0], past_key_values=cache, logits_to_keep=1).logits
            last[0] = logits[:, -1:].argmax(dim=-1)

    for _ in range(tokens + 1):
        step()
    return step


def in_turns(
    sides: Sequence[Callable[[], object]],
    count: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of ``count`` steps of each side; nobody always comes first."""
    seconds: list[list[float]] = [[] for _ in sides]
    places = list(range(len(sides)))
    for turn in range(count):
        first = turn % len(sides)
        for side in places[first:] + places[:first]:
            start = clock()
            sides[side]()
            seconds[side].append(clock() - start)
    return seconds
