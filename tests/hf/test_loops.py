"""Models that run some of their layers several times, with a cache for every pass."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers

import reasonalloc
from generations import PADDED, SMALL, batch, generated
from models import prompt, unequal
from reasonalloc import UnsupportedError, plan
from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.hf.cache_layers import held_bytes
from reasonalloc.integrations.hf.replay import replay_logits
from reasonalloc.integrations.hf.versions import with_cache
from reasonalloc.integrations.vllm.budget import make_budget
from reasonalloc.texts import Trajectory

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DoryForCausalLM"), reason="this transformers has no such model"
)


LOOPS = 2 * [True, False]  # the second and the third pass


@functools.cache
def made(name: str) -> Any:
    return unequal(name)


def test_every_pass_has_a_cache_of_its_own() -> None:
    """In the order of the model's own cache, which it makes longer at the first call."""
    model = made("dory")
    planned = plan(model.config, dtype=torch.float32, **SMALL)
    shapes = planned.shapes
    assert [shape.again for shape in shapes] == [None] * 4 + [1, 2, 1, 2]
    assert [bool(shape.sliding_window) for shape in shapes] == [False, True, False, False, *LOOPS]
    full = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(**with_cache({}, full), input_ids=prompt(30))
        with reasonalloc.attach(model, **SMALL) as attached:
            cache = attached.new_cache()
            model(prompt(30), past_key_values=cache)
    assert [layer.is_sliding for layer in full.layers] == [bool(s.sliding_window) for s in shapes]
    assert held_bytes(full.layers) == planned.memory().full_bytes(30)
    assert len(cache.layers) == len(full.layers) == 8
    assert [len(layer) for layer in cache.retained_tokens] == 5 * [1]


@pytest.mark.parametrize("policy", ["h2o", "value_aware(metric=output)", "tova"])
def test_policies(policy: str) -> None:
    """In a batch as alone, with static steps too."""
    model, (ids, mask) = made("dory_full"), batch()
    own, tokens = ids[1:2, PADDED[1] :], []
    for step in ("eager", "static"):
        with reasonalloc.attach(model, **SMALL, policy=policy, step=step):
            tokens.append(generated(model, ids, mask, 24))
            assert torch.equal(generated(model, own, torch.ones_like(own), 24)[0], tokens[-1][1])
    assert torch.equal(*tokens)


def test_a_replay_is_what_decoding_gives() -> None:
    model, ids, fed = made("dory"), prompt(20, seed=4), prompt(30, seed=5)
    with torch.no_grad(), reasonalloc.attach(model, **SMALL, policy="h2o") as attached:
        cache, replayed = attached.new_cache(), attached.new_cache()
        model(ids, past_key_values=cache)
        slowly = [model(token, past_key_values=cache).logits[0] for token in fed.split(1, dim=1)]
        text = Trajectory(tuple(ids[0].tolist()), (*fed[0].tolist(), 2))
        with replayed.replaying():
            pieces = list(replay_logits(model, text, replayed))
        assert torch.allclose(torch.cat(pieces[1:]), torch.cat(slowly), atol=1e-3)
        assert replayed.retained_tokens == cache.retained_tokens


def test_what_is_refused() -> None:
    model = made("dory_full")
    config = copy.deepcopy(model.config)
    config.recurrent_kv_cache_mode = "last_loop"
    with pytest.raises(UnsupportedError, match="read what the last loop cached"):
        plan(config, **SMALL)
    with pytest.raises(UnsupportedError, match="the cache of layer 1 in a further loop"):
        make_budget(CompressionConfig(budget=16), "it", model.config, 1)
