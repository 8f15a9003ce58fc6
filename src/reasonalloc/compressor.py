"""The cadence of one layer: observe; at the boundary score, allocate, select, compact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonalloc.allocators.head import HeadAllocator
from reasonalloc.attention import Backend
from reasonalloc.attention.dense import attend, received_blocks
from reasonalloc.boundary import decide
from reasonalloc.cache import Rows, Slab, slab_slots
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError
from reasonalloc.observation import observe_prefill, observe_step
from reasonalloc.policies import Candidates, Policy
from reasonalloc.prefill import (
    check_protected,
    joined_rows,
    most_tokens,
    new_positions,
    new_tokens,
    over_past,
)
from reasonalloc.recorder import Recorder
from reasonalloc.window import QueryWindow


class LayerCompressor:
    """Cache and attention of one layer under a budget. Knows no engine.

    Args:
        layer: index of the layer in the model.
        total: tokens that all KV heads together keep after a compression.
        planned: tokens that each KV head was given beforehand, [kv_heads], or None.
        config: budget, cadence, options.
        policy, heads, backend: which tokens, how many per head, how they are read.
        recorder: takes note of every compression.
    """

    def __init__(
        self,
        layer: int,
        total: int,
        config: CompressionConfig,
        policy: Policy,
        heads: HeadAllocator,
        backend: Backend,
        recorder: Recorder,
        planned: Sequence[int] | None = None,
    ) -> None:
        self.layer = layer
        self.total = total
        self._config = config
        self._policy = policy
        self._heads = heads
        self._backend = backend
        self._recorder = recorder
        self._planned = planned
        self._planned_tensor: Tensor | None = None
        self.slab: Slab | None = None
        self._queries: QueryWindow | None = None
        self._columns = 0  # tokens per sequence so far, padding included
        self._seen: int | Tensor = 0  # real tokens per sequence: one number, or [batch] int64
        self._prompt: int | Tensor = 0  # real tokens of the first prefill
        self._held = 0  # upper bound of the tokens held by a sequence, over all heads
        self._since = 0  # decode steps since the last boundary
        self._logits: tuple[float, float | None] = (1.0, None)  # scaling and softcap of the model
        #: Whether decode steps leave the host's part to ``advance``.
        self.static = False
        #: Whether a static step has run that ``advance`` has not been told of.
        self.unsettled = False

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes besides keys and values."""
        slab = 0 if self.slab is None else self.slab.bookkeeping_bytes
        return slab + (0 if self._queries is None else self._queries.nbytes)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        replay: bool = False,
    ) -> Tensor:
        """Attention of new tokens over the cache and themselves; stores them, compresses if due.

        A call with several tokens, and the first call, is a prefill: attended densely, with a
        boundary right after it. A call with one token is a decode step. With ``replay``, several
        tokens are as many decode steps at once: since nothing is evicted between boundaries, the
        tokens up to the next one are attended together, then it compresses, and so on, with the
        result of feeding them one by one.

        Args:
            query: [batch, query_heads, q, head_dim] after RoPE.
            key: [batch, kv_heads, q, head_dim] after RoPE; value: [batch, kv_heads, q, value_dim].
            mask: [batch, 1, q, q] bool over the new tokens, or None if all are real and causal.
                A key that the last query cannot see is padding and is not stored.
            scaling, softcap: of the attention logits.

        Returns:
            [batch, query_heads, q, value_dim].
        """
        queries = query.shape[2]
        slab = self.slab if self.slab is not None else self._allocate(query, key, value)
        if key.shape[0] != slab.batch:
            raise UsageError(
                f"the cache holds {slab.batch} sequences, the new tokens come in {key.shape[0]}: "
                "use a new cache for another batch size"
            )
        # Under autocast keys and values come in different types.
        key, value = key.to(slab.keys.dtype), value.to(slab.values.dtype)
        again = replay and self._columns > 0
        if again and queries > self.until_boundary:
            pieces, end = [], 0
            while end < queries:
                part = slice(end, end := min(end + self.until_boundary, queries))
                own = None if mask is None else mask[..., part, part]
                new = (query[:, :, part], key[:, :, part], value[:, :, part])
                pieces.append(self.forward(*new, own, scaling, softcap, replay=True))
            return torch.cat(pieces, dim=2)
        valid = new_tokens(mask, queries)
        if valid is not None and isinstance(self._seen, int):
            batch = slab.batch
            self._seen = torch.full((batch,), self._seen, device=key.device)
        if queries == 1 and self._columns > 0:
            return self._decode(slab, query, key, value, valid, scaling, softcap)
        return self._prefill(slab, query, key, value, mask, valid, scaling, softcap, not again)

    @property
    def until_boundary(self) -> int:
        """Decode steps that are left before the next boundary."""
        return self._config.interval - self._since

    def _allocate(self, query: Tensor, key: Tensor, value: Tensor) -> Slab:
        batch, kv_heads, _, head_dim = key.shape
        self._backend.check(key.device, key.dtype)  # the model may have moved since
        self.slab = Slab(
            batch,
            kv_heads,
            slab_slots(self.total, kv_heads, self._config.interval),
            head_dim,
            value.shape[-1],
            dtype=key.dtype,
            device=key.device,
            state_channels=self._policy.state_channels,
            native=self._backend.native,
        )
        if self._policy.needs_queries:
            self._queries = QueryWindow(query, self._config.window)
        if self._planned is not None:
            self._planned_tensor = torch.tensor(self._planned, device=key.device)
        return self.slab

    def _decode(
        self,
        slab: Slab,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        watching = self._policy.state_channels > 0
        ring = None if self._queries is None else self._queries.ring
        if (
            self.static
            and self._backend.native
            and valid is None
            and isinstance(self._seen, Tensor)
            and (ring is None or ring.dtype == query.dtype)  # differ under autocast
        ):
            from reasonalloc.native.attention import NewToken, step

            new = NewToken(key, value, slab.positions, self._seen, slab.state, ring)
            out, received = step(query, slab, new, scaling, softcap, watching)
        else:
            if self.static:
                slab.store(key, value, self._seen, valid)
            else:
                slab.append(key, value, self._seen, valid)
            if self._queries is not None:
                self._queries.push(query, self._seen, valid)
            out, received = self._backend.decode(query, slab, scaling, softcap, watching)
        if received is not None:
            group = query.shape[1] // slab.kv_heads
            observe_step(self._policy, slab, received, group, self._seen, valid)
        self._seen += 1 if valid is None else valid.squeeze(1).long()  # a tensor: where it lies
        self._logits = (scaling, softcap)
        self.unsettled = True
        if not self.static:
            self._settle(slab)
        return out

    def fix(self) -> None:
        """Prepare static steps: their device part reads nothing that the host knows.

        Lengths, offsets and positions are on the device, where they stay at one address, and so do
        keys, values, queries and the policy's state: a captured step may be replayed.
        """
        if self.slab is None or self._columns == 0:
            raise RuntimeError("a static step before the prompt")
        self.slab.make_ragged()
        self._seen = _per_sequence(self._seen, self.slab)

    def advance(self) -> None:
        """The host's part of a static step, after its device part was run or replayed."""
        if self.slab is None:
            raise RuntimeError("a static step before the prompt")
        self.slab.count()
        self._settle(self.slab)

    def _settle(self, slab: Slab) -> None:
        """Count a decode step on the host; compress if it completes an interval."""
        self.unsettled = False
        self._columns += 1
        self._held += slab.kv_heads
        self._since += 1
        if self._since == self._config.interval:
            self._since = 0
            if self._held > self.total:
                self._compress(slab, slab.as_rows(), *self._logits)

    def _prefill(
        self,
        slab: Slab,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
        boundary: bool,
    ) -> Tensor:
        heads, columns = key.shape[1:3]
        past = slab.as_rows() if self._columns else None
        keys, values, visible = key, value, mask
        if past is not None:
            keys = torch.cat([past.gather(past.keys), key], dim=2)
            values = torch.cat([past.gather(past.values), value], dim=2)
            visible = over_past(past, mask, columns, query.shape[1])
        out = attend(query, keys, values, visible, scaling, softcap)
        positions = new_positions(key, self._seen, valid)
        state = None
        if self._policy.state_channels:
            received = received_blocks(query, keys, visible, valid, scaling, softcap)
            state = observe_prefill(self._policy, past, positions, heads, received)
        if self._queries is not None:
            self._queries.push(query, self._seen, valid)
        rows = joined_rows(past, key, value, positions, valid, state)
        if self._columns == 0:
            self._prompt = columns if valid is None else valid.sum(dim=1)
            if self._config.protect_prompt:
                tokens = columns if valid is None else int(valid.sum(1).max())
                check_protected(tokens, self.layer, self.total // heads, self._config.window)
        self._seen = self._seen + (columns if valid is None else valid.sum(dim=1))
        self._columns += columns
        self._held += heads * most_tokens(valid, columns)
        # A prefill ends with a boundary; replayed decode steps do if they complete the interval.
        self._since = 0 if boundary else (self._since + columns) % self._config.interval
        if self._held > self.total and self._since == 0:
            self._compress(slab, rows, scaling, softcap)
        else:
            index = torch.arange(rows.index.shape[-1], device=key.device)
            known = isinstance(self._seen, int) and slab.uniform_length is not None
            slab.rewrite(
                rows,
                index < rows.lengths[..., None],
                rows.index.shape[-1] if known else None,
            )
        return out

    def _compress(self, slab: Slab, rows: Rows, scaling: float, softcap: float | None) -> None:
        config = self._config
        candidates = Candidates(
            lengths=rows.lengths,
            positions=rows.gather(rows.positions).long(),
            load_keys=lambda: rows.gather(rows.keys),
            load_values=lambda: rows.gather(rows.values),
            queries=None if self._queries is None else self._queries.read(self._seen, slab),
            query_positions=None if self._queries is None else self._queries.positions(self._seen),
            state=None if rows.state is None else rows.gather(rows.state),
            seen=_per_sequence(self._seen, slab),
            window=config.window,
            scaling=scaling,
            softcap=softcap,
            layer=self.layer,
            seed=config.seed,
            stored=(rows.keys, rows.index) if self._backend.native else None,
        )
        keep, budgets = decide(
            candidates,
            config,
            self._policy,
            self._heads,
            self.total,
            self._planned_tensor,
            self._prompt if config.protect_prompt else 0,
        )
        # One length for all runs: equal shares of a total that divides, no padding.
        equal = (
            self._heads.equal
            and self.total % slab.kv_heads == 0
            and isinstance(self._seen, int)
            and slab.uniform_length is not None
        )
        slab.rewrite(rows, keep, self.total // slab.kv_heads if equal else None)
        self._held = min(self._held, self.total)
        self._recorder.add(self._columns, self.layer, budgets, slab.positions, slab.offsets)


def _per_sequence(seen: int | Tensor, slab: Slab) -> Tensor:
    if isinstance(seen, Tensor):
        return seen
    return torch.full((slab.batch,), seen, device=slab.keys.device)
