"""Tokens in fewer bits in vLLM's pages: the same tokens as on transformers.

Engines round differently, and a number that lies as close to the middle between two codes as that
gets the one or the other, which is no small difference any more. So a few requests of many may go
another way, late, on any processor; that bits are moved as they are is shown to the bit elsewhere
(``vllm_plugin/test_coded_runs.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engines import (
    builder,
    decided,
    greedy,
    manager,
    mostly,
    pool,
    prefilled,
    random_prompts,
    worker,
)

CADENCE = {"budget": 64, "interval": 32}
LENGTHS = (40, 150, 7, 300, 64, 1, 33, 90)
ARMS = [
    {"arm": "best-bytes"},
    {"arm": "rkv/pyramid/reasonalloc", "kv_dtype": "int8"},
    {"arm": "value_aware/uniform/uniform", "kv_dtype": "int8:int4"},
    {"arm": "streaming_llm/uniform/uniform", "kv_dtype": "int4h"},
    {"arm": "h2o/uniform/adakv", "kv_dtype": "fp8"},
    {"arm": "best-bytes", "prompt": "pin"},
    {"arm": "rkv/pyramid/reasonalloc", "kv_dtype": "int8:int4", "prompt": "pin"},
]


@pytest.mark.parametrize("settings", ARMS, ids=lambda settings: "-".join(settings.values()))
def test_as_on_transformers(
    engine: Callable[..., Any],
    model: Any,
    files: Callable[..., Any],
    settings: dict[str, Any],
) -> None:
    settings = {**CADENCE, **settings}
    if settings["arm"] in (made := files(32)):
        settings["profile"] = made[settings["arm"]]
    prompts = random_prompts(LENGTHS * 2)
    # Prompts come in pieces, some of one token, beside requests that decode.
    llm = engine(settings, max_num_batched_tokens=101, max_num_seqs=8)
    assert mostly(greedy(llm, prompts, 150), decided(model, prompts, 150, settings)[0])
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma2", {"arm": "value_aware/uniform/uniform", "kv_dtype": "int4h"}),
        pytest.param(
            "gemma2",
            {"arm": "rkv/uniform/adakv", "kv_dtype": "int8", "prompt": "pin"},
            marks=pytest.mark.long,
        ),
        pytest.param(
            "gpt_oss", {"arm": "rkv/uniform/adakv", "kv_dtype": "int8"}, marks=pytest.mark.long
        ),
        pytest.param(
            "gemma3",
            {"arm": "value_aware/uniform/uniform", "kv_dtype": "int8:int4"},
            marks=pytest.mark.long,
        ),
    ],
)
def test_beside_layers_with_windows(
    engine: Callable[..., Any],
    windowed: Callable[..., Any],
    name: str,
    settings: dict[str, Any],
) -> None:
    """And with soft-capping, or learned sinks."""
    settings, made = {**CADENCE, **settings}, windowed(name)
    prompts = random_prompts(LENGTHS)
    found = greedy(engine(settings, model=made.folder, max_num_seqs=8), prompts, 150)
    assert mostly(found, decided(made.model, prompts, 150, settings)[0])


@pytest.mark.parametrize("name", ["gemma2", pytest.param("gpt_oss", marks=pytest.mark.long)])
def test_blocks_that_held_codes_are_used_again(
    engine: Callable[..., Any], windowed: Callable[..., Any], name: str
) -> None:
    """As numbers codes may be none, and layers with windows read them by vLLM's own kernels."""
    # Codes reach into the half of a page that holds values.
    settings = {"budget": 140, "interval": 32, "arm": "rkv/uniform/uniform", "kv_dtype": "int8"}
    given = {"model": windowed(name).folder, "max_num_seqs": 8, "max_model_len": 512}
    prompts = random_prompts(LENGTHS * 2)
    expected = greedy(engine(settings, **given), prompts, 100)
    small = engine(settings, **given, kv_cache_memory_bytes=2_000_000)
    for _ in range(3):
        assert mostly(greedy(small, prompts, 100), expected)
    assert pool(small).get_num_free_blocks() == pool(small).num_gpu_blocks - 1
    assert not bool(builder(small).runs.pages.raw[0].isnan().any())  # nobody's page


