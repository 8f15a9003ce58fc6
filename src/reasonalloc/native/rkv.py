"""``rkv.cpp``: R-KV's scores of all heads, read from where their keys lie."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.native.build import KINDS, library


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
) -> Tensor:
    """The result of ``policies.rkv.RKV.score``, each head at the price of its own length.

    Args:
        queries: [batch, kv_heads, group, window, head_dim] float32, scaled.
        keys: [batch, m, head_dim] float32, bfloat16 or float16.
        index: [batch, kv_heads, n] int64, places of each head's tokens in ``keys``.
        lengths: [batch, kv_heads] int64, how many of them there are.
        lam, kernel, threshold: of the policy.
        softcap: of the logits, or None.

    Returns:
        [batch, kv_heads, n] float32; 0 beyond ``lengths``.
    """
    batch, kv_heads, n = index.shape
    queries, keys, index, lengths = (t.contiguous() for t in (queries, keys, index, lengths))
    scores = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=keys.device)
    failed = library().reasonalloc_rkv_scores(
        queries.data_ptr(),
        keys.data_ptr(),
        index.data_ptr(),
        lengths.data_ptr(),
        scores.data_ptr(),
        batch,
        kv_heads,
        queries.shape[2],
        queries.shape[3],
        keys.shape[1],
        n,
        keys.shape[2],
        kernel,
        lam,
        threshold,
        softcap or 0.0,
        KINDS[keys.dtype],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("not enough memory for R-KV's scores")
    return scores
