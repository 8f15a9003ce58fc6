"""Runs in a pool of pages, token by token: the slow version of ``attention/kernels/paged/``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn


@dataclass
class Paged:
    """A pool with its requests.

    Attributes:
        pages: [blocks, layers, heads, block_size, 2 * head_dim], a view with any strides.
        first, shift: [layers, slots, heads]; plain: [slots].
        block_table: [rows, n]; slots: [rows].
    """

    pages: Tensor
    first: Tensor
    shift: Tensor
    plain: Tensor
    block_table: Tensor
    slots: Tensor

    def token(self, layer: int, row: int, head: int, place: int) -> Tensor:
        """[2 * head_dim], a view: the token at a place of a run."""
        page, within = divmod(place, self.pages.shape[3])
        return self.page(layer, row, head, page)[within]

    def page(self, layer: int, row: int, head: int, page: int) -> Tensor:
        """[block_size, 2 * head_dim], a view: a page of a run."""
        _, layers, heads, *_ = self.pages.shape
        slot = int(self.slots[row])
        plain = int(self.plain[slot])
        if page < plain:
            number = page * layers * heads + layer * heads + head
        else:
            number = plain * layers * heads + int(self.first[layer, slot, head]) + page - plain
        block = int(self.block_table[row, number // (layers * heads)])
        return self.pages[(block, *divmod(number % (layers * heads), heads))]

    def length(self, layer: int, row: int, head: int, seen: int) -> int:
        return int(self.shift[layer, int(self.slots[row]), head]) + seen


def decoded(
    paged: Paged,
    layer: int,
    query: Tensor,
    seq_lens: Tensor,
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
    scales: tuple[float, float],
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """float64 attention of query [rows, query_heads, dim], log-sum-exps; padded rows as given."""

    def run(row: int, head: int) -> tuple[Tensor, Tensor]:
        length, dim = paged.length(layer, row, head, int(seq_lens[row])), query.shape[2]
        places = [paged.token(layer, row, head, place) for place in range(length)]
        tokens = torch.stack(places).double()
        return scales[0] * tokens[:, :dim], scales[1] * tokens[:, dim:]

    heads = paged.pages.shape[2]
    return attended(query, heads, seq_lens, run, scaling, softcap, sinks, out, lse)


def attended(
    query: Tensor,
    heads: int,
    seq_lens: Tensor,
    run: Callable[[int, int], tuple[Tensor, Tensor]],
    scaling: float,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same over keys and values [tokens, dim] float64 of ``run(row, head)``."""
    out, lse = out.double(), lse.double()
    group = query.shape[1] // heads
    for row in range(len(query)):
        for head in range(heads if seq_lens[row] > 0 else 0):
            keys, values = run(row, head)
            for one in range(head * group, (head + 1) * group):
                logits = scaling * keys @ query[row, one].double()
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                every = logits if sinks is None else torch.cat([logits, sinks[one : one + 1]])
                lse[row, one] = every.logsumexp(0)
                out[row, one] = torch.exp(logits - lse[row, one]) @ values
    return out, lse


def store(
    paged: Paged,
    layer: int,
    key: Tensor,
    value: Tensor,
    token_row: Tensor,
    token_position: Tensor,
    scales: tuple[float, float],
) -> None:
    """Write key and value [tokens, heads, dim]."""
    for token, (row, position) in enumerate(
        zip(token_row.tolist(), token_position.tolist(), strict=True)
    ):
        for head in range(paged.pages.shape[2] if row >= 0 else 0):
            place = paged.length(layer, row, head, position)
            both = [key[token, head], value[token, head]]
            if paged.pages.dtype == E4M3:
                pairs = zip(both, scales, strict=True)
                both = [(x.float() / scale).clamp(-448, 448).to(E4M3) for x, scale in pairs]
            to = paged.token(layer, row, head, place)
            to.copy_(torch.cat([x.to(to.dtype) for x in both]))


def note(
    ring: Tensor, query: Tensor, token_row: Tensor, token_position: Tensor, ring_row: Tensor
) -> None:
    """Remember queries in ring [rows, width, query_heads, dim]."""
    for token in range(len(query)):
        if token_row[token] >= 0 and ring_row[token] >= 0:
            ring[ring_row[token], token_position[token] % ring.shape[1]] = query[token]
