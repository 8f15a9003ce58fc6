"""Models with learned attention sinks: transformers' own attention is the reference."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import reasonalloc
from models import prompt, tiny
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.config import CompressionConfig
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.attention import attention_forward
from reasonalloc.policies import POLICIES

BACKENDS = ("eager", "sdpa", "cpp")
GREEDY: dict[str, Any] = {"do_sample": False}


def layer_of(attention: str, policy: str, budget: int, kv_heads: int) -> LayerCompressor:
    return LayerCompressor(
        0,
        kv_heads * budget,
        CompressionConfig(budget=budget, interval=8, window=4),
        POLICIES.create(policy),
        HEAD_ALLOCATORS.create("uniform"),
        choose_backend(attention),
        Recorder(),
    )


def transformers_own(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [batch, query_heads, q, dim] and probabilities [batch, query_heads, q, n]."""
    q, n = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    module = SimpleNamespace(num_key_value_groups=groups, sinks=sinks, training=False)
    future = torch.ones(q, n, dtype=torch.bool).triu(1 + n - q)
    mask = torch.zeros(1, 1, q, n).masked_fill(future, torch.finfo(torch.float32).min)
    out, weights = eager_attention_forward(module, query, key, value, mask, scaling=0.3)
    return out.transpose(1, 2), weights


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("attention", BACKENDS)
def test_a_layer_gives_what_transformers_gives(attention: str, static: bool, group: int) -> None:
    """Its output at every step, and the attention that a policy has seen."""
    torch.manual_seed(group)
    layer, tokens = layer_of(attention, "h2o", 64, kv_heads=2), 40
    query, sinks = torch.randn(2, 2 * group, tokens, 16), 2 * torch.randn(2 * group)
    key, value = torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)
    expected, weights = transformers_own(query, key, value, sinks)
    outs = []
    for at in [slice(0, 20), *(slice(i, i + 1) for i in range(20, tokens))]:
        if static and at.start == 20:
            layer.fix()
            layer.static = True
        new = (query[:, :, at], key[:, :, at], value[:, :, at])
        outs.append(layer.forward(*new, None, 0.3, sinks=sinks))
        if layer.static:
            layer.advance()
    torch.testing.assert_close(torch.cat(outs, dim=2), expected, rtol=1e-5, atol=1e-5)
    rows = layer.slab.as_rows()  # type: ignore[union-attr]
    assert rows.state is not None
    seen = rows.gather(rows.state)[..., 0]
    received = weights.unflatten(1, (2, group)).mean(dim=2).sum(dim=2)
    torch.testing.assert_close(seen, received, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss_full"])
def test_nothing_evicted_is_the_full_cache(name: str, attention: str) -> None:
    model = tiny(name)
    mask = (torch.arange(30) >= 30 - torch.tensor([30, 17, 2])[:, None]).long()
    ids = prompt(30, 3) * mask
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=100, **GREEDY)
    for step in ("eager", "static") if name == "gpt_oss_full" else ("eager",):
        settings: dict[str, Any] = {"budget": 130, "interval": 16, "step": step}
        with reasonalloc.attach(model, arm="h2o", attention=attention, **settings):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=100, **GREEDY)
        assert torch.equal(out, expected), step


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("arm", ["snapkv/uniform/reasonalloc", "value_aware/uniform/adakv"])
def test_under_a_small_budget(arm: str, kv_dtype: str) -> None:
    model = tiny("gpt_oss")
    full = model.generate(prompt(30, 2), max_new_tokens=60, **GREEDY)
    with reasonalloc.attach(model, budget=16, interval=8, arm=arm, kv_dtype=kv_dtype) as attached:
        cache = attached.new_cache()
        out = model.generate(prompt(30, 2), max_new_tokens=60, past_key_values=cache, **GREEDY)
        assert cache.kv_bytes == attached.plan(2).kv_bytes(cache.get_seq_length())
    assert out.shape == full.shape and not torch.equal(out, full)
    for layer in cache.layers[1:]:
        rows = layer.compressor.slab.as_rows()
        places = rows.gather(rows.positions)
        held = torch.arange(places.shape[-1]) < rows.lengths[..., None]
        rising = places[..., 1:] > places[..., :-1]
        assert bool((rising | ~held[..., 1:]).all())


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss_full"])
def test_sinks_count_in_every_layer(name: str, use_cache: bool) -> None:
    """Sliding layers, which keep transformers' cache, and calls without a cache as well."""
    model, ids = tiny(name), prompt(50, 2)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with reasonalloc.attach(model, budget=64, interval=8):
            torch.testing.assert_close(
                model(ids, use_cache=use_cache).logits, expected, rtol=1e-4, atol=1e-4
            )
            for layer in model.model.layers:
                sinks = layer.self_attn.sinks
                before = sinks.clone()
                sinks.fill_(-1e4)
                assert not torch.allclose(
                    model(ids, use_cache=use_cache).logits, expected, rtol=1e-2, atol=1e-2
                )
                sinks.copy_(before)


def test_half_precision_and_training() -> None:
    model = tiny("gpt_oss").bfloat16()
    with reasonalloc.attach(model, budget=16, interval=8, arm="h2o"):
        assert model.generate(prompt(30, 2), max_new_tokens=20, **GREEDY).shape == (2, 50)
    model = tiny("gpt_oss").train()
    with reasonalloc.attach(model, budget=16):
        model(prompt(30), use_cache=False).logits.sum().backward()
    assert all(bool(layer.self_attn.sinks.grad.any()) for layer in model.model.layers)


def test_what_is_refused() -> None:
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    module: Any = torch.nn.Identity()

    def attend(**settings: Any) -> None:
        attention_forward(module, query, key, key, None, **settings)

    with pytest.raises(UnsupportedError, match=r"sinks of shape \[2\] for 4 query heads"):
        attend(s_aux=torch.zeros(2))
    with pytest.raises(UnsupportedError, match=r"attention dropout 0\.1.*model\.eval\(\)"):
        attend(s_aux=torch.zeros(4), dropout=0.1)
    module.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UnsupportedError, match="does not pass to its attention as 's_aux'"):
        attend()
