"""Pinned prompts: the same tokens as on transformers, and full blocks that requests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import greedy, pool, random_prompts, scheduler

SETTINGS = {"budget": 48, "interval": 32, "prompt": "pin"}
LENGTHS = (40, 150, 7, 64)


@pytest.mark.parametrize(
    ("arm", "caching"),
    [
        ("rkv/pyramid/reasonalloc", True),
        ("rkv/pyramid/reasonalloc", False),
        ("value_aware/uniform/adakv", True),
        ("snapkv/uniform/uniform", True),
    ],
)
def test_as_on_transformers(
    engine: Callable[..., Any], clear: Callable[..., Any], arm: str, caching: bool
) -> None:
    settings = {**SETTINGS, "arm": arm}
    prompts, expected = clear(LENGTHS, 250, **settings)
    llm = engine(
        settings, enable_prefix_caching=caching, max_num_batched_tokens=101, max_num_seqs=8
    )
    assert greedy(llm, prompts, 250) == expected
    assert greedy(llm, prompts, 250) == expected  # from cached prompts
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


def prefilled(llm: Any, run: Callable[[], Any]) -> int:
    """Tokens that are computed for prompts while something runs."""
    total, original = 0, scheduler(llm).schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal total
        output = original(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            total += output.num_scheduled_tokens[new.req_id]
        return output

    scheduler(llm).schedule = watched
    try:
        run()
    finally:
        scheduler(llm).schedule = original
    return total


def test_a_shared_system_prompt_is_computed_once(engine: Callable[..., Any]) -> None:
    settings = {**SETTINGS, "arm": "rkv/uniform/reasonalloc"}
    system = random_prompts([512])[0]
    prompts = [system + own for own in random_prompts([9 + n for n in range(16)], seed=2)]
    alone = greedy(engine(settings, enable_prefix_caching=False), prompts, 120)
    llm = engine(settings)
    found: list[list[int]] = []
    tokens = prefilled(llm, lambda: found.extend(greedy(llm, prompts, 120)))
    assert found == alone
    assert tokens == 512 + sum(len(p) - 512 for p in prompts)


def test_samples_hold_the_prompt_once(engine: Callable[..., Any]) -> None:
    from vllm import SamplingParams

    llm = engine({**SETTINGS, "arm": "rkv"})
    prompt = random_prompts([330])[0]
    most, original = 0, scheduler(llm).schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        output = original(*args, **kwargs)
        most = max(most, pool(llm).num_gpu_blocks - 1 - pool(llm).get_num_free_blocks())
        return output

    scheduler(llm).schedule = watched
    sampling = SamplingParams(n=8, temperature=1.0, seed=1, max_tokens=150, ignore_eos=True)
    llm.generate([{"prompt_token_ids": prompt}], [sampling], use_tqdm=False)
    manager = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0]
    reserve = manager.kv_cache_spec.reserve
    # 10 full blocks once, and for each of the 8 what it holds besides at most.
    assert most <= 330 // 32 + 8 * (reserve.peak(330, 330 + 150) - 330 // 32)
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


def test_a_second_turn_finds_the_first_prompt(engine: Callable[..., Any]) -> None:
    llm = engine({**SETTINGS, "arm": "rkv"})
    first = random_prompts([200])[0]
    answer = greedy(llm, [first], 100)[0]
    second = [*first, *answer, *random_prompts([30], seed=3)[0]]
    tokens = prefilled(llm, lambda: greedy(llm, [second], 50))
    assert tokens == len(second) - 200 // 32 * 32


def test_evicted_prompts_share_nothing(engine: Callable[..., Any]) -> None:
    llm = engine({"budget": 48, "interval": 32})
    assert not scheduler(llm).kv_cache_manager.enable_caching
