"""vLLM's attention kernels over pages of single KV heads, and the pages themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError

#: Formats of a KV cache that can be read here, besides the model's own: numbers of one byte.
CODED = ("fp8", "fp8_e4m3")
_E4M3 = torch.float8_e4m3fn


def stored_bytes(cache_dtype: str, dtype: torch.dtype) -> int:
    """Bytes of a number in the KV cache, by vLLM's name of its format and the model's own type."""
    return 1 if cache_dtype in CODED else dtype.itemsize


@dataclass(frozen=True)
class Coded:
    """A KV cache of e4m3 numbers, each to be multiplied by the scale of its layer.

    Attributes:
        name: vLLM's name of the format.
        scales: of the keys and of the values of each layer.
        table: the same, [layers, 2] float32 on the cache's device.
    """

    name: str
    scales: tuple[tuple[float, float], ...]
    table: Tensor

    def numbers(self, stored: Tensor, layers: int | Tensor, part: int) -> Tensor:
        """The numbers that are stored.

        Args:
            stored: [n, ...] uint8.
            layers: whose they are, one for all or [n].
            part: 0 for keys, 1 for values.

        Returns:
            [n, ...] float32.
        """
        scale = self.table[layers, part]
        return stored.view(_E4M3).float() * scale.view(-1, *[1] * (stored.dim() - 1))

    def store(self, numbers: Tensor, layer: int, part: int) -> Tensor:
        """What is stored of numbers of a layer: uint8; what is too large becomes the largest."""
        most = torch.finfo(_E4M3).max
        scaled = numbers.float() / self.scales[layer][part]
        return scaled.clamp(-most, most).to(_E4M3).view(torch.uint8)


def coded_of(modules: Sequence[Any], device: torch.device) -> Coded | None:
    """The format of the caches of attention layers; None if it is the model's own.

    Args:
        modules: vLLM's ``Attention``, of each layer under a budget.
        device: of the caches.

    Raises:
        UnsupportedError: they differ, or have scales for single heads.
    """
    kinds = {str(module.impl.kv_cache_dtype) for module in modules}
    if not kinds & set(CODED):
        return None
    single = all(module._k_scale.numel() == module._v_scale.numel() == 1 for module in modules)
    if len(kinds) > 1 or not single:
        raise UnsupportedError(
            "layers whose KV caches differ in format, or have scales for single heads, cannot run "
            "under a KV budget in vLLM yet: give the model's own type, as --kv-cache-dtype bfloat16"
        )
    scales = tuple((float(m._k_scale_float), float(m._v_scale_float)) for m in modules)
    table = torch.tensor(scales, dtype=torch.float32, device=device)
    return Coded(kinds.pop(), scales, table)


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
        coded: how ``raw`` holds numbers, if it is uint8.
    """

    raw: Tensor
    keys: Tensor
    values: Tensor
    block_size: int
    of_block: int
    of_layer: int
    of_head: int
    coded: Coded | None = None

    def keys_of(self, pages: Tensor, layers: int | Tensor) -> Tensor:
        """Keys of rows of pages: [n, H, pages * block_size, head_dim] floats.

        Args:
            pages: [n, H, pages] int.
            layers: whose they are, one for all or [n] int64.
        """
        return self._numbers(self.keys[pages].flatten(2, 3), layers, 0)

    def values_of(self, pages: Tensor, layers: int | Tensor) -> Tensor:
        """Values of rows of pages, see ``keys_of``."""
        return self._numbers(self.values[pages].flatten(2, 3), layers, 1)

    def _numbers(self, stored: Tensor, layers: int | Tensor, part: int) -> Tensor:
        return stored if self.coded is None else self.coded.numbers(stored, layers, part)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at ``slots`` (page * block_size + place): [..., head_dim], as stored."""
        page, place = slots // self.block_size, slots % self.block_size
        return self.keys[page, place], self.values[page, place]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [..., head_dim], as they are stored, to ``slots``."""
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
        expected = probe[:, 0] if self._coded is None else probe[:, 0].to(_E4M3).view(torch.uint8)
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
        self._write(pages.raw, key[:, None], value[:, None], slots, self._scales(layer))

    def _scales(self, layer: int) -> tuple[float, float]:
        return (1.0, 1.0) if self._coded is None else self._coded.scales[layer]

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

        key_scale, value_scale = self._scales(layer)
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
