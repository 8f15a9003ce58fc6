"""Layers whose older tokens are coded, made from random numbers, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonalloc.ops.codes import RowFormat, row_format

KINDS = ["auto", "int8", "int4", "fp8", "int4h", "int8:int4", "auto:fp8", "int4h:int8", "fp8:auto"]


@dataclass
class MadeCoded:
    """A ``CodedView``, and what it was made of."""

    pool: Tensor
    formats: tuple[RowFormat, ...]
    coded_slots: int
    tail_keys: Tensor
    tail_values: Tensor
    tail_lengths: Tensor
    positions: Tensor
    kv_heads: int
    starts: Tensor
    offsets: Tensor
    lengths: Tensor
    rows: list[list[Tensor]] = field(default_factory=list)
    """[batch][kv_heads], each [tokens, width] uint8"""


def made_coded(
    seed: int,
    kinds: list[str],
    lengths: list[list[int]],
    tails: list[list[int]],
    dims: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device = torch.device("cpu"),  # noqa: B008 (constant)
) -> MadeCoded:
    """Runs of ``lengths`` and tails of ``tails``, [batch][kv_heads], some slots apart.

    What lies between runs are tokens where all heads have one format, else random bytes. Tails are
    followed by random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    formats = tuple(row_format(kind, *dims, dtype) for kind in kinds)
    batch, heads = len(lengths), len(kinds)
    apart = int(torch.randint(0, 4, (), generator=generator))
    coded = max(sum(row) for row in lengths) + apart * heads
    room = max(max(row) for row in tails) + 3
    pool = _pool(formats, batch, coded, generator)
    places: list[list[tuple[int, int]]] = []
    rows: list[list[Tensor]] = []
    for b, counts in enumerate(lengths):
        slot = byte = 0
        places.append([])
        rows.append([])
        for form, count in zip(formats, counts, strict=True):
            tokens = random_rows(form, count, generator)
            pool[b, byte : byte + tokens.numel()] = tokens.flatten()
            rows[b].append(tokens)
            places[b].append((slot, byte))
            slot, byte = slot + count + apart, byte + (count + apart) * form.width
    offsets, starts = torch.tensor(places).unbind(-1)
    shape = (batch, heads, room)
    return MadeCoded(
        pool=pool.to(device),
        formats=formats,
        coded_slots=coded,
        tail_keys=torch.randn(*shape, dims[0], generator=generator).to(device, dtype),
        tail_values=torch.randn(*shape, dims[1], generator=generator).to(device, dtype),
        tail_lengths=torch.tensor(tails, device=device),
        positions=torch.zeros(batch, coded + heads * room, dtype=torch.int32, device=device),
        kv_heads=heads,
        starts=starts.to(device),
        offsets=offsets.to(device),
        lengths=torch.tensor(lengths, device=device),
        rows=rows,
    )


def _pool(
    formats: tuple[RowFormat, ...], batch: int, coded: int, generator: torch.Generator
) -> Tensor:
    if len(set(formats)) == 1:
        return random_rows(formats[0], batch * coded, generator).view(batch, -1)
    size = coded * max(form.width for form in formats)
    return torch.randint(0, 256, (batch, size), generator=generator, dtype=torch.uint8)


def random_rows(form: RowFormat, count: int, generator: torch.Generator) -> Tensor:
    """[count, width] uint8: keys and values of several magnitudes."""
    keys = torch.randn(count, form.key.dim, generator=generator)
    values = torch.randn(count, form.value.dim, generator=generator)
    keys *= torch.rand(count, 1, generator=generator) * 2
    return form.encode(keys, values)


def dense_attention(
    query: Tensor,
    slab: MadeCoded,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One query head at a time over its tokens in float64; the result of ``decode_coded``."""
    batch, query_heads = query.shape[:2]
    group, room = query_heads // slab.kv_heads, slab.tail_keys.shape[2]
    out = torch.zeros(batch, query_heads, 1, slab.tail_values.shape[-1], dtype=torch.float64)
    received = torch.zeros(slab.positions.shape, dtype=torch.float64)
    for b in range(batch):
        for h, form in enumerate(slab.formats):
            length, tail = len(slab.rows[b][h]), int(slab.tail_lengths[b, h])
            keys, values = form.decode(slab.rows[b][h])
            keys = torch.cat([keys.double(), slab.tail_keys[b, h, :tail].double().cpu()])
            values = torch.cat([values.double(), slab.tail_values[b, h, :tail].double().cpu()])
            first, behind = int(slab.offsets[b, h]), slab.coded_slots + h * room
            for q in range(h * group, (h + 1) * group):
                logits = keys @ query[b, q, 0].double().cpu() * scaling
                if softcap is not None:
                    logits = torch.tanh(logits / softcap) * softcap
                if sinks is not None:
                    logits = torch.cat([logits, sinks[q : q + 1].double().cpu()])
                weights = logits.softmax(0)[: length + tail]
                out[b, q, 0] = weights @ values
                received[b, first : first + length] += weights[:length]
                received[b, behind : behind + tail] += weights[length:]
    return out, received
