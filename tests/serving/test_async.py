"""Steps are scheduled before the tokens of the last one are known: the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engines import greedy, random_prompts, scheduler
from test_blocks import used

LENGTHS = (40, 150, 7, 300)
SETTINGS = {"budget": 64, "interval": 32, "arm": "rkv/uniform/reasonalloc"}


@pytest.fixture
def ahead(engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes engines that schedule a step ahead, which vLLM does on GPUs alone."""
    from vllm.config import VllmConfig

    def make(settings: dict[str, Any], **arguments: Any) -> Any:
        name = "vllm.v1.core.sched.async_scheduler.AsyncScheduler"
        llm = engine(settings, scheduler_cls=name, **arguments)
        assert type(scheduler(llm)).__name__ == "AsyncScheduler"
        assert llm.llm_engine.engine_core.engine_core.batch_queue_size == 2
        return llm

    monkeypatch.setattr(VllmConfig, "max_concurrent_batches", 2)
    return make


def test_the_same_tokens(ahead: Callable[..., Any], clear: Callable[..., Any]) -> None:
    prompts, expected = clear(LENGTHS, 200, **SETTINGS)
    llm = ahead(SETTINGS, max_num_batched_tokens=37, max_num_seqs=8)
    assert greedy(llm, prompts, 200) == expected
    assert used(llm) == 0


def test_a_small_pool(engine: Callable[..., Any], ahead: Callable[..., Any]) -> None:
    prompts = random_prompts([20, 90, 160] * 4, seed=2)
    new = [30 + 7 * i for i in range(len(prompts))]
    expected = greedy(engine(SETTINGS), prompts, new)
    llm = ahead(SETTINGS, kv_cache_memory_bytes=1 << 20, max_num_seqs=12)
    assert greedy(llm, prompts, new) == expected
    assert used(llm) == 0
