"""``rkv.cpp``: R-KV's scores of all heads, read from where their keys lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonalloc.ops.native.build import library
from reasonalloc.ops.native.check import address, failure
from reasonalloc.ops.native.structs import FLOATS


def score(policy: Any, candidates: Any) -> Tensor | None:
    """Return R-KV's scores; None for any other policy, or where no keys lie in one storage.

    Args:
        policy, candidates: of ``reasonalloc.policies``.
    """
    # Of the class itself: a subclass may score in another way.
    if vars(type(policy)).get("loop") != "rkv":
        return None
    if candidates.stored is None or candidates.queries is None:
        return None
    if candidates.bias is not None or candidates.query_sinks is not None:
        return None
    keys, index = candidates.stored
    return rkv_scores(
        candidates.queries.float() * candidates.scaling,
        keys,
        index,
        candidates.lengths,
        lam=policy.lam,
        kernel=policy.kernel,
        threshold=policy.threshold,
        softcap=candidates.softcap,
        sinks=candidates.sinks,
    )


def rkv_scores(
    queries: Tensor,
    keys: Tensor,
    index: Tensor,
    lengths: Tensor,
    *,
    lam: float,
    kernel: int,
    threshold: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The result of ``policies.rkv.RKV.score``, each head at the price of its own length.

    Args:
        queries: [batch, kv_heads, group, window, head_dim] float32, scaled.
        keys: [batch, m, head_dim] float32, bfloat16 or float16.
        index: [batch, kv_heads, n] int64, places of each head's tokens in ``keys``.
        lengths: [batch, kv_heads] int64, how many of them there are.
        lam, kernel, threshold: of the policy.
        softcap: of the logits, or None.
        sinks: [kv_heads, group] learned sinks, or None.

    Returns:
        [batch, kv_heads, n] float32; 0 beyond ``lengths``.

    Raises:
        RuntimeError: an argument is not so, or an index or a length points outside of the storage.
    """
    batch, kv_heads, n = index.shape
    queries, keys, index, lengths = (t.contiguous() for t in (queries, keys, index, lengths))
    group, window, width = queries.shape[2:]
    runs = batch, kv_heads
    sinks = None if sinks is None else sinks.float().contiguous()
    scores = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=keys.device)
    failed = library().reasonalloc_rkv_scores(
        address("queries", queries, torch.float32, (*runs, group, window, width)),
        address("keys", keys, None, (batch, keys.shape[1], width)),
        address("index", index, torch.int64, (*runs, n)),
        address("lengths", lengths, torch.int64, runs),
        scores.data_ptr(),
        batch,
        kv_heads,
        group,
        window,
        keys.shape[1],
        n,
        width,
        kernel,
        lam,
        threshold,
        softcap or 0.0,
        None if sinks is None else address("sinks", sinks, torch.float32, (kv_heads, group)),
        FLOATS[keys.dtype],
        torch.get_num_threads(),
    )
    if failed:
        raise failure(failed)
    return scores
