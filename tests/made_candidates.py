"""Random candidates of a layer."""

from __future__ import annotations

import torch

from reasonalloc.policies import Candidates


def ragged(
    seed: int, lengths: list[list[int]], group: int, window: int, sunk: bool = False
) -> Candidates:
    """Random candidates; keys are clustered so that some are near-duplicates."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, dim = len(lengths), len(lengths[0]), 8
    n = max(max(row) for row in lengths)
    centres = torch.randn(5, dim, generator=generator)
    pick = torch.randint(0, 5, (batch, heads, n), generator=generator)
    keys = centres[pick] + 0.5 * torch.randn(batch, heads, n, dim, generator=generator)
    values = torch.randn(batch, heads, n, dim, generator=generator)
    gaps = torch.randint(1, 4, (batch, heads, n), generator=generator)
    positions = gaps.cumsum(-1)
    length = torch.tensor(lengths)
    # The last token of every head is the newest one of the sequence, as in a real cache.
    newest = int(positions.max()) + 1
    last = positions.gather(-1, (length - 1)[..., None])
    positions = positions + (newest - last)
    return Candidates(
        lengths=length,
        positions=positions,
        load_keys=lambda: keys,
        load_values=lambda: values,
        queries=torch.randn(batch, heads, group, window, dim, generator=generator),
        query_positions=torch.arange(newest - window + 1, newest + 1).expand(batch, -1),
        state=None,
        seen=torch.full((batch,), newest + 1),
        window=window,
        scaling=0.4,
        softcap=None,
        layer=3,
        seed=seed,
        sinks=2 * torch.randn(heads, group, generator=generator) if sunk else None,
    )
