"""The same results on a GPU, and no wait for it in a decode step. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

import reasonalloc
from made_statistics import ready
from models import prompt, tiny
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.config import CompressionConfig
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.policies import POLICIES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("arm", ["rkv", "h2o/pyramid/adakv", "snapkv/uniform/reasonalloc"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_equals_the_cpu(name: str, arm: str) -> None:
    model = tiny(name)
    settings = {"max_new_tokens": 50, "do_sample": False}
    with reasonalloc.attach(model, budget=24, interval=8, arm=arm):
        expected = model.generate(prompt(30, 2), **settings)
    model = model.cuda()
    with reasonalloc.attach(model, budget=24, interval=8, arm=arm) as attached:
        cache = attached.new_cache()
        out = model.generate(prompt(30, 2).cuda(), past_key_values=cache, **settings)
        assert cache.kv_bytes == attached.plan(2).kv_bytes(cache.get_seq_length())
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("heads", HEAD_ALLOCATORS.entries())
@pytest.mark.parametrize("policy", POLICIES.entries())
def test_steps_and_events_do_not_wait(policy: str, heads: str) -> None:
    layer = LayerCompressor(
        0,
        3 * 24,
        CompressionConfig(budget=24, interval=8),
        ready(policy, 0, 6, 16),
        HEAD_ALLOCATORS.create(heads),
        choose_backend("auto"),
        Recorder(),
    )

    def step(columns: int) -> None:
        query = torch.randn(2, 6, columns, 16, device="cuda")
        key, value = torch.randn(2, 2, 3, columns, 16, device="cuda").unbind(0)
        layer.forward(query, key, value, None, 0.25)

    step(40)
    step(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("arm", ["rkv", "h2o/pyramid/adakv", "snapkv/uniform/reasonalloc"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_graphs_write_the_same(name: str, arm: str, attention: str) -> None:
    model = tiny(name).cuda()
    ids = prompt(30, 2).cuda()
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    sampled = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 50}
    outs = []
    for step in ("eager", "graph"):
        settings = {"budget": 24, "interval": 8, "arm": arm, "attention": attention, "step": step}
        with reasonalloc.attach(model, **settings):
            torch.manual_seed(0)
            found = [
                model.generate(ids, attention_mask=mask, max_new_tokens=50, do_sample=False),
                model.generate(ids, **sampled),
            ]
        outs.append(found)
    for eager, graph in zip(*outs, strict=True):
        assert torch.equal(eager, graph)
