"""The Reasoning Wave: tokens that each layer needs to keep a share of its attention mass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reasonalloc.calibrated.demand import KEYS, DemandProfile, config_hash
from reasonalloc.calibrated.objectives import CalibrationConfig
from reasonalloc.calibration.observe import (
    Observer,
    check_mode,
    check_prompts,
    fingerprint,
    observe,
)
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.integrations.hf.model import check_model, inner_model
from reasonalloc.planning.shapes import model_name, text_config
from reasonalloc.whole import whole_number


def demand(weights: Tensor, rho: float) -> Tensor:
    """Return the fewest keys whose attention masses sum to at least ``rho`` of all, per KV head.

    The masses are averaged over the window's queries and over the query heads of the group. What a
    learned sink takes is no key's mass.

    Args:
        weights: [kv_heads, group, window, n], see ``Observer.on_sample``.
        rho: share of the mass, 0 < rho < 1.

    Returns:
        [kv_heads] int64.
    """
    mass = weights.mean(dim=(1, 2))
    sums = mass.double().sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return (sums < rho * sums[..., -1:]).sum(dim=-1).clamp_max(mass.shape[-1] - 1) + 1


class _Demands(Observer):
    """Collects the demand of every sample."""

    def __init__(
        self, layers: Sequence[int], every: int, window: int, rho: float, keys: str
    ) -> None:
        super().__init__(layers, every, window)
        self._rho, self._keys = rho, keys
        self.samples: dict[int, list[Tensor]] = {}

    def start(self) -> None:
        super().start()
        self.samples = {layer: [] for layer in self.layers}

    def on_sample(self, layer: int, weights: Tensor) -> None:
        if self._keys == "generated":
            new = self.generated(layer)
            weights = weights[:, :, -new:, -new:]
        self.samples[layer].append(demand(weights, self._rho))


def attention_mass(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    rho: float = CalibrationConfig.rho,
    max_new_tokens: int = CalibrationConfig.max_new_tokens,
    every: int = CalibrationConfig.every,
    window: int = CompressionConfig.window,
    keys: str = CalibrationConfig.keys,
    on_prompt: Callable[[int], None] | None = None,
) -> DemandProfile:
    """Measure a model's demand per layer with its full cache.

    Args:
        model: a decoder-only transformers model, not attached to anything.
        prompts: token ids, each [1, tokens]; at most 8 are usual. None of a test set.
        rho: share of attention mass to keep.
        max_new_tokens: generated tokens per prompt, greedily, at most.
        every: generated tokens between two samples.
        window: queries averaged in a sample.
        keys: ``all``, or ``generated``: the share is one of the mass that generated tokens have,
            by their own queries.
        on_prompt: called with the index of every finished prompt.

    Returns:
        The profile, for the ``profile`` layer allocator.

    Raises:
        UsageError: a wrong argument, or generations too short for a single sample.
        UnsupportedError: a model that cannot run under a budget.
    """
    if not 0 < rho < 1:
        raise UsageError(f"rho={rho} must lie between 0 and 1")
    if keys not in KEYS:
        raise unknown_name("keys", keys, KEYS)
    model = inner_model(model)
    check_mode(model)
    check_prompts(prompts)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    every, window = whole_number("every", every, 1), whole_number("window", window, 1)
    budgeted = [i for i, shape in enumerate(check_model(model)) if shape.compressible]
    observer = _Demands(budgeted, every, window, rho, keys)
    means, maxima = [], []
    for index in observe(model, prompts, observer, max_new_tokens):
        stacked = [torch.stack(observer.samples[layer]).double() for layer in budgeted]
        means.append([float(s.mean()) for s in stacked])
        maxima.append([float(s.amax(dim=1).mean()) for s in stacked])
        if on_prompt is not None:
            on_prompt(index)
    return DemandProfile(
        model_id=model_name(model),
        config_hash=config_hash(text_config(model).to_dict()),
        rho=rho,
        steps=max_new_tokens,
        prompt_hashes=[fingerprint(ids) for ids in prompts],
        demand_mean=_mean(means),
        demand_max=_mean(maxima),
        curves=means,
        window=window,
        keys=keys,
    )


def _mean(curves: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*curves, strict=True)]
