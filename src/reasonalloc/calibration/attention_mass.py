"""The Reasoning Wave: tokens that each layer needs to keep a share of its attention mass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.attention import attention_forward, mask_forward
from reasonalloc.integrations.hf.model import check_model, text_config
from reasonalloc.profiles import Profile, config_hash

_IMPLEMENTATION = "reasonalloc-calibration"


def demand(
    queries: Tensor, keys: Tensor, rho: float, scaling: float, softcap: float | None = None
) -> Tensor:
    """Fewest keys whose attention masses sum to at least ``rho``, per KV head.

    The masses are averaged over the window's queries and over the query heads of the group.

    Args:
        queries: [query_heads, window, head_dim], of the last ``window`` tokens, oldest first.
        keys: [kv_heads, n, head_dim], the last key belongs to the last query.
        rho: share of the mass, 0 < rho < 1.
        scaling, softcap: of the attention logits.

    Returns:
        [kv_heads] int64.
    """
    kv_heads, n, head_dim = keys.shape
    window = queries.shape[1]
    grouped = queries.reshape(kv_heads, -1, window, head_dim).float()
    logits = grouped @ keys[:, None].float().transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    newest = torch.arange(n - window, n, device=keys.device)
    future = torch.arange(n, device=keys.device) > newest[:, None]
    mass = logits.masked_fill(future, -torch.inf).softmax(dim=-1).mean(dim=(1, 2))
    sums = mass.double().sort(dim=-1, descending=True).values.cumsum(dim=-1)
    return (sums < rho).sum(dim=-1).clamp_max(n - 1) + 1


class _Observer:
    """Attention function that also measures demand at every ``every``-th generated token."""

    def __init__(self, rho: float, every: int, window: int) -> None:
        self._rho, self._every, self._window = rho, every, window
        self._queries: dict[int, Tensor] = {}
        self._steps: dict[int, int] = {}
        self.samples: dict[int, list[Tensor]] = {}

    def start(self) -> None:
        """A new prompt begins."""
        self._queries, self._steps, self.samples = {}, {}, {}

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        layer = module.layer_idx
        recent = query[0, :, -self._window :]
        if layer in self._queries:
            recent = torch.cat([self._queries[layer], recent], dim=1)[:, -self._window :]
        self._queries[layer] = recent
        if query.shape[2] == 1:
            self._steps[layer] = self._steps.get(layer, 0) + 1
            if self._steps[layer] % self._every == 0 and recent.shape[1] == self._window:
                needed = demand(recent, key[0], self._rho, scaling, softcap)
                self.samples.setdefault(layer, []).append(needed)
        return attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **kwargs
        )


def attention_mass(
    model: Any,
    prompts: Sequence[Tensor],
    *,
    rho: float = 0.93,
    max_new_tokens: int = 4096,
    every: int = 128,
    window: int = 8,
    on_prompt: Callable[[int], None] | None = None,
) -> Profile:
    """Measure a model's demand per layer with its full cache (METHOD.md, "Level 1").

    Args:
        model: a decoder-only transformers model, not attached to anything.
        prompts: token ids, each [1, tokens]; at most 8 are usual. None of a test set.
        rho: share of attention mass to keep.
        max_new_tokens: generated tokens per prompt, greedily, at most.
        every: generated tokens between two samples.
        window: queries averaged in a sample.
        on_prompt: called with the index of every finished prompt.

    Returns:
        The profile, for the ``profile`` layer allocator.

    Raises:
        UsageError: a wrong argument, or generations too short for a single sample.
        UnsupportedError: a model that cannot run under a budget.
    """
    if not 0 < rho < 1:
        raise UsageError(f"rho={rho} must lie between 0 and 1")
    for name, size in (("every", every), ("window", window), ("max_new_tokens", max_new_tokens)):
        if size < 1:
            raise UsageError(f"{name}={size} must be at least 1")
    if not prompts:
        raise UsageError("prompts: none given, at least one is needed")
    budgeted = [i for i, shape in enumerate(check_model(model)) if shape.compressible]
    observer = _Observer(rho, every, window)
    original = model.config._attn_implementation
    AttentionInterface.register(_IMPLEMENTATION, observer)
    AttentionMaskInterface.register(_IMPLEMENTATION, mask_forward)
    means, maxima = [], []
    try:
        model.set_attn_implementation(_IMPLEMENTATION)
        for index, ids in enumerate(prompts):
            observer.start()
            model.generate(ids.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
            if any(layer not in observer.samples for layer in budgeted):
                raise UsageError(
                    f"prompt {index}: the generation ended before {every} tokens, so nothing was "
                    "measured: lower every, raise max_new_tokens or take another prompt"
                )
            stacked = [torch.stack(observer.samples[layer]).double() for layer in budgeted]
            means.append([float(s.mean()) for s in stacked])
            maxima.append([float(s.amax(dim=1).mean()) for s in stacked])
            if on_prompt is not None:
                on_prompt(index)
    finally:
        model.set_attn_implementation(original)
    return Profile(
        model_id=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        config_hash=config_hash(text_config(model).to_dict()),
        rho=rho,
        steps=max_new_tokens,
        prompt_hashes=[_fingerprint(ids) for ids in prompts],
        demand_mean=_mean(means),
        demand_max=_mean(maxima),
        curves=means,
    )


def _mean(curves: list[list[float]]) -> list[float]:
    return [sum(column) / len(column) for column in zip(*curves, strict=True)]


def _fingerprint(ids: Tensor) -> str:
    text = ",".join(str(int(token)) for token in ids.flatten())
    return hashlib.sha256(text.encode()).hexdigest()
