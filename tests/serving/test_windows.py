"""Layers with sliding windows beside those under a budget, learned sinks and soft-capping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import builder, greedy, manager, pool, prefilled, random_prompts
from test_pausing import Watched
from windowed import FULL, SLIDING, WINDOW, save_windowed

from reasonalloc.errors import UnsupportedError, UsageError

LENGTHS = (40, 150, 7, 100)
CADENCE = {"budget": 64, "interval": 32}


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        ("gemma3", "rkv/uniform/adakv"),
        pytest.param("gemma3", "value_aware/pyramid/reasonalloc", marks=pytest.mark.long),
        pytest.param("gemma2", "rkv/uniform/adakv", marks=pytest.mark.long),
        ("gemma2", "value_aware/uniform/uniform"),
        pytest.param("gpt_oss", "rkv/uniform/adakv", marks=pytest.mark.long),
        pytest.param("gpt_oss", "snapkv/pyramid/reasonalloc", marks=pytest.mark.long),
        ("gpt_oss", "value_aware/uniform/adakv"),
    ],
)
def test_as_on_transformers(
    engine: Callable[..., Any], windowed: Callable[..., Any], name: str, arm: str
) -> None:
    settings = {**CADENCE, "arm": arm}
    model = windowed(name)
    prompts, expected = model.clear(LENGTHS, 250, **settings)
    # Prompts come in pieces, beside requests that decode.
    llm = engine(settings, model=model.folder, max_num_batched_tokens=101, max_num_seqs=8)
    assert greedy(llm, prompts, 250) == expected
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@pytest.mark.parametrize(
    "name",
    ["gemma3", *(pytest.param(name, marks=pytest.mark.long) for name in ("gemma2", "gpt_oss"))],
)
def test_a_budget_that_holds_everything_is_stock_vllm(
    engine: Callable[..., Any], windowed: Callable[..., Any], name: str
) -> None:
    model = windowed(name)
    prompts, expected = model.clear(LENGTHS, 220)
    settings = {"budget": 800, "arm": "rkv/uniform/reasonalloc"}
    assert greedy(engine(settings, model=model.folder), prompts, 220) == expected
    plain = engine(model=model.folder, enable_prefix_caching=False)
    assert greedy(plain, prompts, 220) == expected


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_only_layers_without_a_window_are_compressed(
    engine: Callable[..., Any], windowed: Callable[..., Any], name: str
) -> None:
    llm = engine({**CADENCE, "arm": "rkv/pyramid/uniform"}, model=windowed(name).folder)
    kinds = ["sliding" in kind for kind in llm.llm_engine.model_config.hf_text_config.layer_types]
    full = [str(index) for index, sliding in enumerate(kinds) if not sliding]
    assert [layer.split(".")[2] for layer in builder(llm).layers] == full
    # Two groups share a pool: pages of a block are those of as many layers.
    assert manager(llm).kv_cache_spec.reserve.windows.widths == (WINDOW,) * (sum(kinds) // 2)


@pytest.mark.parametrize("name", ["gemma3", pytest.param("gpt_oss", marks=pytest.mark.long)])
def test_a_small_pool_serves_many_without_preemption(
    engine: Callable[..., Any], windowed: Callable[..., Any], name: str
) -> None:
    settings = {**CADENCE, "arm": "rkv/uniform/reasonalloc"}
    few = {"model": windowed(name).folder, "max_num_batched_tokens": 128, "max_num_seqs": 64}
    small = Watched(engine(settings, **few, kv_cache_memory_bytes=1 << 20))
    large = Watched(engine(settings, **few))
    small.serve(random_prompts([12] * 12, seed=6), [{"max_tokens": 10}] * 12)
    prompts = random_prompts([12, 30, 5, 150] * 6, seed=7)
    limits = [{"max_tokens": 100 + 5 * i} for i in range(24)]
    held: list[int] = []

    def between() -> None:
        """Nobody holds more than was promised."""
        free = pool(small.llm).get_num_free_blocks()
        held.append(pool(small.llm).num_gpu_blocks - 1 - free)
        promised = small.manager.admission._admitted.values()
        assert held[-1] <= sum(each.blocks for each in promised)

    found = small.serve(prompts, limits, between)
    assert small.paused > 20
    assert max(held) > 0.8 * pool(small.llm).num_gpu_blocks
    assert found == large.serve(prompts, limits)


def test_aborted_requests_leave_nothing(
    engine: Callable[..., Any], windowed: Callable[..., Any]
) -> None:
    settings = {**CADENCE, "arm": "rkv"}
    llm = engine(settings, model=windowed("gemma3").folder, max_num_batched_tokens=101)
    watched, steps = Watched(llm), 0

    def between() -> None:
        nonlocal steps
        steps += 1
        for index, step in enumerate((1, 3, 40, 75)):
            if steps == step:
                llm.llm_engine.abort_request([str(index)])

    found = watched.serve(random_prompts([150, 60, 5, 300, 20]), [{"max_tokens": 120}] * 5, between)
    assert [len(tokens) for tokens in found].count(120) == 1
    assert not watched.manager.admission._admitted


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        pytest.param("gemma3", "pin", marks=pytest.mark.long),
        ("gemma3", "evict"),
        pytest.param("gpt_oss", "pin", marks=pytest.mark.long),
        ("gpt_oss", "evict"),
    ],
)
def test_prompts_are_shared(
    engine: Callable[..., Any], windowed: Callable[..., Any], name: str, prompt: str
) -> None:
    settings = {**CADENCE, "arm": "rkv/uniform/adakv", "prompt": prompt}
    model = windowed(name)
    prompts, expected = model.clear(LENGTHS, 200, **settings)
    llm = engine(settings, model=model.folder, max_num_batched_tokens=101, max_num_seqs=8)
    assert greedy(llm, prompts, 200) == expected
    found: list[list[int]] = []
    total = prefilled(llm, lambda: found.extend(greedy(llm, prompts, 200)))
    assert found == expected
    assert total < sum(LENGTHS) - 3 * 32  # from cached blocks of all groups
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@pytest.mark.parametrize("prompt", ["evict", pytest.param("pin", marks=pytest.mark.long)])
def test_answers_are_shared_by_nobody(
    engine: Callable[..., Any], windowed: Callable[..., Any], prompt: str
) -> None:
    """Layers with windows compute them from what the others have left."""
    settings = {**CADENCE, "arm": "rkv/uniform/adakv", "prompt": prompt}
    llm = engine(settings, model=windowed("gemma3").folder, prefix_cache_retention_interval=32)
    first = random_prompts([150])[0]
    second = [*first, *greedy(llm, [first], 100)[0], *random_prompts([3], seed=3)[0]]
    greedy(llm, [second], 30)
    warm = greedy(llm, [second], 30)
    llm.reset_prefix_cache()
    assert warm == greedy(llm, [second], 30)


def test_a_prompt_that_ends_early_in_a_block_is_found(
    engine: Callable[..., Any], windowed: Callable[..., Any]
) -> None:
    """The window of the last 8 queries begins a block before the prompt's last one."""
    settings = {**CADENCE, "arm": "rkv/uniform/adakv"}
    llm, prompt = engine(settings, model=windowed("gemma3").folder), random_prompts([162])[0]
    computed = [prefilled(llm, lambda: greedy(llm, [prompt], 2)) for _ in range(3)]
    assert computed == [162, 34, 34]


