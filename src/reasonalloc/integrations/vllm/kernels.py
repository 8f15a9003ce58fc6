"""vLLM's attention kernels over pages of single KV heads, and the pages themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError


@dataclass(frozen=True)
class Pages:
    """The KV cache of all layers as pages of one KV head each.

    Page ``(layer * blocks + block) * kv_heads + head`` is that head's page of that block. Page 0
    belongs to vLLM's null block and holds nothing.

    Attributes:
        raw: [pages, 2, block_size, head_dim], keys and values as they lie in memory.
        keys, values: [pages, block_size, head_dim] views whatever the kernel's order is.
        blocks, kv_heads, block_size: sizes.
    """

    raw: Tensor
    keys: Tensor
    values: Tensor
    blocks: int
    kv_heads: int
    block_size: int

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at ``slots`` (page * block_size + place): [..., head_dim] each."""
        page, place = slots // self.block_size, slots % self.block_size
        return self.keys[page, place], self.values[page, place]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [..., head_dim] at ``slots``."""
        page, place = slots // self.block_size, slots % self.block_size
        self.keys[page, place] = keys
        self.values[page, place] = values


class Kernel(Protocol):
    """Attention of a batch of runs; a run is one KV head of one request."""

    def pages(self, caches: Sequence[Tensor]) -> Pages:
        """All layers' caches as one pool.

        Args:
            caches: per layer [blocks, kv_heads, block_size, 2 * head_dim], as vLLM binds them.
        """
        ...

    def store(self, pages: Pages, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Write new tokens: key and value [tokens, head_dim], slots [tokens] int64."""
        ...

    def schedule(self, query_start: Tensor, lengths: Tensor) -> Any:
        """What ``attend`` wants to know beforehand of runs [runs + 1] and [runs], int32."""
        ...

    def attend(
        self,
        pages: Pages,
        query: Tensor,
        out: Tensor,
        query_start: Tensor,
        lengths: Tensor,
        table: Tensor,
        schedule: Any,
        longest_query: int,
    ) -> None:
        """Causal attention, the queries of a run being its last tokens.

        Args:
            pages: the pool.
            query, out: [tokens of all runs, group, head_dim].
            query_start: [runs + 1] int32; lengths: [runs] int32, new tokens included.
            table: [runs, n] int32, pages of each run.
            schedule: from ``schedule``.
            longest_query: most new tokens of a run.
        """
        ...


def joined(caches: Sequence[Tensor]) -> Tensor:
    """The caches of all layers, which lie behind each other, as [pages, 2 * block_size * head_dim].

    Raises:
        UnsupportedError: they do not lie so.
    """
    first = caches[0]
    blocks, heads, _, _ = first.shape
    page = first[0, 0].numel()
    size = blocks * heads * page
    base = first.storage_offset()
    for layer, cache in enumerate(caches):
        expected = first.shape, base + layer * size, first.untyped_storage().data_ptr()
        actual = cache.shape, cache.storage_offset(), cache.untyped_storage().data_ptr()
        if actual != expected or not cache.is_contiguous():
            raise UnsupportedError(
                "vLLM laid out the KV cache in an unexpected way, so that pages cannot be shared "
                "among layers and heads: unset VLLM_KV_CACHE_LAYOUT"
            )
    return first.as_strided((len(caches) * blocks * heads, page), (page, 1), base)


class CpuKernel:
    """vLLM's kernel for processors.

    Args:
        scale, softcap: of the logits; softcap 0 for none.
        group: query heads per KV head.
        head_dim: width of a head.
        block_size: tokens of a page.
        dtype: of queries and cache.
    """

    def __init__(
        self,
        scale: float,
        softcap: float,
        group: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self._scale, self._softcap, self._group = scale, softcap, group
        self._head_dim, self._dtype = head_dim, dtype
        # Not what vLLM would choose: its matrix unit stores keys in an order of its own.
        self._isa = "vec" if head_dim % 32 == 0 and block_size % 32 == 0 else "vec16"

    def pages(self, caches: Sequence[Tensor]) -> Pages:
        """See ``Kernel``."""
        blocks, heads, block_size, _ = caches[0].shape
        raw = joined(caches).view(-1, 2, block_size, self._head_dim)
        keys, values = self._views(raw, block_size)
        return Pages(raw, keys, values, blocks, heads, block_size)

    def _views(self, raw: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Readable views, in the order that the kernel's own writing shows on the null page."""
        probe = torch.arange(1, block_size * self._head_dim + 1, dtype=torch.float32, device="cpu")
        probe = (probe % 251).to(raw.dtype).view(block_size, 1, self._head_dim)
        slots = torch.arange(block_size, device="cpu")
        one = raw[:1]
        self._write(one, probe, probe, slots)
        pages = []
        for part in (0, 1):
            plain = raw[:, part]
            turned = plain.view(-1, self._head_dim, block_size).transpose(1, 2)
            views = [v for v in (plain, turned) if torch.equal(v[0], probe[:, 0])]
            if not views:
                raise UnsupportedError(
                    "vLLM's CPU attention stores keys in an order that is not known here, so they "
                    "cannot be moved: use a block size that is a multiple of 32"
                )
            pages.append(views[0])
        one.zero_()
        return pages[0], pages[1]

    def store(self, pages: Pages, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """See ``Kernel``."""
        self._write(pages.raw, key[:, None], value[:, None], slots)

    def _write(self, raw: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
        from vllm import _custom_ops as ops

        keys, values = raw[:, 0][:, None], raw[:, 1][:, None]
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, self._isa)

    def schedule(self, query_start: Tensor, lengths: Tensor) -> Any:
        """See ``Kernel``."""
        from vllm import _custom_ops as ops
        from vllm import envs

        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=self._group,
            num_kv_heads=1,
            head_dim=self._head_dim,
            seq_lens=lengths,
            dtype=self._dtype,
            query_start_loc=query_start,
            causal=True,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )

    def attend(
        self,
        pages: Pages,
        query: Tensor,
        out: Tensor,
        query_start: Tensor,
        lengths: Tensor,
        table: Tensor,
        schedule: Any,
        longest_query: int,
    ) -> None:
        """See ``Kernel``."""
        from vllm import _custom_ops as ops

        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=pages.raw[:, 0][:, None],
            value_cache=pages.raw[:, 1][:, None],
            output=out,
            query_start_loc=query_start,
            seq_lens=lengths,
            scale=self._scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=self._softcap,
            scheduler_metadata=schedule,
            s_aux=None,
        )
