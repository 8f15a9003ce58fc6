"""The KV cache of all layers as pages of single KV heads, and how they hold numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError

#: Formats of a KV cache that can be read here, besides the model's own: numbers of one byte.
CODED = ("fp8", "fp8_e4m3")
E4M3 = torch.float8_e4m3fn


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
        return stored.view(E4M3).float() * scale.view(-1, *[1] * (stored.dim() - 1))

    def store(self, numbers: Tensor, layer: int, part: int) -> Tensor:
        """What is stored of numbers of a layer: uint8; what is too large becomes the largest."""
        most = torch.finfo(E4M3).max
        scaled = numbers.float() / self.scales[layer][part]
        return scaled.clamp(-most, most).to(E4M3).view(torch.uint8)


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

    @property
    def memory(self) -> Tensor:
        """[pages, numbers of a page], a page in one piece whatever lies where in it."""
        page = self.raw[0].numel()
        return self.raw.as_strided((len(self.raw), page), (page, 1))

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

    def scales(self, layer: int) -> tuple[float, float]:
        """What stored keys and values of a layer are to be multiplied by."""
        return (1.0, 1.0) if self.coded is None else self.coded.scales[layer]

    def numbers_at(self, slots: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer at ``slots``, see ``read``: [..., head_dim] floats each."""
        keys, values = self.read(slots)
        return self._numbers(keys, layer, 0), self._numbers(values, layer, 1)

    def put(self, slots: Tensor, keys: Tensor, values: Tensor, layer: int) -> None:
        """Store the keys and values of a layer [..., head_dim] at ``slots``."""
        if self.coded is not None:
            keys, values = self.coded.store(keys, layer, 0), self.coded.store(values, layer, 1)
        self.write(slots, keys, values)

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values at ``slots`` (page * block_size + place): [..., head_dim], as stored."""
        page, place = slots // self.block_size, slots % self.block_size
        return self.keys[page, place], self.values[page, place]

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [..., head_dim], as they are stored, to ``slots``."""
        page, place = slots // self.block_size, slots % self.block_size
        self.keys[page, place] = keys
        self.values[page, place] = values


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
