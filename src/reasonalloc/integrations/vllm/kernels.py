"""vLLM's attention kernels over pages of single KV heads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.vllm.pages import E4M3, Coded, Pages, joined
from reasonalloc.ops.native.build import require

_log = logging.getLogger(__name__)


class Kernel(Protocol):
    """Attention of a batch of runs; a run is one KV head of one request."""

    def pages(self, caches: Sequence[Tensor]) -> Pages:
        """All layers' caches as one pool.

        Args:
            caches: per layer [blocks, kv_heads, block_size, 2 * head_dim], as vLLM binds them.
        """
        ...

    def store(self, pages: Pages, key: Tensor, value: Tensor, slots: Tensor, layer: int) -> None:
        """Write new tokens of a layer: key and value [tokens, head_dim], slots [tokens] int64."""
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
        layer: int,
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
            layer: whose.
        """
        ...


class CpuKernel:
    """vLLM's kernel for processors.

    Args:
        scale, softcap: of the logits; softcap 0 for none.
        group: query heads per KV head.
        head_dim: width of a head.
        block_size: tokens of a page.
        dtype: of queries, and of the cache if that is not coded.
        parts: KV heads that are attended one after the other, since each has sinks of its own,
            which the kernel knows by query head; 1 without sinks.
        coded: how the cache holds numbers; None: as they are.

    Raises:
        UnsupportedError: vLLM's kernel cannot read such a cache on this processor.
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
        coded: Coded | None = None,
    ) -> None:
        self._scale, self._softcap, self._group = scale, softcap, group
        self._coded = coded
        self._parts = parts
        self._head_dim, self._dtype = head_dim, dtype
        # Not what vLLM would choose: its matrix unit stores keys in an order of its own.
        self._isa = "vec" if head_dim % 32 == 0 and block_size % 32 == 0 else "vec16"
        if coded is not None:
            check_coded(head_dim, block_size)

    def pages(self, caches: Sequence[Tensor]) -> Pages:
        """See ``Kernel``."""
        block_size = caches[0].shape[2]
        pool = joined(caches)
        raw = pool.memory.view(-1, 2, block_size, self._head_dim)
        keys, values = self._views(raw, block_size)
        steps = (pool.of_block, pool.of_layer, pool.of_head)
        return Pages(raw, keys, values, block_size, *steps, self._coded)

    def _views(self, raw: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        """Readable views, in the order that the kernel's own writing shows on the null page."""
        probe = torch.arange(1, block_size * self._head_dim + 1, dtype=torch.float32, device="cpu")
        probe %= 251 if self._coded is None else 13  # numbers that any format holds as they are
        probe = probe.to(self._dtype).view(block_size, 1, self._head_dim)
        slots = torch.arange(block_size, device="cpu")
        one = raw[:1]
        self._write(one, probe, probe, slots, (1.0, 1.0))
        expected = probe[:, 0] if self._coded is None else probe[:, 0].to(E4M3).view(torch.uint8)
        pages = []
        for part in (0, 1):
            plain = raw[:, part]
            turned = plain.view(-1, self._head_dim, block_size).transpose(1, 2)
            views = [v for v in (plain, turned) if torch.equal(v[0], expected)]
            if not views:
                raise UnsupportedError(
                    "vLLM's CPU attention stores keys in an order that is not known here, so they "
                    "cannot be moved: use a block size that is a multiple of 32"
                )
            pages.append(views[0])
        one.zero_()
        return pages[0], pages[1]

    def store(self, pages: Pages, key: Tensor, value: Tensor, slots: Tensor, layer: int) -> None:
        """See ``Kernel``."""
        self._write(pages.raw, key[:, None], value[:, None], slots, pages.scales(layer))

    def _write(
        self,
        raw: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        scales: tuple[float, float],
    ) -> None:
        from vllm import _custom_ops as ops

        keys, values = raw[:, 0][:, None], raw[:, 1][:, None]
        ops.cpu_attn_reshape_and_cache(
            key, value, keys, values, slots, self._isa, *scales, self._format
        )

    @property
    def _format(self) -> str:
        return "auto" if self._coded is None else self._coded.name

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
            kv_cache_dtype=self._format,
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
        layer: int,
    ) -> None:
        """See ``Kernel``."""
        from vllm import _custom_ops as ops

        key_scale, value_scale = pages.scales(layer)
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
                k_scale=key_scale,
                v_scale=value_scale,
                kv_cache_dtype=self._format,
            )


def check_coded(head_dim: int, block_size: int) -> None:
    """Refuse a coded cache that vLLM's kernel for processors cannot read.

    Raises:
        UnsupportedError: says why.
    """
    why = ""
    if head_dim % 32 or block_size % 32:
        why = f"heads of {head_dim} and blocks of {block_size} tokens: both must be multiples of 32"
    elif not torch.cpu._is_avx512_supported():
        why = "a processor without AVX-512"
    if why:
        raise UnsupportedError(
            f"vLLM's CPU attention cannot read a KV cache in fp8 with {why}; use the model's own "
            "type, --kv-cache-dtype auto"
        )


def have_loops(dtype: torch.dtype) -> bool:
    """Whether our own loops on processors (``reasonalloc.ops.native``) can be had.

    They attend, see attention and score several times as fast as what works without them. Compiled
    here if they never were; that they cannot be is logged.

    Args:
        dtype: of the model.
    """
    try:
        require("the KV budget's own attention in vLLM", "vLLM's kernel", dtype)
    except (UsageError, UnsupportedError) as error:
        _log.warning("%s: that is what happens now, and takes more time.", error)
        return False
    return True
