"""Prompts whose full blocks requests share: the same tokens as on transformers, computed once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import greedy, manager, pool, prefilled, random_prompts, scheduler, worker

from reasonalloc.errors import UnsupportedError

SETTINGS = {"budget": 48, "interval": 32}
LENGTHS = (40, 150, 7, 64)
BLOCK = 32
PROMPTS = pytest.mark.parametrize("prompt", ["pin", "evict"])
EVICTED = pytest.mark.parametrize("prompt", [pytest.param("pin", marks=pytest.mark.long), "evict"])


@pytest.mark.parametrize(
    ("arm", "prompt", "caching"),
    [
        ("rkv/pyramid/reasonalloc", "pin", True),
        pytest.param("rkv/pyramid/reasonalloc", "pin", False, marks=pytest.mark.long),
        ("value_aware/uniform/adakv", "pin", True),
        pytest.param("snapkv/uniform/uniform", "pin", True, marks=pytest.mark.long),
        ("rkv/pyramid/reasonalloc", "evict", True),
        pytest.param("rkv/pyramid/reasonalloc", "evict", False, marks=pytest.mark.long),
        pytest.param("rkv/uniform/uniform", "evict", True, marks=pytest.mark.long),
        ("snapkv/uniform/adakv", "evict", True),
        pytest.param("knorm/pyramid/adakv", "evict", True, marks=pytest.mark.long),
    ],
)
def test_as_on_transformers(
    engine: Callable[..., Any], clear: Callable[..., Any], arm: str, prompt: str, caching: bool
) -> None:
    settings = {**SETTINGS, "arm": arm, "prompt": prompt}
    prompts, expected = clear(LENGTHS, 250, **settings)
    llm = engine(
        settings, enable_prefix_caching=caching, max_num_batched_tokens=101, max_num_seqs=8
    )
    found: list[list[int]] = []
    cold = prefilled(llm, lambda: found.extend(greedy(llm, prompts, 250)))
    warm = prefilled(llm, lambda: found.extend(greedy(llm, prompts, 250)))
    assert found == expected * 2
    assert cold == sum(LENGTHS)
    # Of 150 tokens 4 blocks. 64 are 2 blocks, but the last token, or the window, is computed.
    assert warm == cold - caching * (32 + 128 + 32)
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@PROMPTS
def test_a_shared_system_prompt_is_computed_once(engine: Callable[..., Any], prompt: str) -> None:
    settings = {**SETTINGS, "arm": "rkv/uniform/reasonalloc", "prompt": prompt}
    system = random_prompts([512])[0]
    prompts = [system + own for own in random_prompts([9 + n for n in range(16)], seed=2)]
    alone = greedy(engine(settings, enable_prefix_caching=False), prompts, 120)
    llm = engine(settings)
    found: list[list[int]] = []
    tokens = prefilled(llm, lambda: found.extend(greedy(llm, prompts, 120)))
    assert found == alone
    assert tokens == 512 + sum(len(p) - 512 for p in prompts)


def test_every_request_computes_its_own_window(engine: Callable[..., Any]) -> None:
    settings = {**SETTINGS, "arm": "rkv/uniform/reasonalloc"}
    system = random_prompts([512])[0]
    prompts = [system + own for own in random_prompts([3] * 16, seed=2)]
    alone = greedy(engine(settings, enable_prefix_caching=False), prompts, 60)
    llm = engine(settings)
    found: list[list[int]] = []
    tokens = prefilled(llm, lambda: found.extend(greedy(llm, prompts, 60)))
    assert found == alone
    # The last 8 tokens begin in the last block that is shared: 3 of 35 are new.
    assert tokens == 515 + 15 * 35
    # A policy that looks at no queries needs no window.
    llm = engine({**settings, "arm": "streaming_llm/uniform/uniform"})
    assert prefilled(llm, lambda: greedy(llm, prompts, 60)) == 515 + 15 * 3


@EVICTED
def test_samples_hold_the_prompt_once(engine: Callable[..., Any], prompt: str) -> None:
    from vllm import SamplingParams

    settings = {**SETTINGS, "arm": "rkv", "prompt": prompt}
    plain = engine(settings, enable_prefix_caching=False)
    own = manager(plain).kv_cache_spec.reserve.blocks + 1
    blocks = 1 + 330 // BLOCK + 8 * own  # all fit if the prompt counts once
    page = manager(plain).kv_cache_spec.page_size_bytes
    llm = engine(settings, kv_cache_memory_bytes=4 * page * blocks)
    assert pool(llm).num_gpu_blocks == blocks
    tokens = random_prompts([330])[0]
    most, running, original = 0, 0, scheduler(llm).schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal most, running
        output = original(*args, **kwargs)
        most = max(most, pool(llm).num_gpu_blocks - 1 - pool(llm).get_num_free_blocks())
        running = max(running, len(output.num_scheduled_tokens))
        return output

    scheduler(llm).schedule = watched
    sampling = SamplingParams(n=8, temperature=1.0, seed=1, max_tokens=150, ignore_eos=True)
    samples = [
        [
            list(sample.token_ids)
            for output in one.generate([{"prompt_token_ids": tokens}], [sampling], use_tqdm=False)
            for sample in output.outputs
        ]
        for one in (llm, plain)
    ]
    assert samples[0] == samples[1]
    # 10 full blocks once, and for each of the 8 what it holds besides at most.
    assert most <= 330 // BLOCK + 8 * manager(llm).kv_cache_spec.reserve.blocks
    assert running == 8
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@EVICTED
def test_a_second_turn_finds_the_first_prompt(engine: Callable[..., Any], prompt: str) -> None:
    settings = {**SETTINGS, "arm": "rkv", "prompt": prompt}
    llm = engine(settings)
    first = random_prompts([200])[0]
    answer = greedy(llm, [first], 100)[0]
    second = [*first, *answer, *random_prompts([30], seed=3)[0]]
    found: list[list[int]] = []
    tokens = prefilled(llm, lambda: found.extend(greedy(llm, [second], 50)))
    assert tokens == len(second) - 200 // 32 * 32
    assert found == greedy(engine(settings, enable_prefix_caching=False), [second], 50)


def test_a_request_that_is_never_compressed_leaves_its_prompt(engine: Callable[..., Any]) -> None:
    settings = {**SETTINGS, "arm": "rkv"}
    llm, plain = engine(settings), engine(settings, enable_prefix_caching=False)
    first = random_prompts([45])[0]
    greedy(llm, [first], 5)
    second = [*first[:40], *random_prompts([60], seed=3)[0]]
    found: list[list[int]] = []
    assert prefilled(llm, lambda: found.extend(greedy(llm, [second], 80))) == 100 - 32
    assert found == greedy(plain, [second], 80)


def contents(llm: Any) -> dict[Any, torch.Tensor]:
    """Keys and values of all blocks in the prefix cache, by what their tokens are."""
    builder = worker(llm).model_runner.attn_groups[0][0].get_metadata_builder(0)
    return {
        block.block_hash: torch.stack([m.kv_cache[block.block_id] for m in builder._modules])
        for block in pool(llm).blocks
        if block.block_hash is not None
    }


def test_what_is_cached_is_never_written_again(engine: Callable[..., Any]) -> None:
    settings = {**SETTINGS, "arm": "rkv/pyramid/reasonalloc"}
    llm, plain = engine(settings), engine(settings, enable_prefix_caching=False)
    large = engine({**settings, "budget": 1000})
    first, tail = random_prompts([300, 40])
    greedy(large, [first], 2)  # nothing is compressed
    expected = contents(large)
    assert len(expected) == 300 // BLOCK
    answer = greedy(llm, [first], 150)[0]
    found = contents(llm)
    assert found.keys() == expected.keys()
    for name, each in found.items():
        torch.testing.assert_close(each, expected[name], rtol=0, atol=1e-5)
    later = [[*first, *tail], first[:200], [*first[:290], *answer], first]
    assert greedy(llm, later, 100) == greedy(plain, later, 100)
    for name, each in contents(llm).items():
        if name in found:
            assert torch.equal(each, found[name])


@pytest.mark.parametrize(
    ("name", "memory"),
    [
        pytest.param("qwen3", 64, marks=pytest.mark.long),
        ("qwen3", 2),
        pytest.param("gemma3", 2, marks=pytest.mark.long),  # layers with windows beside
    ],
)
def test_many_requests_and_aborts(
    engine: Callable[..., Any],
    folder: Path,
    windowed: Callable[..., Any],
    name: str,
    memory: int,
) -> None:
    from vllm import SamplingParams

    settings = {**SETTINGS, "arm": "rkv/uniform/reasonalloc"}
    model = {"model": folder if name == "qwen3" else windowed(name).folder}
    chance = random.Random(3)
    systems = random_prompts([200, 70, 33], seed=4)
    prompts = [
        [*chance.choice(systems), *own]
        for own in random_prompts([chance.randint(1, 150) for _ in range(100)], seed=5)
    ]
    new = [chance.randint(1, 90) for _ in prompts]
    aborted = {chance.randint(1, 250): str(index) for index in chance.sample(range(100), 20)}
    plain = engine(settings, **model, enable_prefix_caching=False)
    expected = greedy(plain, prompts, new)
    small = {"kv_cache_memory_bytes": memory << 20, "max_num_batched_tokens": 300}
    llm = engine(settings, **model, **small)
    whole, counts = manager(llm)._first_event, {"in place": 0, "beside": 0}

    def first_event(request: str, start: int, tokens: int) -> int:
        needed: int = whole(request, start, tokens)
        stays = min(start // BLOCK, needed - manager(llm)._reserve.blocks)
        counts["beside" if stays == start // BLOCK else "in place"] += 1
        return needed

    def preempt(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a request was preempted")

    manager(llm)._first_event = first_event
    scheduler(llm)._preempt_request = preempt
    found: list[list[int]] = [[] for _ in prompts]
    for index, (prompt, limit) in enumerate(zip(prompts, new, strict=True)):
        parameters = SamplingParams(temperature=0, ignore_eos=True, max_tokens=limit)
        llm.llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
    steps, gone = 0, set()
    while llm.llm_engine.has_unfinished_requests():
        for out in llm.llm_engine.step():
            found[int(out.request_id)] = list(out.outputs[0].token_ids)
        steps += 1
        if (one := aborted.get(steps)) is not None and len(found[int(one)]) < new[int(one)]:
            llm.llm_engine.abort_request([one])
            gone.add(int(one))
    assert len(gone) > 3
    for index, tokens in enumerate(found):
        assert tokens == expected[index][: len(tokens)]
        assert index in gone or len(tokens) == new[index]
    assert counts["beside"] > 0
    assert counts["in place"] > 0 or memory == 64  # enough room, if few run at once
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1
    assert all(block.ref_cnt == 0 for block in pool(llm).blocks if not block.is_null)
    assert not manager(llm)._before
    assert not manager(llm).admission._admitted


def test_a_prompt_as_long_as_the_pool(engine: Callable[..., Any]) -> None:
    settings = {**SETTINGS, "arm": "rkv/uniform/reasonalloc"}
    llm = engine(settings, kv_cache_memory_bytes=1 << 20)
    tokens = (pool(llm).num_gpu_blocks - 1) * BLOCK
    prompts = random_prompts([tokens] * 3)
    prompts[1][:200] = prompts[0][:200]
    prompts.append(prompts[2])
    found: list[list[int]] = []
    computed = prefilled(llm, lambda: found.extend(greedy(llm, prompts, 60)))
    assert found == greedy(engine(settings, enable_prefix_caching=False), prompts, 60)
    # Where the pool cannot hold a prompt and what it is compressed to, the prompt's end is lost.
    left = tokens // BLOCK - manager(llm)._reserve.blocks
    assert left < tokens // BLOCK - 1
    assert computed == 3 * tokens - 200 // BLOCK * BLOCK + tokens - left * BLOCK


def test_a_request_that_could_not_begin_anew_is_not_reset(engine: Callable[..., Any]) -> None:
    """It has more tokens by now than the whole pool has room for."""
    from vllm import SamplingParams

    llm = engine({**SETTINGS, "arm": "rkv"}, num_gpu_blocks_override=13)
    prompts = random_prompts([20, 40])
    expected = greedy(llm, prompts, [500, 100])
    limits = SamplingParams(temperature=0, ignore_eos=True, max_tokens=500)
    llm.llm_engine.add_request("a", {"prompt_token_ids": prompts[0]}, limits)
    for _ in range(420):
        llm.llm_engine.step()
    with pytest.raises(UnsupportedError, match=r"1 of 1 running requests cannot be begun anew"):
        llm.reset_prefix_cache(reset_running_requests=True)
    while llm.llm_engine.has_unfinished_requests():
        (out,) = llm.llm_engine.step()
    assert list(out.outputs[0].token_ids) == expected[0]
    assert llm.reset_prefix_cache(reset_running_requests=True)


def test_a_policy_that_looks_at_prompts_shares_nothing(engine: Callable[..., Any]) -> None:
    llm = engine({**SETTINGS, "arm": "h2o/uniform/uniform"})
    assert not scheduler(llm).kv_cache_manager.enable_caching
    llm = engine({**SETTINGS, "arm": "h2o/uniform/uniform", "prompt": "pin"})
    assert scheduler(llm).kv_cache_manager.enable_caching
