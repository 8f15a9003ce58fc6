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

    The page of block ``b``, layer ``l`` and head ``h`` is ``b * of_block + l * of_layer + h *
    of_head``. Page 0 belongs to vLLM's null block and holds nothing.

    Attributes:
        raw: [pages, 2, block_size, head_dim], keys and values as they lie in memory.
        keys, values: [pages, block_size, head_dim] views whatever the kernel's order is.
        block_size: tokens of a page.
        of_block, of_layer, of_head: steps, in pages.
    """

    raw: Tensor
    keys: Tensor
    values: Tensor
    block_size: int
    of_block: int
    of_layer: int
    of_head: int

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
        sinks: Tensor | None,
    ) -> None:
        """Causal attention, the queries of a run being its last tokens.

        Args:
            pages: the pool.
            query, out: [tokens of all runs, group, head_dim].
            query_start: [runs + 1] int32; lengths: [runs] int32, new tokens included.
            table: [runs, n] int32, pages of each run.
            schedule: from ``schedule``.
            longest_query: most new tokens of a run.
            sinks: [kv_heads, group] learned sinks of the layer, see ``reasonalloc.sinks``; runs
                are then ordered by head. None: the model has none.
        """
        ...


@dataclass(frozen=True)
class Pool:
    """The caches of all layers as one row of pages; steps as in ``Pages``."""

    memory: Tensor  # [pages, numbers of a page]
    of_block: int
    of_layer: int
    of_head: int


def joined(caches: Sequence[Tensor]) -> Pool:
    """The caches of all layers in one piece of memory, whatever vLLM's layout is.

    Args:
        caches: per layer [blocks, kv_heads, block_size, 2 * head_dim], as vLLM binds them.

    Raises:
        UnsupportedError: they are no views of one piece, or not one as far behind the other.
    """
    first = caches[0]
    blocks, heads, size, width = first.shape
    page, base = size * width, first.storage_offset()
    starts = [cache.storage_offset() - base for cache in caches]
    layer = starts[1] if len(caches) > 1 else page
    block, head = first.stride(0), first.stride(1) if heads > 1 else page
    alike = all(
        cache.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and cache.shape == first.shape
        and cache.stride() == first.stride()
        and cache[0, 0].is_contiguous()
        and start == number * layer
        for number, (cache, start) in enumerate(zip(caches, starts, strict=True))
    )
    steps = (block, layer, head)
    if not alike or any(step % page or step < page for step in steps):
        raise UnsupportedError(
            "vLLM laid out the KV cache in an unexpected way, so that pages cannot be shared "
            "among layers and heads: unset VLLM_KV_CACHE_LAYOUT"
        )
    last = (blocks - 1) * block + (len(caches) - 1) * layer + (heads - 1) * head
    memory = first.as_strided((last // page + 1, page), (page, 1), base)
    return Pool(memory, block // page, layer // page, head // page)


class CpuKernel:
    """vLLM's kernel for processors.

    Args:
        scale, softcap: of the logits; softcap 0 for none.
        group: query heads per KV head.
        head_dim: width of a head.
        block_size: tokens of a page.
        dtype: of queries and cache.
        parts: KV heads that are attended one after the other, since each has sinks of its own,
            which the kernel knows by query head; 1 without sinks.
    """

    def __init__(
        self,
        scale: float,
        softcap: float,
        group: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        parts: int = 1,
    ) -> None:
        self._scale, self._softcap, self._group = scale, softcap, group
        self._parts = parts
        self._head_dim, self._dtype = head_dim, dtype
        # Not what vLLM would choose: its matrix unit stores keys in an order of its own.
        self._isa = "vec" if head_dim % 32 == 0 and block_size % 32 == 0 else "vec16"

    def pages(self, caches: Sequence[Tensor]) -> Pages:
        """See ``Kernel``."""
        block_size = caches[0].shape[2]
        pool = joined(caches)
        raw = pool.memory.view(-1, 2, block_size, self._head_dim)
        keys, values = self._views(raw, block_size)
        return Pages(raw, keys, values, block_size, pool.of_block, pool.of_layer, pool.of_head)

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
        runs = len(lengths) // self._parts
        return [self._schedule(query_start[: runs + 1], part) for part in lengths.split(runs)]

    def _schedule(self, query_start: Tensor, lengths: Tensor) -> Any:
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
        sinks: Tensor | None,
    ) -> None:
        """See ``Kernel``."""
        from vllm import _custom_ops as ops

        runs, tokens = (len(each) // self._parts for each in (lengths, query))
        for part, plan in enumerate(schedule):
            some, new = (slice(part * n, (part + 1) * n) for n in (runs, tokens))
            ops.cpu_attention_with_kv_cache(
                query=query[new],
                key_cache=pages.raw[:, 0][:, None],
                value_cache=pages.raw[:, 1][:, None],
                output=out[new],
                query_start_loc=query_start[: runs + 1],
                seq_lens=lengths[some],
                scale=self._scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=table[some],
                softcap=self._softcap,
                scheduler_metadata=plan,
                s_aux=None if sinks is None else sinks[part],
            )
