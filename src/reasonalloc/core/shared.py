"""One layer whose cache several layers of the model read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from reasonalloc.cache import AnySlab
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.prefill import Chunk, new_tokens
from reasonalloc.core.steps import Logits, StepInput
from reasonalloc.errors import UnsupportedError


@dataclass
class Call:
    """New tokens that some readers of a layer have attended with, and others have not.

    Attributes:
        queries, logits: of the readers so far.
    """

    queries: list[Tensor] = field(default_factory=list, kw_only=True)
    logits: list[Logits] = field(default_factory=list, kw_only=True)

    def joined(self, kv_heads: int) -> tuple[Tensor, Logits]:
        """Queries and logits of all readers, as of one whose groups are those of all together."""
        return join_heads(self.queries, kv_heads), join_logits(self.logits, kv_heads)


@dataclass
class SharedCall(Call):
    """The same over a layer under a budget.

    Attributes:
        slab: where they are stored.
        key, value: [batch, kv_heads, q, ...], in the types of the slab.
        valid: [batch, q] bool, false at padding; None if all are real.
        chunk: what they see, if they are several or the first; None of a decode step.
        received: of a decode step [batch, slots], over the readers so far; None if not watched.
    """

    slab: AnySlab
    key: Tensor
    value: Tensor
    valid: Tensor | None
    chunk: Chunk | None = None
    received: Tensor | None = None

    def add(self, query: Tensor, logits: Logits, received: Tensor | None) -> None:
        """Take note of a reader that has attended."""
        self.queries.append(query)
        self.logits.append(logits)
        if received is not None:
            self.received = received if self.received is None else self.received + received


_Own = TypeVar("_Own", bound=Call)


class ReadLayer(LayerCompressor, Generic[_Own]):
    """A layer whose ``forward`` is called once for each of its readers with the same new tokens.

    Args:
        settings: see ``LayerCompressor``.
        readers: number of layers that read the cache.
    """

    def __init__(self, *settings: Any, readers: int) -> None:
        super().__init__(*settings)
        self.readers = readers
        self._call: _Own | None = None

    @property
    def waiting(self) -> int:
        """Readers that have not attended with the latest tokens yet; 0 between calls."""
        return 0 if self._call is None else self.readers - len(self._call.queries)

    def clear(self) -> None:
        """Forget everything, also a call that broke off."""
        super().clear()
        self._call = None


class SharedCompressor(ReadLayer[SharedCall]):
    """Cache and attention of a layer whose cache several layers read, itself among them.

    All readers see what the layer held before and the new tokens; the cadence goes on with the last
    one. Policies get the queries of all: the group of a KV head has the query heads of every
    reader.
    """

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
        """Attention of one reader; see ``LayerCompressor.forward``.

        The first reader's call stores the new tokens or prepares that, the last one's ends it.

        Raises:
            UnsupportedError: readers that have other queries than tokens, or other logits.
            ValueError: a replay over a boundary, which has to be fed in pieces.
        """
        if query.shape[2] != key.shape[2]:
            raise UnsupportedError(
                f"a layer reads a shared cache with {query.shape[2]} of {key.shape[2]} queries, "
                "which cannot run under a KV budget: detach ReasonAlloc to run this model"
            )
        if self._call is None:
            self._call = self._begin(query, key, value, mask, replay)
        call, logits = self._call, Logits(scaling, softcap, sinks)
        received = None
        if call.chunk is not None:
            out = call.chunk.attend(query, logits)
        else:
            out, received = self._step.read(self._held(call.slab), query, logits)
        call.add(query, logits, received)
        if len(call.queries) == self.readers:
            self._end(call)
            self._call = None
        return out

    def _begin(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, replay: bool
    ) -> SharedCall:
        slab, progress, queries = self.slab, self.progress, query.shape[2]
        if slab is None:
            slab = self._allocate(join_heads([query] * self.readers, key.shape[1]), key, value)
        self._check(slab, key)
        key, value = key.to(slab.dtype), value.to(slab.dtype)
        replayed = replay and progress.columns > 0
        if replayed and queries > progress.until_boundary:
            raise ValueError(
                f"{queries} tokens are replayed {progress.until_boundary} before a boundary: feed "
                "a shared cache up to its boundaries"
            )
        valid = new_tokens(mask, queries)
        if valid is not None:
            progress.spread(slab.batch, key.device)
        call = SharedCall(slab, key, value, valid)
        if queries == 1 and progress.columns > 0:
            self._step.store(
                self._held(call.slab), StepInput(query, key, value, valid, Logits(1.0))
            )
        else:
            call.chunk = self._open(slab, key, value, mask, valid, replayed)
        return call

    def _end(self, call: SharedCall) -> None:
        query, logits = call.joined(call.slab.kv_heads)
        if call.chunk is not None:
            self._close(call.chunk, query, logits)
            return
        new = StepInput(query, call.key, call.value, call.valid, logits)
        self._step.finish(self._held(call.slab), new, call.received)
        self._logits = logits
        if not self.static:
            self._settle(call.slab)


def join_heads(queries: Sequence[Tensor], kv_heads: int) -> Tensor:
    """Join the query heads of several layers, group by group.

    Args:
        queries: each [batch, query_heads, q, head_dim].
        kv_heads: of the cache that all of them read.

    Returns:
        [batch, query_heads of all, q, head_dim]: for each KV head those of the first, the second...
    """
    if len(queries) == 1:
        return queries[0]
    groups = [query.unflatten(1, (kv_heads, -1)) for query in queries]
    return torch.cat(groups, dim=2).flatten(1, 2)


def join_logits(logits: Sequence[Logits], kv_heads: int) -> Logits:
    """Join how the readers of a cache make weights of logits, as ``join_heads`` joins queries.

    Raises:
        UnsupportedError: they do it differently.
    """
    sinks = [one.sinks for one in logits if one.sinks is not None]
    first = logits[0]
    if len(sinks) not in (0, len(logits)) or any(one[:2] != first[:2] for one in logits):
        raise UnsupportedError(
            "layers that share a cache scale, cap or bound their attention logits differently, "
            "which cannot run under a KV budget: detach ReasonAlloc to run this model"
        )
    whole = torch.cat([sink.view(kv_heads, -1) for sink in sinks], dim=1) if sinks else None
    return Logits(first.scaling, first.softcap, None if whole is None else whole.flatten())
