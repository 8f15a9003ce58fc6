"""Requests through a vLLM engine in this process, step by step, and what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Served:
    """What it took.

    Attributes:
        steps, preemptions: of the engine.
        running: most requests at once.
        seconds: from the first request on until all have ended.
        first, last: seconds until each request's first and last token.
    """

    steps: int
    preemptions: int
    running: int
    seconds: float
    first: list[float]
    last: list[float]


def serve(llm: Any, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> Served:
    """Serve all requests, which come at once.

    Args:
        llm: vLLM's ``LLM``, whose engine is in this process.
        prompts: token ids of each.
        answers: tokens that each gets.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    preempted = _count_preemptions(scheduler)
    start = time.perf_counter()
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        limits = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False)
        engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, limits)
    steps, running = 0, 0
    first, last = dict[int, float](), dict[int, float]()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now, steps = time.perf_counter() - start, steps + 1
        running = max(running, len(scheduler.running))
        for output in outputs:
            first.setdefault(int(output.request_id), now)
            last[int(output.request_id)] = now
    return Served(
        steps=steps,
        preemptions=len(preempted),
        running=running,
        seconds=time.perf_counter() - start,
        first=[first[index] for index in range(len(prompts))],
        last=[last[index] for index in range(len(prompts))],
    )


def _count_preemptions(scheduler: Any) -> list[str]:
    """A list that gets an entry at every preemption."""
    seen: list[str] = []
    original = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        seen.append(request.request_id)
        original(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return seen
