from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.allocators.power import check_power
from reasonalloc.allocators.rounding import shares_of
from reasonalloc.calibrated.demand import load_profile
from reasonalloc.calibrated.reader import ReadsCalibrated
from reasonalloc.errors import UsageError


@LAYER_ALLOCATORS.register("profile", source="ReasonAlloc, arXiv 2606.11164 (level 1, the wave)")
@dataclass(frozen=True)
class FromProfile(ReadsCalibrated, LayerAllocator):
    """Budgets proportional to a calibrated demand to the power gamma, clipped around the mean.

    ``demand``: a layer's is the ``mean`` over its heads, or the ``max``.
    """

    gamma: float = 0.5
    demand: str = "mean"
    least: float = 0.25
    most: float = 2.0
    called: ClassVar[str] = "profile"
    reads = "profile"

    def __post_init__(self) -> None:
        if self.demand not in ("mean", "max"):
            raise UsageError(f"{self.called}: demand={self.demand!r} must be 'mean' or 'max'")
        check_power(self.called, "gamma", self.gamma, negative=True)
        if not 0 <= self.least <= 1 <= self.most:
            raise UsageError(
                f"{self.called}: least={self.least} and most={self.most} are multiples of the "
                "mean: give 0 <= least <= 1 <= most"
            )

    def allocate(self, query: LayerQuery) -> list[int]:
        if not self.path:
            raise UsageError(
                f"layers={self.called!r} needs a profile file: pass profile='FILE.json' "
                "(--profile FILE.json), made for this model"
            )
        profile = load_profile(self.path)
        profile.check_model(query.model_id, query.config_hash, query.layers)
        means = [heads * query.budget for heads in query.heads]
        lower = [
            min(max(int(self.least * mean), least), mean)
            for mean, least in zip(means, query.leasts, strict=True)
        ]
        upper = [max(int(self.most * mean), mean) for mean in means]
        # The demand is a KV head's.
        heads = torch.tensor(query.heads, dtype=torch.float64, device="cpu") / max(query.heads)
        of_layers = profile.demand_mean if self.demand == "mean" else profile.demand_max
        demand = torch.tensor(of_layers, dtype=torch.float64, device="cpu")
        return shares_of(demand**self.gamma * heads, query.total, lower, upper, exponent=1.0)
