"""The same tokens as on transformers, and as stock vLLM while the budget holds everything."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import builder, greedy, random_prompts
from transformers import AutoConfig

import made_costs
from reasonalloc.calibrated.demand import config_hash

LENGTHS = (40, 150, 7, 300)
PROMPTS = random_prompts(LENGTHS)
CADENCE = {"budget": 64, "interval": 32}


@pytest.fixture(scope="module")
def costs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cost profile of the model, made with R-KV: unequal heads that stay as they are."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    fingerprint = config_hash(AutoConfig.from_pretrained(folder).to_dict())
    made = made_costs.make(4, 2, fingerprint=fingerprint)
    dataclasses.replace(made, policy="rkv", interval=32, window=8).save(path)
    return str(path)


# Every policy, layer and head allocator, and most pairs of them; the others are long tests.
SHORT = {
    ("rkv", "uniform", "uniform"),
    ("rkv", "pyramid", "reasonalloc"),
    ("rkv", "cost", "planned"),
    ("snapkv", "uniform", "reasonalloc"),
    ("snapkv", "cost", "uniform"),
    ("streaming_llm", "pyramid", "uniform"),
    ("streaming_llm", "cost", "reasonalloc"),
}
GRID = [
    pytest.param(*arm, marks=[] if arm in SHORT else [pytest.mark.long])
    for arm in itertools.product(
        ("streaming_llm", "snapkv", "rkv"),
        ("uniform", "pyramid", "cost"),
        ("uniform", "planned", "reasonalloc"),
    )
    if arm[1] == "cost" or arm[2] != "planned"  # only layers='cost' plans heads
]


@pytest.mark.parametrize(("policy", "layers", "heads"), GRID)
def test_as_on_transformers(
    engine: Callable[..., Any],
    clear: Callable[..., Any],
    costs: str,
    policy: str,
    layers: str,
    heads: str,
) -> None:
    arm = {"policy": policy, "layers": layers, "heads": heads}
    settings = {**CADENCE, **arm, **({"profile": costs} if layers == "cost" else {})}
    prompts, expected = clear(LENGTHS, 400, **settings)
    assert greedy(engine(settings), prompts, 400) == expected


@pytest.mark.parametrize(
    "arm",
    [
        "random",
        "tova/pyramid/adakv",
        pytest.param("knorm/uniform/adakv", marks=pytest.mark.long),
    ],
)
def test_other_arms(engine: Callable[..., Any], clear: Callable[..., Any], arm: str) -> None:
    settings = {**CADENCE, "arm": arm, "n_sink": 4, "seed": 3, "window": 4}
    prompts, expected = clear(LENGTHS, 120, **settings)
    assert greedy(engine(settings), prompts, 120) == expected


@pytest.mark.parametrize(
    "arm",
    [
        "best",
        pytest.param("h2o", marks=pytest.mark.long),
        "value_aware/pyramid/reasonalloc",
        pytest.param("lazy_eviction/uniform/uniform", marks=pytest.mark.long),
        "tri_attention/pyramid/uniform",
        "value_aware(metric=output)/uniform/reasonalloc",
    ],
)
def test_arms_that_see_attention_or_read_files(
    engine: Callable[..., Any],
    clear: Callable[..., Any],
    files: Callable[..., Any],
    arm: str,
) -> None:
    settings = {**CADENCE, "arm": arm}
    if arm in (made := files(32)):
        settings["profile"] = made[arm]
    prompts, expected = clear(LENGTHS, 400, **settings)
    assert greedy(engine(settings), prompts, 400) == expected


def test_best_sees_prompts_in_pieces(
    engine: Callable[..., Any], clear: Callable[..., Any], files: Callable[..., Any]
) -> None:
    settings = {**CADENCE, "arm": "best", "profile": files(32)["best"]}
    prompts, expected = clear(LENGTHS, 100, **settings)
    llm = engine(settings, max_num_batched_tokens=37, max_num_seqs=3)
    assert greedy(llm, prompts, 100) == expected


def test_a_piece_of_one_token_is_seen_afterwards(
    engine: Callable[..., Any], clear: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a decoded one: on a GPU a graph may compute it, of which Python sees nothing."""
    settings = {**CADENCE, "arm": "h2o/uniform/uniform"}
    prompts, expected = clear((75, 38), 60, **settings)
    llm = engine(settings, max_num_batched_tokens=37, max_num_seqs=1)
    made, pieces = builder(llm), list[int]()
    observe = made.observe

    def observing(piece: Any, *rest: Any) -> None:
        pieces.append(piece.stop - piece.start)
        observe(piece, *rest)

    monkeypatch.setattr(made, "observe", observing)
    assert greedy(llm, prompts, 60) == expected
    assert set(pieces) == {37}


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="a compiled model cannot call kernels of Triton's interpreter",
)
def test_compiled(engine: Callable[..., Any], clear: Callable[..., Any]) -> None:
    settings = {**CADENCE, "arm": "rkv/pyramid/reasonalloc"}
    prompts, expected = clear(LENGTHS, 200, **settings)
    assert greedy(engine(settings, enforce_eager=False), prompts, 200) == expected


