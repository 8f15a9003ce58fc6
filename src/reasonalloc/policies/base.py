"""The interface of a policy: one pure function over the candidates of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.registry import Registry
from reasonalloc.rotary import Rope


@dataclass(frozen=True)
class Candidates:
    """What a policy may know of one layer at a boundary. ``n`` is the longest head's length.

    A row ``[b, h]`` holds ``lengths[b, h]`` tokens in the order of their positions, then padding.
    All but the last ``window`` tokens of a row are candidates for eviction.

    Attributes:
        lengths: [batch, kv_heads] int64.
        positions: [batch, kv_heads, n] int64, position of each token in its sequence.
        load_keys: returns the keys, [batch, kv_heads, n, head_dim], after RoPE.
        load_values: returns the values, [batch, kv_heads, n, value_dim].
        queries: [batch, kv_heads, group, window, head_dim], queries of the last ``window`` tokens
            after RoPE, oldest first, or None unless ``needs_queries``.
        query_positions: [batch, window] int64, their positions; negative where there is none yet.
        state: [batch, kv_heads, n, state_channels] float32, what the policy has kept of each token
            (see ``Policy.observe``); None without ``state_channels``.
        seen: [batch] int64, tokens of each sequence so far.
        window: most recent tokens that are always kept.
        scaling: factor of the attention logits.
        softcap: soft-capping of the attention logits, or None.
        sinks: [kv_heads, group] learned sinks: logits that stand in the softmax of every query
            beside those of the tokens (``reasonalloc.sinks``); None if the model has none.
        layer: index of the layer; [batch] int64 where rows are of several layers, which only the
            library's own policies are asked to score.
        seed: seed of the run.
        stored: where the keys lie, for loops that read them there: [batch, m, head_dim], and
            [batch, kv_heads, n] int64 places in them; None if they lie in several places.
        bias: [batch, kv_heads, group, window, n] float32, what the model adds to the logits of
            ``queries`` and keys by their distance; None if it adds nothing.
        query_sinks: [batch, kv_heads, group, window] float32, sinks of ``queries``, if every query
            has its own and not every head; else None.
    """

    lengths: Tensor
    positions: Tensor
    load_keys: Callable[[], Tensor]
    load_values: Callable[[], Tensor]
    queries: Tensor | None
    query_positions: Tensor | None
    state: Tensor | None
    seen: Tensor
    window: int
    scaling: float
    softcap: float | None
    layer: int | Tensor
    seed: int
    stored: tuple[Tensor, Tensor] | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    query_sinks: Tensor | None = None

    @cached_property
    def keys(self) -> Tensor:
        """[batch, kv_heads, n, head_dim]; gathered on first use."""
        return self.load_keys()

    @cached_property
    def values(self) -> Tensor:
        """[batch, kv_heads, n, value_dim]; gathered on first use."""
        return self.load_values()

    @cached_property
    def index(self) -> Tensor:
        """[n] int64: 0, 1, ..."""
        return torch.arange(self.positions.shape[-1], device=self.positions.device)

    @cached_property
    def valid(self) -> Tensor:
        """[batch, kv_heads, n] bool: a token, not padding."""
        return self.index < self.lengths[..., None]

    @cached_property
    def evictable(self) -> Tensor:
        """[batch, kv_heads, n] bool: a token that is not among the last ``window``."""
        return self.index < (self.lengths - self.window)[..., None]


@dataclass(frozen=True)
class ModelFacts:
    """What a policy may know of the model before the first token.

    Attributes:
        model_id: name of the model, for messages.
        config_hash: fingerprint of its configuration (``calibrated.demand.config_hash``).
        layers: number of layers under a budget.
        query_heads: query heads per layer.
        head_dim: width of a query.
        load_rope: returns its rotary embedding, or raises ``UnsupportedError`` if it has none that
            is a fixed rotation; None while only the configuration is known.
        load_output_metrics: returns, by layer under a budget, [kv_heads, value_dim, value_dim]
            float32: ``W^T W`` of the part ``W`` of the output projection that reads a query head,
            averaged over the group. Raises ``UnsupportedError`` if the projection cannot be read;
            None while only the configuration is known. They may be filled in later, but before the
            first score.
        kv_heads: KV heads of each layer under a budget.
        indices: of the layers under a budget, among all layers.
    """

    model_id: str
    config_hash: str
    layers: int
    query_heads: int
    head_dim: int
    load_rope: Callable[[], Rope] | None = None
    load_output_metrics: Callable[[], Mapping[int, Tensor]] | None = None
    kv_heads: tuple[int, ...] = ()
    indices: tuple[int, ...] = ()


class Policy(ABC):
    """Scores candidates. Pure: no budget, no memory; what it keeps per token lives in the cache."""

    needs_queries: ClassVar[bool] = False
    """Ask for ``queries`` and ``query_positions``."""
    state_channels: ClassVar[int] = 0
    """Numbers to keep per token, updated by ``observe`` at every query. Not free: attention has to
    give its weights, which fused kernels do not."""
    sums_to_one: ClassVar[bool] = False
    """Scores are shares of a head's own tokens, so that they shrink as the head grows."""
    recent_fraction: ClassVar[float] = 0.0
    """Share of a head's budget that goes to its most recent tokens, whatever their scores."""

    loop: ClassVar[str | None] = None
    """Name of a loop in C++ (``ops.native``) that computes the same scores; not inherited."""

    @abstractmethod
    def score(self, candidates: Candidates) -> Tensor:
        """[batch, kv_heads, n] float32, higher is kept; only evictable entries are looked at."""

    def resolve(self) -> Policy:
        """The policy that really scores: itself, or one that a file names.

        Raises:
            UsageError: a file is needed and missing or broken.
        """
        return self

    def bind(self, model: ModelFacts) -> Policy:
        """The policy for a model; called once before the first token, may read files.

        Raises:
            UsageError: a file is needed and missing, broken or of another model.
        """
        return self

    def shard(self, rank: int, size: int) -> Policy:
        """The bound policy for one of several processes that divide the model's heads.

        A policy that knows something of single heads returns one that knows its own ones: those of
        part ``rank`` of ``size`` equal parts, in the model's order. Others need nothing.

        Args:
            rank: of the process.
            size: how many processes there are.

        Raises:
            UnsupportedError: it reads a file and does not say how to divide it.
        """
        if getattr(self, "reads", None) is not None:
            raise UnsupportedError(
                f"policy={type(self).__name__} reads a file about all heads, but each process "
                f"holds one of {size} parts (tensor parallelism): define its shard(), or use "
                "another policy"
            )
        return self

    def observe(self, state: Tensor, received: Tensor, age: Tensor) -> None:
        """Update the tokens' state in place by the attention of one or more queries, in order.

        Called for every query exactly once, prompt included: one at a time while decoding, many at
        a time in a prefill or a replay, which must give the same. Only with ``state_channels``.

        Args:
            state: [..., n, state_channels] float32; zeros for a token that is new.
            received: [..., q, n] float32, attention weights, averaged over the query heads of the
                KV head's group; 0 where the query is padding or cannot see the token.
            age: [..., q, n] float32, position of the query minus position of the token.
        """
        raise RuntimeError(f"{type(self).__name__} has state_channels, but no observe")


