"""Inkling: attention with a bias by distance, in layers with and without a budget."""

from __future__ import annotations

import copy

import pytest
import torch

import reasonalloc
from generations import SMALL, generated
from models import ABLE, hybrid, prompt
from reasonalloc import UnsupportedError

pytestmark = pytest.mark.skipif(not ABLE, reason="this transformers has other cache layers")


@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_logits_that_grow_with_the_position() -> None:
    model, ids = hybrid("inkling", log_scaling_n_floor=8, log_scaling_alpha=0.5), prompt(20)
    full = generated(model, ids, torch.ones_like(ids), 60)
    with reasonalloc.attach(model, budget=128):
        assert torch.equal(generated(model, ids, torch.ones_like(ids), 60), full)


@pytest.mark.parametrize("name", ["inkling", "inkling_sliding"])
def test_without_a_cache_and_without_a_budget(name: str) -> None:
    """Calls without a cache give the same while attached; copies and detached models do too."""
    model, ids = hybrid(name), prompt(30, 2)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with reasonalloc.attach(model, **SMALL):
            torch.testing.assert_close(model(ids, use_cache=False).logits, plain)
            twin = copy.deepcopy(model)
        for own in (twin, model):
            assert not any("forward" in vars(module) for module in own.modules())
            assert torch.equal(own(ids, use_cache=False).logits, plain)


@pytest.mark.parametrize("policy", ["rkv", "snapkv", "h2o", "value_aware", "streaming_llm"])
def test_replayed_steps_are_those_of_single_tokens(policy: str) -> None:
    model, ids = hybrid("inkling"), prompt(50)
    with torch.no_grad(), reasonalloc.attach(model, **SMALL, policy=policy) as attached:
        one, many = attached.new_cache(), attached.new_cache()
        model(ids[:, :20], past_key_values=one)
        model(ids[:, :20], past_key_values=many)
        single = [model(ids[:, i : i + 1], past_key_values=one).logits for i in range(20, 50)]
        with many.replaying():
            together = model(ids[:, 20:], past_key_values=many).logits
    torch.testing.assert_close(together, torch.cat(single, dim=1), rtol=1e-3, atol=1e-3)
    assert one.recorder.compressions == many.recorder.compressions > 4


def test_what_is_refused_by_name() -> None:
    model = hybrid("inkling")
    with pytest.raises(UnsupportedError, match="attention='cpp' cannot run Inkling"):
        reasonalloc.attach(model, **SMALL, attention="cpp")
    with pytest.raises(UnsupportedError, match="bias by distance, which is not read over"):
        reasonalloc.attach(model, **SMALL, kv_dtype="int8")
    model.model.layers[1].self_attn.rel_logits_proj.rel_extent = 21
    with pytest.raises(UnsupportedError, match="layer 1 has another bias by distance"):
        reasonalloc.attach(model, **SMALL)


def test_hidden_tokens_behind_others_are_refused() -> None:
    """Distances count them, and they are not stored."""
    model, mask = hybrid("inkling"), torch.ones(2, 12, dtype=torch.long)
    mask[1, 10:] = 0
    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        with pytest.raises(UnsupportedError, match="pad on the left"):
            model(prompt(12, 2), past_key_values=cache, attention_mask=mask)
        model(prompt(12, 2), past_key_values=cache, attention_mask=mask.flip(1))
