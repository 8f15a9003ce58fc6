"""The interface of an attention backend over a slab."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from reasonalloc.attention.coded import CodedView, decode_coded
from reasonalloc.errors import UsageError
from reasonalloc.registry import Registry


class SlabView(Protocol):
    """What a backend reads of a layer's storage (``reasonalloc.cache.Slab``).

    Either every run has the same length (``uniform_length`` is a number: then ``rows`` gives a
    strided view without a copy), or runs are described by ``offsets`` and ``lengths``.
    """

    keys: Tensor
    """[batch, slots, head_dim]"""
    values: Tensor
    """[batch, slots, value_dim]"""
    positions: Tensor
    """[batch, slots] int32"""
    kv_heads: int
    uniform_length: int | None

    @property
    def offsets(self) -> Tensor:
        """[batch, kv_heads] int64, first slot of each head's run."""
        ...

    @property
    def lengths(self) -> Tensor:
        """[batch, kv_heads] int64, tokens in each head's run."""
        ...

    def rows(self, flat: Tensor) -> Tensor:
        """[batch, kv_heads, uniform_length, ...] view of a [batch, slots, ...] tensor."""
        ...


class Backend(ABC):
    """Attention of one new query per sequence over the slab. Stateless."""

    native: ClassVar[bool] = False
    """Whether everything else is to be computed by the loops in C++ as well (``ops.native``)."""

    def check(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Refuse a device, or an element type, that it cannot run on.

        Raises:
            UsageError: says what is missing and what to use instead.
            UnsupportedError: the same, of an element type.
        """
        return

    @abstractmethod
    def decode(
        self,
        query: Tensor,
        slab: SlabView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to everything that the slab holds.

        Args:
            query: [batch, query_heads, 1, head_dim].
            slab: the layer's storage, the new token included.
            scaling: factor of the logits.
            softcap: soft-capping of the logits, or None.
            need_weights: also return what each slot received.
            sinks: [query_heads] learned sinks, see ``reasonalloc.sinks``, or None.

        Returns:
            Output [batch, query_heads, 1, value_dim] and, if asked for, weights [batch, slots]
            float32 summed over the query heads of each slot's KV head.
        """

    def decode_coded(
        self,
        query: Tensor,
        slab: CodedView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The same over a slab whose older tokens are coded; slots are those of ``CodedView``."""
        return decode_coded(query, slab, scaling, softcap, need_weights, sinks)


BACKENDS: Registry[Backend] = Registry("attention backend", "reasonalloc.attention.backends")


def choose_backend(
    name: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Backend:
    """Backend by name; ``auto`` is the fastest one that was measured and needs nothing more.

    That is ``sdpa``, and ``cpp`` where steps are compiled, on a CPU.

    Args:
        name: of the backend.
        device, dtype: of the model; None while its weights are not loaded.
        compiled: whether steps are compiled.

    Raises:
        UsageError: unknown name, with the nearest suggestion; a device that it cannot run on.
    """
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS.entries()):
        known = ", ".join(["auto", *BACKENDS.entries()])
        raise UsageError(f"attention={name!r} is unknown: choose one of {known}")
    if name == "auto":
        name = "cpp" if compiled and device is not None else "sdpa"
    backend = BACKENDS.create(name)
    if device is not None:
        backend.check(device, dtype)
    return backend


def slot_mask(slab: SlabView) -> Tensor:
    """[batch, kv_heads, slots] bool: slots that hold a token of the head."""
    return run_mask(slab.offsets, slab.lengths, slab.keys.shape[1])


def run_mask(offsets: Tensor, lengths: Tensor, slots: int) -> Tensor:
    """[batch, kv_heads, slots] bool: slots of runs, of which [batch, kv_heads] say where."""
    every = torch.arange(slots, device=offsets.device)
    start = offsets[..., None]
    return (every >= start) & (every < start + lengths[..., None])
