"""Our own loops on processors, in an engine: that they run, and what works without a compiler."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
from engines import builder, greedy, random_prompts

from reasonalloc.errors import UsageError
from reasonalloc.integrations.vllm import kernels
from reasonalloc.ops import TORCH
from reasonalloc.ops.native.paged import PagedLoop

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="engines with Triton have kernels of it"
)
LENGTHS = (20, 60, 100)
SETTINGS = {"budget": 64, "interval": 32, "window": 8}


@pytest.mark.parametrize(
    "arm",
    [
        "value_aware/pyramid/reasonalloc",
        pytest.param("rkv/pyramid/reasonalloc", marks=pytest.mark.long),
    ],
)
def test_with_a_compiler_and_without(
    engine: Callable[..., Any],
    clear: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    arm: str,
) -> None:
    """The same tokens; the loops do every step in which all requests have one token."""
    settings = {**SETTINGS, "arm": arm}
    prompts, expected = clear(LENGTHS, 150, **settings)
    layers, original = list[int](), PagedLoop.attend

    def counted(loop: PagedLoop, layer: int, *rest: Any) -> None:
        layers.append(layer)
        original(loop, layer, *rest)

    monkeypatch.setattr(PagedLoop, "attend", counted)
    llm = engine(settings)
    assert greedy(llm, prompts, 150) == expected
    assert builder(llm)._compressor._ops is not TORCH
    assert len(layers) > 140 * 4 and set(layers) == set(range(4))

    def refuse(*_: Any) -> None:
        raise UsageError("it needs a C++ compiler, and none was found: install g++")

    layers.clear()
    monkeypatch.setattr(kernels, "require", refuse)
    with caplog.at_level(logging.WARNING, "reasonalloc"):
        plain = engine(settings)
    assert "install g++" in caplog.text
    assert greedy(plain, prompts, 150) == expected
    assert builder(plain)._compressor._ops is TORCH and not layers


@pytest.mark.parametrize(("length", "chunk"), [(33, 32), (1, 2048)])
def test_a_piece_of_one_token(engine: Callable[..., Any], length: int, chunk: int) -> None:
    """What is left of a prompt is seen by the policy: every query hands out 1 per KV head."""
    settings = {**SETTINGS, "arm": "h2o/uniform/uniform"}
    llm = engine(settings, max_num_batched_tokens=chunk, max_num_seqs=2)
    greedy(llm, random_prompts([length]), 2)
    state = builder(llm).runs.state
    assert float(state.double().sum()) == pytest.approx(4 * 2 * length)
