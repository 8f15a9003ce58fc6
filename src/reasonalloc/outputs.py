"""How far a change of a head's output moves its layer's output: a metric of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_NAMES = ("o_proj", "out_proj", "dense", "c_proj")  # of output projections


def projections(module: Any) -> Iterator[Any]:
    """The output projection of an attention module, by the names that are known; or nothing."""
    for name in _NAMES:
        found = getattr(module, name, None)
        if found is not None:
            yield found


@torch.no_grad()
def output_metric(weights: Sequence[Tensor], query_heads: int, kv_heads: int) -> Tensor:
    """[kv_heads, value_dim, value_dim] float32 on the CPU.

    ``W^T W`` of the columns ``W`` of the output projection that belong to a query head, averaged
    over the KV head's group, in all projections.

    Args:
        weights: [outputs, query_heads * value_dim] each, of all that read the heads.
        query_heads: of one of them.
        kv_heads: they are divided among.
    """
    each = [
        torch.einsum("ohd,ohe->hde", own, own)
        for own in (weight.float().unflatten(1, (query_heads, -1)) for weight in weights)
    ]
    metric: Tensor = torch.stack(each).unflatten(1, (kv_heads, -1)).mean(dim=(0, 2))
    return metric.cpu()


class LateMetrics(Mapping[int, Tensor]):
    """Metrics by layer that somebody asks for before the model's weights are there.

    Attributes:
        asked: whether anybody did.
    """

    def __init__(self) -> None:
        self.asked = False
        self._known: dict[int, Tensor] = {}

    def ask(self) -> LateMetrics:
        """Itself: read when it is filled."""
        self.asked = True
        return self

    def fill(self, metrics: Mapping[int, Tensor]) -> None:
        """Take what the weights say."""
        self._known.update(metrics)

    def __getitem__(self, layer: int) -> Tensor:
        return self._known[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)
