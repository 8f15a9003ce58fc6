"""Fits what foretells the loss of a token: a Poisson regression for each KV head.

To first order in one token's weight, a head that loses token ``j`` moves its output at query ``i``
by ``a_ij (o_i - v_j)``, and the KL divergence grows by ``1/2 (g_i . a_ij (v_j - o_i))^2`` with the
random roots ``g`` of the Fisher information (``calibration.fisher``). At every boundary of a text,
the mean of that over all later queries is what losing ``j`` there would cost; ``features`` are what
was known of ``j`` by then. A Poisson regression with a logarithmic link estimates the expected cost
rather than the typical one, which a few needed tokens do not move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from reasonalloc.calibrated.predictor import (
    FEATURES,
    HALF_LIVES,
    Predictor,
    features,
)
from reasonalloc.calibration.checks import to_be_fitted
from reasonalloc.config import CompressionConfig
from reasonalloc.core.watched import Seen
from reasonalloc.policies import Policy
from reasonalloc.policies.recent import weight_sums
from reasonalloc.texts import Trajectory

#: Texts that are looked at, evenly from all, and boundaries of each.
TEXTS = 8
_BOUNDARIES = 12
_RIDGE = 1e-3  # of the mean square of a standardised feature
_STEPS = 12
_LONGEST_STEP = 2.0
_FLOOR = 1e-3  # of the mean loss; keeps the first guess's logarithms finite
_LEAST_LOSS = 1e-30


def texts_to_fit(policies: Sequence[Policy], texts: Sequence[Trajectory]) -> list[Trajectory]:
    """Return the texts that policies are fitted to, evenly from all; none if none is to be."""
    if not any(map(to_be_fitted, policies)):
        return []
    count = min(len(texts), TEXTS)
    return [texts[place * len(texts) // count] for place in range(count)]


def with_predictor(policies: Sequence[Policy], predictor: Predictor | None) -> list[Policy]:
    """Return the policies, those that were to be fitted ready to score."""
    return [
        policy.with_predictor(predictor)
        if to_be_fitted(policy) and predictor is not None
        else policy
        for policy in policies
    ]


class Examples:
    """What was known of tokens at boundaries, and what their loss would have cost, by layer."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._rows: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}

    def add(
        self,
        seen: Seen,
        directions: Tensor,
        text: Trajectory,
        config: CompressionConfig,
        sinks: int,
    ) -> None:
        """Take a layer of a text.

        Args:
            seen: the layer in the full pass.
            directions: [samples, tokens, query_heads, value_dim] random roots.
            text: the text.
            config: cadence, and what happens to the prompt.
            sinks: first tokens that never compete.
        """
        prompt = len(text.prompt_ids)
        first = max(sinks, config.pinned(prompt))
        rows = list(_examples(seen, directions, prompt, first, config))
        if rows:
            known, losses = zip(*rows, strict=True)
            self._rows[seen.layer].append((torch.cat(known, dim=1), torch.cat(losses, dim=1)))

    def fit(self) -> Predictor | None:
        """Return the weights of all layers, or None without an example of one of them."""
        weights = []
        for rows in self._rows.values():
            if not rows:
                return None
            known = torch.cat([part for part, _ in rows], dim=1)
            losses = torch.cat([part for _, part in rows], dim=1)
            weights.append([fit_head(x, y).tolist() for x, y in zip(known, losses, strict=True)])
        return Predictor(list(self._rows), weights)


@torch.no_grad()
def _examples(
    seen: Seen, directions: Tensor, prompt: int, first: int, config: CompressionConfig
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield known features [kv_heads, m, features] and losses [kv_heads, m] per boundary, float32.

    Those of the tokens from ``first`` to the window, which compete there.
    """
    interval = config.interval
    attention, losses = _attention_and_losses(seen, directions)
    tokens, values = attention.shape[-1], seen.scored_values[0].float()
    places = list(range(prompt, tokens - interval + 1, interval))
    chosen = max(1, len(places) // _BOUNDARIES)
    for stop in places[::chosen]:
        compete = slice(first, stop - config.window)
        if first >= stop - config.window:
            continue
        known = known_at(attention[:, :stop, :stop], values[:, :stop])
        lost = losses[:, stop:, :stop].mean(dim=1)
        yield known[:, compete].cpu(), lost[:, compete].cpu()


def known_at(attention: Tensor, values: Tensor) -> Tensor:
    """Return what is known of all tokens after the last of them: [kv_heads, n, features] float32.

    Args:
        attention: [kv_heads, n, n] of each query, a mean over the group.
        values: [kv_heads, n, dim] float32, as policies see them.
    """
    age = torch.arange(attention.shape[-1], 0, -1, device=attention.device).float()
    recent = [
        torch.einsum("hqk,q->hk", attention, 0.5 ** ((age - 1) / life)) / weight_sums(age, life)
        for life in HALF_LIVES
    ]
    distance = torch.linalg.vector_norm(values - values.mean(dim=1, keepdim=True), dim=-1)
    return features(recent, age, distance)


def _attention_and_losses(seen: Seen, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention of the group's mean and what each token is worth: [kv_heads, n, n] float32.

    Args:
        seen, directions: as for ``Examples.add``.
    """
    outputs = seen.output[0].float().unflatten(1, (seen.kv_heads, -1))
    roots = directions.unflatten(2, (seen.kv_heads, -1))
    attention, losses = [], []
    for head in range(seen.kv_heads):  # one at a time: matrices of all tokens with all are large
        weights, values = seen.attention(head), seen.read(head)[1].transpose(-1, -2)
        attention.append(weights.mean(dim=0))
        loss = torch.zeros_like(attention[-1])
        for root in roots[:, :, head].transpose(1, 2):  # [group, n, value_dim]
            gained = root @ values
            gained -= (root * outputs[:, head].transpose(0, 1)).sum(dim=-1, keepdim=True)
            loss += (weights * gained).sum(dim=0).square()
        losses.append(loss / (2 * len(roots)))
    return torch.stack(attention), torch.stack(losses)


def fit_head(known: Tensor, losses: Tensor) -> Tensor:
    """Return weights [features] float32 with ``exp(known @ weights)`` the expected loss.

    Newton's method on the Poisson likelihood of standardised features, with a little ridge.

    Args:
        known: [m, features]; the last feature is constant.
        losses: [m], at least 0.
    """
    x, y = known.double(), losses.double()
    mean, spread = x[:, :-1].mean(dim=0), x[:, :-1].std(dim=0) + 1e-6
    x = torch.cat([(x[:, :-1] - mean) / spread, x[:, -1:]], dim=1)
    scale = y.mean().clamp_min(_LEAST_LOSS)
    y = y / scale
    ridge = torch.eye(len(FEATURES), dtype=torch.float64, device="cpu") * (_RIDGE * len(x))
    ridge[-1, -1] = 1e-6
    weights = torch.linalg.solve(x.T @ x + ridge, x.T @ (y + _FLOOR).log())
    for _ in range(_STEPS):
        expected = (x @ weights).clamp(-12.0, 6.0).exp()
        slope = x.T @ (y - expected) - ridge @ weights
        step = torch.linalg.solve((x * expected[:, None]).T @ x + ridge, slope)
        weights = weights + step * (_LONGEST_STEP / step.abs().max()).clamp_max(1.0)
    raw = weights[:-1] / spread
    constant = weights[-1] - (raw * mean).sum() + scale.log()
    return torch.cat([raw, constant[None]]).float()
