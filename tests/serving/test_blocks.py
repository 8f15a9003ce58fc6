"""Blocks come back: constant use while decoding, nothing left behind, nobody preempted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import greedy, pool, random_prompts, scheduler, worker

SETTINGS = {"budget": 64, "interval": 32, "arm": "rkv/uniform/reasonalloc"}


def used(llm: Any) -> int:
    found: int = pool(llm).num_gpu_blocks - 1 - pool(llm).get_num_free_blocks()
    return found


def run(
    llm: Any, prompts: list[list[int]], watch: Callable[[], None], **sampling: Any
) -> list[Any]:
    """All outputs; ``watch`` is called after every step."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling["output_kind"] = RequestOutputKind.FINAL_ONLY
    for index, prompt in enumerate(prompts):
        parameters = SamplingParams(**{"temperature": 0, "ignore_eos": True, **sampling})
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        finished += [out for out in llm.llm_engine.step() if out.finished]
        watch()
    return finished


def test_use_is_constant_once_compressed(engine: Callable[..., Any]) -> None:
    llm = engine(SETTINGS)
    reserve = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0].kv_cache_spec
    counts: list[int] = []
    run(llm, random_prompts([10, 200]), lambda: counts.append(used(llm)), max_tokens=1800)
    plan = 2 * reserve.reserve.blocks
    assert set(counts[100:-1]) == {plan}  # what the plan says, to the block
    assert max(counts) <= plan + -(-200 // 32)
    assert used(llm) == 0


def test_a_small_pool_serves_many_without_preemption(engine: Callable[..., Any]) -> None:
    llm = engine(SETTINGS, kv_cache_memory_bytes=2 << 20, max_num_seqs=64)
    running: list[int] = []
    prompts = random_prompts([20, 90, 160] * 8, seed=2)
    finished = run(
        llm, prompts, lambda: running.append(len(scheduler(llm).running)), max_tokens=150
    )
    assert len(finished) == len(prompts)
    assert all(request.num_preemptions == 0 for request in scheduler(llm).requests.values())
    reserve = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0].kv_cache_spec
    fit = (pool(llm).num_gpu_blocks - 1) // reserve.reserve.blocks
    assert max(running) >= min(fit, 24) // 2
    assert used(llm) == 0


def test_stock_vllm_would_refuse_this_memory(engine: Callable[..., Any]) -> None:
    small: dict[str, Any] = {"kv_cache_memory_bytes": 1 << 20, "max_model_len": 1024}
    with pytest.raises(ValueError, match="KV cache"):
        engine(**small)
    llm = engine(SETTINGS, **small)
    assert len(greedy(llm, random_prompts([40]), 960)[0]) == 960


@pytest.mark.parametrize("prompt", ["evict", "pin"])
def test_aborted_requests_leave_nothing(engine: Callable[..., Any], prompt: str) -> None:
    llm = engine({**SETTINGS, "prompt": prompt})
    seen = 0

    def watch() -> None:
        nonlocal seen
        seen += 1
        for index, step in enumerate((1, 40, 41, 75, 130)):
            if seen == step:
                llm.llm_engine.abort_request([str(index)])

    finished = run(llm, random_prompts([5, 60, 150, 300, 20, 80]), watch, max_tokens=200)
    assert [out.request_id for out in finished if len(out.outputs[0].token_ids) == 200] == ["5"]
    assert used(llm) == 0
    runner = worker(llm).model_runner
    alone = greedy(llm, random_prompts([33]), 100)
    builder = runner.attn_groups[0][0].get_metadata_builder(0)
    assert len(builder.runs._tracked) <= 1
    assert greedy(llm, random_prompts([33]), 100) == alone


def test_several_samples_stop_strings_and_odd_lengths(engine: Callable[..., Any]) -> None:
    llm = engine(SETTINGS)
    greedy_tokens = greedy(llm, random_prompts([150]), 200)[0]
    finished = run(
        llm, random_prompts([150]), lambda: None, max_tokens=77, n=3, temperature=1.0, seed=1
    )
    assert sorted(len(o.token_ids) for o in finished[0].outputs) == [77] * 3
    stop = greedy_tokens[90]
    first = greedy_tokens.index(stop)
    finished = run(llm, random_prompts([150]), lambda: None, max_tokens=200, stop_token_ids=[stop])
    assert list(finished[0].outputs[0].token_ids) == greedy_tokens[: first + 1]
    assert used(llm) == 0


@pytest.mark.parametrize("prompt", ["evict", "pin"])
def test_a_row_holds_what_a_long_prompt_is_compressed_to(
    engine: Callable[..., Any], prompt: str
) -> None:
    settings = {"budget": 24, "interval": 64, "arm": "rkv", "prompt": prompt}
    llm = engine(settings, max_model_len=98)
    reserve = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0].kv_cache_spec
    tokens = 90 if prompt == "evict" else 33
    assert reserve.reserve.first_event(tokens) < 98
    assert tokens // 32 + reserve.reserve.blocks > -(-98 // 32)  # of a block table of 98 tokens
    assert len(greedy(llm, random_prompts([tokens]), 98 - tokens)[0]) == 98 - tokens
    assert used(llm) == 0
