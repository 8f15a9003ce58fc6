from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.attention.interface import BACKENDS, Backend, SlabView, slot_mask
from reasonalloc.sinks import softmax


@BACKENDS.register("eager", source="plain PyTorch; the reference of every other backend")
@dataclass(frozen=True)
class Eager(Backend):
    """Explicit products, softmax in float32; gives attention weights and soft-caps."""

    def decode(
        self,
        query: Tensor,
        slab: SlabView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        batch, query_heads, _, head_dim = query.shape
        heads = slab.kv_heads
        own = None if sinks is None else sinks.view(heads, -1)
        grouped = query.reshape(batch, heads, query_heads // heads, head_dim)
        if slab.uniform_length is not None:
            keys, values = slab.rows(slab.keys), slab.rows(slab.values)
            weights = _softmax(grouped * scaling @ keys.transpose(-1, -2), softcap, None, own)
            out = weights.to(values.dtype) @ values
        else:
            # Every query head against every slot; a slot counts for the heads of its run only.
            mask = slot_mask(slab)[:, :, None]
            logits = (query.squeeze(2) * scaling @ slab.keys.transpose(-1, -2)).view(
                batch, heads, query_heads // heads, -1
            )
            weights = _softmax(logits, softcap, mask, own)
            out = weights.flatten(1, 2).to(slab.values.dtype) @ slab.values
        received = _received(weights, slab) if need_weights else None
        return out.reshape(batch, query_heads, 1, -1), received


def _softmax(
    logits: Tensor, softcap: float | None, mask: Tensor | None, sinks: Tensor | None
) -> Tensor:
    logits = logits.float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return softmax(logits, sinks)


def _received(weights: Tensor, slab: SlabView) -> Tensor:
    if slab.uniform_length is None:
        return weights.sum(dim=(1, 2))
    received = weights.new_zeros(slab.keys.shape[:2])
    slab.rows(received).copy_(weights.sum(dim=2))
    return received
