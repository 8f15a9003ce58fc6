"""Requests are admitted by expected need and pause; nobody is preempted, and tokens stay."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engines import greedy, manager, pool, random_prompts, scheduler

from reasonalloc.errors import UnsupportedError

SETTINGS = {"budget": 128, "interval": 32, "arm": "rkv/uniform/reasonalloc"}
SMALL = {"kv_cache_memory_bytes": 4 << 20, "max_num_seqs": 64}


PROMPTS = random_prompts([12, 30, 5, 150] * 6, seed=7)
LONG = [{"max_tokens": 180 + 5 * i} for i in range(24)]


class Watched:
    """An engine, and what its scheduler did."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.scheduler = llm, scheduler(llm)
        self.manager = manager(llm)
        self.preempted = self.paused = self.most = self.steps = 0
        self.admitted: list[str] = []
        self.pausing: set[str] = set()
        preempt, pause = self.scheduler._preempt_request, self.manager.admission.pause
        admit = self.manager.admission.admit

        def preempting(*args: Any, **kwargs: Any) -> None:
            self.preempted += 1
            preempt(*args, **kwargs)

        def watching(tokens: Any) -> set[str]:
            self.pausing = pause(tokens)
            self.paused += len(self.pausing)
            return self.pausing

        def admitting(name: str) -> None:
            self.admitted.append(name)
            admit(name)

        self.scheduler._preempt_request = preempting
        self.manager.admission.pause = watching
        self.manager.admission.admit = admitting

    def serve(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[dict[str, Any]],
        between: Callable[[], None] = lambda: None,
        priorities: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Tokens of every request; ``between`` is called after every step."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        for index, (prompt, given) in enumerate(zip(prompts, sampling, strict=True)):
            parameters = SamplingParams(temperature=0, ignore_eos=True, **given)
            priority = priorities[index] if priorities else 0
            engine.add_request(
                str(index), {"prompt_token_ids": list(prompt)}, parameters, priority=priority
            )
        found: list[list[int]] = [[] for _ in prompts]
        self.most = self.steps = 0
        while engine.has_unfinished_requests():
            for out in engine.step():
                found[int(out.request_id)] = list(out.outputs[0].token_ids)
            self.steps += 1
            self.most = max(self.most, len(self.scheduler.running))
            between()
        assert self.preempted == 0
        assert pool(self.llm).get_num_free_blocks() == pool(self.llm).num_gpu_blocks - 1
        return found


@pytest.fixture
def watched(engine: Callable[..., Any]) -> Callable[..., Watched]:
    return lambda **arguments: Watched(engine(SETTINGS, **arguments))


def one_after_another(lengths: Sequence[int], at_once: int) -> int:
    """Steps if so many run at once, each as long as its answer."""
    ends = [0] * at_once
    for length in lengths:
        heapq.heappush(ends, heapq.heappop(ends) + length)
    return max(ends)


def test_short_answers_with_a_large_limit(watched: Callable[..., Watched]) -> None:
    # Enough that the first ones, of which the new engine expects the most, do not count for much.
    prompts = random_prompts([10 + i % 7 for i in range(120)], seed=4)
    short = [{"max_tokens": 1900, "min_tokens": 30, "stop_token_ids": [*range(2, 40)]}] * 120
    small, alone = watched(**SMALL), watched(max_num_seqs=1)
    found = small.serve(prompts, short)
    reserve = small.manager.kv_cache_spec.reserve
    fit = (pool(small.llm).num_gpu_blocks - 1) // reserve.peak(10, 1910)
    lengths = [len(tokens) for tokens in found]
    assert small.most >= 2 * fit
    assert small.steps <= one_after_another(lengths, fit) / 1.8
    assert found[:12] == alone.serve(prompts[:12], short[:12])


def test_paused_requests_continue_as_if_nothing_had_happened(
    watched: Callable[..., Watched],
) -> None:
    small, large = watched(**SMALL), watched()
    small.serve(random_prompts([12] * 12, seed=6), [{"max_tokens": 10}] * 12)
    # Others than the engine has learned to expect, some with prompts beyond the budget.
    found = small.serve(PROMPTS, LONG)
    assert small.paused > 100
    assert found == large.serve(PROMPTS, LONG)


def test_paused_requests_can_be_aborted(watched: Callable[..., Watched]) -> None:
    small = watched(**SMALL)
    small.serve(random_prompts([12] * 12, seed=6), [{"max_tokens": 10}] * 12)
    aborted: list[str] = []

    def between() -> None:
        if small.pausing and small.steps % 5 == 0 and len(aborted) < 10:
            names = sorted(small.pausing, key=lambda n: int(n.split("-")[0]))
            aborted.append(names[0])
            small.llm.llm_engine.abort_request([names[0]], internal=True)

    found = small.serve(random_prompts([12] * 40), [{"max_tokens": 180}] * 40, between)
    assert len(aborted) == 10
    assert sum(len(tokens) == 180 for tokens in found) == 30


def test_priority_says_who_is_next(watched: Callable[..., Watched]) -> None:
    few = {**SMALL, "max_num_seqs": 4}
    ranked, plain = watched(scheduling_policy="priority", **few), watched()
    prompts = random_prompts([40] * 12, seed=8)
    limits = [{"max_tokens": 20}] * 12
    found = ranked.serve(prompts, limits, priorities=[9 - i // 4 for i in range(12)])
    order = [int(name.split("-")[0]) for name in ranked.admitted]
    assert order == [8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3]
    assert found == plain.serve(prompts, limits)


def test_steps_that_are_scheduled_ahead(
    watched: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms.cpu import CpuPlatform

    large = watched()
    check = CpuPlatform.check_and_update_config

    def ahead(platform: Any, config: Any) -> None:
        check(config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(ahead))
    small = watched(**SMALL)
    assert type(small.scheduler).__name__ == "AsyncScheduler"
    small.serve(random_prompts([12] * 12, seed=6), [{"max_tokens": 10}] * 12)
    found = small.serve(PROMPTS, LONG)
    assert small.paused > 100
    assert found == large.serve(PROMPTS, LONG)


def test_a_forced_reset_begins_requests_anew(watched: Callable[..., Watched]) -> None:
    small = watched(**SMALL)
    small.serve(random_prompts([12] * 12, seed=6), [{"max_tokens": 10}] * 12)
    resets = 0

    def between() -> None:
        nonlocal resets
        if small.pausing and not resets:
            resets += 1
            small.scheduler.reset_prefix_cache(reset_running_requests=True)
            small.preempted = 0

    found = small.serve(random_prompts([12] * 40), [{"max_tokens": 180}] * 40, between)
    assert resets == 1
    assert {len(tokens) for tokens in found} == {180}


def test_after_a_forced_reset_others_may_go_first(engine: Callable[..., Any]) -> None:
    """A request that was begun anew and waits takes no slot from one of a higher priority."""
    from vllm import SamplingParams

    settings = {"budget": 64, "interval": 32, "arm": "h2o/uniform/uniform"}
    prompts = random_prompts([40, 50])
    alone = greedy(engine(settings), prompts, 60)
    made = engine(settings, scheduling_policy="priority", max_num_seqs=1).llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    made.add_request("first", {"prompt_token_ids": prompts[0]}, parameters, priority=5)
    for _ in range(10):
        made.step()
    made.reset_prefix_cache(reset_running_requests=True)
    made.add_request("urgent", {"prompt_token_ids": prompts[1]}, parameters, priority=0)
    ended = {}
    while made.has_unfinished_requests():
        ended |= {out.request_id: out for out in made.step() if out.finished}
    assert [*ended] == ["urgent", "first"]
    # Begun anew the first one is prefilled with what it had generated; nothing was evicted yet.
    found = [list(ended[name].outputs[0].token_ids) for name in ("first", "urgent")]
    assert found[1] == alone[1] and found[0][:24] == alone[0][:24]
    assert len(found[0]) == 60


def test_an_engine_that_cannot_be_emptied_runs_on(engine: Callable[..., Any]) -> None:
    """``/pause?mode=keep`` would begin requests anew whose tokens the pool does not hold."""
    from vllm import SamplingParams

    settings = {"budget": 64, "interval": 32, "arm": "rkv/uniform/uniform"}
    made = engine(settings, kv_cache_memory_bytes=1 << 20).llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
    made.add_request("long", {"prompt_token_ids": random_prompts([40])[0]}, parameters)
    for _ in range(900):
        made.step()
    core = made.engine_core.engine_core
    with pytest.raises(UnsupportedError, match="cannot be begun anew"):
        core.pause_scheduler("keep")
    assert not core.is_scheduler_paused()
    while made.has_unfinished_requests():
        last = made.step()
    assert len(last[0].outputs[0].token_ids) == 1000
