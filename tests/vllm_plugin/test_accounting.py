"""What a finished request is said to have kept and lost, against counting token by token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonalloc.cli.serve import _asked, _stages
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.errors import UsageError
from reasonalloc.integrations.vllm.accounting import Accounting
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.pages import stored_bytes
from reasonalloc.integrations.vllm.settings import allow_plugin, as_json, find_settings
from reasonalloc.planning.memory import LayerShape
from reasonalloc.policies import POLICIES


class MadeBudget(EngineBudget):
    """Layer totals as given."""

    def __init__(
        self,
        config: CompressionConfig,
        shapes: tuple[LayerShape, ...],
        ranks: int,
        totals: list[int],
    ) -> None:
        given = {"config": config, "shapes": shapes, "ranks": ranks, "totals": tuple(totals)}
        policy = POLICIES.create(config.arm.policy)
        self.__dict__.update(given, name="made", planned=None, formats=None, policy=policy)


def make(totals: list[int], heads: int, interval: int, block: int, ranks: int = 1) -> Accounting:
    config = CompressionConfig(budget=64, interval=interval)
    shapes = (LayerShape(heads, heads, 16),) * len(totals)
    return Accounting(MadeBudget(config, shapes, ranks, totals), block, 4)


def count(totals: list[int], heads: int, interval: int, prompt: int, tokens: int) -> list[int]:
    """Kept and evicted entries and boundaries that did something, the slow way."""
    kept, evicted, boundaries = 0, 0, set()
    for total in totals:
        held = 0
        for seen in range(1, tokens + 1):
            held += heads
            if seen >= prompt and (seen - prompt) % interval == 0 and held > total:
                evicted += held - total
                held = total
                boundaries.add(seen)
        kept += held
    return [kept, evicted, len(boundaries)]


@given(
    st.lists(st.integers(20, 200), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 200),
)
def test_account(totals: list[int], heads: int, interval: int, prompt: int, new: int) -> None:
    found = make(totals, heads, interval, 16).account(prompt, new)
    expected = count(totals, heads, interval, prompt, prompt + new - 1)
    assert [found.kept, found.evicted, found.compressions] == expected


def test_ranks_share_a_layer() -> None:
    one, two = (make([100, 60], 4, 8, 16, ranks) for ranks in (1, 2))
    first, second = one.account(50, 30), two.account(50, 30)
    assert (first.kept, first.evicted) == (second.kept, second.evicted)
    assert one.block_bytes == two.block_bytes
    # A rank holds half of every block.
    assert two.fits(64 * one.block_bytes, 4096) >= 2 * one.fits(64 * one.block_bytes, 4096)


def test_bytes_of_a_request() -> None:
    sizes = make([128, 128], 2, 32, 32)
    assert sizes.block_bytes == 2 * 2 * 2 * 16 * 32 * 4
    assert sizes.blocks == 4  # (128 + 2 * 63) // 32 = 7 pages per layer, 14 pages, 4 per block
    found = sizes.account(40, 200)
    assert (found.held_bytes, found.full_bytes) == (4 * sizes.block_bytes, 8 * sizes.block_bytes)
    short = sizes.account(40, 10)
    assert short.held_bytes == short.full_bytes == 2 * sizes.block_bytes
    for blocks, requests in ((41, 10), (44, 10), (45, 11), (5, 1), (4, 0), (1, 0), (0, 0)):
        assert sizes.fits(blocks * sizes.block_bytes, 4096) == requests  # one block is vLLM's own


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ([], 4),
        (["--kv-cache-dtype", "fp8"], 1),
        (["--enforce-eager", "--kv-cache-dtype=fp8_e4m3"], 1),
        (["--kv-cache-dtype", "auto", "--served-model-name", "fp8"], 4),
        (["--kv-cache-dtype"], 4),
    ],
)
def test_bytes_of_a_number_as_the_server_is_asked(arguments: list[str], size: int) -> None:
    asked = _asked(arguments, "--kv-cache-dtype", "auto")
    assert stored_bytes(asked, torch.float32) == size


def test_stages_as_the_server_is_asked() -> None:
    assert _stages([]) == 1
    assert _stages(["--pipeline_parallel_size=3", "--dtype", "auto"]) == 3
    assert _stages(["-pp", "2"]) == 2
    for wrong in ("two", "0", ""):
        with pytest.raises(UsageError, match=f"--pipeline-parallel-size {wrong!r} must be"):
            _stages(["--pipeline-parallel-size", wrong])


@pytest.mark.parametrize(
    ("chosen", "then"),
    [
        (None, None),
        ("", ",reasonalloc"),
        ("other", "other,reasonalloc"),
        ("reasonalloc,other", "reasonalloc,other"),
    ],
)
def test_the_plugin_is_loaded_beside_chosen_ones(chosen: str | None, then: str | None) -> None:
    environment = {} if chosen is None else {"VLLM_PLUGINS": chosen}
    allow_plugin(environment)
    assert environment.get("VLLM_PLUGINS") == then


def test_settings_survive_json() -> None:
    config = CompressionConfig(budget=64, interval=32, n_sink=4, seed=3)
    assert find_settings({"reasonalloc": as_json(config)}) == config
    assert "prompt" not in as_json(config)
    pinned = CompressionConfig(budget=64, prompt="pin")
    assert find_settings({"reasonalloc": as_json(pinned)}) == pinned


@pytest.mark.parametrize("stored", [1, 2])
@pytest.mark.parametrize(("policy", "numbers"), [("rkv", 1), ("value_aware", 2), ("knorm", 1)])
def test_what_a_budget_keeps_beside_the_cache_fits_too(
    policy: str, numbers: int, stored: int
) -> None:
    arm = parse_arm(f"{policy}/uniform/uniform")
    assert arm is not None
    made = MadeBudget(CompressionConfig(64, arm), (LayerShape(2, 2, 16),) * 2, 1, [100, 120])
    cache, requests = 1 << 20, 5
    entry = 2 * 16 * stored  # a key and a value
    width = {"rkv": 8, "value_aware": 16, "knorm": 0}[policy]
    ring = requests * width * 2 * (2 * 16) * 2  # layers, heads, bytes
    whole = cache + cache // entry * 4 * numbers + ring
    assert made.cache_bytes(whole, requests, 2, stored) == cache
    assert made.cache_bytes(ring // 2, requests, 2, stored) == 0 or not ring
