"""Differential attention: two KV heads that read each other's values keep the same tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

import reasonalloc
from generations import PADDED, SMALL, batch, generated
from models import unequal
from reasonalloc import UnsupportedError, plan
from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.hf.paired import _apart
from reasonalloc.integrations.vllm.budget import make_budget

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "DiffLlamaForCausalLM"), reason="this transformers has no such model"
)


@functools.cache
def made() -> Any:
    return unequal("diffllama")


def test_a_query_reads_the_key_of_its_own_head() -> None:
    """Head by head: a query times the key of a pair is the query times the key of its head."""
    query, keys = torch.randn(2, 12, 5, 3), torch.randn(2, 4, 5, 3)  # three queries per KV head
    wanted = query @ keys.repeat_interleave(3, dim=1).transpose(-1, -2)
    pairs = torch.cat([keys[:, :2], keys[:, 2:]], dim=-1)
    found = _apart(query, 2) @ pairs.repeat_interleave(6, dim=1).transpose(-1, -2)
    order = [*range(3), *range(6, 9), *range(3, 6), *range(9, 12)]
    torch.testing.assert_close(found, wanted[:, order])


def test_pairs_are_planned() -> None:
    planned = plan(made().config, **SMALL)
    assert [(s.kv_heads, s.query_heads, s.head_dim) for s in planned.shapes] == 4 * [(2, 8, 24)]
    assert planned.totals == 4 * (2 * SMALL["budget"],)
    assert planned.memory().full_bytes(10) == 4 * 10 * 4 * 2 * 12 * planned.memory().itemsize


@pytest.mark.parametrize("settings", [{"policy": "h2o"}, {"kv_dtype": "int8"}, {"prompt": "pin"}])
def test_settings(settings: dict[str, Any]) -> None:
    """In a batch as alone, with static steps too."""
    ids, mask = batch()
    own, tokens = ids[1:2, PADDED[1] :], []
    for step in ("eager", "static"):
        with reasonalloc.attach(made(), **SMALL, **settings, step=step):
            tokens.append(generated(made(), ids, mask, 24))
            assert torch.equal(generated(made(), own, torch.ones_like(own), 24)[0], tokens[-1][1])
    assert torch.equal(*tokens)


def test_what_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="two heads read each other's: use metric='value'"):
        reasonalloc.attach(made(), **SMALL, policy="value_aware(metric=output)")
    with pytest.raises(UnsupportedError, match="layer 0 has KV heads that read each other's"):
        make_budget(CompressionConfig(budget=16), "it", made().config, 1)
