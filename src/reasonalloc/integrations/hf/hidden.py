"""What attention masks hide from a cache: compared with what it has seen, and dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.cache_layers import CacheLayers
from reasonalloc.integrations.hf.seen import SeenText, following


@dataclass(frozen=True)
class Hidden:
    """The hidden columns of a cache's text.

    Attributes:
        layers: of the cache.
        seen: its text, with the positions of visible columns.
    """

    layers: CacheLayers
    seen: SeenText

    def compare(self, mask: Tensor | None, batch: int, columns: int) -> None:
        """Compare a mask with what was seen; drop what it hides.

        Args:
            mask: [batch, all columns] 2-D mask; None if everything is visible.
            batch, columns: of the new tokens.

        Raises:
            UsageError: a mask that does not fit or shows what was hidden.
            UnsupportedError: it hides what a layer cannot forget.
        """
        past = self.seen.columns
        if past == 0:
            return
        if mask is None:
            if self.seen.padded:
                raise UsageError(
                    f"no attention_mask was given, but of the {past} tokens that the cache has "
                    "seen some were hidden (padding): pass the mask over the whole conversation"
                )
            return
        if mask.shape != (batch, past + columns):
            raise UsageError(
                f"the attention mask covers {mask.shape[-1]} tokens, but the cache has seen "
                f"{past} and {columns} are new: pass a mask over all of them"
            )
        if not self.seen.padded and bool(mask[:, :past].all()):
            return
        with torch.inference_mode(False), torch.no_grad():
            visible = mask[:, :past].bool()
            places = self.seen.places(batch, mask.device)
            if bool((visible & (places < 0)).any()):
                raise UsageError(
                    "attention_mask shows tokens that an earlier call on this cache hid: they were "
                    "not stored; hide them again, or start with a new cache"
                )
            hidden = ~visible & (places >= 0)
            if bool(hidden.any()):
                self._refuse_to_hide()
                self._refuse_gaps(hidden, visible)
                self.forget(hidden, past)

    def _refuse_to_hide(self) -> None:
        if self.layers.states:
            raise UnsupportedError(
                "attention_mask hides tokens that layers with a state (linear attention, Mamba, "
                "convolution) have taken in or would take in: start with a new cache"
            )

    def _refuse_gaps(self, hidden: Tensor, visible: Tensor) -> None:
        """Refuse to hide tokens before others, whose bias would change (ALiBi)."""
        if self.layers.counted and bool((visible & (hidden.cumsum(dim=1) > 0)).any()):
            raise UnsupportedError(
                "attention_mask hides tokens before others that stay, whose position would change "
                "(ALiBi), but keys were stored with it: start with a new cache"
            )

    def forget(self, hidden: Tensor, columns: int) -> None:
        """Drop visible columns.

        Args:
            hidden: [batch, columns so far] bool, which.
            columns: how many of all columns stay part of the text.
        """
        places = self.seen.places(hidden.shape[0], hidden.device)
        width = max(1, int(places.max()) + 1)
        spare = places.masked_fill(~hidden, width)
        gone = torch.zeros(len(places), width + 1, dtype=torch.bool, device=hidden.device)
        gone = gone.scatter_(1, spare, True)[:, :width]
        places = places.masked_fill(hidden, -1)
        for layer in self.layers.budgeted:
            slab = layer.compressor.slab
            where = hidden.device if slab is None else slab.device
            layer.go_back(gone.to(where), following(places).to(where), columns)
        if columns == self.seen.columns:
            self.seen.set_places(places)

    def go_back(self, columns: int) -> None:
        """Drop everything behind the first ``columns``."""
        slab = self.layers.budgeted[0].compressor.slab
        if slab is not None:
            places = self.seen.places(slab.batch, slab.device)
            late = torch.arange(places.shape[1], device=places.device) >= columns
            self.forget(late & (places >= 0), columns)

    def note(self, mask: Tensor, columns: int) -> None:
        """Take note which of the ``columns`` that were just seen are hidden.

        Args:
            mask: [batch, all columns] 2-D mask.
            columns: of the new tokens.

        Raises:
            UnsupportedError: a layer cannot do without them.
        """
        fresh = mask[:, -columns:].bool()
        if bool(fresh.all()):
            return
        if columns == 1:
            self._refuse_to_hide()  # the model hides nothing from a state in calls with one token
        places = self.seen.places(len(mask), mask.device)
        old = places[:, :-columns]
        new = following(old)[:, None] + fresh.long().cumsum(dim=1) - 1
        places = torch.cat([old, new.masked_fill(~fresh, -1)], dim=1)
        between = (places[:, 1:] < 0) & (places[:, :-1] >= 0)
        if any(layer.counts_columns for layer in self.layers.budgeted) and bool(between.any()):
            raise UnsupportedError(
                "attention_mask hides tokens behind others, which this model counts in the "
                "distances that its attention depends on: pad on the left"
            )
        self.seen.set_places(places)
