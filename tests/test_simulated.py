"""Whole generations equal a slow simulation that decides by plain references."""

from __future__ import annotations

import pytest
import torch

import reasonalloc
from models import prompt, tiny
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.policies import POLICIES
from reference import SCORES
from simulator import Simulator

HEADS = ("uniform", "adakv", "reasonalloc")


def test_every_policy_and_head_allocator_has_a_reference() -> None:
    assert set(POLICIES.entries()) == set(SCORES)
    assert set(HEAD_ALLOCATORS.entries()) == set(HEADS)


def compare(name: str, length: int, tokens: int, **settings: object) -> None:
    model = tiny(name)
    ids = prompt(length, seed=length)
    full = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    with reasonalloc.attach(model, record="tokens", **settings) as attached:  # type: ignore[arg-type]
        fast = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        recorder = attached.recorder
        config, totals = attached.config, attached.totals
    assert recorder is not None and recorder.compressions >= 6
    slow = Simulator(
        model,
        totals,
        config.arm.policy,
        config.arm.heads,
        config.interval,
        config.window,
        config.n_sink,
        config.protect_prompt,
        config.seed,
    )
    assert slow.generate(ids, tokens) == fast[0, length:].tolist()
    for layer in range(len(totals)):
        event = [e for e in recorder.events if e.layer == layer][-1]
        after = event.step  # tokens appended since then are in the simulation's lists as well
        kept = [[p for p in row if p < after] for row in slow.kept[layer]]
        assert [event.kept(0, h) for h in range(len(kept))] == kept
        assert sum(map(len, kept)) == totals[layer]
    assert not torch.equal(full, fast) or config.budget > 30, "compression changed nothing"


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("policy", sorted(SCORES))
def test_policy_and_heads(policy: str, heads: str) -> None:
    compare("llama", 45, 50, budget=20, policy=policy, heads=heads, interval=8, window=4)


@pytest.mark.parametrize("threshold", [0.02, 0.2])
def test_recurrence_with_tokens_that_are_not_attended_to(threshold: float) -> None:
    policy = f"lazy_eviction(threshold={threshold})"
    for heads in HEADS:
        compare("llama", 45, 50, budget=20, policy=policy, heads=heads, interval=8, window=4)


@pytest.mark.parametrize("layers", ["pyramid", "pyramid(beta=3)"])
def test_layer_budgets(layers: str) -> None:
    compare("qwen3", 30, 40, budget=24, policy="snapkv", layers=layers, interval=8, window=4)


@pytest.mark.parametrize("policy", sorted(SCORES))
@pytest.mark.parametrize("options", [{"n_sink": 15}, {"protect_prompt": True}])
def test_forced_tokens(policy: str, options: dict[str, int]) -> None:
    for heads in ("uniform", "reasonalloc"):
        compare(
            "qwen2", 22, 50, budget=30, policy=policy, heads=heads, interval=8, window=4, **options
        )


def test_total_that_does_not_divide_and_short_prompt() -> None:
    compare("llama", 3, 60, budget=19, layers="pyramid(beta=2.5)", interval=7, window=3)
