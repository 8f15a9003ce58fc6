"""Attention over keys and values in fewer bits: the reference of every backend."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from reasonalloc.ops.interface import CodedTokens
from reasonalloc.ops.torch import take
from reasonalloc.sinks import softmax


class CodedView(CodedTokens, Protocol):
    """What a backend reads of a layer whose older tokens are coded (``cache.CodedSlab``).

    The tokens of a head are its *run*, coded, and its *tail*, in the model's dtype. Slots are
    numbered through: ``coded_slots`` of the runs, then ``kv_heads * room`` of the tails.
    """

    positions: Tensor
    """[batch, coded_slots + kv_heads * room] int32"""
    kv_heads: int


def decode_coded(
    query: Tensor,
    slab: CodedView,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attend to runs and tails; see ``Backend.decode_coded``.

    Products with coded keys are in float32; of a rotated key with the rotated query.
    """
    batch, query_heads, _, head_dim = query.shape
    heads = slab.kv_heads
    group = query_heads // heads
    room, coded = slab.tail_keys.shape[2], slab.coded_slots
    grouped = query.reshape(batch, heads, group, head_dim).float() * scaling
    outs = []
    received = torch.zeros(batch, slab.positions.shape[1], dtype=torch.float32, device=query.device)
    for head in range(heads):
        keys, values, held = run_of(slab, head)
        mine = grouped[:, head]
        tail = torch.arange(room, device=query.device) < slab.tail_lengths[:, head, None]
        logits = torch.cat(
            [
                mine @ keys.transpose(1, 2),
                mine @ slab.tail_keys[:, head].float().transpose(1, 2),
            ],
            dim=2,
        )
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        seen = torch.cat([held, tail], dim=1)[:, None]
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        own = None if sinks is None else sinks.view(heads, group)[head]
        weights = softmax(logits, own) * seen
        everything = torch.cat([values, slab.tail_values[:, head].float()], dim=1)
        outs.append(weights @ everything)
        if need_weights:
            sums, n = weights.sum(dim=1), keys.shape[1]
            slots = slab.offsets[:, head, None] + torch.arange(n, device=query.device)
            if n:  # what is no token weighs nothing
                received.scatter_add_(1, slots.clamp_max(coded - 1), sums[:, :n])
            received[:, coded + head * room : coded + (head + 1) * room] += sums[:, n:]
    out = torch.stack(outs, dim=1).to(slab.tail_values.dtype)
    return out.reshape(batch, query_heads, 1, -1), received if need_weights else None


def run_of(slab: CodedView, head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys [batch, n, head_dim] and values [batch, n, value_dim] of a head's run, float32.

    And which of the ``n`` entries are tokens, [batch, n] bool; the others are 0. ``n`` is
    ``coded_slots``, so that no length is read on the host.
    """
    coded, width, device = slab.coded_slots, slab.formats[head].width, slab.pool.device
    index = torch.arange(coded, device=device)
    held = index < slab.lengths[:, head, None]
    if len(set(slab.formats)) == 1:
        slots = (slab.offsets[:, head, None] + index).clamp_max(max(coded - 1, 0))
        rows = take(one_format_rows(slab), slots)
    else:  # rows of several widths: byte by byte
        first = (slab.starts[:, head, None] + index * width).masked_fill(~held, 0)
        places = first[..., None] + torch.arange(width, device=device)
        rows = slab.pool.gather(1, places.flatten(1)).view(*first.shape, width)
    keys, values = slab.formats[head].decode(rows)
    # Bytes of no token are no numbers, or are those of another format.
    empty = ~held[..., None]
    return keys.float().masked_fill(empty, 0.0), values.float().masked_fill(empty, 0.0), held


def one_format_rows(slab: CodedView) -> Tensor:
    """Return [batch, coded_slots, width] uint8, a view of the pool; all heads have one format.

    Row ``offsets[b, h]`` of it is the first of a head's run.
    """
    coded, width = slab.coded_slots, slab.formats[0].width
    return slab.pool[:, : coded * width].view(len(slab.pool), coded, width)