def test_prompts_that_come_in_chunks(engine: Callable[..., Any], clear: Callable[..., Any]) -> None:
    settings = {**CADENCE, "arm": "snapkv/pyramid/reasonalloc"}
    # Chunks end anywhere, also within the observation window.
    prompts, expected = clear(LENGTHS, 100, **settings)
    llm = engine(settings, max_num_batched_tokens=37, max_num_seqs=8)
    assert greedy(llm, prompts, 100) == expected


def test_a_window_that_is_longer_than_the_interval(
    engine: Callable[..., Any], clear: Callable[..., Any]
) -> None:
    """Queries of one interval are looked at in the next one, too, whoever reaches a boundary."""
    settings = {"budget": 32, "interval": 4, "window": 10, "arm": "rkv/uniform/adakv"}
    prompts, expected = clear((40, 44, 44), 60, **settings)
    # The first one ends early, and another one takes its place in the batch.
    assert greedy(engine(settings), prompts, [6, 60, 60]) == [expected[0][:6], *expected[1:]]


def test_a_budget_that_holds_everything_is_stock_vllm(engine: Callable[..., Any]) -> None:
    found = greedy(engine({"budget": 800, "arm": "rkv/uniform/reasonalloc"}), PROMPTS, 300)
    assert found == greedy(engine(enable_prefix_caching=False), PROMPTS, 300)


def test_the_plugin_without_a_budget_changes_nothing(
    engine: Callable[..., Any], clear: Callable[..., Any]
) -> None:
    prompts, expected = clear(LENGTHS, 60)
    assert greedy(engine(), prompts, 60) == expected


@pytest.mark.parametrize(
    ("arm", "prompt"),
    [
        ("rkv/uniform/reasonalloc", "evict"),
        pytest.param("value_aware/uniform/uniform", "pin", marks=pytest.mark.long),
    ],
)
def test_no_request_depends_on_its_batch_mates(
    engine: Callable[..., Any], arm: str, prompt: str
) -> None:
    chance = random.Random(0)
    prompts = random_prompts([chance.randint(1, 200) for _ in range(100)], seed=5)
    new = [chance.randint(1, 120) for _ in prompts]
    settings = {"budget": 48, "interval": 16, "arm": arm, "prompt": prompt}
    llm = engine(settings, max_num_seqs=32)
    first = greedy(llm, prompts, new)
    assert [len(tokens) for tokens in first] == new
    for seed in range(2):
        order = list(range(len(prompts)))
        random.Random(seed).shuffle(order)
        again = greedy(llm, [prompts[i] for i in order], [new[i] for i in order])
        assert again == [first[i] for i in order]
