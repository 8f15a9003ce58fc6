"""What a loaded model is: its fingerprints, and prompts as its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from reasonalloc.calibrated.demand import config_hash
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.chunks import Facts
from reasonalloc.planning.shapes import text_config


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a problem, in the model's chat template if it has one.

    Raises:
        UsageError: the template refuses it.
    """
    if not getattr(tokenizer, "chat_template", None):
        ids: list[int] = tokenizer(prompt + "\n")["input_ids"]
        return ids
    try:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # templates are programs and raise what they like
        raise UsageError(f"the model's chat template refuses a prompt: {error}") from error
    return list(encoded["input_ids"])


def model_facts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Facts:
    """What a loaded model is, and the longest of the prompts."""
    template, device = getattr(tokenizer, "chat_template", None), model.device
    return Facts(
        config_hash=config_hash(text_config(model).to_dict()),
        weights_hash=weights_hash(model),
        template_hash=None if not template else _hash(str(template).encode()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        longest=max(len(encode(tokenizer, prompt)) for prompt in prompts),
        positions=getattr(text_config(model), "max_position_embeddings", None),
    )


def weights_hash(model: Any) -> str:
    """Fingerprint of a model's weights: names, shapes and up to 256 numbers of each tensor.

    Before transformers 5.18 a divided model's tensors are this process's parts.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        if hasattr(weight, "full_tensor"):  # divided among processes, each of which comes here
            weight = weight.full_tensor()
        if not weight.is_meta:  # offloaded: there is nothing to look at
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float32)
            digest.update(some.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
