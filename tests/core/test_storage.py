"""Selection and slab against Python lists, over random shapes and histories."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from examples import examples
from reasonalloc.cache import Rows, Slab
from reasonalloc.ops import TORCH, choose_operations


@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=6),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.5, 0.9]),
    st.integers(0, 12),
)
@examples(100)
def test_select(
    seed: int, heads: list[tuple[int, int]], window: int, recent_fraction: float, first: int
) -> None:
    lengths = [length for length, _ in heads]
    budgets = [min(length, budget) for length, budget in heads]
    n = max([*lengths, 1])
    scores = torch.randint(0, 6, (1, len(heads), n), generator=_seeded(seed)).float()
    # The first tokens are forced, as far as every budget has room for them.
    counts = [max(0, min(first, b - window)) for b in budgets]
    forced = (torch.arange(n) < torch.tensor(counts)[:, None])[None]
    keep = TORCH.select(
        scores,
        torch.tensor([lengths]),
        torch.tensor([budgets]),
        window,
        recent_fraction,
        forced if first else None,
    )
    for h, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        first_ones = set(range(counts[h]))
        slow = reference.select(
            scores[0, h].tolist(), length, budget, window, recent_fraction, first_ones
        )
        assert first_ones <= set(slow)
        assert keep[0, h].nonzero().flatten().tolist() == slow
        assert len(slow) == budget
        assert set(range(length - min(window, budget), length)) <= set(slow)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(slab: Slab, expected: list[list[list[int]]]) -> None:
    """The slab holds exactly these positions, and the keys and values that belong to them."""
    offsets, lengths = slab.offsets, slab.lengths
    ends = []
    for b, row in enumerate(expected):
        for h, positions in enumerate(row):
            start = int(offsets[b, h])
            stop = start + int(lengths[b, h])
            assert slab.positions[b, start:stop].tolist() == positions
            assert positions == sorted(set(positions))
            marks = [b * 1000 + h * 100 + p / 64 for p in positions]
            expected_keys = torch.tensor(marks, dtype=torch.float32)
            torch.testing.assert_close(slab.keys[b, start:stop, 0], expected_keys)
            torch.testing.assert_close(slab.values[b, start:stop, 0], -expected_keys)
            ends.append((b, start, stop))
    for b, start, stop in ends:  # runs never overlap and never leave the slab
        assert 0 <= start <= stop <= slab.slots
        others = [(s, e) for c, s, e in ends if c == b and (s, e) != (start, stop) and e > s]
        assert all(e <= start or s >= stop for s, e in others)
    assert slab.longest >= max(len(p) for row in expected for p in row)


def token(batch: int, heads: int, position: list[int]) -> torch.Tensor:
    """[batch, heads, 1, 2] keys that tell sequence, head and position."""
    b = torch.arange(batch)[:, None] * 1000 + torch.arange(heads) * 100
    return (b + torch.tensor(position)[:, None] / 64)[..., None, None].expand(-1, -1, 1, 2)


@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(4, 12),
    st.booleans(),
    st.booleans(),
)
@examples(100)
def test_slab_history(
    seed: int, batch: int, heads: int, budget: int, ragged: bool, native: bool
) -> None:
    generator = _seeded(seed)
    interval = 5
    slab = Slab(
        batch,
        heads,
        heads * (budget + interval),
        2,
        2,
        dtype=torch.float32,
        device=torch.device("cpu"),
        state_channels=2,
        ops=choose_operations(native),
    )
    assert slab.kv_bytes == 2 * batch * heads * (budget + interval) * 2 * 4
    seen = [0] * batch
    expected: list[list[list[int]]] = [[[] for _ in range(heads)] for _ in range(batch)]
    for _ in range(4):
        for _ in range(interval):
            valid = torch.rand(batch, 1, generator=generator) < 0.8 if ragged else None
            key = token(batch, heads, seen)
            position = torch.tensor(seen) if ragged else seen[0]
            slab.append(key, -key, position, valid)
            for b in range(batch):
                if valid is None or bool(valid[b]):
                    for h in range(heads):
                        expected[b][h].append(seen[b])
                    seen[b] += 1
        check(slab, expected)
        check_state(slab, expected, new=interval)
        rows = slab.as_rows()
        # Random unequal budgets that sum to at most the layer's budget, or equal ones.
        keep = torch.zeros(batch, heads, rows.index.shape[-1], dtype=torch.bool)
        for b in range(batch):
            room = heads * budget
            for h in range(heads):
                held = len(expected[b][h])
                most = min(held, room) if ragged else min(held, budget)
                count = int(torch.randint(0, most + 1, (), generator=generator)) if ragged else most
                room -= count
                chosen = sorted(torch.randperm(held, generator=generator)[:count].tolist())
                keep[b, h, chosen] = True
                expected[b][h] = [expected[b][h][i] for i in chosen]
        slab.rewrite(rows, keep, None if ragged else len(expected[0][0]))
        check(slab, expected)


def check_state(slab: Slab, expected: list[list[list[int]]], new: int) -> None:
    """State moves with its token and is zero for a new one; then marks every token anew."""
    assert slab.state is not None
    for b, row in enumerate(expected):
        for h, positions in enumerate(row):
            start = int(slab.offsets[b, h])
            found = slab.state[b, start : start + len(positions)]
            fresh = torch.tensor(
                [p > max([-1, *positions]) - new for p in positions], dtype=torch.bool
            )
            marks = torch.tensor(
                [[p + 1.0, -p - 1.0] for p in positions], dtype=torch.float32
            ).view(-1, 2)
            known = found.any(dim=-1)
            assert bool((known | fresh).all())
            assert torch.equal(found[known], marks[known])
    slab.state.copy_(torch.stack([slab.positions + 1, -slab.positions - 1], dim=-1))


def test_full_run_is_an_error_not_a_corruption() -> None:
    slab = Slab(1, 2, 6, 2, 2, dtype=torch.float32, device=torch.device("cpu"))
    for position in range(3):
        key = token(1, 2, [position])
        slab.append(key, -key, position, None)
    try:
        slab.append(key, -key, 3, None)
    except RuntimeError as error:
        assert "full" in str(error)
    else:
        raise AssertionError("a full run took another token")


def test_rows_gather_two_and_three_dimensions() -> None:
    flat = torch.arange(12.0).view(1, 6, 2)
    rows = Rows(
        flat,
        flat,
        torch.arange(6).view(1, 6),
        None,
        torch.tensor([[[5, 0], [2, 2]]]),
        torch.ones(1),
    )
    assert rows.gather(flat)[0, :, :, 0].tolist() == [[10.0, 0.0], [4.0, 4.0]]
    assert rows.gather(rows.positions)[0].tolist() == [[5, 0], [2, 2]]
