"""Tiny models whose layers are of several kinds: sliding windows, learned sinks, soft-capping."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
)

from models import COMMON

WINDOW = 40  # tokens; no multiple of a block
SLIDING, FULL = "sliding_attention", "full_attention"
_SHAPE: dict[str, Any] = {
    **COMMON,
    "hidden_size": 96,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": WINDOW,
}


def _gemma3(**changes: Any) -> Any:
    kinds = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
    given = {**_SHAPE, "layer_types": kinds, "query_pre_attn_scalar": 32, **changes}
    given["num_hidden_layers"] = len(given["layer_types"])
    return Gemma3ForCausalLM(Gemma3TextConfig(**given))


def _gemma2(**changes: Any) -> Any:
    given = {**_SHAPE, "num_hidden_layers": 4, "query_pre_attn_scalar": 32, **changes}
    # Caps so low that they matter; vLLM's Gemma 2 has no output layer of its own.
    given |= {"attn_logit_softcapping": 5.0, "tie_word_embeddings": True}
    return Gemma2ForCausalLM(Gemma2Config(**given))


def _gpt_oss(**changes: Any) -> Any:
    """With sinks that take between next to nothing and most of the attention."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    given = {**_SHAPE, "num_hidden_layers": 4, "rope_parameters": rope, **experts, **changes}
    model = GptOssForCausalLM(GptOssConfig(**given))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.uniform_(-2, 5)
    return model


_MAKE: dict[str, Callable[..., Any]] = {"gemma3": _gemma3, "gemma2": _gemma2, "gpt_oss": _gpt_oss}


def save_windowed(folder: Path, name: str, **changes: Any) -> Path:
    """Save a model without a tokenizer and return the folder."""
    torch.manual_seed(0)
    _MAKE[name](**changes).eval().save_pretrained(folder)
    return folder
