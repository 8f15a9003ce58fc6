from __future__ import annotations

from dataclasses import dataclass

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.allocators.layer.offline import in_proportion, statistics_of
from reasonalloc.calibrated.reader import ReadsCalibrated
from reasonalloc.errors import UsageError


@LAYER_ALLOCATORS.register("cake", source="CAKE, arXiv 2503.12491, per model instead of per prompt")
@dataclass(frozen=True)
class Cake(ReadsCalibrated, LayerAllocator):
    """Budgets proportional to entropy^(1/tau1) * variance^(1/tau2) of calibrated attention."""

    tau1: float = 1.0
    tau2: float = 1.0
    reads = "statistics"

    def __post_init__(self) -> None:
        for name, value in (("tau1", self.tau1), ("tau2", self.tau2)):
            if value <= 0:
                raise UsageError(f"cake: {name}={value} must be above 0 (1 is the usual)")

    def allocate(self, query: LayerQuery) -> list[int]:
        statistics = statistics_of("cake", self.path, query)
        # Relative to the largest: powers of the tiny variances must not underflow.
        entropy = statistics.entropy / statistics.entropy.max().clamp_min(1e-300)
        variance = statistics.variance / statistics.variance.max().clamp_min(1e-300)
        return in_proportion(entropy ** (1 / self.tau1) * variance ** (1 / self.tau2), query)
