"""The interface of a layer allocator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from reasonalloc.registry import Registry


@dataclass(frozen=True)
class LayerQuery:
    """What a layer allocator may know.

    Attributes:
        layers: number of layers that hold a compressible cache.
        kv_heads: KV heads per layer; of the first where they differ.
        budget: mean retained tokens per (layer, KV head).
        window: always-kept recent tokens per head.
        n_sink: always-kept first tokens per head.
        model_id: name of the model, for messages.
        config_hash: fingerprint of the model's configuration (``calibrated.demand.config_hash``).
        row_bytes: gives the bytes of a token of one head in a format of ``kv_dtype``, and with
            numbers of so many bytes at full width (0: the model's).
        heads: KV heads of each layer; left out: ``kv_heads`` everywhere.
    """

    layers: int
    kv_heads: int
    budget: int
    window: int
    n_sink: int = 0
    model_id: str = ""
    config_hash: str = ""
    row_bytes: Callable[[str, int], int] | None = None
    heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.heads:
            object.__setattr__(self, "heads", (self.kv_heads,) * self.layers)

    @property
    def total(self) -> int:
        """Retained tokens of the whole model."""
        return sum(self.heads) * self.budget

    @property
    def least(self) -> int:
        """Smallest total of one layer: window and sinks of every head, where it has most heads."""
        return max(self.heads) * (self.window + self.n_sink)

    @property
    def leasts(self) -> tuple[int, ...]:
        """Smallest total of each layer."""
        return tuple(heads * (self.window + self.n_sink) for heads in self.heads)


class LayerAllocator(ABC):
    """Decides, before the first token, how many tokens each layer may keep."""

    @abstractmethod
    def allocate(self, query: LayerQuery) -> list[int]:
        """Return ``layers`` integers >= ``query.leasts`` that sum to ``query.total``."""

    def plan_heads(self, query: LayerQuery) -> list[list[int]] | None:
        """Return tokens of every head, [layers][kv_heads], for the head allocator ``planned``.

        None if it plans layers alone; otherwise rows sum to what ``allocate`` returns.
        """
        return None

    def plan_formats(self, query: LayerQuery) -> list[list[tuple[int, str]]] | None:
        """Return tokens and format of every head, [layers][kv_heads], for ``planned``.

        They take at most the bytes of ``query.total`` tokens in the model's dtype; the last
        ``window`` tokens of a head are kept in that anyway. None if formats are not planned;
        otherwise ``allocate`` returns the sums of the tokens, whatever they are.
        """
        return None


LAYER_ALLOCATORS: Registry[LayerAllocator] = Registry(
    "layer allocator",
    "reasonalloc.allocators.layer",
    lambda: LayerAllocator,
    "reasonalloc.layer_allocators",
)
"""Layer allocators by name: the library's, those of packages and your own."""
