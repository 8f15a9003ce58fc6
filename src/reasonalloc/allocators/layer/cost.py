from __future__ import annotations

from dataclasses import dataclass

import torch

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.allocators.minimise import minimise
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibrated.reader import ReadsCalibrated
from reasonalloc.errors import UsageError


@LAYER_ALLOCATORS.register("cost", source="ours: measured KL of compressing each head alone")
@dataclass(frozen=True)
class LeastCost(ReadsCalibrated, LayerAllocator):
    """Least summed cost over all layers and heads at once, from a cost profile.

    Every head keeps ``least`` tokens besides window and sinks (fewer if the budget has no room),
    and no more than ``most`` times the mean. ``kind``: only calibration texts of that kind count.
    ``by="layers"``: costs of whole layers, whose heads then get equal shares.
    """

    least: int = 8
    most: float = 6.0
    kind: str = ""
    by: str = "heads"
    reads = "cost profile"

    def __post_init__(self) -> None:
        if self.least < 0:
            raise UsageError(f"cost: least={self.least} is a number of tokens: give 0 or more")
        if self.by not in ("heads", "layers"):
            raise UsageError(f"cost: by={self.by!r} must be 'heads' or 'layers'")
        if self.most < 1:
            raise UsageError(f"cost: most={self.most} is a multiple of the mean: give 1 or more")

    def plan_heads(self, query: LayerQuery) -> list[list[int]]:
        if not self.path:
            raise UsageError(
                "layers='cost' needs a cost profile: pass profile='FILE.json' "
                "(--profile FILE.json), made for this model with "
                "'reasonalloc calibrate --objective fisher'"
            )
        costs = load_costs(self.path)
        costs.check_model(query.model_id, query.config_hash, query.layers, query.kv_heads)
        texts = [i for i, kind in enumerate(costs.kinds) if self.kind in ("", kind)]
        if not texts:
            raise UsageError(
                f"cost: kind={self.kind!r} is no kind of text in {self.path!r}, which has "
                f"{', '.join(sorted(set(costs.kinds)))}"
            )
        lower = min(query.window + query.n_sink + self.least, query.budget)
        upper = max(int(self.most * query.budget), query.budget)
        points = torch.tensor(costs.budgets, dtype=torch.float64, device="cpu")
        if self.by == "layers":
            curves = torch.tensor(costs.layer_curves(texts), dtype=torch.float64, device="cpu")
            mean = query.layers * query.budget
            equal = minimise(curves, points, mean, lower, upper).tolist()
            return [[size] * query.kv_heads for size in equal]
        curves = torch.tensor(costs.curves(texts), dtype=torch.float64, device="cpu").flatten(0, 1)
        sizes = minimise(curves, points, query.total, lower, upper)
        heads: list[list[int]] = sizes.view(query.layers, query.kv_heads).tolist()
        return heads

    def allocate(self, query: LayerQuery) -> list[int]:
        return [sum(heads) for heads in self.plan_heads(query)]
