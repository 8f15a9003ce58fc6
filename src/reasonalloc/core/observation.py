"""What a policy keeps of every token, updated by the attention that the token receives."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from reasonalloc.cache import AnySlab, Rows
from reasonalloc.policies import Policy


def observe_step(
    policy: Policy,
    slab: AnySlab,
    received: Tensor,
    group: int,
    position: int | Tensor,
    valid: Tensor | None,
) -> None:
    """Update the state in the slab after a decode step.

    Args:
        policy: has ``state_channels``.
        slab: the layer's storage, the new token included.
        received: [batch, slots] float32, summed over the query heads of each slot's KV head.
        group: query heads per KV head.
        position: of the new token: one for all sequences, or [batch] int64.
        valid: [batch, 1] bool, false where the new token is padding; None if all are real.
    """
    if slab.state is None:
        raise RuntimeError("a slab without state")
    mean = received / group
    if valid is not None:
        mean = mean * valid
    if isinstance(position, Tensor):
        position = position[:, None]
    age = (position - slab.positions).float()
    policy.observe(slab.state, mean[:, None], age[:, None])


def observe_prefill(
    policy: Policy,
    past: Rows | None,
    positions: Tensor,
    kv_heads: int,
    received: Iterable[tuple[int, int, Tensor]],
) -> Tensor:
    """What the policy knows of every token after several at once.

    Args:
        policy: has ``state_channels``.
        past: what the layer held before.
        positions: [batch, q] int32, of the new tokens.
        kv_heads: number of KV heads.
        received: from ``attention.dense.received_blocks``, over past and new tokens.

    Returns:
        [batch, kv_heads, past + q, channels] float32.
    """
    batch, columns = positions.shape
    shape = batch, kv_heads, columns, policy.state_channels
    state = torch.zeros(shape, dtype=torch.float32, device=positions.device)
    tokens = positions[:, None].expand(-1, kv_heads, -1)
    if past is not None and past.state is not None:
        state = torch.cat([past.gather(past.state), state], dim=2)
        tokens = torch.cat([past.gather(past.positions), tokens], dim=2)
    for start, stop, weights in received:
        age = positions[:, None, start:stop, None] - tokens[:, :, None]
        policy.observe(state, weights, age.float())
    return state
