"""Differential attention: pairs of KV heads that read each other's values keep the same tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.slab_layer import FOREIGN_ATTENTION, SlabLayer


class PairedLayer(SlabLayer):
    """A layer whose model attends twice with the same keys, to either half of its value heads.

    KV head ``i`` of the first half and head ``i`` of the second are one run of the slab: its keys
    are both keys, its values both values. A query is zero beside the key of its own head, so that
    one pass gives the outputs of both calls.
    """

    _asked: Tensor | None = None  # the query of a call that the second one has to follow
    _second: Tensor | None = None  # what that one gets
    _whole: Tensor | None = None  # the values of all heads

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        query_sinks: Tensor | None = None,
    ) -> Tensor:
        """Store the new tokens and attend at the first call; the second gets the other half.

        Args:
            value: [batch, kv_heads, q, head_dim], one half of the value heads, twice.
        """
        if self._second is not None and self._whole is not None:
            second = self._second
            if self._asked is not query or not self._is_half(1, value, self._whole):
                raise UnsupportedError(FOREIGN_ATTENTION)
            self._asked = self._second = self._whole = None
            super().release(key)
            return second
        whole, plain = self._values, sinks is None and bias is None and query_sinks is None
        if whole is None or not plain or not self._is_half(0, value, whole):
            raise UnsupportedError(FOREIGN_ATTENTION)
        pairs = whole.shape[1] // 2
        both = super().attend(_apart(query, pairs), key, whole, mask, scaling, softcap)
        both = _in_order(both, pairs, 2)
        self._asked, self._whole, self._second = query, whole, both[..., value.shape[-1] :]
        return both[..., : value.shape[-1]]

    def release(self, key: Tensor) -> None:
        """Keep what the second call needs."""

    def clear(self) -> None:
        """Forget everything, also a call that broke off."""
        super().clear()
        self._asked = self._second = self._whole = None

    def _stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return [batch, kv_heads / 2, q, 2 * head_dim] of [batch, kv_heads, q, head_dim]."""
        return torch.cat(key.chunk(2, dim=1), dim=-1), torch.cat(value.chunk(2, dim=1), dim=-1)

    def _is_half(self, part: int, value: Tensor, whole: Tensor) -> bool:
        """Whether values are a half of all, twice; on a GPU only looked at with several tokens."""
        if value.shape != whole.shape:
            return False
        waits = value.device.type != "cpu" and value.shape[2] == 1
        if self.compressor.static or waits:
            return True
        half = whole.chunk(2, dim=1)[part]
        return torch.equal(value, torch.cat([half, half], dim=1))


def _apart(query: Tensor, pairs: int) -> Tensor:
    """Return queries of the double width, those of a pair's heads beside one another.

    Args:
        query: [batch, query_heads, q, head_dim].
        pairs: of KV heads.
    """
    first, second = query.chunk(2, dim=1)
    wide = torch.stack(
        [
            torch.cat([first, torch.zeros_like(first)], dim=-1),
            torch.cat([torch.zeros_like(second), second], dim=-1),
        ],
        dim=1,
    )
    return _in_order(wide.flatten(1, 2), 2, pairs)


def _in_order(heads: Tensor, outer: int, inner: int) -> Tensor:
    """Return [batch, outer * inner * group, ...] heads as [batch, inner * outer * group, ...]."""
    split: Tensor = heads.unflatten(1, (outer, inner, -1))
    return split.transpose(1, 2).flatten(1, 3)
