"""One layer that keeps everything, and shows what its attention saw: what calibration looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from reasonalloc.attention.dense import attend, repeat_heads
from reasonalloc.attention.distance import DistanceBias
from reasonalloc.attention.latent import LatentHeads
from reasonalloc.core.shared import Call, ReadLayer, join_heads
from reasonalloc.core.steps import Logits
from reasonalloc.sinks import softmax


@dataclass(frozen=True)
class Seen:
    """What the attention of one layer was given in a pass over new tokens, and what it gave.

    Of a layer whose cache several layers read, the queries and outputs are those of all of them:
    the group of a KV head has the query heads of every reader.

    Attributes:
        layer: index of the layer in the model.
        query: [1, query_heads, q, query_dim] after RoPE, of the new tokens, which are the last of
            all tokens; with a bias by distance they are wide, see ``DistanceBias``.
        key, value: [1, kv_heads, n, ...] as they are stored, of all tokens; keys after RoPE.
        output: [1, q, query_heads, value_dim].
        scaling, softcap: of the attention logits.
        sinks: [query_heads] learned sinks, or None.
        latent: how heads read the keys, if these are latents and values are empty; else None.
        bias: how queries with a bias by distance are read; None if they have none.
        parts: [1, q, query_heads, value_dim] of each reader, as the model goes on with them: in the
            graph, if gradients are recorded.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None = None
    latent: LatentHeads | None = None
    bias: DistanceBias | None = None
    parts: tuple[Tensor, ...] = ()

    @property
    def kv_heads(self) -> int:
        """Heads that tokens are stored for."""
        return self.key.shape[1]

    @cached_property
    def _read(self) -> tuple[Tensor, Tensor]:
        if self.latent is None:
            return self.key, self.value
        return self.latent.expand(self.key)

    def read(self, head: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that the queries of a KV head read, float32.

        Returns:
            [1, n, head_dim] and [1, n, value_dim]; of latents [query_heads, ...], those of each.
        """
        keys, values = (part[0].unflatten(0, (self.kv_heads, -1))[head] for part in self._read)
        return keys.float(), values.float()

    @property
    def scored_values(self) -> Tensor:
        """What policies see as values: [1, kv_heads, n, ...]."""
        return self.value if self.latent is None else self.latent.scored_values(self.key)

    def attention(self, head: int) -> Tensor:
        """Return the causal attention of a KV head's queries to all keys: [group, q, n] float32.

        Rows sum to 1, to less with sinks.
        """
        query, keys = self._of(self.query[0], head).float(), self.read(head)[0]
        sinks = None if self.sinks is None else self._of(self.sinks, head)
        (q, n), table = (query.shape[1], keys.shape[1]), None
        if self.bias is not None:
            query, table, sinks = self.bias.split(query)
        logits = query * self.scaling @ keys.transpose(-1, -2)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        index = torch.arange(n, device=keys.device)
        distance = index[n - q :, None] - index
        if self.bias is not None and table is not None:
            logits = logits + self.bias.of(table, distance)
        own = sinks if sinks is None or sinks.dim() == 1 else sinks[None]
        return softmax(logits.masked_fill(distance < 0, -torch.inf)[None], own)[0]

    def _of(self, tensor: Tensor, head: int) -> Tensor:
        """Return the rows [group, ...] of a KV head, of [query_heads, ...]."""
        rows: Tensor = tensor.unflatten(0, (self.kv_heads, -1))
        return rows[head]


def join_outputs(parts: Sequence[Tensor], kv_heads: int) -> Tensor:
    """Join what several readers of a cache have read, group by group; see ``join_heads``.

    Args:
        parts: each [batch, q, query_heads, value_dim].
        kv_heads: of the cache.

    Returns:
        [batch, q, query_heads of all, value_dim].
    """
    return join_heads([part.transpose(1, 2) for part in parts], kv_heads).transpose(1, 2)


@dataclass
class _Call(Call):
    """The same with what the readers so far have read, [batch, q, query_heads, value_dim] each."""

    outputs: list[Tensor] = field(default_factory=list)


class WatchedLayer(ReadLayer[_Call]):
    """A layer that evicts nothing, whatever its budget; gradients flow through it.

    Of one sequence without padding.

    Args:
        settings, readers: see ``ReadLayer``.
        show: gets what was seen, after the last reader of the same new tokens.
        instead: [batch, q, query_heads, value_dim], what attention gives instead, in a single call;
            or None.
        own: attention gives every new token its own value instead.
    """

    differentiable = True

    def __init__(
        self,
        *settings: Any,
        readers: int,
        show: Callable[[Seen], None],
        instead: Tensor | None = None,
        own: bool = False,
    ) -> None:
        super().__init__(*settings, readers=readers)
        self._show, self._instead, self._own = show, instead, own
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        replay: bool = False,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one reader over everything; see ``LayerCompressor.forward``."""
        call = self._call
        if call is None:
            call = self._call = _Call()
            self._store(key, value)
        keys, values = self._tokens()
        logits = Logits(scaling, softcap, sinks)
        if self._instead is None:
            out = self._attend(query, keys, values, mask, logits).transpose(1, 2)
        else:
            grouped = self._instead.unflatten(2, (keys.shape[1], self.readers, -1))
            out = grouped[:, :, :, len(call.outputs)].flatten(2, 3)
        call.queries.append(query)
        call.logits.append(logits)
        call.outputs.append(out)
        if len(call.outputs) == self.readers:
            self._call = None
            self._show(self._seen(call, keys, values))
        return out.transpose(1, 2)

    def _store(self, key: Tensor, value: Tensor) -> None:
        if self._key is not None and self._value is not None:
            key = torch.cat([self._key, key], dim=2)
            value = torch.cat([self._value, value], dim=2)
        self._key, self._value = key, value

    def _tokens(self) -> tuple[Tensor, Tensor]:
        if self._key is None or self._value is None:
            raise RuntimeError("a layer without tokens")
        return self._key, self._value

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, logits: Logits
    ) -> Tensor:
        """[batch, query_heads, q, value_dim]"""
        (q, n), heads = (query.shape[2], keys.shape[2]), keys.shape[1]
        if q < n:
            if q > 1:
                raise RuntimeError("a watched layer takes a text, then single tokens")
            mask = None  # a single token sees everything
        if self.latent is not None:
            keys, values = self.latent.expand(keys)
        if self._own:
            return repeat_heads(values[:, :, n - q :], query.shape[1])
        if self.bias is None:
            return attend(query, keys, values, mask, *logits)
        places = torch.arange(n, device=keys.device).expand(len(keys), heads, -1)
        positions = (places[:, 0, n - q :], places)
        return self.bias.attend(query, keys, values, mask, positions, logits.scaling)

    def _seen(self, call: _Call, keys: Tensor, values: Tensor) -> Seen:
        heads = keys.shape[1]
        query, logits = call.joined(heads)
        return Seen(
            self.layer,
            query.detach(),
            keys.detach(),
            values.detach(),
            join_outputs([part.detach() for part in call.outputs], heads),
            *logits,
            latent=self.latent,
            bias=self.bias,
            parts=tuple(call.outputs),
        )

    def clear(self) -> None:
        """Forget everything, also a call that broke off."""
        super().clear()
        self._key = self._value = None
