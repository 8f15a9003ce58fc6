"""Attention that a token received lately: a sum over queries whose weights halve, and its mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_received(state: Tensor, received: Tensor, half_lives: Sequence[float]) -> None:
    """Take in the attention of one or more queries, in order.

    Args:
        state: [..., n, half_lives] float32, changed in place; 0 for a token that is new.
        received: [..., q, n] float32, as for ``Policy.observe``.
        half_lives: queries after which attention counts half, one per channel of ``state``.
    """
    # A query that is padding gives nothing to any token, and is not counted.
    total = received.sum(dim=-1, keepdim=True)
    if received.shape[-2] == 1:  # at every step: fewer operations
        new = received.squeeze(-2)
        for channel, half_life in enumerate(half_lives):
            still = 0.5 ** (1 / half_life)
            kept = torch.where(total > 0, still, torch.ones_like(total)).squeeze(-2)
            state[..., channel].mul_(kept).add_(new)
        return
    real = (total > 0).float()
    later = real.flip(-2).cumsum(-2).flip(-2) - real
    count = real.sum(dim=-2, keepdim=True)
    fading = torch.cat([0.5 ** (later / half_life) for half_life in half_lives], dim=-1)
    kept = torch.cat([0.5 ** (count / half_life) for half_life in half_lives], dim=-1)
    state.mul_(kept).add_(received.transpose(-1, -2) @ fading)


def weight_sums(queries: Tensor, half_life: float) -> Tensor:
    """Return the sum of the weights of so many queries, at least 1: ``state`` divides by it."""
    one = 0.5 ** (1 / half_life)
    weights: Tensor = (1 - 0.5 ** (queries / half_life)) / (1 - one)
    return weights
