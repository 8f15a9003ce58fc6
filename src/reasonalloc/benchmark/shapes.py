"""Models with random weights in the shapes of well-known ones: nothing is downloaded."""

from __future__ import annotations

import os
from typing import Any

import torch

from reasonalloc.errors import UsageError, unknown_name

#: Architecture and sizes of the models' published configurations.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "qwen-14b": {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
    },
}


def build_shape(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model of a shape with random weights, in evaluation mode.

    Args:
        name: a key of ``SHAPES``.
        dtype, device: where and in which type it is made.

    Raises:
        UsageError: an unknown shape, or the weights alone do not fit into the memory that is free.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in SHAPES:
        raise unknown_name("shape", name, SHAPES)
    sizes = dict(SHAPES[name])
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    need = sum(p.numel() for p in empty.parameters()) * dtype.itemsize
    free = free_memory(device)
    if free is not None and need > free:
        raise UsageError(
            f"shape={name!r} has {need / 2**30:.1f} GiB of weights in {dtype}, and "
            f"{free / 2**30:.1f} GiB are free on {device}: use a smaller shape or dtype"
        )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(before)
    return model.to(device).eval()


def free_memory(device: torch.device) -> int | None:
    """Return bytes that are free on a device; None where nobody says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
