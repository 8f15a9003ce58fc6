"""Tiny random-weight models of every architecture that is claimed to work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB = 97
FULL = "full_attention"
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # the usual 0.02 gives flat attention, and tests that see nothing
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


def gpt_oss(config: dict[str, Any]) -> Any:
    """With learned sinks that take between next to nothing and most of the attention."""
    model = GptOssForCausalLM(
        GptOssConfig(
            **config,
            head_dim=16,
            sliding_window=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.uniform_(-2, 5)
    return model


FACTORIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "llama": lambda c: LlamaForCausalLM(LlamaConfig(**c)),
    "qwen2": lambda c: Qwen2ForCausalLM(Qwen2Config(**c)),
    "qwen3": lambda c: Qwen3ForCausalLM(Qwen3Config(**{"head_dim": 16, **c})),
    "mistral": lambda c: MistralForCausalLM(MistralConfig(**c, sliding_window=None)),
    "phi3": lambda c: Phi3ForCausalLM(Phi3Config(**c)),
    "gemma2": lambda c: Gemma2ForCausalLM(
        Gemma2Config(**c, head_dim=16, sliding_window=24, query_pre_attn_scalar=16)
    ),
    "gemma3": lambda c: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **c,
            head_dim=16,
            sliding_window=24,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
        )
    ),
    "gpt_oss": lambda c: gpt_oss({"layer_types": ["sliding_attention", *2 * [FULL]], **c}),
    "gpt_oss_full": lambda c: gpt_oss({"layer_types": 3 * [FULL], **c}),
    "olmo2": lambda c: Olmo2ForCausalLM(Olmo2Config(**c)),
    "qwen3_moe": lambda c: Qwen3MoeForCausalLM(Qwen3MoeConfig(**c, head_dim=16, **EXPERTS)),
    "mixtral": lambda c: MixtralForCausalLM(
        MixtralConfig(**c, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
}


def tiny(name: str, **changes: Any) -> Any:
    """A model with seeded random weights, fp32, in evaluation mode."""
    torch.manual_seed(hash_name(name))
    model = FACTORIES[name]({**COMMON, **changes}).eval()
    if name == "gemma2":  # older transformers' sdpa ignores soft-capping
        model.set_attn_implementation("eager")
    return model


def hash_name(name: str) -> int:
    """A stable seed per architecture."""
    return sum(ord(c) * (i + 1) for i, c in enumerate(name))


def prompt(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """[batch, length] token ids without padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch, length), generator=generator)
