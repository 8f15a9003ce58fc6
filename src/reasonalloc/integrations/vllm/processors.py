"""A step's attention on processors: tables of pages for vLLM's own kernel, or for our loops."""

from __future__ import annotations

import itertools
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.integrations.vllm.builder import BudgetBuilder
from reasonalloc.integrations.vllm.kernels import CpuKernel, Kernel, have_loops
from reasonalloc.integrations.vllm.metadata import BudgetMetadata, Piece, SplitMetadata
from reasonalloc.integrations.vllm.runs import NO_REQUEST, Batch, dummy_batch, send
from reasonalloc.integrations.vllm.spec import BudgetSpec
from reasonalloc.ops.native.paged import Layout, PagedLoop


class ProcessorBuilder(BudgetBuilder):
    """Metadata with a table of pages, which is made on the host."""

    def __init__(
        self,
        kv_cache_spec: BudgetSpec,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layout = self.runs.layout
        self._tables: dict[bool, tuple[Any, Tensor]] = {}
        self._loops = self._coded is None and have_loops(vllm_config.model_config.dtype)
        self._check_bits(self._loops)
        # Equal budgets: no need to look at the layers one by one.
        self.layers_alike = (
            len(set(layout.totals)) == 1
            and layout.totals[0] % layout.kv_heads == 0
            and HEAD_ALLOCATORS.create(self._plan.config.arm.heads).equal
        )

    @cached_property
    def kernel(self) -> Kernel:
        """The kernel of all layers."""
        impl = self._modules[0].impl
        return CpuKernel(
            impl.scale,
            impl.logits_soft_cap,
            impl.num_heads // impl.num_kv_heads,
            impl.head_size,
            self.kv_cache_spec.block_size,
            self.vllm_config.model_config.dtype,
            1 if self._sinks is None else impl.num_kv_heads,
            self._coded,
        )

    def _bind(self) -> None:
        if not self.runs.bound:
            self._bind_pages(self.kernel.pages([module.kv_cache for module in self._modules]))
            if self._loops:
                pages = self.runs.pages
                self._native = Layout.of(pages.raw, pages.keys, pages.values)
            if self._bits is not None and self._native is None:
                raise RuntimeError("our own attention cannot read vLLM's pool")

    @cached_property
    def _loop(self) -> PagedLoop | None:
        """Attention of steps with one token per request; None if there is none of our own."""
        if self._native is None:
            return None
        impl = self._modules[0].impl
        group = impl.num_heads // impl.num_kv_heads
        cap = impl.logits_soft_cap or 0.0
        coded = None if self._bits is None else self._bits.in_loops
        return PagedLoop(self._native, group, impl.num_kv_heads, impl.scale, cap, coded)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> BudgetMetadata | SplitMetadata:
        """Metadata of one step."""
        common, batch, self._batch = common_attn_metadata, self._batch, None
        starts = common.query_start_loc_cpu.tolist()
        new = [b - a for a, b in itertools.pairwise(starts)]
        if batch is None:
            self._due, self._unseen = [], []
            after = common.seq_lens.tolist()
            batch = dummy_batch([n - q for n, q in zip(after, new, strict=True)], after)
        self._bind()
        blocks, seq_lens = common.block_table_tensor, common.seq_lens
        self._blocks = blocks
        prompts = self._prompts(batch, starts) if self._observes else []
        if self._bits is None or min(new) > 1 or max(new) == 1:
            return self._part(batch, new, blocks, seq_lens, prompts)
        # Our own loop alone reads fewer bits, and vLLM's kernel alone takes several tokens.
        parts = list[tuple[Tensor | None, BudgetMetadata]]()
        for alone in (True, False):
            rows = [row for row, count in enumerate(new) if (count == 1) == alone]
            tokens = [token for row in rows for token in range(starts[row], starts[row + 1])]
            own, where = send(self.device, rows, tokens)
            some = Batch(
                [batch.requests[row] for row in rows],
                [batch.before[row] for row in rows],
                [batch.after[row] for row in rows],
            )
            counts = [new[row] for row in rows]
            parts.append((where, self._part(some, counts, blocks[own], seq_lens[own], [])))
        return SplitMetadata(self, prompts, parts)

    def _part(
        self,
        batch: Batch,
        new: list[int],
        blocks: Tensor,
        seq_lens: Tensor,
        prompts: list[Piece],
    ) -> BudgetMetadata:
        """Metadata of requests whose tokens follow each other.

        Args:
            batch: they.
            new: tokens of each.
            blocks: [requests, n] int32; seq_lens: [requests] int32.
            prompts: see ``BudgetMetadata``.
        """
        runs, starts = self.runs, [0, *itertools.accumulate(new)]
        heads, tokens = runs.heads, starts[-1]
        slots, begins = send(self.device, batch.slots, starts)
        lengths = runs.lengths(slots, seq_lens)
        alone = tokens == len(new)
        table = self._table(batch, slots, lengths, blocks, alone)
        loop = self._loop if alone else None
        by_head = loop is None and (not alone or self._sinks is not None)
        new_slots = self._new_slots(table, lengths, new, starts)
        if runs.state is not None:
            runs.state.index_fill_(0, new_slots.flatten(), 0)
        if by_head:
            table, lengths = table.transpose(1, 2), lengths.transpose(1, 2)
            offset = torch.arange(heads, device=self.device)[:, None] * tokens
            query_start = torch.cat([(begins[:-1] + offset).flatten(), offset[-1] + tokens])
            query_start = query_start.to(torch.int32)
        else:
            query_start = torch.arange(len(new) * heads + 1, dtype=torch.int32, device=self.device)
        lengths, table = lengths.flatten(1).contiguous(), table.flatten(1, 2).contiguous()
        noted = self._noted(batch, starts)
        if loop is not None:
            coded = begin = None
            if self._bits is not None:
                coded, begin = (t[:, slots].flatten(1) for t in (runs.coded, runs.begin))
            loop.begin(table, lengths, new_slots, noted, coded, begin)
        elif self._bits is not None and any(
            request.slot != NO_REQUEST and before >= request.start
            for request, before in zip(batch.requests, batch.before, strict=True)
        ):
            raise RuntimeError("a request that was compressed came with several tokens")
        return BudgetMetadata(
            builder=self,
            tokens=tokens,
            by_head=by_head,
            query_start=query_start,
            lengths=lengths,
            table=table,
            slots=new_slots,
            noted=noted,
            longest_query=max(new),
            prompts=prompts,
            loop=loop,
            begun=0 if loop is None else loop.begun,
        )

    def _table(
        self, batch: Batch, slots: Tensor, lengths: Tensor, blocks: Tensor, alone: bool
    ) -> Tensor:
        """[L, requests, H, pages]; made anew only if runs, requests or their blocks changed.

        The last one of steps with one token per request is kept, and that of others: ``alone``.
        """
        size = self.kv_cache_spec.block_size
        pages = -(-int(lengths.max()) // size)
        needed = self.runs.layout.reserve.needed
        held = [needed(r.start, n) for r, n in zip(batch.requests, batch.after, strict=True)]
        key = (self.runs.version, pages, batch.slots, held)
        if alone not in self._tables or self._tables[alone][0] != key:
            self._tables[alone] = key, self.runs.table(slots, blocks, pages)
        return self._tables[alone][1]

    def _new_slots(
        self, table: Tensor, lengths: Tensor, new: list[int], starts: list[int]
    ) -> Tensor:
        """[L, tokens * H] int64: where the new tokens go, the last ones of their runs.

        Args:
            table: [L, requests, H, pages]; lengths: [L, requests, H], new tokens included.
            new: tokens of each request; starts: the first token of each, and the end.
        """
        layers, requests, heads, pages = table.shape
        size = self.kv_cache_spec.block_size
        place, row = lengths.long() - 1, torch.arange(requests, device=self.device)
        if starts[-1] > requests:
            rows = [row for row, count in enumerate(new) for _ in range(count)]
            behind = [
                end - 1 - n
                for end, start in zip(starts[1:], starts, strict=False)
                for n in range(start, end)
            ]
            row, after = send(self.device, rows, behind)
            place = place[:, row] - after[:, None]
        run = torch.arange(layers, device=self.device)[:, None, None] * requests + row[:, None]
        run = run * heads + torch.arange(heads, device=self.device)
        page = table.reshape(-1).take(run * pages + place // size)
        return (page.long() * size + place % size).flatten(1)

    def _noted(self, batch: Batch, starts: list[int]) -> tuple[Tensor, Tensor, Tensor] | None:
        """``_wanted`` on the device; None of none."""
        tokens, rows, places = self._wanted(batch, starts)
        if not tokens:
            return None
        return tuple(send(self.device, tokens, rows, places))  # type: ignore[return-value]
