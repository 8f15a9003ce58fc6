"""Generations with the full cache, watched layer by layer."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reasonalloc.core.watched import Seen
from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.watched import watching


class Observer(ABC):
    """Looks at what layers see, one sequence at a time.

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

    @abstractmethod
    def on_sample(self, layer: int, weights: Tensor) -> None:
        """Take a layer's attention after every ``every``-th generated token.

        Args:
            weights: [kv_heads, group, window, n] float32, of the last queries.
        """

    @property
    def seen(self) -> int:
        """Most tokens that a layer has seen of the prompt and behind it."""
        return max(self._seen.values(), default=0)

    def generated(self, layer: int) -> int:
        """Tokens that a layer has seen one by one since the prompt."""
        return self._steps.get(layer, 0)

    def show(self, seen: Seen) -> None:
        """Take a step of one sequence."""
        layer, query = seen.layer, seen.query
        before = self._seen.get(layer, 0)
        self._seen[layer] = before + query.shape[2]
        self.on_queries(layer, query[0], before)
        recent = query[:, :, -self.window :]
        if layer in self._queries:
            recent = torch.cat([self._queries[layer], recent], dim=2)[:, :, -self.window :]
        self._queries[layer] = recent
        if query.shape[2] == 1:
            self._steps[layer] = self._steps.get(layer, 0) + 1
            if self._steps[layer] % self.every == 0 and self._seen[layer] > self.window:
                self.sampled.add(layer)
                whole = replace(seen, query=recent)
                weights = [whole.attention(head) for head in range(seen.kv_heads)]
                self.on_sample(layer, torch.stack(weights))


def observe(
    model: Any, prompts: Sequence[Tensor], observer: Observer, max_new_tokens: int
) -> Iterator[int]:
    """Generate greedily from each prompt under the observer; yields the index of each when done.

    Args:
        model: a decoder-only transformers model, not attached to anything.
        prompts: token ids, each [1, tokens], checked.
        observer: started anew for every prompt.
        max_new_tokens: generated tokens per prompt, at most.

    Raises:
        UsageError: generations too short for a single sample.
    """
    if observer.every >= max_new_tokens:
        raise UsageError(
            f"every={observer.every} leaves no sample of max_new_tokens={max_new_tokens}, so "
            "nothing was measured: lower every, or raise max_new_tokens"
        )
    with watching(model, observer.show) as watched:
        for index, ids in enumerate(prompts):
            observer.start()
            watched.generate(ids.to(model.device), max_new_tokens)
            if any(layer not in observer.sampled for layer in observer.layers):
                if (seen := observer.seen) <= observer.window:
                    raise UsageError(
                        f"window={observer.window}: prompt {index} and what follows it have {seen} "
                        "tokens, no more, so nothing was measured: lower window, or raise "
                        "max_new_tokens"
                    )
                raise UsageError(
                    f"prompt {index}: the generation ended before {observer.every} tokens, so "
                    "nothing was measured: lower every, raise max_new_tokens or take another prompt"
                )
            yield index


def check_mode(model: Any) -> None:
    """Refuse a model in training mode, whose dropout would be measured as well.

    Raises:
        UsageError: says what to call.
    """
    if model.training:
        raise UsageError("the model is in training mode: call model.eval() first")


def check_prompts(prompts: Sequence[Any]) -> None:
    """Refuse what are no prompts, one of them or more.

    Raises:
        UsageError: names the first.
    """
    if not len(prompts):
        raise UsageError("prompts: none given, at least one is needed")
    for index, ids in enumerate(prompts):
        given = f"{ids!r}"[:60]
        if isinstance(ids, Tensor):
            given = f"a tensor {list(ids.shape)} of {ids.dtype}"
            whole = not ids.is_floating_point() and ids.dtype != torch.bool
            if whole and ids.dim() == 2 and ids.shape[0] == 1 and ids.shape[1]:
                continue
        raise UsageError(
            f"prompts[{index}] is {given}: give the token ids of one prompt, [1, tokens]"
        )


def fingerprint(ids: Tensor) -> str:
    """Return the SHA-256 of a prompt's token ids."""
    text = ",".join(str(int(token)) for token in ids.flatten())
    return hashlib.sha256(text.encode()).hexdigest()
