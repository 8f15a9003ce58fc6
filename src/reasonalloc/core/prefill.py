"""What a layer sees and holds when several tokens come at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonalloc.attention.dense import attend, received_blocks, repeat_heads
from reasonalloc.attention.distance import DistanceBias
from reasonalloc.attention.latent import LatentHeads
from reasonalloc.cache import AnySlab, Rows
from reasonalloc.core.steps import Logits
from reasonalloc.errors import UnsupportedError, UsageError


def new_tokens(mask: Tensor | None, queries: int) -> Tensor | None:
    """[batch, q] bool from the mask's last row: which of the new tokens are real."""
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape[-1] != queries:
        raise UnsupportedError(
            f"an attention mask of shape {tuple(mask.shape)} and type {mask.dtype} cannot be used "
            "on a compressed cache: pass a 2-D padding mask, or none"
        )
    return mask[:, 0, -1, :]


def most_tokens(valid: Tensor | None, columns: int) -> int:
    """Upper bound of the real tokens among new columns; exact where looking costs no wait."""
    if valid is None or valid.device.type != "cpu":
        return columns
    return int(valid.sum(dim=1).max())


def check_protected(tokens: int, layer: int, kept: int, window: int) -> None:
    """Refuse a protected prompt of ``tokens`` where a head keeps ``kept``.

    Raises:
        UsageError: says what fits.
    """
    room = kept - window
    if tokens > room:
        raise UsageError(
            f"protect_prompt: the prompt has {tokens} tokens, but layer {layer} keeps {kept} per "
            f"head, {window} of them for the window: raise the budget, shorten the prompt to "
            f"{max(room, 0)} or do not protect it"
        )


def over_past(past: Rows, mask: Tensor | None, columns: int, query_heads: int) -> Tensor:
    """[batch, query_heads, q, past + q] bool: all of the past, the new tokens as ``mask`` says."""
    batch = past.index.shape[0]
    held = repeat_heads(past.held, query_heads)[:, :, None].expand(-1, -1, columns, -1)
    if mask is None:
        mask = torch.ones(columns, columns, dtype=torch.bool, device=held.device).tril()
    return torch.cat([held, mask.expand(batch, query_heads, columns, columns)], dim=-1)


def new_positions(key: Tensor, seen: int | Tensor, valid: Tensor | None) -> Tensor:
    """[batch, q] int32: positions of new tokens; of no meaning at padding.

    Args:
        key: [batch, kv_heads, q, head_dim], for shape and device.
        seen: tokens of each sequence before these: one number or [batch] int64.
        valid: [batch, q] bool, false at padding; None if all are real.
    """
    batch, _, columns, _ = key.shape
    if valid is None and isinstance(seen, int):
        places = torch.arange(seen, seen + columns, device=key.device).expand(batch, -1)
    else:
        real = (
            torch.ones(batch, columns, dtype=torch.bool, device=key.device)
            if valid is None
            else valid
        )
        start = seen if isinstance(seen, int) else seen[:, None]
        places = start + real.long().cumsum(dim=1) - 1
    return places.to(torch.int32)


def joined_rows(
    past: Rows | None,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    valid: Tensor | None,
    state: Tensor | None,
) -> Rows:
    """What a layer holds after a prefill: the past and the real new tokens, left-aligned.

    Args:
        past: what it held before.
        key, value: [batch, kv_heads, q, ...], of the new tokens.
        positions: [batch, q] int32, of the new tokens.
        valid: [batch, q] bool, false at padding; None if all are real.
        state: [batch, kv_heads, past + q, channels], or None if the policy keeps nothing.
    """
    batch, heads, columns, _ = key.shape
    device = key.device
    flat_keys, flat_values = key.flatten(1, 2), value.flatten(1, 2)
    new = torch.arange(columns, device=device)
    positions = positions[:, None].expand(-1, heads, -1).reshape(batch, -1)
    index = (torch.arange(heads, device=device)[:, None] * columns + new).expand(batch, -1, -1)
    is_token = None if valid is None else valid[:, None].expand(-1, heads, -1)
    if past is None:
        lengths = torch.full((batch, heads), columns, dtype=torch.int64, device=device)
    else:
        offset = past.keys.shape[1]
        flat_keys = torch.cat([past.keys, flat_keys], dim=1)
        flat_values = torch.cat([past.values, flat_values], dim=1)
        positions = torch.cat([past.positions, positions], dim=1)
        fresh = torch.ones_like(index, dtype=torch.bool) if is_token is None else is_token
        index = torch.cat([past.index, index + offset], dim=2)
        is_token = torch.cat([past.held, fresh], dim=2)
        lengths = is_token.sum(dim=-1)
    flat_state = None
    if state is not None:
        # As the storage lies. Entries that are no tokens repeat others: they go to a spare place.
        spare = flat_keys.shape[1]
        place = index if is_token is None else index.masked_fill(~is_token, spare)
        place = place.flatten(1)[..., None].expand(-1, -1, state.shape[-1])
        flat_state = state.new_zeros(batch, spare + 1, state.shape[-1])
        flat_state.scatter_(1, place, state.flatten(1, 2))
    if is_token is not None:
        order = is_token.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        index = index.gather(-1, order)
        lengths = is_token.sum(dim=-1)
    coded = 0 if past is None else past.coded
    return Rows(flat_keys, flat_values, positions, flat_state, index.contiguous(), lengths, coded)


