from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.allocators.minimise import minimise, minimise_bytes
from reasonalloc.calibrated.costs import CostProfile, load_costs
from reasonalloc.calibrated.reader import ReadsCalibrated
from reasonalloc.errors import UsageError

_Item = TypeVar("_Item")


@LAYER_ALLOCATORS.register("cost", source="ours: measured KL of compressing each head alone")
@dataclass(frozen=True)
class LeastCost(ReadsCalibrated, LayerAllocator):
    """Least summed cost over all layers and heads at once, from a cost profile.

    Every head keeps ``least`` tokens besides window and sinks (fewer if the budget has no room),
    and no more than ``most`` times the mean. ``kind``: only calibration texts of that kind count.
    ``by="layers"``: costs of whole layers, whose heads then get equal shares.
    ``bits="planned"``: every head also gets the format of its older tokens, out of those that were
    measured (``calibrate --kv-dtypes``), within the bytes of the budget. ``itemsize``: bytes of a
    number at full width that the budget is counted in (0: the model's dtype).
    """

    least: int = 8
    most: float = 6.0
    kind: str = ""
    by: str = "heads"
    bits: str = "fixed"
    itemsize: int = 0
    reads = "cost profile"

    def __post_init__(self) -> None:
        if self.least < 0:
            raise UsageError(f"cost: least={self.least} is a number of tokens: give 0 or more")
        if self.by not in ("heads", "layers"):
            raise UsageError(f"cost: by={self.by!r} must be 'heads' or 'layers'")
        if self.bits not in ("fixed", "planned"):
            raise UsageError(f"cost: bits={self.bits!r} must be 'fixed' or 'planned'")
        if self.itemsize not in (0, 2, 4):
            raise UsageError(f"cost: itemsize={self.itemsize} must be 0, 2 or 4")
        if self.bits == "fixed" and self.itemsize:
            raise UsageError("cost: itemsize has no effect with bits='fixed': leave it out")
        if self.bits == "planned" and self.by == "layers":
            raise UsageError("cost: bits='planned' plans heads: leave by='layers' out")
        if self.most < 1:
            raise UsageError(f"cost: most={self.most} is a multiple of the mean: give 1 or more")

    def _costs(self, query: LayerQuery) -> tuple[CostProfile, list[int]]:
        """Return the profile, checked, and the texts that count."""
        if not self.path:
            raise UsageError(
                "layers='cost' needs a cost profile: pass profile='FILE.json' "
                "(--profile FILE.json), made for this model with "
                "'reasonalloc calibrate --objective fisher'"
            )
        costs = load_costs(self.path)
        costs.check_model(query.model_id, query.config_hash, query.heads)
        texts = [i for i, kind in enumerate(costs.kinds) if self.kind in ("", kind)]
        if not texts:
            raise UsageError(
                f"cost: kind={self.kind!r} is no kind of text in {self.path!r}, which has "
                f"{', '.join(sorted(filter(None, set(costs.kinds)))) or 'texts without kinds'}"
            )
        return costs, texts

    def plan_heads(self, query: LayerQuery) -> list[list[int]]:
        if self.bits == "planned":
            return [[tokens for tokens, _ in layer] for layer in self._plan_formats(query)]
        costs, texts = self._costs(query)
        lower = min(query.window + query.n_sink + self.least, query.budget)
        upper = max(int(self.most * query.budget), query.budget)
        points = torch.tensor(costs.budgets, dtype=torch.float64, device="cpu")
        if self.by == "layers":
            if len(set(query.heads)) > 1:
                raise UsageError(
                    f"cost: by='layers' gives the heads of a layer equal shares, and the layers of "
                    f"{query.model_id!r} have {min(query.heads)} to {max(query.heads)} of them: "
                    "leave it out"
                )
            curves = torch.tensor(costs.layer_curves(texts), dtype=torch.float64, device="cpu")
            mean = query.layers * query.budget
            equal = minimise(curves, points, mean, lower, upper).tolist()
            return [[size] * query.kv_heads for size in equal]
        sizes = minimise(costs.head_curves(texts), points, query.total, lower, upper)
        return _by_layer(sizes.tolist(), query.heads)

    def plan_formats(self, query: LayerQuery) -> list[list[tuple[int, str]]] | None:
        return self._plan_formats(query) if self.bits == "planned" else None

    def _plan_formats(self, query: LayerQuery) -> list[list[tuple[int, str]]]:
        costs, texts = self._costs(query)
        if query.row_bytes is None:
            raise UsageError(
                f"cost: bits='planned' counts bytes, and the layers of {query.model_id!r} differ "
                "in shape: use bits='fixed' (the preset 'best')"
            )
        if not costs.coded:
            raise UsageError(
                f"cost: bits='planned' needs costs in several formats, {self.path!r} has one: "
                "calibrate with --kv-dtypes auto,int8,int8:int4,int4h"
            )
        widths = [query.row_bytes(kind, self.itemsize) for kind in costs.formats]
        heads = sum(query.heads)
        lower = min(query.window + query.n_sink + self.least, query.budget)
        upper = max(int(self.most * query.budget), query.budget) * max(widths) // min(widths)
        formats, tokens = minimise_bytes(
            torch.stack([costs.head_curves(texts, kind) for kind in costs.formats]),
            torch.tensor(costs.budgets, dtype=torch.float64, device="cpu"),
            torch.tensor(widths, dtype=torch.float64, device="cpu"),
            heads * (query.budget - query.window) * widths[0],
            lower,
            upper,
            query.window,
        )
        names = [costs.formats[place] for place in formats.tolist()]
        return _by_layer(list(zip(tokens.tolist(), names, strict=True)), query.heads)

    def allocate(self, query: LayerQuery) -> list[int]:
        return [sum(heads) for heads in self.plan_heads(query)]


def _by_layer(items: Sequence[_Item], heads: Sequence[int]) -> list[list[_Item]]:
    """Return what all heads get as a list per layer, of so many heads each."""
    rest = iter(items)
    return [list(islice(rest, count)) for count in heads]
