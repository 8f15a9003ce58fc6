"""The loops in C++ against plain PyTorch, over shapes at which they change their way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reasonalloc
from examples import examples
from models import prompt, tiny
from reasonalloc.allocators.head import HeadQuery
from reasonalloc.allocators.head.base import SCORE_NORMS
from reasonalloc.attention import BACKENDS, choose_backend
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.ops import TORCH, choose_operations
from reasonalloc.ops.native import build
from reasonalloc.ops.native.rows import move_rows
from reasonalloc.policies import POLICIES, Candidates
from strategies import lengths_of_heads
from triton_cases import random_slab

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> None:
    """More threads than runs, and fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


LENGTHS = st.one_of(st.integers(0, 600), st.sampled_from([0, 1, 255, 256, 257, 512]))


@given(
    st.integers(0, 10**6),
    lengths_of_heads(LENGTHS, 3, 2),
    st.integers(1, 9),
    st.sampled_from([(8, 8), (24, 16), (64, 64), (80, 48), (130, 192)]),
    st.sampled_from([None, 2.0]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([None, 0.0, 3.0, -200.0, 200.0]),
)
@examples(60)
def test_attention_is_the_reference(
    seed: int,
    lengths: list[list[int]],
    group: int,
    dims: tuple[int, int],
    softcap: float | None,
    dtype: torch.dtype,
    sink: float | None,
) -> None:
    slab = random_slab(seed, lengths, *dims, dtype, uniform=False)
    query = torch.randn(len(lengths), len(lengths[0]) * group, 1, dims[0]).to(dtype)
    # As models pass it: heads behind tokens in memory.
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    if seed % 3 == 0:  # under autocast
        slab.keys = slab.keys.float()
    sinks = None if sink is None else (sink + torch.randn(query.shape[1])).to(dtype)
    out, received = BACKENDS.create("cpp").decode(query, slab, 0.3, softcap, True, sinks)
    again, none = BACKENDS.create("cpp").decode(query, slab, 0.3, softcap, False, sinks)
    assert none is None and torch.equal(out, again) and out.dtype == dtype
    slab.keys, slab.values = slab.keys.float(), slab.values.float()
    slow, weights = BACKENDS.create("eager").decode(query.float(), slab, 0.3, softcap, True, sinks)
    empty = (slab.lengths == 0).repeat_interleave(group, dim=1)[..., None, None]
    slow = slow.masked_fill(empty, 0.0)  # the reference looks at all slots then
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.float(), slow, rtol=tolerance, atol=tolerance)
    if not bool(empty.any()):
        assert received is not None
        torch.testing.assert_close(received, weights, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("threads")
@given(
    st.integers(0, 10**6),
    lengths_of_heads(st.integers(1, 90), 3, 2),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([8, 20, 64]),
    st.sampled_from([None, 3.0]),
    st.sampled_from(["rkv", "rkv(lam=0.5, kernel=3, threshold=0.2)", "rkv(kernel=1, threshold=1)"]),
    st.sampled_from(list(TOLERANCE)),
    st.sampled_from([None, 0.0, 3.0, -200.0, 200.0]),
)
@examples(60)
def test_rkv_is_the_reference(
    seed: int,
    lengths: list[list[int]],
    group: int,
    window: int,
    dim: int,
    softcap: float | None,
    spec: str,
    dtype: torch.dtype,
    sink: float | None,
) -> None:
    candidates = scattered(seed, lengths, group, window, dim, softcap, dtype)
    if sink is not None:
        sinks = sink + torch.randn(len(lengths[0]), group)
        candidates = dataclasses.replace(candidates, sinks=sinks)
    policy = POLICIES.create(spec)
    fast = choose_operations(native=True).score(policy, candidates)
    slow = policy.score(candidates)
    evictable = candidates.evictable
    torch.testing.assert_close(fast[evictable], slow[evictable], rtol=1e-4, atol=1e-6)
    assert not bool(fast[~candidates.valid].any())


def scattered(
    seed: int,
    lengths: list[list[int]],
    group: int,
    window: int,
    dim: int,
    softcap: float | None,
    dtype: torch.dtype,
) -> Candidates:
    """Heads whose keys resemble a few centres and lie anywhere in the storage."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, n = len(lengths), len(lengths[0]), max(max(row) for row in lengths)
    m = heads * n + 7
    centres = torch.randn(5, dim, generator=generator)
    keys = centres[torch.randint(0, 5, (batch, m), generator=generator)]
    keys = (keys + 0.5 * torch.randn(batch, m, dim, generator=generator)).to(dtype)
    places = [torch.randperm(m, generator=generator)[: heads * n] for _ in range(batch)]
    index = torch.stack(places).view(batch, heads, n)
    length = torch.tensor(lengths)
    row = torch.arange(batch)[:, None, None]
    return Candidates(
        lengths=length,
        positions=torch.arange(n).expand(batch, heads, n),
        load_keys=lambda: keys[row, index],
        load_values=lambda: keys[row, index],
        queries=torch.randn(batch, heads, group, window, dim, generator=generator).to(dtype),
        query_positions=torch.arange(n - window, n).expand(batch, -1),
        state=None,
        seen=torch.full((batch,), n),
        window=window,
        scaling=0.4,
        softcap=softcap,
        layer=0,
        seed=seed,
        stored=(keys, index),
    )


@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([((), torch.int32), ((3,), torch.float32), ((64,), torch.bfloat16)]),
    st.booleans(),
)
@examples(60)
def test_rows_go_where_they_belong(
    seed: int,
    batch: int,
    heads: int,
    n: int,
    row: tuple[tuple[int, ...], torch.dtype],
    inside: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = row
    slots = heads * (n + 2)
    m = slots if inside else heads * n
    flat = torch.randint(0, 200, (batch, m, *shape), generator=generator).to(dtype)
    own = flat if inside else torch.zeros(batch, slots, *shape, dtype=dtype)
    places = [torch.randperm(m, generator=generator)[: heads * n] for _ in range(batch)]
    index = torch.stack(places).view(batch, heads, n)
    keep = torch.rand(batch, heads, n, generator=generator) < 0.6
    room = keep.sum(-1) + torch.randint(0, 3, (batch, heads), generator=generator)
    offsets = room.cumsum(1) - room
    expected = own.clone()
    for b in range(batch):
        for h in range(heads):
            kept = flat[b, index[b, h][keep[b, h]]].clone()
            expected[b, int(offsets[b, h]) :][: len(kept)] = kept
    move_rows(own, flat, index, keep, offsets)
    assert torch.equal(own, expected)


@pytest.mark.parametrize("arm", ["rkv", "rkv/uniform/reasonalloc", "h2o/uniform/adakv", "tova"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_run_is_the_same(name: str, arm: str) -> None:
    """Plain steps, padded batches and soft-capping included; logits, since ties may fall apart."""
    model = tiny(name)
    mask = (torch.arange(30) >= 30 - torch.tensor([30, 17, 2])[:, None]).long()
    found = []
    policy, _, heads = (arm + "/uniform/uniform").split("/")[:3]
    for attention in ("sdpa", "cpp"):
        with reasonalloc.attach(
            model, budget=16, interval=8, policy=policy, heads=heads, attention=attention
        ) as attached:
            out = model.generate(
                prompt(30, 3) * mask,
                attention_mask=mask,
                max_new_tokens=40,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            assert attached.recorder is not None and attached.recorder.compressions > 0
        found.append(out)
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(
        torch.stack(found[1].logits), torch.stack(found[0].logits), rtol=1e-4, atol=1e-4
    )


@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([0.5, 1.0, 0.0, 2.0]),
)
@examples(150)
def test_budgets_are_the_reference(seed: int, batch: int, n: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    lower = integers(20, batch, n)
    upper = lower + integers(40, batch, n)
    share = torch.rand(batch, generator=generator)
    total = lower.sum(1) + (share * (upper - lower).sum(1)).long()
    demand = integers(8, batch, n) * torch.rand(batch, n, generator=generator).round(decimals=1)
    fast = choose_operations(native=True).robustify(demand, total, lower, upper, exponent)
    assert torch.equal(fast, TORCH.robustify(demand, total, lower, upper, exponent))


SCORES = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 0.5, float("inf"), float("-inf"), 1e-30])


@given(
    st.data(),
    lengths_of_heads(st.integers(1, 30), 3, 3),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.booleans(),
)
@examples(100)
def test_selections_are_the_reference(
    data: st.DataObject,
    lengths: list[list[int]],
    window: int,
    fraction: float,
    ties: bool,
    forced: bool,
) -> None:
    held = torch.tensor(lengths)
    n = int(held.max())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = torch.randn(*held.shape, n, generator=generator)
    if ties:
        scores = torch.tensor(data.draw(st.lists(SCORES, min_size=8, max_size=8)))[
            torch.randint(0, 8, scores.shape, generator=generator)
        ]
    scores = scores.masked_fill(torch.arange(n) >= held[..., None], -torch.inf)
    budgets = (torch.rand(held.shape, generator=generator) * (held + 1)).long().minimum(held)
    first = None
    if forced:
        first = (torch.arange(n) < 2) & (torch.arange(n) < (held - window)[..., None])
        budgets = budgets.maximum(first.sum(-1) + window).minimum(held)
    query = HeadQuery(scores, held, budgets.sum(1), 0, held[:, 0], window, shares=ties)
    native = choose_operations(native=True)
    fast = dataclasses.replace(query, ops=native)
    keep = native.select(scores, held, budgets, window, fraction, first)
    assert torch.equal(keep.sum(-1), budgets)
    assert torch.equal(keep, TORCH.select(scores, held, budgets, window, fraction, first))
    for norm in SCORE_NORMS:
        assert torch.equal(fast.pooled_counts(norm), query.pooled_counts(norm))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is for CPUs, but the model is on cuda"):
        choose_backend("cpp", torch.device("cuda"))
    model = tiny("llama").double()
    with pytest.raises(UnsupportedError, match=r"float16, but the model is in torch\.float64"):
        reasonalloc.attach(model, budget=16, attention="cpp")
    with (
        reasonalloc.attach(tiny("llama"), budget=16, attention="cpp") as attached,
        pytest.raises(UnsupportedError, match=r"but the model is in torch\.float64"),
    ):
        attached._model.double().generate(prompt(20), max_new_tokens=3)
    rows = torch.zeros(1, 4, 2)
    index, keep = torch.arange(4).view(1, 1, 4), torch.ones(1, 1, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="ends behind its storage of 4 slots"):
        move_rows(rows, rows, index, keep, torch.tensor([[1]]))
    with pytest.raises(RuntimeError, match=r"flat .* must be .*float32.* but it is .*int64"):
        move_rows(rows, rows.long(), index, keep, torch.tensor([[0]]))
    with pytest.raises(UsageError, match=r"threshold=-1\.0 must not be negative"):
        POLICIES.create("rkv(threshold=-1)")
    build.library.cache_clear()
    monkeypatch.setattr(build, "_SOURCES", ("lanes.h", "attention.py"))
    with pytest.raises(UnsupportedError, match=r"cannot be compiled \(.*error.*attention='sdpa'"):
        reasonalloc.attach(tiny("llama"), budget=16, attention="cpp")
    build.library.cache_clear()


def test_what_is_not_a_number_is_not_hidden() -> None:
    slab = random_slab(0, [[300, 5]], 8, 8, torch.float32, uniform=False)
    query = torch.randn(1, 4, 1, 8)
    for softcap in (None, 2.0):
        expected, _ = BACKENDS.create("eager").decode(query, slab, 0.3, softcap, False)
        slab.keys[0, int(slab.offsets[0, 0]) + 290] = torch.nan
        out, _ = BACKENDS.create("cpp").decode(query, slab, 0.3, softcap, False)
        assert bool(out[:, :2].isnan().all())
        torch.testing.assert_close(out[:, 2:], expected[:, 2:])
        slab.keys.nan_to_num_(1.0)
    # All of a piece of 256 tokens is out of reach of the query.
    slab = random_slab(0, [[300]], 8, 8, torch.float32, uniform=False)
    start = int(slab.offsets[0, 0])
    slab.keys[0, start : start + 256, 0] = -torch.inf
    query = torch.ones(1, 1, 1, 8)
    expected, _ = BACKENDS.create("eager").decode(query, slab, 0.3, None, False)
    out, _ = BACKENDS.create("cpp").decode(query, slab, 0.3, None, False)
    torch.testing.assert_close(out, expected)


def test_another_default_type() -> None:
    candidates = scattered(0, [[40, 17]], 2, 8, 64, None, torch.float32)
    policy = POLICIES.create("rkv")
    expected = policy.score(candidates)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(policy.score(candidates), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_compiled_steps_choose_it() -> None:
    names = {
        step: type(
            choose_backend("auto", torch.device("cpu"), torch.float32, step == "compile")
        ).__name__
        for step in ("eager", "compile")
    }
    assert names == {"eager": "Sdpa", "compile": "Cpp"}
