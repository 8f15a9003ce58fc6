"""The text that a cache has seen: token ids, and where each column lies in its sequence."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

_JOIN = 256  # pieces that are joined, and on a GPU moved to the host, at once
UNKNOWN = -1  # the id of a token that came as an embedding


class SeenText:
    """Ids and positions of all columns that a cache has seen, 4 bytes a token on the host.

    A column is a place in ``input_ids``, padding included. Its *position* counts the real tokens
    before it; a hidden column (padding, or masked later) has none. Positions are the ones that
    ``LayerCompressor`` stores.
    """

    def __init__(self) -> None:
        self.columns = 0
        self._ids: list[Tensor] = []  # [batch, q] int32, on the host
        self._recent: list[Tensor] = []  # what follows, where the model is
        self._places: Tensor | None = None  # [batch, n] int64, positions, -1 where hidden
        self._next: Tensor | None = None  # [batch] int64: the position behind ``_places``

    @property
    def padded(self) -> bool:
        """Whether a column may be hidden."""
        return self._places is not None

    @property
    def ids(self) -> Tensor:
        """[batch, columns] int32 on the host; ``UNKNOWN`` where an embedding was given."""
        if any(piece.is_pinned() for piece in self._ids):
            torch.cuda.synchronize()  # ``_join`` did not wait
        pieces = [*self._ids, *(piece.to("cpu") for piece in self._recent)]
        self._ids, self._recent = [torch.cat(pieces, dim=1)], []
        return self._ids[0]

    def places(self, batch: int, device: torch.device) -> Tensor:
        """[batch, columns] int64: the position of each column, -1 where it is hidden."""
        if self._places is None or self._next is None:
            return torch.arange(self.columns, device=device).expand(batch, -1)
        known = self._places.to(device)
        later = torch.arange(self.columns - known.shape[1], device=device)
        return torch.cat([known, self._next.to(device)[:, None] + later], dim=1)

    def latest(self, count: int, batch: int, device: torch.device) -> Tensor:
        """[batch or 1, count] int64: the positions of the last columns, -1 where hidden."""
        if self._places is None:
            return torch.arange(self.columns - count, self.columns, device=device)[None]
        return self.places(batch, device)[:, -count:]

    def add(self, ids: Tensor | None, batch: int, columns: int) -> None:
        """Append columns; all of them are visible until ``hide`` says otherwise.

        Args:
            ids: [batch, columns], or None if embeddings were given.
            batch, columns: their number.
        """
        if ids is None:
            fresh = torch.full((batch, columns), UNKNOWN, dtype=torch.int32, device="cpu")
        else:
            fresh = ids.detach().to(torch.int32, copy=True)
        self._recent.append(fresh)
        self.columns += columns
        if len(self._recent) == _JOIN:
            self._join()

    def _join(self) -> None:
        joined = torch.cat(self._recent, dim=1)
        if joined.is_cuda:
            host = torch.empty(joined.shape, dtype=joined.dtype, device="cpu", pin_memory=True)
            joined = host.copy_(joined, non_blocking=True)
        self._ids.append(joined)
        self._recent = []

    def set_places(self, places: Tensor) -> None:
        """Say where all columns lie: [batch, columns] int64, -1 where hidden."""
        if bool((places >= 0).all()):  # such as after going back to before what was hidden
            self._places = self._next = None
        else:
            self._places, self._next = places.clone(), following(places)

    def go_back(self, columns: int) -> None:
        """Forget all but the first ``columns``."""
        if columns == self.columns:
            return
        if self._places is not None:
            self.set_places(self.places(len(self._places), self._places.device)[:, :columns])
        self._ids = [self.ids[:, :columns]] if columns else []
        self._recent = []
        self.columns = columns
        if columns == 0:
            self._places = self._next = None

    def content(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        tensors = {"ids": self.ids}
        if self._places is not None:
            tensors["places"] = self.places(len(tensors["ids"]), self._places.device)
        return tensors

    def fill(self, content: Mapping[str, Tensor]) -> None:
        """Take over what another text held.

        Raises:
            ValueError, KeyError: a tensor is missing, or of another shape or type.
        """
        ids, places = content["ids"], content.get("places")
        if ids.dim() != 2 or ids.dtype != torch.int32:
            raise ValueError("the ids of the text do not fit")
        self._ids, self._recent, self.columns = [ids.clone()], [], ids.shape[1]
        if places is not None:
            if places.shape != ids.shape or places.dtype != torch.int64:
                raise ValueError("the places of the text do not fit")
            self.set_places(places)

    def copy(self, sequences: Tensor | None = None) -> SeenText:
        """The same text; nothing that one of the two does is seen by the other.

        Args:
            sequences: [n] int64, which of the sequences, in this order; None: all.
        """
        twin = copy.copy(self)
        if sequences is not None:
            twin._ids, twin._recent = [self.ids[sequences.to("cpu")]], []
            if self._places is not None:
                rows = sequences.to(self._places.device)
                twin.set_places(self.places(len(self._places), rows.device)[rows])
            return twin
        twin._ids, twin._recent = list(self._ids), list(self._recent)  # pieces never change
        return twin

    def common(self, ids: Tensor, visible: Tensor | None) -> int:
        """The first column at which a text differs from what was seen.

        Args:
            ids: [batch, n] token ids.
            visible: [batch, n] bool, which of them are to be seen; None: all that are here.

        Returns:
            A number of columns, at most ``min(n, columns)``: before it the visible ids agree, and
            no column is to be seen that is hidden here.
        """
        n = min(ids.shape[1], self.columns)
        if n == 0:
            return 0
        own, given = self.ids[:, :n], ids[:, :n].to("cpu", torch.int32)
        here = self.places(own.shape[0], own.device)[:, :n] >= 0
        wanted = here if visible is None else visible[:, :n].to("cpu", torch.bool)
        other = (own != given) & (own != UNKNOWN) & here & wanted
        columns = (other | (wanted & ~here)).any(dim=0).nonzero()
        return int(columns[0]) if len(columns) else n


def following(places: Tensor) -> Tensor:
    """[batch] int64: the position behind the last visible one of [batch, n] ``places``."""
    if places.shape[1] == 0:
        return places.new_zeros(places.shape[0])
    return places.amax(dim=1) + 1