POLICIES: Registry[Policy] = Registry(
    "policy", "reasonalloc.policies", lambda: Policy, "reasonalloc.policies"
)
"""Policies by name: the library's, those of packages and your own."""


def of_rows(known: Callable[[int], Tensor], layers: Sequence[int], layer: int | Tensor) -> Tensor:
    """What is known of each row's layer, on its device.

    Args:
        known: of a layer, by its index in the model: [kv_heads, ...].
        layers: indices of all of them, rising.
        layer: see ``Candidates.layer``; all among ``layers``.

    Returns:
        [1 or batch, kv_heads, ...].
    """
    if not isinstance(layer, Tensor):
        return known(layer)[None]
    first = layers[0]
    if list(layers) != list(range(first, first + len(layers))):
        raise NotImplementedError("rows of several layers that do not follow each other")
    return torch.stack([known(index) for index in layers])[layer - first]


def kept_state(candidates: Candidates) -> Tensor:
    """[batch, kv_heads, n, state_channels] float32: ``state`` of a policy that keeps some."""
    if candidates.state is None:
        raise RuntimeError("a policy that reads its state must set state_channels")
    return candidates.state


def from_mean_value(candidates: Candidates) -> Tensor:
    """[batch, kv_heads, n, value_dim] float32: values less the mean value of the head's tokens."""
    values = candidates.values.float()
    valid = candidates.valid[..., None]
    mean = (values * valid).sum(dim=2, keepdim=True) / valid.sum(dim=2, keepdim=True)
    return values - mean


def window_logits(candidates: Candidates) -> Tensor:
    """Attention logits of the observation window: [batch, kv_heads, group, window, n] float32."""
    queries = candidates.queries
    if queries is None:
        raise RuntimeError("a policy that reads queries must set needs_queries")
    flat = queries.flatten(2, 3).float() * candidates.scaling
    logits: Tensor = (flat @ candidates.keys.float().transpose(-1, -2)).unflatten(
        2, queries.shape[2:4]
    )
    if candidates.softcap is not None:
        logits = torch.tanh(logits / candidates.softcap) * candidates.softcap
    return logits if candidates.bias is None else logits + candidates.bias


def window_sinks(candidates: Candidates) -> Tensor | None:
    """Sinks of ``window_logits``, as ``reasonalloc.sinks.softmax`` wants them, or None."""
    return candidates.sinks if candidates.query_sinks is None else candidates.query_sinks


def causal(candidates: Candidates) -> Tensor:
    """[batch, kv_heads, 1, window, n] bool: keys that each window query could see."""
    queries = candidates.query_positions
    if queries is None:
        raise RuntimeError("a policy that reads queries must set needs_queries")
    earlier = candidates.positions[:, :, None, :] <= queries[:, None, :, None]
    return (earlier & candidates.valid[:, :, None, :])[:, :, None]


def check_kernel(owner: str, kernel: int) -> int:
    """Validate the size of a pooling kernel (odd, positive)."""
    if kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"{owner}: kernel={kernel} must be an odd number >= 1")
    return kernel
