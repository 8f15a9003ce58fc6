"""What foretells the loss of a token: examples equal slow ones, fits find what made the data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import made_costs
import reasonalloc
from models import prompt, tiny
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibrated.predictor import FEATURES, as_json
from reasonalloc.calibration import ablation, fisher
from reasonalloc.calibration.predictor import Examples, _attention_and_losses, fit_head
from reasonalloc.config import CompressionConfig
from reasonalloc.core.watched import Seen
from reasonalloc.errors import UsageError
from reasonalloc.policies import Candidates
from reasonalloc.policies.predicted_loss import PredictedLoss
from reasonalloc.texts import Trajectory

CADENCE: dict[str, Any] = {"interval": 8, "window": 4}
SETTINGS: dict[str, Any] = {**CADENCE, "budgets": (10, 16, 24), "samples": 2}


def text(seed: int = 0, completion: int = 60) -> Trajectory:
    ids = prompt(25 + completion, seed=seed)[0].tolist()
    return Trajectory(tuple(ids[:25]), tuple(ids[25:]))


def layer(softcap: float | None, sunk: bool, tokens: int = 12) -> tuple[Seen, torch.Tensor]:
    """A layer of two KV heads with two query heads each, and random directions."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, tokens, 6, generator=generator)
    key, value = (torch.randn(1, 2, tokens, 6, generator=generator) for _ in range(2))
    sinks = torch.randn(4, generator=generator) if sunk else None
    seen = Seen(3, query, key, value, torch.zeros(1, tokens, 4, 6), 0.7, softcap, sinks)
    for head in range(4):
        for i in range(tokens):
            row = weights(seen, head, i) @ value[0, head // 2, : i + 1].double()
            seen.output[0, i, head] = row.float()
    return seen, torch.randn(3, tokens, 4, 6, generator=generator)


def weights(seen: Seen, head: int, i: int, without: int = -1, share: float = 0.0) -> torch.Tensor:
    """Attention of a query, with a token's odds lowered by a share: [i + 1] float64."""
    keys = seen.key[0, head // 2, : i + 1].double()
    logits = keys @ seen.query[0, head, i].double() * seen.scaling
    if seen.softcap is not None:
        logits = torch.tanh(logits / seen.softcap) * seen.softcap
    if without >= 0:
        logits[without] += math.log1p(-share)
    if seen.sinks is not None:
        logits = torch.cat([logits, seen.sinks[head : head + 1].double()])
    return logits.softmax(0)[: i + 1]


@pytest.mark.parametrize(("softcap", "sunk"), [(None, False), (2.0, False), (None, True)])
def test_losses_are_what_a_token_that_fades_would_do(softcap: float | None, sunk: bool) -> None:
    seen, directions = layer(softcap, sunk)
    attention, losses = _attention_and_losses(seen, directions)
    for kv_head, i, j in ((0, 11, 2), (1, 11, 11), (1, 7, 0), (0, 5, 4)):
        heads = (2 * kv_head, 2 * kv_head + 1)
        mean = sum(float(weights(seen, head, i)[j]) for head in heads) / 2
        assert float(attention[kv_head, i, j]) == pytest.approx(mean, rel=1e-4)
        values, share = seen.value[0, kv_head, : i + 1].double(), 1e-5
        expected = 0.0
        for direction in directions.double():
            moved = 0.0
            for head in heads:
                faded = weights(seen, head, i, j, share) @ values
                change = (faded - weights(seen, head, i) @ values) / share
                moved += float(change @ direction[i, head])
            expected += moved**2 / 2 / len(directions)
        assert float(losses[kv_head, i, j]) == pytest.approx(expected, rel=2e-3, abs=1e-7)
    assert float(attention.triu(1).abs().max()) == 0 == float(losses.triu(1).abs().max())


def test_examples_are_known_at_boundaries_and_paid_after_them() -> None:
    seen, directions = layer(None, False, tokens=30)
    config = CompressionConfig(budget=8, interval=6, window=4)
    known_text = Trajectory(tuple(range(12)), tuple(range(19)))
    examples = Examples([3])
    examples.add(seen, directions, known_text, config, sinks=2)
    ((known, losses),) = examples._rows[3]
    # Boundaries after 12, 18 and 24 tokens have an interval behind them.
    assert known.shape == (2, 6 + 12 + 18, len(FEATURES)) and losses.shape == known.shape[:2]
    policy = PredictedLoss().with_predictor(made_costs.predictor([3], 2))
    attention, whole = _attention_and_losses(seen, directions)
    torch.testing.assert_close(losses[:, 6:18], whole[:, 18:, 2:14].mean(dim=1))
    state = torch.zeros(1, 2, 18, policy.state_channels)
    age = (torch.arange(18)[:, None] - torch.arange(18)).float().expand(1, 2, 18, 18)
    policy.observe(state, attention[None, :, :18, :18], age)
    candidates = made_candidates(seen, state, 18)
    scores = policy.score(candidates)[0, :, 4:14]
    rows = torch.tensor(policy._predictor.weights[0])  # type: ignore[union-attr]
    expected = torch.einsum("hnf,hf->hn", known[:, 8:18], rows)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def made_candidates(seen: Seen, state: torch.Tensor, tokens: int) -> Any:
    return Candidates(
        lengths=torch.full((1, 2), tokens),
        positions=torch.arange(tokens).expand(1, 2, -1),
        load_keys=lambda: seen.key[:, :, :tokens],
        load_values=lambda: seen.value[:, :, :tokens],
        queries=None,
        query_positions=None,
        state=state,
        seen=torch.tensor([tokens]),
        window=4,
        scaling=1.0,
        softcap=None,
        layer=3,
        seed=0,
    )


def test_a_fit_finds_the_exponents() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(20_000, len(FEATURES), generator=generator).double() - 3
    known[:, -1] = 1.0
    true = torch.tensor([0.8, -0.3, 0.5, 1.2, -9.0]).double()
    noise = torch.empty(20_000).double().exponential_(generator=generator)
    found = fit_head(known, (known @ true).exp() * noise).double()
    assert float((found - true).abs().max()) < 0.1
    # Nothing to learn: finite, and no order.
    nothing = fit_head(known, torch.zeros(20_000))
    assert bool(nothing.isfinite().all())


def test_a_profile_keeps_what_it_was_measured_with(tmp_path: Path) -> None:
    model, texts = tiny("llama", initializer_range=0.1), [text(), text(3, 40)]
    found, other = fisher(model, texts, policies=["predicted_loss(sinks=1)", "rkv"], **SETTINGS)
    assert other.foretells is None and found.policy == "predicted_loss(sinks=1)"
    predictor = found.predictor
    assert predictor is not None and predictor.layers == [0, 1, 2]
    path = tmp_path / "costs.json"
    found.save(path)
    assert load_costs(path) == found
    settings = {"budget": 20, **CADENCE, "profile": path}
    ids = prompt(30, seed=2)
    for arm in ("best", "calibrated/uniform/reasonalloc", "predicted_loss(sinks=1)/cost/planned"):
        with reasonalloc.attach(model, arm=arm, **settings) as attached:
            model.generate(ids, max_new_tokens=40, do_sample=False)
            bound = attached._plan.policy
            assert isinstance(bound, PredictedLoss) and bound.sinks == 1
            assert bound._predictor == predictor
            assert attached.recorder is not None and attached.recorder.compressions > 4
    # With the same gradients, what the file holds costs what was fitted.
    named = f"predicted_loss(path={path}, sinks=1)"
    policies = ["predicted_loss(sinks=1)", named, "value_aware"]
    fitted, read, another = fisher(model, texts, policies=policies, **SETTINGS)
    assert fitted == found and read.foretells is None
    assert read.costs == fitted.costs != another.costs


def test_what_cannot_be_foretold() -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match="nothing can be foretold"):
        fisher(model, [text(completion=6)], policies=["predicted_loss"], **SETTINGS)
    with pytest.raises(UsageError, match="use objective='fisher'"):
        ablation(model, [text()], policy="predicted_loss", **CADENCE)
    with pytest.raises(UsageError, match="needs a cost profile"):
        reasonalloc.attach(model, budget=20, policy="predicted_loss")


def test_a_profile_that_foretells_nothing(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "costs.json"
    (profile,) = fisher(model, [text()], policies=["rkv"], **SETTINGS)
    profile.save(path)
    with pytest.raises(UsageError, match="was made with rkv and foretells nothing"):
        reasonalloc.attach(model, budget=20, policy="predicted_loss", profile=path, **CADENCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ["recent8"]}, "this version reads recent8"),
        ({"layers": [1, 0]}, "indices of layers, rising"),
        ({"weights": []}, "foretells: weights must be"),
        ({"weights": [[["a"] * len(FEATURES)] * 2] * 2}, "must be finite numbers"),
        ({"weights": [[[math.nan] * len(FEATURES)] * 2] * 2}, "must be finite numbers"),
        ({"more": 1}, "foretells must be null or an object"),
    ],
)
def test_broken_files(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made, path = made_costs.make(2, 2), tmp_path / "costs.json"
    path.write_text(json.dumps(vars(made) | {"foretells": foretold() | change}))
    with pytest.raises(UsageError, match=message):
        load_costs(path)
    path.write_text(json.dumps(vars(made) | {"foretells": foretold()}))
    assert load_costs(path).predictor is not None


def foretold() -> dict[str, Any]:
    return as_json(made_costs.predictor([0, 1], 2)) or {}


def test_older_files_foretell_nothing(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    data = {k: v for k, v in vars(made_costs.make(2, 2)).items() if k != "foretells"}
    path.write_text(json.dumps(data | {"version": 4}))
    assert load_costs(path).predictor is None
