"""What slabs of every kind share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

S = TypeVar("S", bound="LayerStorage")


class LayerStorage:
    """Storage of one layer: tensors whose first dimension is the sequences.

    Attributes:
        positions: [batch, slots] int32, position of each token in its sequence.
        state: [batch, slots, channels] float32, what the policy keeps per token, or None.
    """

    _shared: ClassVar[tuple[str, ...]] = ()
    """Tensors that are the same for every sequence."""

    positions: Tensor
    state: Tensor | None
    _sequences: Tensor

    def content(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        raise NotImplementedError

    def copy(self: S, sequences: Tensor | None = None) -> S:
        """The same content in memory of its own.

        Args:
            sequences: [n] int64, which of the sequences, in this order; None: all.
        """
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name not in self._shared:
                setattr(twin, name, value.clone() if sequences is None else value[sequences])
        if sequences is not None:
            twin._sequences = self._sequences.new_tensor(range(len(sequences)))[:, None]
        return twin

    def _mark(self, slot: tuple[Tensor, Tensor], position: int | Tensor) -> None:
        """Write the position of a new token and a state of zeros; see ``Slab.store``."""
        if isinstance(position, Tensor):
            self.positions.index_put_(slot, position[:, None].to(torch.int32))
        else:
            self.positions.index_put_(slot, self.positions.new_full((), position))
        if self.state is not None:
            self.state.index_put_(slot, self.state.new_zeros(()))

    def _check_content(self, content: Mapping[str, Tensor]) -> None:
        """Refuse tensors of another shape or type than those of ``content()``.

        Raises:
            ValueError: one is missing or differs.
        """
        for name, tensor in self.content().items():
            given = content.get(name)
            if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
                theirs = None if given is None else (tuple(given.shape), given.dtype)
                raise ValueError(f"{name} is {theirs}, not {(tuple(tensor.shape), tensor.dtype)}")
