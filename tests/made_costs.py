"""Random cost profiles."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.calibrated.predictor import FEATURES, Predictor, as_json
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.planning.shapes import text_config


def predictor(layers: list[int], heads: int, seed: int = 0) -> Predictor:
    generator = random.Random(seed)  # no tensors: some tests are under fake ones here
    weights = [[[generator.gauss(0, 1) for _ in FEATURES] for _ in range(heads)] for _ in layers]
    return Predictor(layers, weights)


def make(layers: int, heads: int, *, fingerprint: str = "", seed: int = 0) -> CostProfile:
    generator = torch.Generator().manual_seed(seed)
    budgets = [8, 16, 32, 64]
    scale = torch.rand(2, layers, heads, 1, generator=generator) ** 3
    slope = 0.3 + 2 * torch.rand(2, layers, heads, 1, generator=generator)
    costs = scale * torch.tensor(budgets) ** -slope
    return CostProfile(
        objective="fisher",
        model_id="tiny",
        config_hash=fingerprint,
        policy="value_aware",
        interval=8,
        window=4,
        samples=2,
        budgets=budgets,
        text_hashes=["a" * 64, "b" * 64],
        kinds=["code", "prose"],
        tokens=[90, 40],
        costs=costs.tolist(),
        layer_costs=(1.2 * costs.sum(dim=2)).tolist(),
    )


def of_model(model: Any, seed: int = 0) -> CostProfile:
    budgeted = {i: shape for i, shape in enumerate(check_model(model)) if shape.compressible}
    layers, shapes = list(budgeted), list(budgeted.values())
    fingerprint = config_hash(text_config(model).to_dict())
    made = make(len(shapes), shapes[0].kv_heads, fingerprint=fingerprint, seed=seed)
    return replace(made, foretells=as_json(predictor(layers, shapes[0].kv_heads, seed)))


#: What formats cost more than none, in which fewer bits cost a little.
MORE = {"int8": 0.01, "int8:int4": 0.1, "int4h": 0.4}


def in_formats(costs: CostProfile) -> CostProfile:
    """With costs in fewer bits: most is lost where much depends on a head."""
    coded = {
        kind: {
            "costs": (torch.tensor(costs.costs) * (1 + more)).tolist(),
            "layer_costs": (torch.tensor(costs.layer_costs) * (1 + more)).tolist(),
        }
        for kind, more in MORE.items()
    }
    return replace(costs, coded=coded)
