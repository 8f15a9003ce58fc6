"""One arm decodes one batch, timed step by step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonalloc.benchmark.split import Split, splitting
from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.hf import attach_config
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.own_cache import full_bytes, full_cache
from reasonalloc.integrations.hf.versions import with_cache

#: The model's own full cache: growing, or allocated for the whole length at once.
FULL, STATIC = "full", "full-static"


@dataclass(frozen=True)
class Contender:
    """What is measured: ``full``, ``full-static``, or an arm under a budget."""

    name: str
    config: CompressionConfig | None = None


@dataclass(frozen=True)
class Timing:
    """What one run of one contender measured.

    Attributes:
        prefill_seconds: of the prompt.
        steps: [new tokens] seconds of every decode step.
        split: seconds of further steps by part; taken after ``steps``, so timers do not disturb.
        kv_bytes: held for keys and values at the end.
        peak_bytes: of the device's memory, weights included; None on a CPU.
    """

    prefill_seconds: float
    steps: list[float]
    split: Split
    kv_bytes: int
    peak_bytes: int | None


def decode(
    model: Any,
    contender: Contender,
    prompt: Tensor,
    new_tokens: int,
    interval: int,
    watch: Callable[[int], None] = lambda _: None,
) -> Timing:
    """Prefill a batch of prompts, then decode greedily, one step at a time.

    Args:
        model: a transformers model without a budget.
        contender: which cache.
        prompt: [batch, tokens] int64.
        new_tokens: decode steps.
        interval: further steps during which the parts are timed.
        watch: is told the number of steps that are done.
    """
    device = prompt.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with opened(model, contender, prompt, new_tokens + interval) as cache, torch.inference_mode():
        start = _now(device)
        out = model(input_ids=prompt, **with_cache({}, cache), logits_to_keep=1)
        token = out.logits[:, -1:].argmax(dim=-1)
        before = _now(device)
        prefill, steps = before - start, []
        for step in range(new_tokens):
            token = one_step(model, cache, token)
            after = _now(device)
            steps.append(after - before)
            watch(step + 1)
            before = _now(device)
        held = cache.kv_bytes if isinstance(cache, BudgetCache) else full_bytes(cache)
        with splitting(model, cache, device) as split:
            for _ in range(interval):
                before = _now(device)
                token = one_step(model, cache, token)
                split.total += _now(device) - before
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Timing(prefill, steps, split, held, peak)


def one_step(model: Any, cache: Any, token: Tensor) -> Tensor:
    """Feed tokens, [batch, tokens]; the likeliest next one of each sequence, [batch, 1]."""
    out = model(input_ids=token, **with_cache({}, cache))
    chosen: Tensor = out.logits[:, -1:].argmax(dim=-1)
    return chosen


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def opened(model: Any, contender: Contender, prompt: Tensor, new_tokens: int) -> Iterator[Any]:
    """Return the contender's cache for a prompt and so many new tokens, ready to be used."""
    from transformers import StaticCache

    if contender.config is not None:
        with attach_config(model, contender.config) as attachment:
            cache = attachment.new_cache()
            with attachment.decoding(cache):
                yield cache
    elif contender.name == STATIC:
        yield StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)
    else:
        yield full_cache(model)


def weight_products(model: Any, batch: int, repeats: int = 10) -> list[float]:
    """Return seconds that the products of one step with all weights take alone, several times."""
    run = products_alone(model, batch)
    seconds = []
    for _ in range(repeats + 1):
        start = _now(model.device)
        run()
        seconds.append(_now(model.device) - start)
    return seconds[1:]


def products_alone(model: Any, batch: int) -> Callable[[], None]:
    """Return a function that does the products of one step with all weights, and nothing else.

    What no cache can go below: each ``Linear`` is applied to a [batch, 1, inputs] tensor.
    """
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weight = layers[0].weight
    inputs = {
        n: torch.randn(batch, 1, n, dtype=weight.dtype, device=weight.device)
        for n in {layer.in_features for layer in layers}
    }

    @torch.inference_mode()
    def run() -> None:
        for layer in layers:
            layer(inputs[layer.in_features])

    return run


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
