"""The cadence of one layer: observe; at the boundary score, allocate, select, compact."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reasonalloc.allocators.head import HeadAllocator
from reasonalloc.attention import Backend
from reasonalloc.attention.distance import DistanceBias
from reasonalloc.attention.latent import LatentHeads
from reasonalloc.cache import AnySlab, CodedSlab, Rows, Slab
from reasonalloc.config import CompressionConfig
from reasonalloc.core.boundary import decide
from reasonalloc.core.cadence import Cadence
from reasonalloc.core.candidates import candidates_of
from reasonalloc.core.observation import observe_prefill
from reasonalloc.core.prefill import (
    Chunk,
    check_protected,
    joined_rows,
    most_tokens,
    new_positions,
    new_tokens,
)
from reasonalloc.core.progress import Progress
from reasonalloc.core.recorder import Recorder
from reasonalloc.core.steps import EagerStep, FixedStep, Held, Logits, Step, StepInput
from reasonalloc.core.storage import Storage, check_positions
from reasonalloc.core.window import QueryWindow
from reasonalloc.errors import UsageError
from reasonalloc.ops import choose_operations
from reasonalloc.policies import Policy


class LayerCompressor:
    """Cache and attention of one layer under a budget. Knows no engine.

    Args:
        layer: index of the layer in the model.
        total: tokens that all KV heads together keep after a compression.
        planned: tokens that each KV head was given beforehand, [kv_heads], or None.
        formats: how older tokens of each KV head are kept, [kv_heads], if that is planned: a head
            then never keeps more than its own tokens, whatever the others leave.
        config: budget, cadence, options.
        policy, heads, backend: which tokens, how many per head, how they are read; the backend
            says as well what boundaries, moves and fixed steps are computed with.
        recorder: takes note of every compression.

    Attributes:
        slab: the tokens; None before the first.
        progress: the counters.
        static: decode steps read nothing of the host, and leave its part to ``advance``.
        latent: how heads read what is stored, if keys are latents (MLA) and values are empty; set
            before ``forward``. None where keys and values are stored.
        bias: how queries with a bias by distance are read; set before ``forward``. None where they
            have none.
        differentiable: whether gradients flow through the attention.
    """

    differentiable = False

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
        formats: Sequence[str] | None = None,
    ) -> None:
        self.layer = layer
        self.total = total
        self._config = config
        self._policy = policy
        self._heads = heads
        self._backend = backend
        self._recorder = recorder
        self._wanted: Tensor | None = None  # what is planned, on the device, [kv_heads] int64
        self._ops = ops = choose_operations(backend.native)
        self._storage = Storage(total, config, planned, formats, policy.state_channels, ops)
        self._eager, self._fixed = EagerStep(policy, backend, ops), FixedStep(policy, backend, ops)
        self.slab: AnySlab | None = None
        self._queries: QueryWindow | None = None
        self.progress = Progress(Cadence(config.interval))
        self._logits = Logits(1.0)  # of the model
        self.static = False
        self.latent: LatentHeads | None = None
        self.bias: DistanceBias | None = None

    @property
    def waiting(self) -> int:
        """Layers that have yet to attend with the latest tokens; see ``SharedCompressor``."""
        return 0

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
        sinks: Tensor | None = None,
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
                Of latents: [batch, 1, q, rank + rotary] and [batch, 1, q, 0].
            mask: [batch, 1, q, q] bool over the new tokens, or None if all are real and causal.
                A key that the last query cannot see is padding and is not stored.
            scaling, softcap: of the attention logits.
            sinks: [query_heads] learned sinks, see ``reasonalloc.sinks``, or None.

        Returns:
            [batch, query_heads, q, value_dim].
        """
        slab = self.slab if self.slab is not None else self._allocate(query, key, value)
        self._check(slab, key)
        # Under autocast keys and values come in different types.
        key, value = key.to(slab.dtype), value.to(slab.dtype)
        queries, progress, logits = query.shape[2], self.progress, Logits(scaling, softcap, sinks)
        replayed = replay and progress.columns > 0
        if replayed and queries > progress.until_boundary:
            return self._in_pieces(query, key, value, mask, logits)
        valid = new_tokens(mask, queries)
        if valid is not None:
            progress.spread(slab.batch, key.device)
        if queries == 1 and progress.columns > 0:
            return self._decode(slab, query, key, value, valid, logits)
        return self._prefill(slab, query, key, value, mask, valid, logits, replayed)

    def _check(self, slab: AnySlab, key: Tensor) -> None:
        """Refuse another batch size or type than the cache holds."""
        if key.shape[0] != slab.batch:
            raise UsageError(
                f"the cache holds {slab.batch} sequences, the new tokens come in {key.shape[0]}: "
                "use a new cache for another batch size"
            )
        if key.dtype != slab.dtype and not torch.is_autocast_enabled(key.device.type):
            raise UsageError(
                f"the cache holds {slab.dtype}, the model computes in {key.dtype} now: start "
                "with a new cache"
            )

    def _in_pieces(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        logits: Logits,
    ) -> Tensor:
        """Replay more decode steps than there are before the next boundary."""
        pieces, end, queries = [], 0, query.shape[2]
        scaling, softcap, sinks = logits
        while end < queries:
            part = slice(end, end := min(end + self.progress.until_boundary, queries))
            own = None if mask is None else mask[..., part, part]
            new = (query[:, :, part], key[:, :, part], value[:, :, part])
            pieces.append(self.forward(*new, own, scaling, softcap, True, sinks))
        return torch.cat(pieces, dim=2)

    def _allocate(self, query: Tensor, key: Tensor, value: Tensor) -> AnySlab:
        self._backend.check(key.device, key.dtype)  # the model may have moved since
        self.slab = self._storage.empty(key, value, self.progress.pinned.room)
        if self._policy.needs_queries:
            self._queries = QueryWindow(query, self._config.window)
        planned = self._storage.planned
        if planned is not None:
            self._wanted = torch.tensor(planned, dtype=torch.int64, device=key.device)
        return self.slab

    def _decode(
        self,
        slab: AnySlab,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        logits: Logits,
    ) -> Tensor:
        out = self._step.run(self._held(slab), StepInput(query, key, value, valid, logits))
        self._logits = logits
        if not self.static:
            self._settle(slab)
        return out

    @property
    def _step(self) -> Step:
        return self._fixed if self.static else self._eager

    def _held(self, slab: AnySlab) -> Held:
        return Held(slab, self._queries, self.progress, self.latent, self.bias)

    @property
    def unsettled(self) -> bool:
        """Whether a static step has run that ``advance`` has not been told of."""
        return self.progress.unsettled

    @unsettled.setter
    def unsettled(self, value: bool) -> None:
        self.progress.unsettled = value

    def fix(self) -> None:
        """Prepare static steps, see ``FixedStep``."""
        if self.slab is None or self.progress.columns == 0:
            raise RuntimeError("a static step before the prompt")
        self.slab.make_ragged()
        self.progress.spread(self.slab.batch, self.slab.device)

    @property
    def evicted_at(self) -> int:
        """Columns at the latest compression that may have evicted tokens; 0 if none did."""
        return self.progress.evicted_at

    @property
    def protected_columns(self) -> int:
        """Columns of the first prompt, if it stays."""
        return 0 if self._config.prompt == "evict" else self.progress.prompt_columns

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
        slab, progress = self.slab, self.progress
        if slab is None:
            return
        before = progress.seen
        if self._queries is not None:
            self._queries.go_back(before, seen)
        taken_back = progress.columns - columns
        alike = isinstance(slab, Slab) and slab.uniform_length is not None
        if isinstance(slab, Slab) and alike and isinstance(before, int) and taken_back > 0:
            left = slab.shorten(taken_back)  # nothing is padding: all end alike
            progress.pinned.go_back(before - taken_back, holes=False)
            held = slab.kv_heads * (left - progress.pinned.most)
            progress.go_back(before - taken_back, held, columns)
        else:
            held = slab.remove(gone)
            progress.pinned.go_back(seen, holes=True)
            progress.go_back(seen, self._competing(slab, held), columns)

    def _competing(self, slab: AnySlab, held: int) -> int:
        """Tokens of the fullest sequence that are not pinned, of ``held`` in all; waits."""
        pinned = self.progress.pinned
        if not pinned:
            return held
        rows = slab.as_rows()
        there = torch.arange(rows.index.shape[-1], device=rows.lengths.device)
        free = (there < rows.lengths[..., None]) & ~pinned.mask(rows.gather(rows.positions))
        return int(free.sum(dim=(1, 2)).max())

    def clear(self) -> None:
        """Forget everything; the memory stays, but for that of what was pinned."""
        if self.slab is not None:
            self.slab.clear()
        if self.progress.pinned.room:
            self.slab = None
        if self._queries is not None:
            self._queries.clear()
        self.progress.clear()

    def copy(self, recorder: Recorder, sequences: Tensor | None = None) -> LayerCompressor:
        """The same content in memory of its own, with another recorder; see ``Slab.copy``."""
        twin = copy.copy(self)
        twin._recorder = recorder
        if sequences is not None and self.slab is not None:
            sequences = sequences.to(self.slab.device)
        twin.slab = None if self.slab is None else self.slab.copy(sequences)
        twin._queries = None if self._queries is None else self._queries.copy(sequences)
        twin.progress = self.progress.copy(sequences)
        return twin

    def report_to(self, recorder: Recorder) -> None:
        """Tell another recorder of compressions from now on."""
        self._recorder = recorder

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold."""
        tensors = {} if self.slab is None else self.slab.content()
        tensors |= {} if self._queries is None else self._queries.content()
        equal = self.slab is not None and self.slab.uniform_length is not None
        return tensors, {**self.progress.content(), "equal": equal}

    def fill(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], queries: tuple[int, int]
    ) -> None:
        """Take over what a layer with the same settings held; see ``content``.

        Args:
            tensors: where this layer is to be; none of an empty layer.
            numbers: read from a file, and not trusted.
            queries: query heads of the layer, and their width.

        Raises:
            ValueError, KeyError, TypeError: something is missing or does not fit.
        """
        self.progress.check(numbers)
        if not tensors:
            return
        names = ("tail_keys", "tail_values") if self._storage.coded else ("keys", "values")
        keys, values = (tensors[name] for name in names)
        batch, kv_heads = tensors["lengths"].shape
        self.progress.fill_pinned(numbers, batch, keys.device)
        room = self.progress.pinned.room
        given, own = tensors["positions"].shape[1], self._storage.slots(kv_heads, room)
        if given != own:  # before so much is allocated
            raise ValueError(f"{given} slots, not {own}")
        slab = self._allocate(
            keys.new_empty(batch, queries[0], 1, queries[1]),
            keys.new_empty(batch, kv_heads, 1, keys.shape[-1]),
            values.new_empty(batch, kv_heads, 1, values.shape[-1]),
        )
        left = self._config.interval - int(numbers["since"])
        slab.fill(tensors, bool(numbers["equal"]), left)
        if self._queries is not None:
            self._queries.fill(tensors)
        held = self._competing(slab, int(slab.held.sum(dim=1).max()))
        self.progress.fill(numbers, batch, held, keys.device)
        check_positions(slab, self.progress.per_sequence(batch, keys.device))

    def advance(self) -> None:
        """The host's part of a static step, after its device part was run or replayed."""
        if self.slab is None:
            raise RuntimeError("a static step before the prompt")
        self.slab.count()
        self._settle(self.slab)

    def _settle(self, slab: AnySlab) -> None:
        """Count a decode step on the host; at the end of an interval compress, or only code."""
        if not self.progress.step(slab.kv_heads):
            return
        if self.progress.held > self._storage.most:
            self._compress(slab, slab.as_rows(), self._logits)
        elif isinstance(slab, CodedSlab):
            rows = slab.as_rows()
            slab.rewrite(rows, rows.held, None)

    def _prefill(
        self,
        slab: AnySlab,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        logits: Logits,
        replayed: bool,
    ) -> Tensor:
        chunk = self._open(slab, key, value, mask, valid, replayed)
        out = chunk.attend(query, logits)
        self._close(chunk, query, logits)
        return out

    def _open(
        self,
        slab: AnySlab,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        valid: Tensor | None,
        replayed: bool,
    ) -> Chunk:
        """Make room for new tokens; return what their queries see."""
        progress, columns = self.progress, key.shape[2]
        past = slab.as_rows() if progress.columns else None
        if progress.columns == 0 and self._config.prompt == "protect":
            tokens = columns if valid is None else int(valid.sum(1).max())
            kept = self.total // slab.kv_heads
            check_protected(tokens, self.layer, kept, self._config.window)
        held = slab.kv_heads * most_tokens(valid, columns)
        if self._pins(replayed):
            held = slab.kv_heads * self._pin(columns, valid)
            slab, past = self._make_room(slab, key, value, past)
        how, places = (self.latent, self.bias), None
        if self.bias is not None:
            places = new_positions(key, progress.seen, valid)
        return Chunk(slab, past, key, value, mask, valid, held, replayed, *how, places)

    def _close(self, chunk: Chunk, query: Tensor, logits: Logits) -> None:
        """Store new tokens that have attended, and compress if that is due.

        Args:
            chunk: the tokens.
            query: [batch, query_heads, q, head_dim], of all that read the layer.
            logits: of their attention.
        """
        slab, key, progress, valid = chunk.slab, chunk.key, self.progress, chunk.valid
        rows, columns = self._rows_after(chunk, query, logits), key.shape[2]
        chunk.release()
        if self._queries is not None:
            self._queries.push(query, progress.seen, valid)
        due = progress.prefill(columns, valid, chunk.held, chunk.replayed)
        if due and progress.held > self._storage.most:
            self._compress(slab, rows, logits)
            return
        longest = rows.index.shape[-1]
        is_token = torch.arange(longest, device=key.device) < rows.lengths[..., None]
        alike = isinstance(progress.seen, int) and slab.uniform_length is not None
        slab.rewrite(rows, is_token, longest if alike else None, settle=progress.at_boundary)

    def _rows_after(self, chunk: Chunk, query: Tensor, logits: Logits) -> Rows:
        """What the layer holds after new tokens, before anything is evicted."""
        key, valid, past = chunk.key, chunk.valid, chunk.past
        positions = new_positions(key, self.progress.seen, valid)
        state = None
        if self._policy.state_channels:
            received = chunk.received(query, logits)
            state = observe_prefill(self._policy, past, positions, key.shape[1], received)
        return joined_rows(past, key, chunk.value, positions, valid, state)

    def _pins(self, replayed: bool) -> bool:
        """Whether the tokens of this prefill are to be pinned."""
        first = self.progress.columns == 0
        return self._config.prompt == "pin" and not replayed and (first or self._config.pin_turns)

    def _pin(self, columns: int, valid: Tensor | None) -> int:
        """Pin the new tokens; waits for the device if some are padding.

        Returns:
            How many of the fullest sequence are not pinned, because they are too many.

        Raises:
            UsageError: they are too many, and are to be refused then.
        """
        seen, limit = self.progress.seen, self._config.pin_limit
        start = seen.clone() if isinstance(seen, Tensor) else seen  # a step counts in place
        if valid is None:
            most = self._config.pinned(columns)
            self.progress.pinned.add(start, seen + most, most)
            return columns - most
        real = valid.sum(dim=1)
        self._config.pinned(int(real.max()))  # refuses
        pinned = real if limit is None else real.masked_fill(real > limit, 0)
        self.progress.pinned.add(start, seen + pinned, int(pinned.max()))
        return int((real - pinned).max())

    def _make_room(
        self, slab: AnySlab, key: Tensor, value: Tensor, past: Rows | None
    ) -> tuple[AnySlab, Rows | None]:
        """Return storage for what is pinned now, and the rows that are to be written to it."""
        pinned = self.progress.pinned.room
        if slab.slots >= self._storage.slots(slab.kv_heads, pinned):
            return slab, past
        self.slab = larger = self._storage.empty(key, value, pinned)
        if slab.uniform_length is None:
            larger.make_ragged()
        if past is not None and isinstance(slab, CodedSlab) and isinstance(larger, CodedSlab):
            larger.take_over(slab)  # what is coded stays so, bit by bit
            past = larger.as_rows()
        return larger, past

    def _compress(self, slab: AnySlab, rows: Rows, logits: Logits) -> None:
        seen, pinned = self.progress.seen, self.progress.pinned
        keep, budgets = decide(
            candidates_of(self.layer, self._held(slab), rows, logits, self._config),
            self._config,
            self._policy,
            self._heads,
            self.total,
            self._wanted,
            self.progress.prompt if self._config.prompt == "protect" else 0,
            self._ops,
            pinned,
            self._storage.formats is not None,
        )
        # One length for all runs: equal shares of a total that divides, no padding.
        equal = (
            self._heads.equal
            and self.total % slab.kv_heads == 0
            and isinstance(seen, int)
            and slab.uniform_length is not None
            and (not pinned or pinned.prefix is not None)
        )
        each = self.total // slab.kv_heads + pinned.most
        slab.rewrite(rows, keep, each if equal else None)
        self.progress.compressed(self.total)
        columns = self.progress.columns
        self._recorder.add(columns, self.layer, budgets, slab.as_rows)
