"""Statistics of queries and window attention, measured with the full cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reasonalloc.calibrated.demand import config_hash
from reasonalloc.calibrated.objectives import CalibrationConfig
from reasonalloc.calibrated.statistics import Statistics
from reasonalloc.calibration.observe import (
    Observer,
    check_mode,
    check_prompts,
    fingerprint,
    observe,
)
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.model import check_model, inner_model
from reasonalloc.integrations.hf.rope import read_rope
from reasonalloc.integrations.hf.rotation import check_rotation
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.shapes import model_name, text_config
from reasonalloc.rotary import Rope, to_features, turns
from reasonalloc.whole import whole_number

KERNEL = 7  # of DynamicKV's pooling, as in its code


def spread(weights: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return CAKE's entropy and variance of a layer's attention to the keys before the window.

    Args:
        weights: [kv_heads, group, window, n].
        window: newest keys that are left out.

    Returns:
        Entropy in nats, summed over heads and queries; variance over the queries, summed over heads
        and keys. Two float64 numbers.
    """
    earlier = weights[..., : weights.shape[-1] - window].double()
    entropy = -torch.xlogy(earlier, earlier).sum()
    return entropy, earlier.var(dim=2).sum()


def pooled(weights: Tensor, window: int) -> Tensor:
    """Return DynamicKV's attention per key before the window: [query_heads, n - window] float32."""
    received = weights[..., : weights.shape[-1] - window].sum(dim=2).flatten(0, 1)
    return F.avg_pool1d(received[:, None], KERNEL, stride=1, padding=KERNEL // 2)[:, 0]


def top_shares(attention: Sequence[Tensor], tops: Sequence[int]) -> list[list[float]]:
    """Return each layer's share of the highest attentions, pooled over layers and heads.

    Args:
        attention: [query_heads, n] of each layer; heads may differ.
        tops: tokens per (layer, query head), each at most ``n``.

    Returns:
        [tops][layers], each row sums to 1. Equal attentions: the earlier layer's counts.
    """
    flat = torch.cat([layer.cpu().flatten() for layer in attention])
    heads = torch.tensor([layer.shape[0] for layer in attention], dtype=torch.int64, device="cpu")
    owner = torch.arange(len(attention), device="cpu").repeat_interleave(
        heads * attention[0].shape[1]
    )
    order = owner[flat.sort(descending=True, stable=True).indices]
    shares = []
    for top in tops:
        kept = order[: top * int(heads.sum())]
        counts = kept.bincount(minlength=len(attention)).double()
        shares.append((counts / counts.sum()).tolist())
    return shares


class _Statistics(Observer):
    """Collects sums over all queries and, per prompt, what the samples show."""

    def __init__(self, layers: Sequence[int], every: int, window: int, rope: Rope | None) -> None:
        super().__init__(layers, every, window)
        self._rope = rope
        self._rates: dict[int, Tensor] = {}  # per layer, since layers may lie on several devices
        self.sums: dict[int, Tensor] = {}
        self.sizes: dict[int, Tensor] = {}
        self.queries = 0
        self.spreads: dict[int, list[Tensor]] = {}
        self.shares: dict[int, list[list[float]]] = {}
        self._pooled: dict[int, Tensor] = {}

    def start(self) -> None:
        super().start()
        self.spreads = {layer: [] for layer in self.layers}
        self.shares, self._pooled = {}, {}

    def on_queries(self, layer: int, query: Tensor, first: int) -> None:
        if self._rope is None:
            return
        positions = torch.arange(first, first + query.shape[1], device=query.device)
        if layer not in self._rates:
            self._rates[layer] = self._rope.rates(query.device)
        turn = turns(-positions, self._rates[layer])
        features = to_features(query, self._rope.pairs) * turn
        for sums, values in ((self.sums, features), (self.sizes, features.abs())):
            sums[layer] = values.sum(dim=1) + sums.get(layer, 0)
        self.queries += query.shape[1] if layer == self.layers[0] else 0

    def mean(self, sums: dict[int, Tensor]) -> Tensor:
        """Return [layers, query_heads, features] of sums over all queries."""
        return torch.stack([sums[layer].cpu() for layer in self.layers]) / self.queries

    def mean_spreads(self) -> Tensor:
        """Return [layers, 2]: entropy and variance, mean over the samples of a prompt."""
        means = [torch.stack(self.spreads[layer]).mean(dim=0).cpu() for layer in self.layers]
        return torch.stack(means)

    def on_sample(self, layer: int, weights: Tensor) -> None:
        self.spreads[layer].append(torch.stack(spread(weights, self.window)))
        self._pooled[layer] = pooled(weights, self.window)
        if len(self._pooled) == len(self.layers):
            attention = [self._pooled[index] for index in self.layers]
            tops = [1 << power for power in range(attention[0].shape[1].bit_length())]
            for top, share in zip(tops, top_shares(attention, tops), strict=True):
                self.shares.setdefault(top, []).append(share)
            self._pooled = {}


def statistics(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int = CalibrationConfig.max_new_tokens,
    every: int = CalibrationConfig.every,
    window: int = CompressionConfig.window,
    on_prompt: Callable[[int], None] | None = None,
) -> Statistics:
    """Measure query and attention statistics with the full cache (docs/method.md, "Offline").

    Args:
        model: a decoder-only transformers model, not attached to anything.
        prompts: token ids, each [1, tokens]; at most 8 are usual. None of a test set.
        max_new_tokens: generated tokens per prompt, greedily, at most.
        every: generated tokens between two samples of window attention; all queries are averaged.
        window: queries per sample.
        on_prompt: called with the index of every finished prompt.

    Returns:
        For the policy ``tri_attention``, the layer allocators ``cake`` and ``dynamickv``. Without
        queries if the model's rotary embedding does not allow for their mean (``no_queries``).

    Raises:
        UsageError: a wrong argument, or generations too short for a single sample.
        UnsupportedError: a model that cannot run under a budget.
    """
    model = inner_model(model)
    check_mode(model)
    check_prompts(prompts)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, 1)
    every, window = whole_number("every", every, 1), whole_number("window", window)
    if window < 2:
        raise UsageError(f"window={window}: a variance over queries needs at least 2")
    shapes = check_model(model)
    budgeted = [i for i, shape in enumerate(shapes) if shape.compressible]
    rope, reason = _rope(model, prompts, [shapes[layer] for layer in budgeted])
    observer = _Statistics(budgeted, every, window, rope)
    spreads: list[Tensor] = []
    shares: dict[int, list[Tensor]] = {}
    for index in observe(model, prompts, observer, max_new_tokens):
        spreads.append(observer.mean_spreads())
        for top, samples in observer.shares.items():
            shares.setdefault(top, []).append(
                torch.tensor(samples, dtype=torch.float64, device="cpu").mean(dim=0)
            )
        if on_prompt is not None:
            on_prompt(index)
    entropy, variance = torch.stack(spreads).mean(dim=0).unbind(dim=1)
    return Statistics(
        model_id=model_name(model),
        config_hash=config_hash(text_config(model).to_dict()),
        steps=max_new_tokens,
        window=window,
        prompt_hashes=[fingerprint(ids) for ids in prompts],
        layers=budgeted,
        entropy=entropy.contiguous(),
        variance=variance.contiguous(),
        tops=sorted(shares),
        top_share=torch.stack([torch.stack(shares[top]).mean(dim=0) for top in sorted(shares)]),
        rope=rope,
        query_mean=None if rope is None else observer.mean(observer.sums).to(torch.complex64),
        query_norm=None if rope is None else observer.mean(observer.sizes).float(),
        no_queries=reason,
    )


def _rope(
    model: Any, prompts: Sequence[Tensor], shapes: Sequence[LayerShape]
) -> tuple[Rope | None, str]:
    """Return the model's rotary embedding, or None and why queries cannot be averaged under it."""
    for present, what in (
        (any(s.latent is not None for s in shapes), "latent attention (MLA)"),
        (any(s.query_dim != s.head_dim for s in shapes), "a bias in its attention logits"),
        (any(s.paired for s in shapes), "KV heads that read each other's values"),
        (
            len({(s.query_heads, s.query_dim) for s in shapes}) > 1,
            "layers under a budget that differ in their queries",
        ),
    ):
        if present:
            return None, f"{type(model).__name__} has {what}: its queries are not averaged"
    try:
        rope = read_rope(model)
        check_rotation(model, rope, int(prompts[0][0, -1]))
    except UnsupportedError as error:
        return None, str(error)
    return rope, ""
