"""Exact bytes of a compressed cache, known before the first token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reasonalloc.core.cadence import compression_points, most_coded, most_held, slots
from reasonalloc.kinds import is_coded
from reasonalloc.ops.codes import row_format
from reasonalloc.planning.latents import LatentShape
from reasonalloc.planning.states import StateShape
from reasonalloc.whole import whole_number


@dataclass(frozen=True)
class LayerShape:
    """One layer of a model, as its cache sees it.

    Attributes:
        kv_heads, query_heads: heads per layer; 0 in a layer that has no cache of keys. Query heads
            are those of all layers that read the cache.
        head_dim: width of a key and, unless ``value_dim`` says otherwise, of a value.
        sliding_window: tokens that the layer sees at most, in a window or a chunk, or None if it
            sees everything. Layers with a window or chunks keep their own cache and have no budget.
        state: what a linear, Mamba or convolution layer keeps, also beside attention, or None.
        value_dim: width of a value, or None; 0 if a token is one vector, its latent.
        latent: what latent attention (MLA) makes of a token, or None in any other layer.
        readers: other layers that read this layer's cache, by index.
        reads: the layer whose cache this one reads instead of having its own, or None.
        again: the layer of the model that runs once more, with this cache, or None.
        paired: whether either half of the KV heads reads the values of both: two heads of the model
            are then one here, with keys and values of double width.
        image: whether the layer attends to an image, whose keys are not part of the plan, instead
            of the text.
        distances: for how many distances between query and key the layer adds a bias of each
            query's own to the logits; 0: it adds none, or has no budget.
        bias: channels that a key has under a budget besides ``head_dim``, for the bias of its
            position (ALiBi).
        copies: how often the model's own cache holds each KV head.
        query_sinks: whether every query brings a sink of its own, beside such a bias.
    """

    kv_heads: int
    query_heads: int
    head_dim: int
    sliding_window: int | None = None
    state: StateShape | None = None
    value_dim: int | None = None
    latent: LatentShape | None = None
    readers: tuple[int, ...] = ()
    reads: int | None = None
    again: int | None = None
    image: bool = False
    distances: int = 0
    bias: int = 0
    copies: int = 1
    query_sinks: bool = False
    paired: bool = False

    @property
    def dims(self) -> tuple[int, int]:
        """Widths of a key and of a value, as they are stored."""
        value_dim = self.head_dim if self.value_dim is None else self.value_dim
        return self.head_dim + self.bias, value_dim

    @property
    def query_dim(self) -> int:
        """Width of a query, with its bias by distance and its sink."""
        if self.latent is not None:
            return self.latent.key_dim
        return self.head_dim + self.bias + self.distances + self.query_sinks

    @property
    def handed(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and width of either tensor that the model hands to its cache."""
        if self.latent is not None and self.latent.cached:
            return (1, self.latent.rank), (1, self.latent.rotary)
        if self.paired:
            return (2 * self.kv_heads, self.dims[0] // 2), (2 * self.kv_heads, self.dims[1] // 2)
        return (self.kv_heads, self.dims[0]), (self.kv_heads, self.dims[1])

    @property
    def compressible(self) -> bool:
        """Whether the layer has a budget."""
        return self.sliding_window is None and self.kv_heads > 0

    def full_bytes(self, batch: int, tokens: int, itemsize: int) -> int:
        """Return the bytes of keys and values in the model's own cache after ``tokens`` tokens."""
        kept = tokens if self.sliding_window is None else min(tokens, self.sliding_window - 1)
        numbers = (sum(self.dims) - self.bias) * self.copies
        return batch * self.kv_heads * kept * numbers * itemsize


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a cache with ``batch`` sequences.

    KV bytes are those of keys and values, and of the states of layers that have some.

    Attributes:
        shapes: all layers.
        totals: retained tokens of each compressible layer right after a compression.
        batch: sequences.
        interval, window: cadence.
        itemsize: bytes of one number of the cache's dtype.
        keeps_queries: whether the policy needs the queries of the window.
        state_channels: float32 numbers that the policy keeps per slot.
        pinned: tokens that every head keeps on top of the budget, of the longest sequence.
        kv_dtype: how older tokens are kept, see ``CompressionConfig``.
        formats: the same of every head, [layers][kv_heads] tokens and format, if it is planned.
    """

    shapes: tuple[LayerShape, ...]
    totals: tuple[int, ...]
    batch: int
    interval: int
    window: int
    itemsize: int
    keeps_queries: bool = False
    state_channels: int = 0
    pinned: int = 0
    kv_dtype: str = "auto"
    formats: tuple[tuple[tuple[int, str], ...], ...] | None = None

    @property
    def _slabs(self) -> list[tuple[LayerShape, int]]:
        shapes = [s for s in self.shapes if s.compressible]
        return list(zip(shapes, self.totals, strict=True))

    @property
    def triggers(self) -> tuple[int, ...]:
        """Per layer under a budget, the tokens of all heads beyond which it is compressed."""
        if self.formats is None:
            return self.totals
        return tuple(len(layer) * min(tokens for tokens, _ in layer) for layer in self.formats)

    def compressions(self, prompt: int, steps: int) -> list[list[int]]:
        """When each layer under a budget is compressed while a sequence is decoded alone.

        Args:
            prompt: tokens of the prompt, pinned ones among them.
            steps: decode steps after it; the last generated token is not among them.

        Returns:
            Per layer the tokens of the sequence at each compression; none of a full cache.
        """
        heads = [shape.kv_heads for shape in self.shapes if shape.compressible]
        return [
            compression_points(total, own, self.interval, prompt, steps, self.pinned)
            for total, own in zip(self.triggers, heads, strict=False)  # a full cache has none
        ]

    @property
    def slab_bytes(self) -> int:
        """KV bytes of the slabs: the same after any number of tokens; more per pinned turn."""
        size = 0
        for index, (shape, total) in enumerate(self._slabs):
            plain = sum(shape.dims) * self.itemsize
            if self.coded:
                size += self._coded_bytes(index, shape, total)
                size += shape.kv_heads * self._room * plain
            else:
                size += most_held(total, shape.kv_heads, self.interval, self.pinned) * plain
        return self.batch * size

    @property
    def coded(self) -> bool:
        """Whether older tokens are kept in fewer bits."""
        return self.formats is not None or is_coded(self.kv_dtype)

    def row_bytes(self, shape: LayerShape, kv_dtype: str) -> int:
        """Return the bytes of an older token of one head: its key, its value and their scales."""
        return row_bytes(shape, kv_dtype, self.itemsize)

    def _coded_bytes(self, index: int, shape: LayerShape, total: int) -> int:
        """Bytes of the coded tokens of one layer and sequence."""
        if self.formats is None:
            tokens = most_coded(total, shape.kv_heads, self.window, self.pinned)
            return tokens * self.row_bytes(shape, self.kv_dtype)
        return sum(
            (tokens - self.window + self.pinned) * self.row_bytes(shape, kind)
            for tokens, kind in self.formats[index]
        )

    @property
    def _room(self) -> int:
        """Tokens of a head that are kept as they are."""
        return self.window + self.interval

    @property
    def floor_bytes(self) -> int:
        """KV bytes in use right after a compression."""
        size = 0
        for index, (shape, total) in enumerate(self._slabs):
            plain, heads = sum(shape.dims) * self.itemsize, shape.kv_heads
            if self.coded:
                size += self._coded_bytes(index, shape, total) + heads * self.window * plain
            else:
                size += (total + heads * self.pinned) * plain
        return self.batch * size

    def compressed_bytes(self, tokens: int) -> int:
        """Return the KV bytes in use right after a compression at ``tokens`` tokens each."""
        tokens = whole_number("tokens", tokens, 0)
        return self.floor_bytes + self.state_bytes + self.sliding_bytes(tokens)

    @property
    def mean_tokens(self) -> float:
        """Mean tokens per layer and KV head right after a compression, pinned ones apart."""
        return sum(self.totals) / sum(shape.kv_heads for shape, _ in self._slabs)

    @property
    def bookkeeping_bytes(self) -> int:
        """Positions, run tables and what the policy observes, besides keys and values."""
        per_slot = 4 + 4 * self.state_channels  # position, state
        size = 0
        for shape, total in self._slabs:
            heads, window = shape.kv_heads, self.window if self.coded else None
            held = slots(total, heads, self.interval, self.pinned, window)
            tables = 4 if self.coded else 2
            size += self.batch * (held * per_slot + tables * heads * 8)
            if self.keeps_queries:
                size += (
                    self.batch * self.window * shape.query_heads * shape.query_dim * self.itemsize
                )
        return size

    def sliding_bytes(self, tokens: int) -> int:
        """Return the KV bytes of the layers with a sliding window after ``tokens`` tokens."""
        return sum(
            s.full_bytes(self.batch, tokens, self.itemsize)
            for s in self.shapes
            if not s.compressible
        )

    def kv_bytes(self, tokens: int) -> int:
        """Return the KV bytes of the whole cache after ``tokens`` tokens per sequence."""
        tokens = whole_number("tokens", tokens, 0)
        return self.slab_bytes + self.state_bytes + self.sliding_bytes(tokens)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of linear, Mamba and convolution layers: always the same."""
        states = [shape.state for shape in self.shapes if shape.state is not None]
        return sum(state.nbytes(self.batch, self.itemsize) for state in states)

    def full_bytes(self, tokens: int) -> int:
        """Return the KV bytes of the full cache after ``tokens`` tokens per sequence."""
        tokens = whole_number("tokens", tokens, 0)
        kept = sum(s.full_bytes(self.batch, tokens, self.itemsize) for s in self.shapes)
        return kept + self.state_bytes


def row_bytes(shape: LayerShape, kv_dtype: str, itemsize: int) -> int:
    """Return the bytes of a token of one head: its key, its value, and the numbers that scale them.

    Args:
        shape: of the layer.
        kv_dtype: a format, see ``ops.codes``.
        itemsize: bytes of one number of the model's dtype.
    """
    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[itemsize]
    return row_format(kv_dtype, *shape.dims, dtype).width
