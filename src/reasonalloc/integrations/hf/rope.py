"""The rotary embedding of a transformers model: which one it is."""

from __future__ import annotations

from typing import Any

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.planning.shapes import text_config
from reasonalloc.rotary import Rope

# Those whose frequencies stay the same however long the text gets.
_FIXED = ("default", "linear", "yarn", "llama3", "proportional")
_FULL = "full_attention"


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
