"""Replaying a known trajectory in pieces equals decoding it token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import reasonalloc
from models import prompt, tiny

ARMS = [
    "rkv",
    "h2o/uniform/adakv",
    "lazy_eviction(threshold=0.03)/uniform/adakv",
    "value_aware/uniform/reasonalloc",
    "snapkv/pyramid/reasonalloc",
    "streaming_llm",
    "random",
]


def kept(recorder: Any) -> list[Any]:
    """By step and layer: a replay over several boundaries takes them layer by layer."""
    return sorted(
        (e.step, e.layer, [[e.kept(b, h) for h in range(3)] for b in range(2)])
        for e in recorder.events
    )


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("pieces", [[8] * 6, [3, 5, 8, 1, 7, 8, 2, 2, 4, 8], [48], [3, 20, 1, 24]])
@torch.no_grad()
def test_replay_equals_decoding(name: str, arm: str, pieces: list[int]) -> None:
    model = tiny(name)
    ids = prompt(30 + sum(pieces), 2)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0  # left padding
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with reasonalloc.attach(model, budget=20, interval=8, window=4, arm=arm, record="tokens") as a:

        def run(sizes: list[int]) -> tuple[torch.Tensor, list[Any], int]:
            cache, end, logits = a.new_cache(), 0, []
            for size in [30, *sizes]:
                part = slice(end, end := end + size)
                with cache.replaying():
                    out = model(
                        ids[:, part],
                        attention_mask=mask[:, :end],
                        position_ids=places[:, part],
                        past_key_values=cache,
                    )
                logits.append(out.logits)
            return torch.cat(logits, dim=1), kept(cache.recorder), cache.kv_bytes

        whole, whole_kept, whole_bytes = run(pieces)
        single, single_kept, single_bytes = run([1] * sum(pieces))
    assert whole_kept == single_kept and len(whole_kept) >= 6
    assert whole_bytes == single_bytes
    torch.testing.assert_close(whole[0], single[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole[1, 11:], single[1, 11:], rtol=1e-3, atol=1e-3)
