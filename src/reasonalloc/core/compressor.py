"""The cadence of one layer: observe; at the boundary score, allocate, select, compact."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reasonalloc.allocators.head import HeadAllocator
from reasonalloc.attention import Backend
from reasonalloc.attention.dense import attend, received_blocks
from reasonalloc.cache import Rows, Slab
from reasonalloc.config import CompressionConfig
from reasonalloc.core.boundary import decide
from reasonalloc.core.observation import observe_prefill, observe_step
from reasonalloc.core.prefill import (
    check_protected,
    joined_rows,
    most_tokens,
    new_positions,
    new_tokens,
    over_past,
)
from reasonalloc.core.recorder import Recorder
from reasonalloc.core.window import QueryWindow
from reasonalloc.errors import UsageError
from reasonalloc.planning.memory import slab_slots
from reasonalloc.policies import Candidates, Policy

_COUNTERS = ("columns", "since", "evicted_at", "prompt_columns")


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
        self._prompt_columns = 0
        self._held = 0  # upper bound of the tokens held by a sequence, over all heads
        self._since = 0  # decode steps since the last boundary
        self._logits: tuple[float, float | None] = (1.0, None)  # scaling and softcap of the model
        #: Columns at the latest compression that may have evicted tokens; 0 if none did.
        self.evicted_at = 0
        self._boundaries: list[int] = []  # columns at the boundaries since then, that one included
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
        if key.dtype != slab.keys.dtype and not torch.is_autocast_enabled(key.device.type):
            raise UsageError(
                f"the cache holds {slab.keys.dtype}, the model computes in {key.dtype} now: start "
                "with a new cache"
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
            self._seen = torch.full((batch,), self._seen, dtype=torch.int64, device=key.device)
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
            self._planned_tensor = torch.tensor(self._planned, dtype=torch.int64, device=key.device)
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
            from reasonalloc.ops.native.attention import NewToken, step

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

    @property
    def protected_columns(self) -> int:
        """Columns of the first prompt, if it is protected."""
        return self._prompt_columns if self._config.protect_prompt else 0

    @property
    def keeps_state(self) -> bool:
        """Whether the policy keeps numbers per token, which cannot go back."""
        return self._policy.state_channels > 0

    def drop(self, gone: Tensor, seen: Tensor, columns: int) -> None:
        """Remove tokens that are no longer part of the text; waits for the device.

        Args:
            gone: [batch, positions] bool, true for the positions to be removed.
            seen: [batch] int64, position of the next token of each sequence.
            columns: columns of the text; fewer than before if its end is taken back, which must
                not lie before ``evicted_at``.
        """
        slab, before = self.slab, self._seen
        if slab is None:
            return
        if self._queries is not None:
            self._queries.go_back(before, seen)
        if isinstance(before, int) and slab.uniform_length is not None and columns < self._columns:
            self._seen = before - (self._columns - columns)  # nothing is padding: all end alike
            slab.shorten(before - self._seen)
            self._held -= slab.kv_heads * (before - self._seen)
        else:
            self._held = slab.remove(gone)
            if isinstance(before, Tensor):
                before.copy_(seen)  # in place: a captured step reads it there
            else:
                self._seen = seen.clone()
        if isinstance(self._prompt, Tensor) or isinstance(self._seen, Tensor):
            prompt, now = (
                torch.as_tensor(x, dtype=torch.int64, device=gone.device)
                for x in (self._prompt, self._seen)
            )
            self._prompt = torch.minimum(prompt, now)
        else:
            self._prompt = min(self._prompt, self._seen)
        if columns < self._columns:
            self._columns = columns
            self._since = self._steps_since_boundary(columns)

    def _steps_since_boundary(self, columns: int) -> int:
        """What ``_since`` was when the text had so many columns, or 0 if it was in a prefill."""
        self._boundaries = [place for place in self._boundaries if place <= columns]
        since = columns - self._boundaries[-1] if self._boundaries else self._config.interval
        if since >= self._config.interval:
            self._boundaries.append(columns)
            return 0
        return since

    def clear(self) -> None:
        """Forget everything; the memory stays."""
        if self.slab is not None:
            self.slab.clear()
        if self._queries is not None:
            self._queries.clear()
        self._columns = self._held = self._since = self.evicted_at = 0
        self._seen, self._prompt, self._boundaries = 0, 0, []
        self._prompt_columns, self.unsettled = 0, False

    def copy(self, recorder: Recorder, sequences: Tensor | None = None) -> LayerCompressor:
        """The same content in memory of its own, with another recorder; see ``Slab.copy``."""
        twin = copy.copy(self)
        twin._recorder, twin._boundaries = recorder, list(self._boundaries)
        if sequences is not None and self.slab is not None:
            sequences = sequences.to(self.slab.keys.device)
        twin.slab = None if self.slab is None else self.slab.copy(sequences)
        twin._queries = None if self._queries is None else self._queries.copy(sequences)
        for name in ("_seen", "_prompt"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(twin, name, value.clone() if sequences is None else value[sequences])
        return twin

    def report_to(self, recorder: Recorder) -> None:
        """Tell another recorder of compressions from now on."""
        self._recorder = recorder

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold."""
        tensors = {} if self.slab is None else self.slab.content()
        tensors |= {} if self._queries is None else self._queries.content()
        numbers: dict[str, Any] = {
            "columns": self._columns,
            "since": self._since,
            "prompt_columns": self._prompt_columns,
            "evicted_at": self.evicted_at,
            "boundaries": self._boundaries,
            "equal": self.slab is not None and self.slab.uniform_length is not None,
        }
        for name, value in (("seen", self._seen), ("prompt", self._prompt)):
            numbers[name] = value.tolist() if isinstance(value, Tensor) else value
        return tensors, numbers

    def fill(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], query_heads: int
    ) -> None:
        """Take over what a layer with the same settings held; see ``content``.

        Args:
            tensors: where this layer is to be; none of an empty layer.
            numbers: read from a file, and not trusted.
            query_heads: of the layer.

        Raises:
            ValueError, KeyError, TypeError: something is missing or does not fit.
        """
        counts = {name: int(numbers[name]) for name in _COUNTERS}
        boundaries = [int(place) for place in numbers["boundaries"]]
        if not 0 <= counts["since"] < self._config.interval or not (
            0 <= counts["evicted_at"] <= counts["columns"]
            and 0 <= counts["prompt_columns"] <= counts["columns"]
        ):
            raise ValueError(f"counters {counts} cannot be")
        if boundaries != sorted(boundaries) or not all(
            0 <= place <= counts["columns"] for place in boundaries
        ):
            raise ValueError(f"boundaries {boundaries} cannot be")
        if not tensors:
            return
        keys, values = tensors["keys"], tensors["values"]
        batch, kv_heads = tensors["lengths"].shape
        query = keys.new_empty(batch, query_heads, 1, keys.shape[2])
        slab = self._allocate(
            query,
            keys.new_empty(batch, kv_heads, 1, keys.shape[2]),
            values.new_empty(batch, kv_heads, 1, values.shape[2]),
        )
        slab.fill(tensors, bool(numbers["equal"]), self._config.interval - counts["since"])
        if self._queries is not None:
            self._queries.fill(tensors)
        self._seen = _count(numbers["seen"], batch, counts["columns"], keys.device)
        self._prompt = _count(numbers["prompt"], batch, counts["columns"], keys.device)
        _check_positions(slab, _per_sequence(self._seen, slab))
        self._columns, self._since = counts["columns"], counts["since"]
        self._prompt_columns = counts["prompt_columns"]
        self.evicted_at, self._boundaries = counts["evicted_at"], boundaries
        self._held = int(slab.lengths.sum(dim=1).max())

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
            self._boundaries.append(self._columns)
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
            self._prompt_columns = columns
            self._prompt = columns if valid is None else valid.sum(dim=1)
            if self._config.protect_prompt:
                tokens = columns if valid is None else int(valid.sum(1).max())
                check_protected(tokens, self.layer, self.total // heads, self._config.window)
        self._seen = self._seen + (columns if valid is None else valid.sum(dim=1))
        self._columns += columns
        self._held += heads * most_tokens(valid, columns)
        # A prefill ends with a boundary; replayed decode steps do if they complete the interval.
        self._since = 0 if boundary else (self._since + columns) % self._config.interval
        if self._since == 0:
            self._boundaries.append(self._columns)
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
        self.evicted_at, self._boundaries = self._columns, [self._columns]
        self._held = min(self._held, self.total)
        self._recorder.add(self._columns, self.layer, budgets, slab.positions, slab.offsets)


def _per_sequence(seen: int | Tensor, slab: Slab) -> Tensor:
    if isinstance(seen, Tensor):
        return seen
    return torch.full((slab.batch,), seen, dtype=torch.int64, device=slab.keys.device)


def _count(value: Any, batch: int, most: int, device: torch.device) -> int | Tensor:
    """A number of tokens, for all sequences or each, read from a file."""
    numbers = value if isinstance(value, list) else [value]
    if any(not isinstance(n, int) or not 0 <= n <= most for n in numbers):
        raise ValueError(f"{value!r} is no number of tokens up to {most}")
    if not isinstance(value, list):
        return int(value)
    if len(value) != batch:
        raise ValueError(f"{len(value)} numbers of tokens for {batch} sequences")
    return torch.tensor(value, dtype=torch.int64, device=device)


def _check_positions(slab: Slab, seen: Tensor) -> None:
    """Refuse positions that do not rise inside a run, or lie outside of the text."""
    rows = slab.as_rows()
    held = torch.arange(rows.index.shape[-1], device=seen.device) < rows.lengths[..., None]
    places = rows.gather(rows.positions)
    inside = (places >= 0) & (places < seen[:, None, None])
    rising = places[..., 1:] > places[..., :-1]
    if not bool((inside | ~held).all()) or not bool((rising | ~held[..., 1:]).all()):
        raise ValueError("positions do not rise, or lie outside of the text")
