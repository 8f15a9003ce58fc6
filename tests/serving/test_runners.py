"""Both model runners tell the worker's tables the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from engines import builder, greedy, worker

from reasonalloc.integrations.vllm.patches import version

SETTINGS = {"budget": 32, "interval": 16, "arm": "rkv/uniform/adakv"}
EXPECTED = os.environ.get("EXPECTED_VLLM", "")


@pytest.mark.skipif(not EXPECTED, reason="EXPECTED_VLLM names no version and runner")
def test_the_version_and_runner_that_are_meant(engine: Callable[..., Any]) -> None:
    release, runner = EXPECTED.split(",")
    assert version().startswith(release)
    assert engine(SETTINGS).llm_engine.vllm_config.use_v2_model_runner == (runner == "v2")


def test_which_requests_begin(engine: Callable[..., Any]) -> None:
    tables = builder(engine(SETTINGS))

    def start(alive: set[str], starts: int, before: int, new: int) -> int:
        tables.begin(alive, ["a"], [starts], [before], [new], [8])
        found: int = tables.runs._tracked["a"].start
        return found

    assert start({"a"}, 100, 64, 36) == 100  # the first 64 tokens were cached by another request
    assert start({"a"}, 101, 100, 1) == 100
    assert start({"a"}, 102, 0, 50) == 102  # computed anew
    assert start({"a"}, 102, 50, 52) == 102
    tables.begin({"b"}, ["b"], [7], [0], [7], [8])
    assert set(tables.runs._tracked) == {"b"}
    assert start({"a", "b"}, 9, 8, 1) == 9
    tables.begin(set(), [], [], [], [], [])


def test_warm_up_requests_are_never_compressed(
    engine: Callable[..., Any], clear: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine(SETTINGS)
    if not llm.llm_engine.vllm_config.use_v2_model_runner:
        pytest.skip("the V1 model runner warms up without requests")
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    # Triton's interpreter cannot run the kernels of all samplers and of grammars.
    greedily = SamplingParams(temperature=0)
    monkeypatch.setattr(SamplingParams, "for_sampler_warmup", lambda: greedily)
    steps = worker(llm).execute_model, lambda grammar: worker(llm).sample_tokens(None)
    runner = worker(llm).model_runner
    warmup_kernels(runner, *steps)
    assert run_mixed_prefill_decode_warmup(runner, *steps, num_tokens=100)
    assert not any("warmup" in name for name in builder(llm).runs._tracked)
    prompts, expected = clear([50], 40, **SETTINGS)
    assert greedy(llm, prompts, 40) == expected
