"""Attention over runs in a pool of pages, and storing into it, without a table of pages.

A block of the pool holds ``block_size`` tokens of every (layer, KV head): ``L * H`` pages. The
pages of a request are numbered through its blocks: page ``g`` is the ``g % (L * H)``-th (layer,
head) of its block ``g // (L * H)``. A run is one head's tokens, in order. Page ``i`` of the run of
(layer, head) is request page

- ``i * L * H + layer * H + h`` if ``i < plain``, as in a cache that is not compressed,
- ``plain * L * H + first + i - plain`` if not.

``plain`` is ``PLAIN`` while a request is not compressed, and the full blocks of a prompt that
stays. A run holds ``shift`` plus the tokens of its sequence.

The kernels compute this themselves. All lengths are read on the device and no grid depends on
them, so a step never waits for the host and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN = 1 << 30  # more pages than any run has
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_BYTES = (torch.float8_e4m3fn, torch.uint8)  # vLLM keeps e4m3 numbers as either
_VARYING = ["layer", "table_slots", "max_blocks", "table_stride"]  # one kernel for all of them


@triton.jit
def _entry(first, shift, plain, slots, row, head, layer, table_slots, HEADS: tl.constexpr):
    """First page behind the plain ones, shift and plain pages of a run."""
    slot = tl.load(slots + row)
    at = (layer * table_slots + slot).to(tl.int64) * HEADS + head
    return tl.load(first + at), tl.load(shift + at), tl.load(plain + slot)


@triton.jit
def _page_starts(
    page, inside, first, plain, table, max_blocks, layer, head,
    block_stride, layer_stride, head_stride, HEADS: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    """int64 elements from the pool's start of the first key of each ``page`` of a run.

    Numbers of pages never become numbers of request pages, which would overflow: both summands of
    ``plain * L * H + behind`` are divided by ``L * H`` on their own.
    """
    behind = first + tl.maximum(page - plain, 0)
    own = page < plain
    index = tl.where(own, page, plain + behind // PER_BLOCK)
    which = tl.where(own, layer * HEADS + head, behind % PER_BLOCK)
    # What lies in no block of the request goes to block 0, which holds nothing.
    block = tl.load(table + index, mask=inside & (index < max_blocks), other=0).to(tl.int64)
    at = block * block_stride + (which // HEADS).to(tl.int64) * layer_stride
    return at + (which % HEADS).to(tl.int64) * head_stride


@triton.jit
def _addresses(
    place, inside, first, plain, table, max_blocks, layer, head,
    block_stride, layer_stride, head_stride, token_stride,
    HEADS: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """int64 elements from the pool's start of the keys at ``place`` of a run."""
    at = _page_starts(
        place // BLOCK_SIZE, inside, first, plain, table, max_blocks, layer, head,
        block_stride, layer_stride, head_stride, HEADS, PER_BLOCK,
    )  # fmt: skip
    return at + (place % BLOCK_SIZE).to(tl.int64) * token_stride