def test_prompts_beyond_the_pool(engine: Callable[..., Any], windowed: Callable[..., Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    small = {"kv_cache_memory_bytes": 1 << 20, "max_num_batched_tokens": 128}
    llm = engine({**CADENCE, "arm": "rkv"}, model=windowed("gemma3").folder, **small)
    with pytest.raises(VLLMValidationError, match="shorten it to"):
        greedy(llm, random_prompts([700]), 4)  # 22 of 31 blocks, and two groups' windows
    assert len(greedy(llm, random_prompts([200]), 4)[0]) == 4


@pytest.mark.parametrize(
    ("name", "changes", "arguments", "says"),
    [
        ("gemma3", {"layer_types": [FULL, FULL, FULL, SLIDING]}, {}, "into 3 groups"),
        ("gpt_oss", {"layer_types": 2 * [FULL, SLIDING]}, {}, "layer 0 has a sliding window of 40"),
        ("gemma3", {}, {"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache"),
        (
            "gemma3",
            {},
            {"disable_sliding_window": True, "max_model_len": 32},
            "--disable-sliding-window",
        ),
    ],
)
def test_refused(
    engine: Callable[..., Any],
    tmp_path: Path,
    name: str,
    changes: dict[str, Any],
    arguments: dict[str, Any],
    says: str,
) -> None:
    folder = save_windowed(tmp_path, name, **changes)
    with pytest.raises((UnsupportedError, UsageError), match=says):
        engine(CADENCE, model=folder, **arguments)
