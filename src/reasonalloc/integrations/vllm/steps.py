"""A step's attention by the paged kernels, in tensors that stay where they are; without vLLM.

The host tells the device of a step in one copy that nobody waits for. Blocks and lengths are vLLM's
own tensors, and where tokens lie follows from the run tables inside the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reasonalloc.attention.kernels import paged as kernels
from reasonalloc.integrations.vllm.pages import Coded, Pages, joined
from reasonalloc.integrations.vllm.runs import QueryRows, Runs
from reasonalloc.integrations.vllm.views import CodedPool

_SLOTS, _ROWS, _POSITIONS, _RING = range(4)


def cells(caches: Sequence[Tensor], coded: Coded | None = None) -> tuple[Pages, kernels.Pool]:
    """The caches of all layers as pages, and as the kernels take them.

    Args:
        caches: per layer [blocks, kv_heads, block_size, 2 * head_dim], as vLLM binds them; the key
            and the value of a token lie beside each other, as vLLM's own kernels for GPUs have it.
        coded: how they hold numbers; None: as they are.
    """
    _, heads, size, width = caches[0].shape
    memory, dim, page = joined(caches), width // 2, size * width
    raw = memory.memory.view(-1, size, 2, dim).transpose(1, 2)
    steps = (memory.of_block, memory.of_layer, memory.of_head)
    block, layer, head = (step * page for step in steps)
    pool = kernels.Pool(
        memory.memory, len(caches), heads, size, dim, block, layer, head, width, dim
    )
    return Pages(raw, raw[:, 0], raw[:, 1], size, *steps, coded), pool


@dataclass(frozen=True)
class Step:
    """What differs between steps.

    Attributes:
        tokens: new ones, and padding where all requests have one.
        decodes: requests with one token; their rows come first, and padding is counted.
        splits: parts of a run: of its coded tokens and of the others, if some are coded.
        blocks: [rows, n] int32, of each request.
        seq_lens: [rows] int32, new tokens included; 0 for padding.
    """

    tokens: int
    decodes: int
    splits: tuple[int, ...]
    blocks: Tensor
    seq_lens: Tensor


class Steps:
    """Stores new tokens and attends for requests that have one each.

    Args:
        runs, queries: where tokens lie, the last queries; both are bound and prepared.
        pool: the pages.
        query: any tensor of the type and device of queries, [.., query_heads, head_dim].
        rows, tokens: most requests and most tokens of a step.
        scaling, softcap: of the logits; softcap 0 for none.
        bits: pages of coded tokens, or None.
        pinned: most tokens that a run holds besides those of the budget.
    """

    def __init__(
        self,
        runs: Runs,
        queries: QueryRows,
        pool: kernels.Pool,
        query: Tensor,
        rows: int,
        tokens: int,
        scaling: float,
        softcap: float,
        bits: CodedPool | None = None,
        pinned: int = 0,
    ) -> None:
        self._bits = bits
        self._runs, self._queries, self._pool, self._query = runs, queries, pool, query
        self._tables = kernels.RunTables(runs.first, runs.shift, runs.plain)
        self._scaling, self._softcap = scaling, softcap
        heads, dim = query.shape[-2:]
        device = query.device
        shape = (4, max(rows, tokens))
        self._facts = torch.zeros(shape, dtype=torch.int32, device=device)
        self._lse = torch.zeros(rows, heads, dtype=torch.float32, device=device)
        layout = runs.layout
        # A head's share of the largest layer; what a head has more is cut into the same parts. The
        # same in every step, so that a captured one can be replayed: a short prompt leaves parts
        # empty, which costs less than a long one in few parts.
        self._share = max(layout.totals) // layout.kv_heads + layout.reserve.interval + pinned
        floats = max(
            kernels.scratch_floats(n, heads, dim, sum(self._splits(n))) for n in range(1, rows + 1)
        )
        self._scratch = torch.zeros(floats, dtype=torch.float32, device=device)
        if bits is not None and device.type == "cuda":  # before a graph is captured
            for layer in range(runs.layers):
                kernels.prepare_coded(bits.coding.rows_of(layer), pool)

    def _splits(self, rows: int) -> tuple[int, ...]:
        if self._bits is None:
            return (kernels.decode_splits(rows, self._share, self._query, self._pool),)
        layout = self._runs.layout
        tail = self._bits.coding.window + layout.reserve.interval
        return kernels.coded_splits(rows, self._share, tail, self._query, self._pool)

    def next(
        self,
        slots: Sequence[int],
        before: Sequence[int],
        starts: Sequence[int],
        noted: tuple[Sequence[int], Sequence[int]],
        blocks: Tensor,
        seq_lens: Tensor,
    ) -> Step:
        """Tell the device of the next step.

        Whatever the step is, it is told in the same memory: after this call a CUDA graph of a step
        with as many rows, all of one token, can be replayed instead of storing and attending.

        Args:
            slots: [requests], of each request in the run tables; those with one token first.
            before: [requests], tokens of each in the cache.
            starts: [requests + 1], the first token of each, and the end.
            noted: tokens whose queries are remembered, and their rows.
            blocks, seq_lens: as in ``Step``; rows behind those of the requests are padding, which
                belongs to a step only if all its requests have one token.
        """
        rows, tokens = len(slots), starts[-1]
        begins = np.asarray(starts[:-1], dtype=np.int32)
        new = [b - a for a, b in itertools.pairwise(starts)]
        facts = np.full(self._facts.shape, -1, dtype=np.int32)
        facts[_SLOTS] = 0
        facts[_SLOTS, :rows] = slots
        facts[_ROWS, :tokens] = np.repeat(np.arange(rows, dtype=np.int32), new)
        offset = np.asarray(before, dtype=np.int32) - begins
        facts[_POSITIONS, :tokens] = np.arange(tokens, dtype=np.int32) + np.repeat(offset, new)
        if noted[0]:
            facts[_RING, noted[0]] = noted[1]
        host = torch.from_numpy(facts)
        if self._facts.device.type == "cuda":
            host = host.pin_memory()  # not given to others before the copy is done
        self._facts.copy_(host, non_blocking=True)
        decodes = next((row for row, n in enumerate(new) if n != 1), rows)
        if self._runs.state is not None:
            self._reset_state(rows, tokens, blocks)
        if decodes == rows:
            tokens = decodes = len(seq_lens)
        else:
            blocks, seq_lens = blocks[:rows], seq_lens[:rows]
        return Step(tokens, decodes, self._splits(max(1, decodes)), blocks, seq_lens)

    def _reset_state(self, rows: int, tokens: int, blocks: Tensor) -> None:
        """Forget what the policy knew of the tokens that were where new ones come."""
        row = self._facts[_ROWS, :tokens].long()
        slots = self._facts[_SLOTS, :rows].long()[row]
        places = self._runs.places(slots, self._facts[_POSITIONS, :tokens], blocks, row)
        if self._runs.state is not None:
            self._runs.state.index_fill_(0, places.flatten(), 0)  # waits for nothing

    def store(self, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step) -> None:
        """Write new keys and values [tokens, kv_heads, head_dim] to their runs, note queries."""
        some = slice(step.tokens)
        ring = self._queries.ring(layer)
        kernels.paged_store(
            key[some],
            value[some],
            query[some],
            self._pool,
            self._tables,
            layer,
            step.blocks,
            self._facts[_SLOTS, : len(step.blocks)],
            self._facts[_ROWS, some],
            self._facts[_POSITIONS, some],
            ring,
            None if ring is None else self._facts[_RING, some],
            *self._runs.pages.scales(layer),
        )

    def attend(
        self, layer: int, query: Tensor, out: Tensor, step: Step, sinks: Tensor | None = None
    ) -> None:
        """Attention of the requests with one token.

        Args:
            layer: which.
            query, out: [tokens, query_heads, head_dim]; out is written.
            step: the step.
            sinks: [kv_heads, group] float32 learned sinks of the layer, contiguous, or None.
        """
        some = slice(step.decodes)
        if not step.decodes:
            return
        where = (step.blocks[some], step.seq_lens[some], self._facts[_SLOTS, some])
        into = (out[some], self._lse[some], self._scratch)
        logits = (self._scaling, self._softcap, None if sinks is None else sinks.flatten())
        if self._bits is None:
            kernels.paged_decode(
                query[some],
                self._pool,
                self._tables,
                layer,
                *where,
                *into,
                step.splits[0],
                *logits,
                *self._runs.pages.scales(layer),
            )
            return
        kernels.paged_decode_coded(
            query[some],
            self._pool,
            self._tables,
            kernels.CodedTables(self._runs.coded, self._runs.begin),
            self._bits.coding.rows_of(layer),
            layer,
            *where,
            *into,
            step.splits[0],
            step.splits[1],
            *logits,
        )