@dataclass(frozen=True)
class Pool:
    """The pages of all layers.

    The key of token ``t`` of page (layer, head) of a block begins ``block * block_stride + layer *
    layer_stride + head * head_stride + t * token_stride`` elements behind the first element of
    ``data``, its value ``value_at`` behind its key.

    Attributes:
        data: of any shape; float32, float16 or bfloat16, or e4m3 numbers as such or as uint8.
        layers, heads, block_size, head_dim: sizes.
        block_stride, layer_stride, head_stride, token_stride, value_at: in elements.

    Raises:
        RuntimeError: not one block lies in ``data``, or its type is another.
    """

    data: Tensor
    layers: int
    heads: int
    block_size: int
    head_dim: int
    block_stride: int
    layer_stride: int
    head_stride: int
    token_stride: int
    value_at: int

    def __post_init__(self) -> None:
        _demand(
            self.data.dtype in (*_FLOATS, *_BYTES),
            f"a pool of {self.data.dtype}: kernels read float32, float16, bfloat16 and e4m3",
        )
        sizes = (self.layers, self.heads, self.block_size, self.head_dim)
        _demand(
            min(sizes) > 0 and min(self.strides) >= 0 and self.block_stride > 0,
            f"a pool of {sizes} (layers, heads, block size, head size) and strides {self.strides}",
        )
        _demand(
            self.blocks > 0,
            f"no block of {self._inside} elements lies in a pool of {list(self.data.shape)} with "
            f"strides {list(self.data.stride())}",
        )

    @classmethod
    def of(cls, pages: Tensor) -> Pool:
        """A pool whose keys and values lie beside each other.

        Args:
            pages: [blocks, layers, heads, block_size, 2 * head_dim], any strides but the last: 1.
        """
        _demand(
            pages.dim() == 5 and pages.stride(4) == 1 and pages.shape[4] % 2 == 0,
            f"pages {list(pages.shape)} with strides {list(pages.stride())}: not [blocks, layers, "
            "heads, block_size, 2 * head_dim] with a last stride of 1",
        )
        _, layers, heads, block_size, both = pages.shape
        block, layer, head, token, _ = pages.stride()
        dim = both // 2
        return cls(pages, layers, heads, block_size, dim, block, layer, head, token, dim)

    @property
    def strides(self) -> tuple[int, int, int, int, int]:
        """Of blocks, layers, heads and tokens, and from a key to its value."""
        inner = (self.layer_stride, self.head_stride, self.token_stride, self.value_at)
        return (self.block_stride, *inner)

    @property
    def blocks(self) -> int:
        """How many lie in ``data``."""
        shape, stride = self.data.shape, self.data.stride()
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        return 1 + (min(extent, self.data.numel() * extent) - self._inside) // self.block_stride

    @property
    def _inside(self) -> int:
        """Elements from the first of a block to its last."""
        last = (self.layers - 1) * self.layer_stride + (self.heads - 1) * self.head_stride
        last += (self.block_size - 1) * self.token_stride
        return last + self.value_at + self.head_dim


@dataclass(frozen=True)
class RunTables:
    """Where the runs of all requests lie; a request has a slot.

    Attributes:
        first: [layers, slots, heads] int32, the first page behind the plain ones.
        shift: [layers, slots, heads] int32, tokens of the run less those of its sequence.
        plain: [slots] int32.

    Raises:
        RuntimeError: they are something else.
    """

    first: Tensor
    shift: Tensor
    plain: Tensor

    def __post_init__(self) -> None:
        device, slots = self.first.device, self.first.shape[1:2]
        _int32("first", self.first, (*self.first.shape[:1], *slots, *self.first.shape[2:3]), device)
        _int32("shift", self.shift, self.first.shape, device)
        _int32("plain", self.plain, slots, device)


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _int32(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    _handed(name, tensor, (torch.int32,), shape, device, tensor.is_contiguous())


def _handed(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
    laid: bool,
) -> None:
    """Refuse what a kernel would take for something else; ``laid``: the strides are right."""
    if tensor.dtype in dtypes and laid and tensor.shape == tuple(shape) and tensor.device == device:
        return
    raise RuntimeError(
        f"{name} cannot be handed to a kernel: it must be {list(shape)} of "
        f"{' or '.join(map(str, dtypes))} on {device}, its last dimensions contiguous, but it is "
        f"{list(tensor.shape)} of {tensor.dtype} with strides {list(tensor.stride())} on "
        f"{tensor.device}"
    )


def _vectors(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """[.., head_dim] of floats with any strides but the last: 1."""
    _handed(name, tensor, (like.dtype,), shape, like.device, tensor.stride(-1) == 1)


def _runs(
    pool: Pool, tables: RunTables, layer: int, block_table: Tensor, slots: Tensor, query: Tensor
) -> int:
    """Check what both launchers take; returns the group."""
    rows, device = len(slots), query.device
    _demand(
        query.dim() == 3 and query.dtype in _FLOATS and query.shape[1] % pool.heads == 0,
        f"query {list(query.shape)} of {query.dtype} over {pool.heads} KV heads: it must be [n, "
        "query_heads, head_dim] of float32, float16 or bfloat16, the heads a multiple",
    )
    shape = (pool.layers, len(tables.plain), pool.heads)
    _demand(
        tables.first.shape == shape and tables.first.device == device,
        f"tables {list(tables.first.shape)} on {tables.first.device} for a pool of {list(shape)} "
        f"(layers, slots, heads) and a query on {device}",
    )
    _demand(pool.data.device == device, f"a pool on {pool.data.device} for a query on {device}")
    _demand(0 <= layer < pool.layers, f"layer {layer} of {pool.layers}")
    _int32("slots", slots, (rows,), device)
    contiguous = block_table.dim() == 2 and block_table.stride(1) == 1
    wide = (rows, block_table.shape[-1])
    _handed("block_table", block_table, (torch.int32,), wide, device, contiguous)
    return query.shape[1] // pool.heads
