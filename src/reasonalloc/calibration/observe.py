"""Generations with the full cache, watched by an attention function of transformers' interface."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.attention import attention_forward, mask_forward
from reasonalloc.integrations.hf.model import check_followed
from reasonalloc.sinks import softmax

_IMPLEMENTATION = "reasonalloc-calibration"


def window_attention(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return causal attention of the last queries to all keys: [kv_heads, group, window, n].

    Args:
        queries: [query_heads, window, head_dim], of the last ``window`` tokens, oldest first.
        keys: [kv_heads, n, head_dim], the last key belongs to the last query.
        scaling, softcap: of the attention logits.
        sinks: [query_heads] learned sinks, see ``reasonalloc.sinks``, or None.

    Returns:
        float32, rows sum to 1, to less with sinks.
    """
    kv_heads, n, head_dim = keys.shape
    window = queries.shape[1]
    grouped = queries.reshape(kv_heads, -1, window, head_dim).float()
    logits = grouped @ keys[:, None].float().transpose(-1, -2) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    newest = torch.arange(n - window, n, device=keys.device)
    future = torch.arange(n, device=keys.device) > newest[:, None]
    own = None if sinks is None else sinks.view(kv_heads, -1)
    return softmax(logits.masked_fill(future, -torch.inf)[None], own)[0]


class Observer(ABC):
    """Attention function that shows what it sees, one sequence at a time.

    Args:
        layers: indices of the layers to watch.
        every: generated tokens between two samples of a layer.
        window: queries in a sample.
    """

    def __init__(self, layers: Sequence[int], every: int, window: int) -> None:
        self.layers = layers
        self.every, self.window = every, window
        self._queries: dict[int, Tensor] = {}
        self._steps: dict[int, int] = {}
        self._seen: dict[int, int] = {}
        self.sampled: set[int] = set()

    def start(self) -> None:
        """Begin a new prompt."""
        self._queries, self._steps, self._seen, self.sampled = {}, {}, {}, set()

    def on_queries(self, layer: int, query: Tensor, first: int) -> None:  # noqa: B027 (optional)
        """Take queries after RoPE, [query_heads, q, head_dim], of positions from ``first`` on."""

    @property
    def seen(self) -> Container[int]:
        """Layers whose attention was seen since ``start``."""
        return self._seen

    @abstractmethod
    def on_sample(self, layer: int, weights: Tensor) -> None:
        """Take ``window_attention`` of a layer, after every ``every``-th generated token."""

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Attend, and show what is seen."""
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        layer = module.layer_idx
        if layer in self.layers:
            self._watch(layer, query[0], key[0], (scaling, softcap, s_aux))
        how: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, **kwargs}
        return attention_forward(module, query, key, value, attention_mask, **how)

    def _watch(self, layer: int, query: Tensor, key: Tensor, how: tuple[Any, ...]) -> None:
        """Take a step of one sequence; ``how`` is the rest of ``window_attention``'s arguments."""
        seen = self._seen.get(layer, 0)
        self._seen[layer] = seen + query.shape[1]
        self.on_queries(layer, query, seen)
        recent = query[:, -self.window :]
        if layer in self._queries:
            recent = torch.cat([self._queries[layer], recent], dim=1)[:, -self.window :]
        self._queries[layer] = recent
        if query.shape[1] == 1:
            self._steps[layer] = self._steps.get(layer, 0) + 1
            if self._steps[layer] % self.every == 0 and self._seen[layer] > self.window:
                self.sampled.add(layer)
                self.on_sample(layer, window_attention(recent, key, *how))


def observe(
    model: Any, prompts: Sequence[Tensor], observer: Observer, max_new_tokens: int
) -> Iterator[int]:
    """Generate greedily from each prompt under the observer; yields the index of each when done.

    Args:
        model: a decoder-only transformers model, not attached to anything.
        prompts: token ids, each [1, tokens].
        observer: started anew for every prompt.
        max_new_tokens: generated tokens per prompt, at most.

    Raises:
        UsageError: no prompt, or generations too short for a single sample.
    """
    if not prompts:
        raise UsageError("prompts: none given, at least one is needed")
    if observer.every >= max_new_tokens:
        raise UsageError(
            f"every={observer.every} leaves no sample of max_new_tokens={max_new_tokens}, so "
            "nothing was measured: lower every, or raise max_new_tokens"
        )
    original = model.config._attn_implementation
    AttentionInterface.register(_IMPLEMENTATION, observer)
    AttentionMaskInterface.register(_IMPLEMENTATION, mask_forward)
    try:
        model.set_attn_implementation(_IMPLEMENTATION)
        for index, ids in enumerate(prompts):
            observer.start()
            model.generate(ids.to(model.device), max_new_tokens=max_new_tokens, do_sample=False)
            check_followed(model, observer.layers, observer.seen)
            if any(layer not in observer.sampled for layer in observer.layers):
                raise UsageError(
                    f"prompt {index}: the generation ended before {observer.every} tokens, so "
                    "nothing was measured: lower every, raise max_new_tokens or take another prompt"
                )
            yield index
    finally:
        model.set_attn_implementation(original)


def fingerprint(ids: Tensor) -> str:
    """Return the SHA-256 of a prompt's token ids."""
    text = ",".join(str(int(token)) for token in ids.flatten())
    return hashlib.sha256(text.encode()).hexdigest()
