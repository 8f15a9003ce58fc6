"""Learned attention sinks: a logit per query head that stands in the softmax beside the tokens'."""

from __future__ import annotations

from torch import Tensor


def softmax(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax over the last dimension, with the sinks in the denominator.

    With the log-sum-exp ``L`` of the tokens' logits, a sink ``s`` takes ``sigmoid(s - L)`` of the
    attention; the tokens share the rest.

    Args:
        logits: [batch, *heads, ..., n] float32, soft-capped.
        sinks: [*heads], one logit each, which is not soft-capped, or one for each query, of the
            shape of ``logits`` without its last dimension; None: none.

    Returns:
        Of the shape of ``logits``, float32; rows sum to 1 without sinks, to less with them.
    """
    weights = logits.softmax(dim=-1)
    if sinks is None:
        return weights
    of_queries = sinks.dim() == logits.dim() - 1
    others = 1 if of_queries else logits.dim() - 1 - sinks.dim()
    own = sinks.float().view(*sinks.shape, *[1] * others)
    return weights * (logits.logsumexp(dim=-1, keepdim=True) - own).sigmoid()
