"""Toy sizes for any model family: small, with every kind of layer that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Sizes of a toy, by the names that configurations have for them.
TOY: dict[str, Any] = {
    "vocab_size": 97,
    "unpadded_vocab_size": 97,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "n_inner": 64,
    "block_ff_dim": 64,
    "shared_expert_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "shared_intermediate_size": 32,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "multi_query_group_num": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "kv_channels": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "sliding_window": 24,
    "attention_chunk_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 24,
    "v_head_dim": 12,
    "rotary_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_dt_rank": 4,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "conv_dim": 64,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "altup_num_inputs": 2,
    "laurel_rank": 8,
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attention_dropout": 0.0,
    "use_cache": True,
}


#: Fields that some families leave at 1.
_AT_MOST = {"num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"}
_AT_MOST |= {"num_key_value_heads", "multi_query_group_num"}
#: Fields that are set where a family leaves them to be computed.
_EVEN_IF_NONE = {"num_key_value_heads", "head_dim"}
_EVEN_IF_NONE |= {"pad_token_id", "bos_token_id", "eos_token_id"}
_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
#: What a family needs for its default configuration to be a valid one.
VALID: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    }
}
#: What a family needs besides, for a toy with all of its layers.
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "layer_types": _SLIDING_AND_FULL,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "git": {"vision_config": {**_TOWER, "num_hidden_layers": 1, "patch_size": 14}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 24},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": _SLIDING_AND_FULL,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": _SLIDING_AND_FULL},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "phi4_multimodal": {
        "vision_config": {**_TOWER, "num_hidden_layers": 2, "patch_size": 14, "crop_size": 28},
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
}


def toy_config(name: str, **settings: Any) -> Any:
    """Return a configuration of a family with toy sizes and every kind of layer that it has.

    Args:
        name: model type.
        settings: fields with other values.

    Raises:
        Exception: whatever the family's configuration says to such sizes.
    """
    text = text_default(name)
    kind = type(text)
    given = {**_sizes(text), **_OWN.get(name, {}), **settings}
    try:
        return kind(**given)
    except Exception:
        given.pop("layers_block_type", None)
        return kind(**given)


def text_default(name: str, **settings: Any) -> Any:
    """Return the default configuration of a family's decoder, with other values of some fields."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**settings).get_text_config(decoder=True)


def _sizes(config: Any) -> dict[str, Any]:
    """Return toy sizes of the fields that a configuration has."""
    fields = {*vars(config), *getattr(type(config), "attribute_map", {})}
    given = {}
    for field in fields & TOY.keys():
        try:
            default, size = getattr(config, field, None), TOY[field]
        except Exception:  # it differs between layers
            continue
        if field in _AT_MOST and default is not None:
            given[field] = min(default, size)
        elif default is not None or field in _EVEN_IF_NONE:
            given[field] = size
    if getattr(config, "kv_lora_rank", None):  # every head has a key of its own
        own = {
            "num_key_value_heads": TOY["num_attention_heads"],
            "head_dim": TOY["qk_rope_head_dim"],
        }
        given |= {field: size for field, size in own.items() if field in given}
    for field in ("layer_types", "layers_block_type"):
        types = getattr(config, field, None) if field in vars(config) else None
        if isinstance(types, list) and types:
            given[field] = few_layers(types, given.get("num_hidden_layers", 4))
    return given


def few_layers(types: Sequence[str], count: int) -> list[str]:
    """Return so many layers that have every kind in its order; the last kinds are repeated."""
    kinds = list(dict.fromkeys(types))
    return [*kinds, *kinds[::-1] * count][: max(count, len(kinds))]
