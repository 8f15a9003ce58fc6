"""Memory: what the plan says, to the byte, and the same after any number of tokens."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any

import psutil
import pytest
import torch

import reasonalloc
from models import prompt, tiny

ARMS = [
    "rkv",
    "h2o/pyramid(beta=3)/adakv",
    "lazy_eviction/uniform/adakv",
    "streaming_llm",
    "snapkv/uniform/reasonalloc",
]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_measured_bytes_equal_the_plan(name: str, arm: str) -> None:
    model = tiny(name)
    with reasonalloc.attach(model, budget=19, interval=8, arm=arm) as attached:
        plan = attached.plan(batch=2)
        cache = attached.new_cache()
        model(prompt(30, 2), past_key_values=cache)
        for step in range(60):
            tokens = cache.get_seq_length()
            assert tokens == 30 + step
            assert cache.kv_bytes == plan.kv_bytes(tokens)
            assert cache.bookkeeping_bytes == plan.bookkeeping_bytes
            assert cache.used_kv_bytes <= cache.kv_bytes
            if step % 8 == 0:
                assert cache.used_kv_bytes == plan.floor_bytes + plan.sliding_bytes(tokens)
            model(prompt(1, 2, seed=step), past_key_values=cache)
        allocated = sum(
            t.untyped_storage().nbytes()
            for layer in cache.layers
            if (slab := getattr(getattr(layer, "compressor", None), "slab", None)) is not None
            for t in (slab.keys, slab.values)
        )
        assert allocated == plan.slab_bytes  # really freed: no larger storage behind the views


def test_full_bytes_are_what_the_full_cache_takes() -> None:
    for name in ("llama", "gemma2"):
        model = tiny(name)
        with reasonalloc.attach(model, budget=20) as attached:
            plan = attached.plan(batch=2)
        full = model(prompt(50, 2), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
        assert plan.full_bytes(50) == held


@pytest.mark.long
@pytest.mark.once
def test_twenty_thousand_tokens() -> None:
    """Neither memory nor time per step grows with the tokens generated."""
    model = tiny("llama", num_hidden_layers=2, max_position_embeddings=32768)
    process = psutil.Process()
    sizes: list[int] = []
    with (
        torch.inference_mode(),
        reasonalloc.attach(model, budget=32, interval=32, heads="reasonalloc") as attached,
    ):
        cache = attached.new_cache()
        token = prompt(1)
        model(prompt(40), past_key_values=cache)

        def decode(steps: int, into: Any) -> float:
            nonlocal token
            start = time.process_time()
            for _ in range(steps):
                token = model(token, past_key_values=into).logits[:, -1:].argmax(-1)
            return time.process_time() - start

        for _ in range(20):
            decode(1000, cache)
            gc.collect()
            sizes.append(process.memory_info().rss)
            assert cache.kv_bytes == attached.plan().kv_bytes(cache.get_seq_length())
        assert cache.get_seq_length() == 20_040
        assert attached.recorder is not None and attached.recorder.compressions == 2 * (1 + 625)
        assert sizes[-1] - sizes[2] < 8 * 1024 * 1024
        # A young cache takes turns with the old one: what disturbs one block disturbs the next.
        young = attached.new_cache()
        model(prompt(40), past_key_values=young)
        decode(200, young)
        ratios = [decode(32, cache) / decode(32, young) for _ in range(31)]
        assert statistics.median(ratios) < 1.4
