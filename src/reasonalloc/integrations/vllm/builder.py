"""Requests of a step of vLLM as runs: what is known of them, and compression after the step."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.v1.attention.backend import AttentionMetadataBuilder

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm.budget import EngineBudget, find_budget
from reasonalloc.integrations.vllm.checks import check_bits
from reasonalloc.integrations.vllm.compression import Due, PoolCompressor
from reasonalloc.integrations.vllm.metadata import BudgetMetadata, Piece
from reasonalloc.integrations.vllm.observation import FLUSH, PoolObserver, Unseen
from reasonalloc.integrations.vllm.pages import Coded, Pages, coded_of
from reasonalloc.integrations.vllm.runs import (
    NO_REQUEST,
    Batch,
    QueryRows,
    Runs,
    Tracked,
)
from reasonalloc.integrations.vllm.spec import BudgetSpec
from reasonalloc.integrations.vllm.views import CodedPool
from reasonalloc.ops.native.paged import Layout
from reasonalloc.outputs import output_metric, projections


def own_stage(plan: EngineBudget) -> int:
    """The pipeline-parallel stage of this process."""
    if plan.stages is None:
        return 0
    number: int = get_pp_group().rank_in_group
    return number


class BudgetBuilder(AttentionMetadataBuilder[BudgetMetadata]):
    """Turns a step's requests into runs; owns the tables and compresses after the forward pass.

    Metadata of the attention is what a subclass makes of it.
    """

    def __init__(
        self,
        kv_cache_spec: BudgetSpec,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        plan = find_budget(vllm_config)
        if plan is None:
            raise RuntimeError("a budget's backend without a budget")
        self._plan: EngineBudget = plan
        self._rank = get_tensor_model_parallel_rank() if plan.ranks > 1 else 0
        self._stage = own_stage(plan)
        layouts = plan.layouts(kv_cache_spec.block_size)
        layout = layouts[self._stage * plan.ranks + self._rank]
        self.layers = {name: index for index, name in enumerate(layer_names)}
        self._observes = plan.policy.state_channels > 0
        self.runs = Runs(
            layout,
            device,
            vllm_config.scheduler_config.max_num_seqs,
            plan.policy.state_channels,
        )
        self.queries = QueryRows(len(layer_names), plan.query_width)
        self._batch: Batch | None = None
        self._due: list[Due] = []
        self._unseen: list[Unseen] = []
        self._blocks: Tensor | None = None
        self._bits: CodedPool | None = None  # pages of tokens in fewer bits
        self._native: Layout | None = None  # of the pool, if our own loops read it

    def _check_bits(self, able: bool) -> None:
        """Refuse fewer bits where nothing reads them.

        Args:
            able: whether the attention of one-token steps does.
        """
        if self.runs.layout.coding is not None:
            stored = "auto" if self._coded is None else self._coded.name
            check_bits(self._plan, stored, able)

    @cached_property
    def _modules(self) -> list[Any]:
        context = self.vllm_config.compilation_config.static_forward_context
        return [context[name] for name in self.layers]

    @cached_property
    def _coded(self) -> Coded | None:
        """How the cache holds numbers; None: as they are."""
        return coded_of(self._modules, self.device)

    @cached_property
    def _sinks(self) -> Tensor | None:
        """[L, H, group] float32; None if the model has none."""
        impls = [module.impl for module in self._modules]
        if getattr(impls[0], "sinks", None) is None:
            return None
        heads = impls[0].num_kv_heads
        return torch.stack([impl.sinks.detach().float().view(heads, -1) for impl in impls])

    def sinks(self, layer: int) -> Tensor | None:
        """Learned sinks of a layer, [H, group] float32; None if the model has none."""
        return None if self._sinks is None else self._sinks[layer]

    def _bind_pages(self, pages: Pages) -> None:
        self.runs.bind(pages)
        if (coding := self.runs.layout.coding) is not None:
            self._bits = CodedPool(coding, pages, self.device)

    @cached_property
    def _compressor(self) -> PoolCompressor:
        impl = self._modules[0].impl
        return PoolCompressor(
            self._plan,
            self._rank,
            self.runs,
            self.queries,
            impl.scale,
            impl.logits_soft_cap or None,
            self._sinks,
            self._stage,
            self._native,
            self._bits,
        )

    @cached_property
    def observer(self) -> PoolObserver:
        """What the policy knows of every token."""
        impl = self._modules[0].impl
        return PoolObserver(
            self._plan.policy_of(self._plan.shard(self._rank)),
            self.runs,
            self.queries,
            impl.scale,
            impl.logits_soft_cap or None,
            self._sinks,
            self._native,
            self._bits,
        )

    def know(self, model: Any) -> None:
        """Read what the policy wants to know of the weights, once.

        Args:
            model: vLLM's, in this process.

        Raises:
            UnsupportedError: an output projection cannot be read.
        """
        outputs = self._plan.outputs
        if not outputs.asked or outputs:
            return
        before = self._plan.stage(self._stage).start or 0
        impl, dtype = self._modules[0].impl, self.vllm_config.model_config.dtype
        # Applied to single numbers it shows its matrix, however its weights are stored.
        single = torch.eye(impl.num_heads * impl.head_size, dtype=dtype, device=self.device)
        for name, index in self.layers.items():
            attention = model.get_submodule(name.rpartition(".")[0])
            projection = next(projections(attention), None)
            if projection is None or getattr(projection, "quant_method", None) is None:
                raise UnsupportedError(
                    f"metric='output': {self._plan.name}'s {name} has no output projection of a "
                    "known name: use metric='value'"
                )
            weight = projection.quant_method.apply(projection, single).t()
            metric = output_metric([weight], impl.num_heads, impl.num_kv_heads)
            outputs.fill({before + index: metric})

    @property
    def copied(self) -> str | None:
        """What was copied from the weights and would not follow new ones; None of nothing."""
        if self._sinks is not None:
            return "learned sinks"
        if self._plan.outputs.asked:
            return "output projections (metric='output')"
        return None if self._coded is None else "scales of the fp8 cache"

    def begin(
        self,
        alive: Collection[str],
        requests: list[str],
        starts: list[int],
        before: list[int],
        new: list[int],
        held: list[int],
    ) -> None:
        """Take note of the requests of the step that is built next.

        Args:
            alive: names of the requests that the worker knows.
            requests: those of the step, in order.
            starts: tokens of each one's prefill.
            before: tokens of each in the cache; new: tokens that the step adds.
            held: blocks in each one's row of the block table.
        """
        reserve = self.runs.layout.reserve
        self.queries.give_back(self.runs.forget_others(alive))
        tracked = [self.runs.track(*each) for each in zip(requests, starts, before, strict=True)]
        after = [seen + more for seen, more in zip(before, new, strict=True)]
        self._batch = Batch(tracked, before, after)
        self._due, self._unseen = [], []
        for row, (request, seen, tokens) in enumerate(zip(tracked, before, after, strict=True)):
            request.seen = tokens
            due = tokens == self._boundary(request, tokens)
            if due:
                self._due.append(Due(request, row, tokens))
                if tokens == reserve.first_event(request.start):
                    request.before = held[row] - reserve.own(request.start)
            if self._is_piece(request, seen, tokens):
                request.observed = tokens  # by the attention itself
            elif self._observes and (
                due or tokens - request.observed >= FLUSH or seen < request.start
            ):
                self._unseen.append(Unseen(request, row, tokens))

    def forget(self, requests: Collection[str]) -> None:
        """Requests of these names hold nothing any more; those that are not known never did."""
        self.queries.give_back(self.runs.forget(requests))

    def _is_piece(self, request: Tracked, before: int, after: int) -> bool:
        """Whether a step computes a piece of a prompt whose attention is seen as it is computed.

        A single token is not: a CUDA graph may do its step, of which Python sees nothing.
        """
        return before < request.start and (after - before > 1 or self.runs.layout.reserve.pin)

    def _boundary(self, request: Tracked, tokens: int) -> int:
        """The first boundary at or after ``tokens`` tokens."""
        return self.runs.layout.reserve.cadence.boundary(request.start, tokens)

    def _wanted(self, batch: Batch, starts: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Tokens of the step that a boundary's observation window will want; rows, places."""
        policy = self._plan.policy
        tokens, rows, places = list[int](), list[int](), list[int]()
        if not (policy.needs_queries or self._observes):
            return tokens, rows, places
        steps = zip(batch.requests, batch.before, batch.after, strict=True)
        for at, (request, before, after) in zip(starts, steps, strict=False):
            if request.slot == NO_REQUEST:
                continue
            first = after
            if policy.needs_queries:
                first = self._boundary(request, after) - self._plan.config.window
            if self._observes and not self._is_piece(request, before, after):
                first = min(first, before)
            elif self._observes:
                first = min(first, request.start)
            for position in range(max(before, first), after):
                tokens.append(at + position - before)
                rows.append(self.queries.lend(request))
                places.append(position % self.queries.width)
        return tokens, rows, places

    def _prompts(self, batch: Batch, starts: list[int]) -> list[Piece]:
        """Pieces of prompts among the tokens of the step; pinned ones need no state."""
        if self.runs.layout.reserve.pin:
            return []
        return [
            Piece(request, row, starts[row], starts[row + 1], before)
            for row, (request, before, after) in enumerate(
                zip(batch.requests, batch.before, batch.after, strict=True)
            )
            if request.slot != NO_REQUEST and self._is_piece(request, before, after)
        ]

    def observe(self, piece: Piece, layer: int, query: Tensor) -> None:
        """Let the policy see the attention of a piece of a prompt in a layer.

        Args:
            piece: of the step that was built last.
            layer: which.
            query: [tokens, query_heads, head_dim], of the whole step.
        """
        if self._blocks is not None:
            own = query[piece.start : piece.stop]
            blocks = self._blocks[piece.row]
            self.observer.prefill(layer, own, piece.request, piece.before, blocks)

    def finish(self) -> None:
        """Compress what reached a boundary; after the forward pass of a step."""
        due, unseen, self._due, self._unseen = self._due, self._unseen, [], []
        if self._blocks is None:
            return
        if unseen:
            self.observer.steps(unseen, self._blocks)
        if due:
            self._compressor.run(due, self._blocks)
