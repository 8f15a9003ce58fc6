"""Whether the queries of a transformers model follow its rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonalloc.core.watched import Seen
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.integrations.hf.watched import watching
from reasonalloc.rotary import Rope, from_features, to_features, turns

_SHIFT = 37  # any position far enough from 0 for rotations to show


@torch.inference_mode()
def check_rotation(model: Any, rope: Rope, token: int) -> None:
    """Make sure that every layer under a budget rotates its queries as ``rope`` says.

    A text of one token gives the same hidden states at every position, since attention to a single
    key has weight 1 (learned sinks are left out): so its queries must differ by the rotation alone.

    Raises:
        UnsupportedError: a layer rotates otherwise (interleaved dimensions, layers without
            positions, positions that are added).
    """
    budgeted = [i for i, shape in enumerate(check_model(model)) if shape.compressible]
    start, shifted = (_queries(model, token, position) for position in (0, _SHIFT))
    shift = torch.tensor(_SHIFT, dtype=torch.int64, device="cpu")
    turn = turns(shift, rope.rates(shift.device)).to(torch.complex64)
    for layer in budgeted:
        turned = from_features(to_features(start[layer], rope.pairs) * turn, rope.pairs)
        error = (turned - shifted[layer]).norm() / turned.norm().clamp_min(1e-9)
        if float(error) > 0.02:  # half precision rounds to 0.004; another rotation is off by 0.1 up
            raise UnsupportedError(
                f"the queries of {type(model).__name__} cannot be averaged: layer {layer} does not "
                "rotate its queries by halves"
            )


def _queries(model: Any, token: int, position: int) -> dict[int, Tensor]:
    """Queries of every layer after RoPE, [query_heads, head_dim], of a text of one token."""
    queries: dict[int, Tensor] = {}

    def note(seen: Seen) -> None:
        queries[seen.layer] = seen.query[0, :, 0].float().cpu()

    ids = torch.tensor([[token]], dtype=torch.int64, device=model.device)
    with watching(model, note) as watched:
        watched.logits(ids, torch.zeros_like(ids[0]), first=position, own=True)
    return queries
