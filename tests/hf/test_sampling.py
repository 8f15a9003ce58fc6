"""Sampling by row: the distribution, and that nothing but the row decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from models import prompt, tiny
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.batch import Job, Settings, solve
from reasonalloc.evaluation.chunks import Chunk, Item, ModelSpec
from reasonalloc.evaluation.facts import encode
from reasonalloc.evaluation.protocols import PROTOCOLS, Rules, find_rules
from reasonalloc.evaluation.sampling import Sampling, SeededSampling, sample_seed
from reasonalloc.evaluation.solver import Solver
from tiny_folder import save_tiny

SETTINGS = Settings(interval=8, window=4)


class Fixed:
    """A stream of one number."""

    def __init__(self, number: float) -> None:
        self.random = lambda: number


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 0.95, 0), (0.6, 0.7, 0), (1.3, 1.0, 5), (1.0, 0.8, 6), (1.0, 1e-9, 0)],
)
def test_the_distribution_is_that_of_transformers(
    temperature: float, top_p: float, top_k: int
) -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 40) * 2
    expected = TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    draws = 2000
    sampler = SeededSampling(Sampling(temperature, top_p, top_k), [0] * draws)
    sampler._streams = [Fixed((i + 0.5) / draws) for i in range(draws)]  # type: ignore[misc]
    out = sampler(torch.zeros(draws, 1), scores.expand(draws, -1))
    assert (out.isfinite().sum(-1) == 1).all()
    found = torch.bincount(out.argmax(-1), minlength=40) / draws
    assert (found - expected.softmax(-1)[0]).abs().max() <= 1.01 / draws


def test_draws_at_the_edges_take_a_possible_token() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    sampler = SeededSampling(Sampling(1.0), [0, 0])
    sampler._streams = [Fixed(0.0), Fixed(1.0)]  # type: ignore[misc]
    assert sampler(torch.zeros(2, 1), scores.expand(2, -1)).argmax(-1).tolist() == [1, 3]


def test_seeds() -> None:
    assert sample_seed(0, "60", 1) == 41286268644095  # results of other machines depend on it
    seeds = {sample_seed(s, p, n) for s in (0, 1) for p in ("a", "b", "b/1") for n in (0, 1)}
    assert len(seeds) == 12 and max(seeds) < 1 << 48


@pytest.mark.parametrize("arm", ["full", "rkv", "h2o", "random", "snapkv/pyramid/reasonalloc"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.9), Sampling(1.0, 1.0, 20)])
def test_a_batch_gives_each_row_what_it_gets_alone(arm: str, sampling: Sampling) -> None:
    model = tiny("qwen3", eos_token_id=7)
    prompts = [prompt(n, seed=n)[0].tolist() for n in (9, 30, 17, 17, 4)]
    prompts[3] = prompts[2]  # two samples of one problem
    seeds = [sample_seed(0, str(i), 0) for i in range(len(prompts))]
    job = Job(arm, None if arm == "full" else 16)
    together = solve(model, prompts, job, SETTINGS, 40, sampling=sampling, seeds=seeds)
    alone = [
        solve(model, [p], job, SETTINGS, 40, sampling=sampling, seeds=[s])
        for p, s in zip(prompts, seeds, strict=True)
    ]
    assert together.completions == tuple(a.completions[0] for a in alone)
    assert together.ended == tuple(a.ended[0] for a in alone)
    assert (together.completions[2] == together.completions[3]) is sampling.greedy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), name="gemma3", eos_token_id=[9, 10, 11])


@pytest.mark.parametrize("arm", ["full", "rkv", "rkv/pyramid/adakv"])
def test_rows_say_of_each_sample_what_it_would_be_alone(folder: Path, arm: str) -> None:
    solver = Solver(ModelSpec(str(folder)), SETTINGS, Sampling(3.0), 40)
    texts = [" ".join(f"w{(3 * i + n) % 60}" for i in range(n)) for n in (25, 3, 60, 12, 8, 30)]
    items = [Item(str(i), text, 0, i) for i, text in enumerate(texts)]
    job = Job(arm, None if arm == "full" else 14)
    ignored = {"batch", "seconds", "peak_bytes"}

    def run(*chosen: Item) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        outcome = solver.solve(Chunk(job, chosen, record=True), lambda _: True)
        assert outcome.rows is not None
        rows = [{k: v for k, v in row.items() if k not in ignored} for row in outcome.rows]
        return rows, outcome.events

    rows, events = run(*items)
    for item, row in zip(items, rows, strict=True):
        assert run(item)[0] == [row]
    assert events == run(items[0])[1]
    assert {r["finish"] for r in rows} == {"stop", "length"}
    # The counts and bytes are calculated; this is what really happened.
    for item, row in zip(items, rows, strict=True):
        tokens = encode(solver._tokenizer, item.prompt)
        found = solve(solver._model, [tokens], job, SETTINGS, 40, sampling=Sampling(3.0),
                      seeds=[item.seed])  # fmt: skip
        assert row["compressions"] == found.compressions
        assert row["kv_bytes"] == found.kv_bytes
        assert row["completion_tokens"] == len(found.completions[0])
    if arm != "full":
        assert len(events) == rows[0]["compressions"] > 0
        assert all(sum(e["budgets"]) <= 2 * 3 * 14 for e in events)


def test_protocols() -> None:
    assert find_rules("paper") == Rules(Sampling(0.6, 0.95, 0), 8, 16384)
    assert find_rules("quick", max_new_tokens=9) == Rules(Sampling(), 1, 9)
    assert find_rules("paper", samples=2, top_k=5).sampling == Sampling(0.6, 0.95, 5)
    assert set(PROTOCOLS) == {"paper", "greedy", "quick"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 8}, "would be the same text each time"),
        ({"samples": 0}, "samples=0 is too small"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
    ],
)
def test_wrong_rules(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_rules("greedy", **change)
    with pytest.raises(UsageError, match="did you mean 'paper'"):
        find_rules("papre")
