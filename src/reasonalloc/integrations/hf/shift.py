"""Positions behind images: models remember how far they are shifted, of the text read last.

Models with multi-axis rotary positions (M-RoPE: Qwen2-VL and its kin) count an image's tokens by
its height and width, so that the text behind it stands nearer than it lies. How much nearer is kept
on the model, ``rope_deltas`` [batch, 1], and belongs to a text: a cache takes it along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reasonalloc.integrations.hf.cache import BudgetCache


def shift_holder(model: Any) -> Any:
    """The module of a model that remembers the shift; None if none does."""
    return next((module for module in model.modules() if hasattr(module, "rope_deltas")), None)


def give_shift(holder: Any, cache: BudgetCache, call: Mapping[str, Any]) -> None:
    """Have the model remember the shift of a cache's text, if it is to go on.

    Args:
        holder: see ``shift_holder``.
        cache: what the call goes on with.
        call: arguments of the call, which may say where its tokens stand.
    """
    if holder is not None and call.get("position_ids") is None and cache.get_seq_length():
        holder.rope_deltas = cache.shift


def take_shift(holder: Any, cache: BudgetCache) -> None:
    """Have a cache remember the shift of the text that the model has read."""
    shift = None if holder is None else holder.rope_deltas
    cache.shift = shift.detach() if isinstance(shift, Tensor) else None
