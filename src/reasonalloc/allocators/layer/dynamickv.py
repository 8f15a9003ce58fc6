from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.allocators.layer.offline import in_proportion, statistics_of
from reasonalloc.calibrated.reader import ReadsCalibrated
from reasonalloc.calibrated.statistics import Statistics


@LAYER_ALLOCATORS.register(
    "dynamickv", source="DynamicKV, arXiv 2412.14838, per model instead of per prompt"
)
@dataclass(frozen=True)
class DynamicKV(ReadsCalibrated, LayerAllocator):
    """Budgets proportional to each layer's share of the highest calibrated attentions."""

    reads = "statistics"

    def allocate(self, query: LayerQuery) -> list[int]:
        statistics = statistics_of("dynamickv", self.path, query)
        return in_proportion(_share(statistics, query.budget - query.window), query)


def _share(statistics: Statistics, top: int) -> Tensor:
    """Return [layers] shares of the ``top`` highest attentions.

    Between two measured numbers in proportion to the logarithm, since they double from one to the
    next; beyond the last, the last.
    """
    place = math.log2(max(top, 1))
    places = [math.log2(measured) for measured in statistics.tops]
    above = next((i for i, p in enumerate(places) if p >= place), len(places) - 1)
    below = max(above - 1, 0)
    if above == below or place >= places[above]:
        return statistics.top_share[above]
    weight = (place - places[below]) / (places[above] - places[below])
    return torch.lerp(statistics.top_share[below], statistics.top_share[above], weight)
