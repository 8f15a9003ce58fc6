"""The attention backend that reads compressed runs; for vLLM's processors' kernel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.selector import get_attn_backend

from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.metadata import BudgetMetadata, SplitMetadata
from reasonalloc.integrations.vllm.processors import ProcessorBuilder
from reasonalloc.integrations.vllm.spec import BudgetSpec, budget_spec


class BudgetImpl(CPUAttentionBackendImpl):
    """Attention of one layer: writes new tokens to their runs, attends, remembers queries."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: BudgetMetadata | SplitMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As vLLM calls it: query [tokens, heads, head_dim], output likewise, filled in place."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation under a KV budget")
        if attn_metadata is None:  # a warm-up without attention
            return output
        meta, builder = attn_metadata, attn_metadata.builder
        index = builder.layers[layer.layer_name]
        for tokens, part in meta.parts:
            attend = self._by_kernel if part.loop is None else self._by_loop
            if tokens is None:
                attend(index, part, query, key, value, output)
                continue
            out = torch.empty_like(output[: part.tokens])
            attend(index, part, query[tokens], key[tokens], value[tokens], out)
            output[tokens] = out
        for piece in meta.prompts:
            builder.observe(piece, index, query)
        return output

    def _by_loop(
        self,
        index: int,
        meta: BudgetMetadata,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
    ) -> None:
        """One token per request, by our own loop, see ``reasonalloc.ops.native.paged``."""
        builder, tokens, loop = meta.builder, meta.tokens, meta.loop
        if loop is None or loop.begun != meta.begun:
            raise RuntimeError("another step was begun before this one's attention")
        loop.attend(
            index,
            query[:tokens],
            key[:tokens],
            value[:tokens],
            output[:tokens].view(tokens, self.num_heads, self.head_size),
            None if meta.noted is None else builder.queries.ready(index, query[0]),
            builder.sinks(index),
        )

    def _by_kernel(
        self,
        index: int,
        meta: BudgetMetadata,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output: Tensor,
    ) -> None:
        """Any step, by vLLM's kernel."""
        builder, tokens = meta.builder, meta.tokens
        kernel, pages = builder.kernel, builder.runs.pages
        heads, width = self.num_kv_heads, self.head_size
        group = self.num_heads // heads
        kernel.store(
            pages,
            key[:tokens].reshape(-1, width),
            value[:tokens].reshape(-1, width),
            meta.slots[index],
            index,
        )
        if meta.noted is not None:
            builder.queries.note(index, query, *meta.noted)
        if meta.by_head:
            asked = query[:tokens].view(tokens, heads, group, width).transpose(0, 1)
            asked = asked.reshape(heads * tokens, group, width)
            out = torch.empty_like(asked)
        else:
            asked = query[:tokens].reshape(tokens * heads, group, width)
            out = output[:tokens].view(tokens * heads, group, width)
        kernel.attend(
            pages,
            asked,
            out,
            meta.query_start,
            meta.lengths[index],
            meta.table[index],
            meta.schedule(index),
            meta.longest_query,
            builder.sinks(index),
            index,
        )
        if meta.by_head:
            back = out.view(heads, tokens, group, width).transpose(0, 1)
            output[:tokens].view(tokens, heads, group, width).copy_(back)


class BudgetBackend(CPUAttentionBackend):
    """vLLM's backend for processors, over runs."""

    forward_includes_kv_cache_update: bool = True
    plan: ClassVar[EngineBudget]

    @staticmethod
    def get_impl_cls() -> type[BudgetImpl]:
        """The attention of a layer."""
        return BudgetImpl

    @staticmethod
    def get_builder_cls() -> type[ProcessorBuilder]:
        """The metadata of a step."""
        return ProcessorBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> BudgetSpec:
        """The layer's KV cache with what the scheduler must know of the budget."""
        return budget_spec(spec, cls.plan.layouts(spec.block_size)[0].reserve)


_backends: dict[tuple[int, Any], Any] = {}


def stock_backend(head_size: int, kv_cache_dtype: str, attn_type: str, has_sink: bool) -> Any:
    """The backend that vLLM would choose for a layer on this GPU; None on a CPU."""
    if current_platform.is_cpu():
        return None
    return get_attn_backend(
        head_size,
        torch.get_default_dtype(),
        kv_cache_dtype,
        has_sink=has_sink,
        attn_type=attn_type,
    )


def backend_of(plan: EngineBudget, stock: Any = None) -> Any:
    """The backend class of a plan: one for all layers.

    Args:
        plan: the budget.
        stock: what vLLM would choose; None: the kernel for processors.
    """
    key = (id(plan), stock)
    if key not in _backends:
        if stock is None:
            _backends[key] = type("BudgetBackend", (BudgetBackend,), {"plan": plan})
        else:
            from reasonalloc.integrations.vllm.paged import paged_backend

            _backends[key] = paged_backend(plan, stock)
    return _backends[key]
