"""Exact causal attention in chunks of queries, quick to train with on a CPU in bfloat16.

PyTorch's fused kernel takes most of a training step of this small model on a CPU. Here each chunk
of queries meets only the keys up to its end, as plain batched products, with a backward pass that
keeps the probabilities. It is used for training only: the checkpoint names no attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "reasonalloc_chunked"
CHUNK = 64


class ChunkedCausalAttention(torch.autograd.Function):
    """Causal attention with grouped queries over whole sequences without padding."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend: query [B, H, T, D], key and value [B, K, T, D]; returns [B, H, T, D]."""
        batch, heads, length, width = query.shape
        kv_heads = key.shape[1]
        groups = heads // kv_heads
        q = query.reshape(batch * kv_heads, groups, length, width) * scale
        k = key.reshape(batch * kv_heads, length, width)
        v = value.reshape(batch * kv_heads, length, width)
        future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu_(1)
        outputs: list[Tensor] = []
        saved: list[Tensor] = []
        for start in range(0, length, CHUNK):
            end = min(length, start + CHUNK)
            rows = end - start
            chunk = q[:, :, start:end].reshape(-1, groups * rows, width)
            scores = torch.bmm(chunk, k[:, :end].transpose(1, 2)).view(-1, groups, rows, end)
            scores[..., start:].masked_fill_(future[:rows, :rows], float("-inf"))
            weights = torch.softmax(scores, -1).view(-1, groups * rows, end)
            outputs.append(torch.bmm(weights, v[:, :end]).view(-1, groups, rows, width))
            saved.append(weights)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.scale = scale
        ctx.kv_heads = kv_heads
        return torch.cat(outputs, 2).view(batch, heads, length, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of query, key and value; the scale has none."""
        q, k, v, *saved = ctx.saved_tensors
        flat, groups, length, width = q.shape
        batch = flat // ctx.kv_heads
        grad = grads[0].reshape(flat, groups, length, width)
        dq = torch.empty_like(q)
        dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
        dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
        for index, start in enumerate(range(0, length, CHUNK)):
            end = min(length, start + CHUNK)
            rows = end - start
            weights = saved[index]
            chunk = grad[:, :, start:end].reshape(flat, groups * rows, width).to(weights.dtype)
            dv[:, :end] += torch.bmm(weights.transpose(1, 2), chunk)
            dweights = torch.bmm(chunk, v[:, :end].transpose(1, 2))
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            dq[:, :, start:end] = torch.bmm(dscores, k[:, :end]).view(-1, groups, rows, width)
            q_chunk = q[:, :, start:end].reshape(flat, groups * rows, width)
            dk[:, :end] += torch.bmm(dscores.transpose(1, 2), q_chunk)
        heads = ctx.kv_heads * groups
        return (
            (dq * ctx.scale).view(batch, heads, length, width),
            dk.view(batch, ctx.kv_heads, length, width).to(k.dtype),
            dv.view(batch, ctx.kv_heads, length, width).to(v.dtype),
            None,
        )


def chunked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks; returns [B, T, H, D] and no weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = value.dtype  # under autocast the normalized queries and keys are still float32
    attend = cast(Callable[..., Tensor], ChunkedCausalAttention.apply)
    output = attend(query.to(dtype), key.to(dtype), value, scale)
    return output.transpose(1, 2).contiguous(), None


def register() -> None:
    """Make the attention known to transformers under :data:`NAME`."""
    AttentionInterface.register(NAME, chunked_attention)
