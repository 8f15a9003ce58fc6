from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from reasonalloc.attention.backends.eager import Eager
from reasonalloc.attention.interface import BACKENDS, Backend, SlabView, slot_mask

_EAGER = Eager()


@BACKENDS.register("sdpa", source="torch.nn.functional.scaled_dot_product_attention")
@dataclass(frozen=True)
class Sdpa(Backend):
    """Fused attention on strided views; ragged runs are read in place, nothing is padded."""

    def decode(
        self,
        query: Tensor,
        slab: SlabView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights or softcap is not None:  # what the fused kernels cannot give
            return _EAGER.decode(query, slab, scaling, softcap, need_weights)
        batch, query_heads, _, head_dim = query.shape
        heads = slab.kv_heads
        group = query_heads // heads
        if slab.uniform_length is not None:
            out = F.scaled_dot_product_attention(
                query.reshape(batch, heads, group, head_dim),
                slab.rows(slab.keys),
                slab.rows(slab.values),
                scale=scaling,
            )
        else:
            # The slab as one KV head, the query heads as its queries: a mask gives each query
            # head its own run, and keys and values are read once, where they lie.
            mask = slot_mask(slab)[:, :, None].expand(-1, -1, group, -1).flatten(1, 2)
            out = F.scaled_dot_product_attention(
                query.reshape(batch, 1, query_heads, head_dim),
                slab.keys[:, None],
                slab.values[:, None],
                attn_mask=mask[:, None],
                scale=scaling,
            )
        return out.reshape(batch, query_heads, 1, -1), None
