"""Every policy's scores over a ragged batch equal the per-head reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from examples import examples
from made_candidates import ragged
from made_statistics import ready
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.policies import POLICIES, Candidates, Policy, rkv
from reasonalloc.policies.predicted_loss import PredictedLoss
from reasonalloc.policies.tri_attention import TriAttention
from strategies import lengths_of_heads

SPECS = {
    "streaming_llm": {"sinks": 2},
    "knorm": {},
    "tova": {},
    "h2o": {},
    "lazy_eviction": {"threshold": 0.3},
    "snapkv": {"kernel": 7, "pooling": "max"},
    "tri_attention": {"horizon": 100},
    "rkv": {"lam": 0.5, "kernel": 3, "threshold": 0.2},
    "random": {},
    "value_aware": {"half_life": 5, "sinks": 2},
    "predicted_loss": {"sinks": 2},
}


PARTS = (1, 7, 2, 30)  # queries that come at once


def history(candidates: Candidates, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights and ages [batch, kv_heads, sum(PARTS), n] of the last queries."""
    generator = torch.Generator().manual_seed(seed)
    queries = candidates.seen[:, None] - torch.arange(sum(PARTS), 0, -1)
    age = (queries[:, None, :, None] - candidates.positions[:, :, None]).float()
    weights = torch.rand(age.shape, generator=generator) ** 4
    return weights.masked_fill(age < 0, 0.0), age


def observed(policy: Policy, candidates: Candidates, seed: int) -> Candidates:
    """With the state that the policy has after ``history``."""
    if not policy.state_channels:
        return candidates
    state = torch.zeros(*candidates.positions.shape, policy.state_channels)
    weights, age = history(candidates, seed)
    for part, old in zip(weights.split(PARTS, 2), age.split(PARTS, 2), strict=True):
        policy.observe(state, part, old)
    return dataclasses.replace(candidates, state=state)


@given(
    st.integers(0, 10**6),
    lengths_of_heads(st.integers(9, 30), 2, 2),
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
)
@examples(25)
def test_scores(seed: int, lengths: list[list[int]], group: int, window: int, sunk: bool) -> None:
    candidates = ragged(seed, lengths, group, window, sunk)
    assert set(SPECS) == set(POLICIES.entries()) - reference.NAMED_BY_A_FILE
    for name, parameters in SPECS.items():
        arguments = ", ".join(f"{k}={v}" for k, v in parameters.items())
        for spec, kwargs in ((name, {}), (f"{name}({arguments})", parameters)):
            heads = len(lengths[0])
            policy = ready(spec, candidates.layer, heads * group, 8, heads)
            own = extra(policy)
            fast = policy.score(observed(policy, candidates, seed))
            assert fast.dtype == torch.float32 and fast.shape == candidates.positions.shape
            for b, row in enumerate(lengths):
                for h, length in enumerate(row):
                    slow = reference.SCORES[name](head_of(candidates, b, h, seed), **kwargs, **own)
                    free = length - window
                    expected = torch.tensor(slow[:free])
                    # knorm drops all but 14 bits: a norm between two may go either way.
                    rtol = 2**-13 if name == "knorm" else 1e-4
                    torch.testing.assert_close(fast[b, h, :free], expected, rtol=rtol, atol=1e-6)


def extra(policy: Policy) -> dict[str, Any]:
    """What the reference needs besides the parameters."""
    if isinstance(policy, PredictedLoss):
        return {"predictor": policy._predictor}
    return {"statistics": policy._statistics} if isinstance(policy, TriAttention) else {}


def head_of(c: Candidates, b: int, h: int, seed: int) -> reference.Head:
    n = int(c.lengths[b, h])
    assert c.queries is not None and c.query_positions is not None
    weights, age = (x[b, h, :, :n].T.tolist() for x in history(c, seed))
    positions = c.positions[b, h, :n].tolist()
    received = [
        [(int(p + a), w) for w, a in zip(*columns, strict=True) if a >= 0]
        for p, columns in zip(positions, zip(weights, age, strict=True), strict=True)
    ]
    return reference.Head(
        keys=c.keys[b, h, :n],
        values=c.values[b, h, :n],
        positions=positions,
        queries=c.queries[b, h],
        query_positions=c.query_positions[b].tolist(),
        received=received,
        window=c.window,
        scaling=c.scaling,
        layer=c.layer,
        head=h,
        seen=int(c.seen[b]),
        seed=c.seed,
        sinks=None if c.sinks is None else c.sinks[h].tolist(),
    )


