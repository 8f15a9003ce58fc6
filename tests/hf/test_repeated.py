"""Models that repeat the heads of a cache before attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reasonalloc
from generations import SMALL
from models import prompt, unequal
from reasonalloc.integrations.hf.repeated import as_asked, follow, in_groups, unrepeated

needs_jetmoe = pytest.mark.skipif(
    not hasattr(transformers, "JetMoeForCausalLM"), reason="this transformers has no JetMoE"
)


@given(copies=st.integers(1, 4), kv_heads=st.integers(1, 4), group=st.integers(1, 3))
def test_query_heads_lie_beside_their_key_head(copies: int, kv_heads: int, group: int) -> None:
    """Head by head: query head ``i`` reads head ``i // group`` of the repeated ones."""
    heads = torch.arange(copies * kv_heads * group)
    wanted = [
        query
        for own in range(kv_heads)
        for query in heads.tolist()
        if query // group % kv_heads == own
    ]
    assert in_groups(heads, copies, kv_heads, dim=0).tolist() == wanted
    there = in_groups(heads[None, :, None, None], copies, kv_heads)
    assert torch.equal(as_asked(there, copies, kv_heads).flatten(), heads)


def followed(*shape: int) -> Tensor:
    tensor = torch.randn(shape)
    follow(tensor)
    return tensor


def test_what_was_repeated_is_known() -> None:
    key, value = followed(2, 3, 5, 4), followed(2, 3, 5, 6)
    keys, values = key.repeat(1, 2, 1, 1), value.repeat((1, 2, 1, 1))
    assert torch.equal(keys, torch.cat([key, key], dim=1))
    found = unrepeated(keys, values)
    assert found[0] is key and found[1] is value and found[2] == 2
    for other in (keys.clone(), keys * 2, key.repeat(2, 1, 1, 1), keys[:, :3]):
        assert unrepeated(other, values) == (other, values, 1)
    assert unrepeated(keys, value)[2] == 1


@needs_jetmoe
@pytest.mark.parametrize(
    "settings",
    [
        {"arm": "h2o/uniform/reasonalloc"},
        {"policy": "value_aware"},
        {"kv_dtype": "int8:int4", "step": "static"},
        {"attention": "eager"},
        {"attention": "cpp", "policy": "h2o"},
    ],
)
def test_every_setting_compresses_the_heads_of_the_cache(settings: dict[str, Any]) -> None:
    """Each compresses, in the planned bytes."""
    model, ids = unequal("jetmoe"), prompt(30, 2)
    with reasonalloc.attach(model, **SMALL, **settings) as attached:
        cache = attached.new_cache()
        model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        assert cache.kv_bytes == attached.plan(batch=2).kv_bytes(49)
        assert cache.recorder.compressions