@dataclass
class Chunk:
    """Several new tokens of a layer, and what their queries see.

    Attributes:
        slab: where they are to be stored.
        past: what the layer held before, or None.
        key, value: [batch, kv_heads, q, ...], of the new tokens.
        mask: [batch, 1, q, q] bool over the new tokens, or None if all are real and causal.
        valid: [batch, q] bool, false at padding; None if all are real.
        held: upper bound of the new tokens of a sequence that are not pinned, over all heads.
        replayed: they are decode steps.
        latent: how heads read them, if they are latents.
        bias: how queries with a bias by distance are read; None if they have none.
        positions: [batch, q] int32, of the new tokens, where there is such a bias.
        keys, values: [batch, kv_heads, past + q, ...]; of latents those of every head.
    """

    slab: AnySlab
    past: Rows | None
    key: Tensor
    value: Tensor
    mask: Tensor | None
    valid: Tensor | None
    held: int
    replayed: bool
    latent: LatentHeads | None = None
    bias: DistanceBias | None = None
    positions: Tensor | None = None
    keys: Tensor = field(init=False)
    values: Tensor = field(init=False)
    _visible: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.keys, self.values = self.key, self.value
        if (past := self.past) is not None:
            self.keys = torch.cat([past.gather(past.keys), self.key], dim=2)
            self.values = torch.cat([past.gather(past.values), self.value], dim=2)
        if self.latent is not None:
            self.keys, self.values = self.latent.expand(self.keys)

    def visible(self, query_heads: int) -> Tensor | None:
        """[batch, query_heads, q, past + q] bool, or the mask if there is no past."""
        if self.past is None:
            return self.mask
        if self._visible is None or self._visible.shape[1] != query_heads:
            self._visible = over_past(self.past, self.mask, self.key.shape[2], query_heads)
        return self._visible

    def release(self) -> None:
        """Free what attention alone needs."""
        self.keys, self.values, self._visible = self.key, self.value, None

    def attend(self, query: Tensor, logits: Logits) -> Tensor:
        """Attention of queries [batch, query_heads, q, head_dim]: [batch, query_heads, q, dim]."""
        visible = self.visible(query.shape[1])
        if self.bias is not None:
            places = self._places()
            return self.bias.attend(query, self.keys, self.values, visible, places, logits.scaling)
        return attend(query, self.keys, self.values, visible, *logits)

    def received(self, query: Tensor, logits: Logits) -> Iterator[tuple[int, int, Tensor]]:
        """Attention that past and new tokens receive; see ``dense.received_blocks``."""
        visible, valid = self.visible(query.shape[1]), self.valid
        if self.bias is not None:
            places = self._places()
            return self.bias.received(query, self.keys, visible, places, logits.scaling, valid)
        runs = self.key.shape[1]
        return received_blocks(query, self.keys, visible, valid, *logits, runs=runs)

    def _places(self) -> tuple[Tensor, Tensor]:
        """[batch, q] and [batch, kv_heads, past + q]: positions of queries and keys."""
        if self.positions is None:
            raise RuntimeError("a bias by distance without positions")
        keys = self.positions[:, None].expand(-1, self.key.shape[1], -1)
        if (past := self.past) is not None:
            keys = torch.cat([past.gather(past.positions), keys], dim=2)
        return self.positions, keys