def part_of(candidates: Candidates, own: slice) -> Candidates:
    """As a process sees them that holds some of the KV heads."""
    keys, values = candidates.keys[:, own], candidates.values[:, own]
    return Candidates(
        **{
            **{f.name: getattr(candidates, f.name) for f in dataclasses.fields(candidates)},
            "load_keys": lambda: keys,
            "load_values": lambda: values,
            **{
                name: None if each is None else each[:, own]
                for name in ("lengths", "positions", "queries", "state")
                for each in [getattr(candidates, name)]
            },
            "sinks": None if candidates.sinks is None else candidates.sinks[own],
        }
    )


@pytest.mark.parametrize("name", sorted(SPECS.keys() - {"random"}))
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_heads_score_as_all_together(name: str, size: int) -> None:
    candidates = ragged(5, [[20, 13, 17, 20], [9, 20, 16, 12]], 3, 4, sunk=True)
    policy = ready(name, candidates.layer, 12, 8, 4)
    candidates = observed(policy, candidates, 1)
    parts = []
    for rank in range(size):
        own = slice(rank * 4 // size, (rank + 1) * 4 // size)
        parts.append(policy.shard(rank, size).score(part_of(candidates, own)))
    # Products of fewer rows are added up in another order on some processors.
    torch.testing.assert_close(torch.cat(parts, dim=1), policy.score(candidates))


def test_a_file_about_heads_that_nobody_can_divide() -> None:
    class Own(PredictedLoss):
        shard = Policy.shard

    with pytest.raises(UnsupportedError, match=r"one of 2 parts .*: define its shard\(\)"):
        Own().shard(0, 2)


def test_similarity_in_blocks_equals_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = ragged(1, [[30, 22], [9, 30]], 2, 4)
    whole = POLICIES.create("rkv").score(candidates)
    monkeypatch.setattr(rkv, "_CPU_BLOCK_ELEMENTS", 500)
    torch.testing.assert_close(POLICIES.create("rkv").score(candidates), whole)


def test_rkv_keeps_the_latest_of_duplicates() -> None:
    candidates = ragged(2, [[20]], 1, 4)
    keys = torch.eye(20, 32)[None, None].clone()
    keys[0, 0, 7] = keys[0, 0, 11] = keys[0, 0, 3]
    made = Candidates(**{**vars(candidates), "load_keys": lambda: keys})
    redundancy = rkv._redundancy(made.keys, made.valid, 0.5)[0, 0]
    # Each row leaves its latest duplicate out: token 3 is counted twice, 7 once, 11 never.
    assert redundancy[3] > redundancy[7] > redundancy[11] == redundancy[12]


def test_random_is_uniform_and_new_at_every_boundary() -> None:
    first = ragged(3, [[4000 // 2] * 2], 1, 4)
    scores = POLICIES.create("random").score(first)
    assert 0.45 < float(scores.mean()) < 0.55 and float(scores.std()) > 0.27
    later = Candidates(**{**vars(first), "seen": first.seen + 1})
    again = POLICIES.create("random").score(later)
    correlation = torch.corrcoef(torch.stack([scores.flatten(), again.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.1


def test_equal_tokens_score_alike_wherever_they_lie() -> None:
    """Scores of LazyEviction tie all the time: a digit between them would be taken for a reason."""
    policy, many = POLICIES.create("lazy_eviction"), 8003
    for age, last, longest in ((40, 3.0, 7.0), (900, 31.0, 15.0), (17, 0.0, 0.0), (55, 50.0, 9.0)):
        first = ragged(3, [[many]], 1, 4)
        state = torch.tensor([last, longest]).expand(1, 1, many, 2).contiguous()
        seen, positions = torch.tensor([many + age]), torch.full((1, 1, many), many - 1)
        own = Candidates(**{**vars(first), "seen": seen, "positions": positions, "state": state})
        assert policy.score(own).unique().numel() == 1


@pytest.mark.parametrize(
    "spec",
    [
        "rkv(lam=2)",
        "rkv(kernel=4)",
        "snapkv(pooling=sum)",
        "streaming_llm(sinks=-1)",
        "lazy_eviction(threshold=0)",
        "tri_attention(horizon=0)",
        "value_aware(half_life=0)",
        "value_aware(metric=norm)",
        "value_aware(sinks=-1)",
        "predicted_loss(sinks=-1)",
    ],
)
def test_parameters_are_checked(spec: str) -> None:
    with pytest.raises(UsageError):
        POLICIES.create(spec)