def test_what_was_in_a_block_does_not_matter(engine: Callable[..., Any]) -> None:
    """Prompts come in pieces, whose last blocks vLLM's own kernels read to their ends."""
    settings = {**CADENCE, "arm": "rkv/uniform/uniform", "kv_dtype": "int8"}
    given = {"max_num_batched_tokens": 37, "max_num_seqs": 8, "kv_cache_memory_bytes": 8 << 20}
    prompts = random_prompts(LENGTHS)
    expected = greedy(engine(settings, **given), prompts, 60)
    llm = engine(settings, **given)
    for module in worker(llm).vllm_config.compilation_config.static_forward_context.values():
        module.kv_cache[1:] = torch.nan  # all but nobody's block
    assert greedy(llm, prompts, 60) == expected


@pytest.mark.parametrize(
    "more",
    [
        {"arm": "rkv/uniform/adakv"},
        {"arm": "value_aware/uniform/adakv", "prompt": "pin"},
    ],
)
def test_a_prompt_is_computed_once(engine: Callable[..., Any], more: dict[str, Any]) -> None:
    """Its blocks are shared until a request's tokens are coded, to blocks of its own."""
    settings = {**CADENCE, **more, "kv_dtype": "int8"}
    shared, *own = random_prompts([128, *range(9, 15)])
    prompts = [shared + more for more in own]
    alone = engine(settings, enable_prefix_caching=False)
    one_by_one = [greedy(alone, [prompt], 80)[0] for prompt in prompts]
    llm = engine(settings)
    greedy(llm, prompts[:1], 1)
    found: list[list[int]] = []
    computed = prefilled(llm, lambda: found.extend(greedy(llm, [p], 80)[0] for p in prompts))
    assert found == one_by_one
    assert computed == sum(map(len, own))
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


def test_pinned_prompts_that_requests_share_in_a_small_pool(engine: Callable[..., Any]) -> None:
    """Each request has its own, coded; blocks suffice, and what was shared is given back."""
    settings = {**CADENCE, "arm": "rkv/uniform/adakv", "kv_dtype": "int8", "prompt": "pin"}
    shared, *own = random_prompts([128, *range(5, 21)])
    prompts = [shared + more for more in own]
    given = {"max_num_seqs": 8, "max_model_len": 512}
    alone = engine(settings, enable_prefix_caching=False, **given)
    expected, spec = greedy(alone, prompts, 100), manager(alone).kv_cache_spec
    blocks = 128 // 32 + 4 * spec.reserve.own(149)  # of eight that may run at once
    small = engine(settings, **given, kv_cache_memory_bytes=4 * spec.page_size_bytes * blocks)
    assert pool(small).num_gpu_blocks == blocks
    greedy(small, prompts[:1], 1)
    found: list[list[int]] = []
    computed = prefilled(small, lambda: found.extend(greedy(small, prompts, 100)))
    assert mostly(found, expected)
    assert computed < sum(map(len, prompts))
    assert pool(small).get_num_free_blocks() == pool(small).num_gpu_blocks - 1


def test_memory_is_really_freed(engine: Callable[..., Any], files: Callable[..., Any]) -> None:
    """At the same budget in tokens a sequence takes a fraction of the blocks."""
    held = {}
    for kind in ("auto", "int8", "int4h"):
        settings = {"budget": 512, "interval": 32, "arm": "rkv/uniform/uniform", "kv_dtype": kind}
        held[kind] = builder(engine(settings)).runs.layout.reserve.blocks
    # In float32 four and seven times as many tokens fit into a page, besides tails of 40 tokens.
    assert held["int8"] < 0.4 * held["auto"]
    assert held["int4h"] < 0.35 * held["auto"]
