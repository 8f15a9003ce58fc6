from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reasonalloc.attention.backends.eager import Eager
from reasonalloc.attention.coded import CodedView, one_format_rows
from reasonalloc.attention.interface import BACKENDS, Backend, SlabView, run_mask, slot_mask
from reasonalloc.ops.codes import rotated
from reasonalloc.sinks import softmax

_EAGER = Eager()


@BACKENDS.register("sdpa", source="torch.nn.functional.scaled_dot_product_attention")
@dataclass(frozen=True)
class Sdpa(Backend):
    """Fused attention on strided views; ragged runs are read in place, nothing is padded."""

    def decode(
        self,
        query: Tensor,
        slab: SlabView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        plain = not need_weights and softcap is None and sinks is None
        if query.device.type == "cpu" and not (plain and slab.uniform_length is not None):
            return _products(query, slab, scaling, softcap, need_weights, sinks)
        if not plain:  # what the fused kernels cannot give
            return _EAGER.decode(query, slab, scaling, softcap, need_weights, sinks)
        batch, query_heads, _, head_dim = query.shape
        heads = slab.kv_heads
        group = query_heads // heads
        if slab.uniform_length is not None:
            out = F.scaled_dot_product_attention(
                query.reshape(batch, heads, group, head_dim),
                slab.rows(slab.keys),
                slab.rows(slab.values),
                scale=scaling,
            )
        else:
            # The slab as one KV head, the query heads as its queries: a mask gives each query
            # head its own run, and keys and values are read once, where they lie.
            mask = slot_mask(slab)[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)
            out = F.scaled_dot_product_attention(
                query.reshape(batch, 1, query_heads, head_dim),
                slab.keys[:, None],
                slab.values[:, None],
                attn_mask=mask[:, None],
                scale=scaling,
            )
        return out.reshape(batch, query_heads, 1, -1), None

    def decode_coded(
        self,
        query: Tensor,
        slab: CodedView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if len(set(slab.formats)) > 1:
            return super().decode_coded(query, slab, scaling, softcap, need_weights, sinks)
        return _coded_products(query, slab, scaling, softcap, need_weights, sinks)


def _products(
    query: Tensor,
    slab: SlabView,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Explicit products over the slab where it lies: on a CPU as fast as the fused kernel.

    Ragged runs are read as one: every query head is multiplied with every slot and looks at those
    of its KV head. With few KV heads reading the keys is what takes the time; with many the
    superfluous products do.
    """
    batch, query_heads, _, head_dim = query.shape
    heads, uniform = slab.kv_heads, slab.uniform_length is not None
    query = query * scaling
    if uniform:
        keys, values = (slab.rows(x).flatten(0, 1) for x in (slab.keys, slab.values))
        logits = torch.bmm(query.view(batch * heads, -1, head_dim), keys.transpose(1, 2))
    else:
        keys, values = slab.keys, slab.values
        logits = torch.bmm(query.view(batch, query_heads, head_dim), keys.transpose(1, 2))
    logits = logits.float().view(batch, heads, query_heads // heads, -1)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    if not uniform:
        # Added, which is several times faster here than masked_fill_; finite, since a run may be
        # empty. No logit is large enough to be seen beside it.
        own = slot_mask(slab)
        logits.add_(own.to(logits.dtype).sub_(1.0).mul_(1e30)[:, :, None])
    weights = softmax(logits, None if sinks is None else sinks.view(heads, -1))
    shape = (keys.shape[0], -1, keys.shape[1])
    out = torch.bmm(weights.view(shape).to(values.dtype), values)
    received = None
    if need_weights and uniform:
        received = weights.new_zeros(slab.keys.shape[:2])
        slab.rows(received).copy_(weights.sum(dim=2))
    elif need_weights:
        received = weights.sum(dim=(1, 2))
    return out.view(batch, query_heads, 1, -1), received


def _coded_products(
    query: Tensor,
    slab: CodedView,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Explicit products in float32, with all runs as one and with each head's own tail.

    A fused kernel would need decoded runs and tails copied behind each other.
    """
    batch, query_heads, _, head_dim = query.shape
    heads, coded = slab.kv_heads, slab.coded_slots
    group, room = query_heads // heads, slab.tail_keys.shape[2]
    form = slab.formats[0]
    keys, values = (x.float() for x in form.decode(one_format_rows(slab), unrotate=False))
    query = query.reshape(batch, query_heads, head_dim).float() * scaling
    # Rotated queries for rotated keys: fewer than the keys to turn back.
    turned = rotated(query) if form.key.kind == "int4h" else query
    run = torch.bmm(turned, keys.transpose(1, 2)).view(batch, heads, group, coded)
    grouped = query.view(batch, heads, group, head_dim)
    logits = torch.cat([run, grouped @ slab.tail_keys.float().transpose(-1, -2)], dim=-1)
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    # Added and finite for the reasons given in ``_products``.
    logits.add_(_own_tokens(slab).float().sub_(1.0).mul_(1e30)[:, :, None])
    weights = softmax(logits, None if sinks is None else sinks.view(heads, group))
    run, tail = weights.split([coded, room], dim=-1)
    out = torch.bmm(run.reshape(batch, query_heads, coded), values).view(batch, heads, group, -1)
    out = (out + tail @ slab.tail_values.float()).to(slab.tail_values.dtype)
    received = None
    if need_weights:
        received = torch.cat([run.sum(dim=(1, 2)), tail.sum(dim=2).flatten(1)], dim=1)
    return out.view(batch, query_heads, 1, -1), received


def _own_tokens(slab: CodedView) -> Tensor:
    """[batch, kv_heads, coded_slots + room] bool: tokens of each head in all runs and its tail."""
    run = run_mask(slab.offsets, slab.lengths, slab.coded_slots)
    places = torch.arange(slab.tail_keys.shape[2], device=slab.pool.device)
    return torch.cat([run, places < slab.tail_lengths[..., None]], dim=-1)
