"""The rotary embedding of a transformers model: which one it is, and that queries follow it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from reasonalloc.attention.dense import repeat_heads
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.attention import mask_forward
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.planning.shapes import text_config
from reasonalloc.rotary import Rope, from_features, to_features, turns

# Those whose frequencies stay the same however long the text gets.
_FIXED = ("default", "linear", "yarn", "llama3", "proportional")
_FULL = "full_attention"
_IMPLEMENTATION = "reasonalloc-rotation"
_SHIFT = 37  # any position far enough from 0 for rotations to show


def read_rope(model: Any) -> Rope:
    """Rotary embedding of the layers under a budget.

    Raises:
        UnsupportedError: there is none, or its rotation is not a fixed function of the position.
    """
    name, config = type(model).__name__, text_config(model)

    def refuse(reason: str) -> UnsupportedError:
        return UnsupportedError(f"the queries of {name} cannot be averaged: {reason}")

    modules = [
        module
        for module in model.modules()
        if hasattr(module, "rope_type") and getattr(module, "config", None) is config
    ]
    if not modules:
        raise refuse("it has no rotary position embedding that is known")
    if len(modules) > 1:
        raise refuse(f"it has {len(modules)} rotary embeddings")
    rotary: Any = modules[0]
    kind, prefix = rotary.rope_type, ""
    if isinstance(kind, dict):  # one embedding per type of layer
        kind, prefix = kind.get(_FULL), f"{_FULL}_"
    if kind is None:
        raise refuse("its layers with full attention have no rotary position embedding")
    if kind not in _FIXED:
        raise refuse(f"its rotary embedding is of type {kind!r}, which changes with the length")
    parameters = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in parameters or hasattr(rotary, "mrope_section"):
        raise refuse("its positions have several dimensions (M-RoPE)")
    frequencies = getattr(rotary, f"{prefix}inv_freq").double().tolist()
    shape = next(s for s in check_model(model) if s.compressible)
    return Rope(
        tuple(frequencies), float(getattr(rotary, f"{prefix}attention_scaling")), shape.head_dim
    )


@torch.inference_mode()
def check_rotation(model: Any, rope: Rope, token: int) -> None:
    """Make sure that every layer under a budget rotates its queries as ``rope`` says.

    A text of one token gives the same hidden states at every position, since attention to a single
    key has weight 1 (learned sinks are left out): so its queries must differ by the rotation alone.

    Raises:
        UnsupportedError: a layer rotates otherwise (interleaved dimensions, layers without
            positions, positions that are added).
    """
    budgeted = [i for i, shape in enumerate(check_model(model)) if shape.compressible]
    start, shifted = (_queries(model, token, position) for position in (0, _SHIFT))
    shift = torch.tensor(_SHIFT, dtype=torch.int64, device="cpu")
    turn = turns(shift, rope.rates(shift.device)).to(torch.complex64)
    for layer in budgeted:
        turned = from_features(to_features(start[layer], rope.pairs) * turn, rope.pairs)
        error = (turned - shifted[layer]).norm() / turned.norm().clamp_min(1e-9)
        if float(error) > 0.02:  # half precision rounds to 0.004; another rotation is off by 0.1 up
            raise UnsupportedError(
                f"the queries of {type(model).__name__} cannot be averaged: layer {layer} does not "
                "rotate its queries by halves"
            )


def _queries(model: Any, token: int, position: int) -> dict[int, Tensor]:
    """Queries of every layer after RoPE, [query_heads, head_dim], of a text of one token."""
    queries: dict[int, Tensor] = {}

    def note(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        queries[module.layer_idx] = query[0, :, 0].float().cpu()
        return repeat_heads(value, query.shape[1]).transpose(1, 2).contiguous(), None

    original = model.config._attn_implementation
    AttentionInterface.register(_IMPLEMENTATION, note)
    AttentionMaskInterface.register(_IMPLEMENTATION, mask_forward)
    try:
        model.set_attn_implementation(_IMPLEMENTATION)
        ids = torch.tensor([[token]], dtype=torch.int64, device=model.device)
        model(ids, position_ids=torch.full_like(ids, position), use_cache=False)
    finally:
        model.set_attn_implementation(original)
    return queries
