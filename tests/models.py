"""Tiny random-weight models of every architecture that is claimed to work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
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

from reasonalloc.integrations.hf.states import holds_states

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

_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2: dict[str, Any] = {
    **_MAMBA,
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
_INKLING: dict[str, Any] = {
    "head_dim": 16,
    "d_rel": 4,
    "rel_extent": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "route_scale": 1.0,
    "logits_mup_width_multiplier": 1.0,
}
_INKLING2: dict[str, Any] = {
    "head_dim": 16,
    "d_rel": 4,
    "rel_extent": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "route_scale": 1.0,
    "unpadded_vocab_size": VOCAB,
    "n_layers_per_attn_res_block": 2,
    "log_scaling_n_floor": 8,
}
_LINEAR_FIRST = ["linear_attention", "full_attention", "linear_attention", "full_attention"]

#: Classes of hybrid models, looked up by name (older transformers lacks some), and their settings.
HYBRIDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **_DELTA,
            **EXPERTS,
            "head_dim": 16,
            "layer_types": _LINEAR_FIRST,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {**_DELTA, "head_dim": 16, "layer_types": _LINEAR_FIRST},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            **_MAMBA2,
            "layer_types": _LINEAR_FIRST,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
        },
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", {**_MAMBA2, "attn_layer_indices": [1, 3]}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            **_MAMBA,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
        },
    ),
    "zamba": (
        "ZambaConfig",
        "ZambaForCausalLM",
        {
            **_MAMBA,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "eos_token_id": None,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
    ),
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        {**_MAMBA2, "mamba_d_ssm": 96, "num_hidden_layers": 2},
    ),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "head_dim": 8,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        {
            "layer_types": _LINEAR_FIRST,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
        },
    ),
    "minimax": (  # lightning attention; a cache of the model's own class
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        {
            "layer_types": [*_LINEAR_FIRST[1:], "linear_attention"],
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 4,  # all: measured costs have no jumps from one to another
            "block_size": 16,
        },
    ),
    "zaya": (  # convolutions of queries and keys, values of the token before
        "ZayaConfig",
        "ZayaForCausalLM",
        {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "router_hidden_size": 16,
        },
    ),
    "inkling": (  # four convolutions a layer; a bias by distance
        "InklingTextConfig",
        "InklingForCausalLM",
        {**_INKLING, "num_hidden_layers": 3, "layer_types": 3 * ["hybrid"]},
    ),
    "inkling_sliding": (
        "InklingTextConfig",
        "InklingForCausalLM",
        {
            **_INKLING,
            "layer_types": 2 * ["hybrid_sliding", "hybrid"],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 12,
            "sliding_window_size": 24,
        },
    ),
    "inkling2": (  # the same with a sink of every query
        "Inkling2TextConfig",
        "Inkling2ForCausalLM",
        {**_INKLING2, "num_hidden_layers": 3, "layer_types": 3 * ["hybrid"]},
    ),
    "inkling2_sliding": (
        "Inkling2TextConfig",
        "Inkling2ForCausalLM",
        {
            **_INKLING2,
            "layer_types": 2 * ["hybrid_sliding", "hybrid"],
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 12,
            "sliding_window_size": 24,
        },
    ),
    "zaya_sliding": (
        "ZayaConfig",
        "ZayaForCausalLM",
        {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "router_hidden_size": 16,
            "attention_bias": True,
            "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
            "sliding_window": 24,
        },
    ),
}

_MLA: dict[str, Any] = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
_MLA_EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
}
_MLA_MOE: dict[str, Any] = {**_MLA, **_MLA_EXPERTS, "first_k_dense_replace": 1}

#: Classes of models with latent attention, looked up by name, and their settings.
LATENTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", _MLA_MOE),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _MLA_MOE),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {**_MLA, **_MLA_EXPERTS}),
    "mistral4": ("Mistral4Config", "Mistral4ForCausalLM", _MLA_MOE),
    "minicpm3": ("MiniCPM3Config", "MiniCPM3ForCausalLM", _MLA),
    "longcat_flash": (
        "LongcatFlashConfig",
        "LongcatFlashForCausalLM",
        {
            **_MLA,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "head_dim": 8,
        },
    ),
    "youtu": ("YoutuConfig", "YoutuForCausalLM", {**_MLA, "q_lora_rank": None}),
    "axk1": ("AXK1Config", "AXK1ForCausalLM", {**_MLA, **_MLA_EXPERTS}),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {
            **_MLA_MOE,
            "num_local_experts": 4,
            "num_hidden_layers": 4,
            "layer_types": _LINEAR_FIRST,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        {
            **_MLA_MOE,
            "num_local_experts": 4,
            "num_hidden_layers": 4,
            "layer_types": _LINEAR_FIRST,
            "head_dim": 8,
        },
    ),
}

_GEMMA4: dict[str, Any] = {
    "head_dim": 16,
    "global_head_dim": 24,
    "sliding_window": 24,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
_GEMMA3N: dict[str, Any] = {
    "head_dim": 16,
    "sliding_window": 24,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "laurel_rank": 8,
    "num_kv_shared_layers": 2,
}
_DORY: dict[str, Any] = {
    "n_input_layers": 1,
    "n_recurrent_layers": 2,
    "n_output_layers": 1,
    "n_recurrent_loops": 3,
    "ngpt_alpha_init": 0.7,  # the usual 0.05 hardly changes what is read
}
_SLIDING_FIRST = ["sliding_attention", FULL, "sliding_attention", FULL]

#: The same of models whose layers differ: in what they see, in their shapes, in how they read.
UNEQUAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mllama": (
        "MllamaTextConfig",
        "MllamaForCausalLM",
        {"cross_attention_layers": [1], "num_hidden_layers": 3},
    ),
    "diffllama": (  # pairs of KV heads read each other's values
        "DiffLlamaConfig",
        "DiffLlamaForCausalLM",
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 12},
    ),
    "dory": (  # layers 1 and 2 run three times
        "DoryConfig",
        "DoryForCausalLM",
        {
            **_DORY,
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": [FULL, "sliding_attention", FULL, FULL],
        },
    ),
    "dory_full": (
        "DoryConfig",
        "DoryForCausalLM",
        {**_DORY, "head_dim": 16, "layer_types": 4 * [FULL]},
    ),
    "jetmoe": (  # the heads of a cache are repeated once per expert
        "JetMoeConfig",
        "JetMoeForCausalLM",
        {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "attention_chunk_size": 32,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "layer_types": _SLIDING_FIRST,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 2,
            "use_bidirectional_attention": "vision",
        },
    ),
    "gemma4_full": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "layer_types": 4 * [FULL],
        },
    ),
    "gemma3n": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {**_GEMMA3N, "num_hidden_layers": 6, "layer_types": 3 * _SLIDING_FIRST[:2]},
    ),
    "gemma3n_full": (
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {**_GEMMA3N, "layer_types": 4 * [FULL]},
    ),
    "gemma4_shared": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **_GEMMA4,
            "num_hidden_layers": 7,
            "layer_types": [*_SLIDING_FIRST, FULL, *_SLIDING_FIRST[:2]],
            "num_kv_shared_layers": 3,
        },
    ),
    "gemma4_full_shared": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {**_GEMMA4, "layer_types": 4 * [FULL], "num_kv_shared_layers": 2},
    ),
    "mimo_v2_flash": (  # values of another width than keys; sinks in layers with a window
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        {
            "head_dim": 16,
            "v_head_dim": 8,
            "sliding_window": 24,
            "num_hidden_layers": 4,
            "layer_types": _SLIDING_FIRST,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "laguna": (
        "LagunaConfig",
        "LagunaForCausalLM",
        {
            **EXPERTS,
            "head_dim": 16,
            "layer_types": [FULL, "sliding_attention", FULL, FULL],
            "num_attention_heads_per_layer": [6, 9, 6, 3],
            "sliding_window": 24,
            "shared_expert_intermediate_size": 32,
        },
    ),
}

_FALCON: dict[str, Any] = {"ffn_hidden_size": 64}
_ALIBI: dict[str, Any] = {"alibi": True, "multi_query": False}
_UNEVEN: dict[str, Any] = {"num_attention_heads": 12, "hidden_size": 96}  # slopes that are rounded
_XGLM = {"attention_heads": 6, "num_layers": 3, "d_model": 48, "ffn_dim": 64}
_TROCR = {"decoder_attention_heads": 6, "decoder_layers": 3, "d_model": 48}
_NEO = {"num_heads": 6, "num_layers": 3, "window_size": 24}
_MPT = {"n_heads": 6, "n_layers": 3, "d_model": 48, "max_seq_len": 512, "use_cache": True}

#: The same of models whose modules compute attention themselves.
INLINE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "falcon": ("FalconConfig", "FalconForCausalLM", _FALCON),
    "falcon_heads": ("FalconConfig", "FalconForCausalLM", {**_FALCON, "multi_query": False}),
    "falcon_new": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon_alibi": ("FalconConfig", "FalconForCausalLM", {**_FALCON, **_ALIBI}),
    "falcon_uneven": ("FalconConfig", "FalconForCausalLM", {**_FALCON, **_ALIBI, **_UNEVEN}),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseConfig",
        "GPTNeoXJapaneseForCausalLM",
        # Transformers 5.12 breaks off where it turns a part of the channels.
        {"intermediate_multiple_size": 2, "rotary_pct": 0.5 if holds_states() else 1.0},
    ),
    "xglm": ("XGLMConfig", "XGLMForCausalLM", _XGLM),
    "gpt_neo": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {**_NEO, "attention_types": [[["global"], 1], [["local", "global"], 1]]},
    ),
    "gpt_neo_global": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {**_NEO, "attention_types": [[["global"], 3]]},
    ),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"n_head": 6, "n_layer": 3}),
    "bloom_uneven": (
        "BloomConfig",
        "BloomForCausalLM",
        {"n_head": 12, "n_layer": 3, "hidden_size": 96},
    ),
    "mpt": ("MptConfig", "MptForCausalLM", {**_MPT, "attn_config": {"clip_qkv": 4.0}}),
    "trocr": (
        "TrOCRConfig",
        "TrOCRForCausalLM",
        {**_TROCR, "decoder_ffn_dim": 64, "initializer_range": 0.6},
    ),
}


#: Whether transformers has cache layers for layers without keys (5.23, which wants Python 3.11).
ABLE = holds_states()
#: Hybrids that run here.
RUNNING = [name for name in HYBRIDS if ABLE and hasattr(transformers, HYBRIDS[name][1])]
#: Those whose layers attend through modules of their own, so that calibration can tell them apart,
#: and by products of queries and keys alone.
CALIBRATED = [name for name in RUNNING if name != "zamba" and not name.startswith("inkling")]


def latent(name: str, **changes: Any) -> Any:
    """A model with latent attention, seeded random weights, fp32, in evaluation mode."""
    config, model, settings = LATENTS[name]
    given = {**COMMON, **settings, **changes}
    if name == "longcat_flash":
        given.pop("num_hidden_layers"), given.pop("intermediate_size")
    torch.manual_seed(hash_name(name))
    return getattr(transformers, model)(getattr(transformers, config)(**given)).eval()


def hybrid(name: str, **changes: Any) -> Any:
    """A hybrid model with seeded random weights, fp32, in evaluation mode."""
    model = _made(name, HYBRIDS, changes)
    for module in model.modules():
        if type(module).__name__ == "ZayaQKNorm":  # 0 makes all keys alike
            torch.nn.init.uniform_(module.temp, 0.5, 1.5)
    return model


def unequal(name: str, **changes: Any) -> Any:
    """A model whose layers differ, likewise."""
    return _made(name, UNEQUAL, changes)


def inline(name: str, **changes: Any) -> Any:
    """A model whose modules compute attention themselves, likewise."""
    config, model, settings = INLINE[name]
    given = {**COMMON, **settings, **changes}
    foreign = {"num_attention_heads", "num_hidden_layers", "num_key_value_heads", "hidden_size"}
    if config not in ("FalconConfig", "GPTNeoXJapaneseConfig"):  # names of their own
        keep = {"hidden_size"} if config in ("BloomConfig", "GPTNeoConfig") else set()
        given = {k: v for k, v in given.items() if k not in foreign - keep}
    given.pop("num_key_value_heads", None)
    torch.manual_seed(hash_name(name))
    return getattr(transformers, model)(getattr(transformers, config)(**given)).eval()


def unequal_heads() -> Any:
    """A Llama whose layers have 3, 1 and 2 KV heads, as the configuration of each says."""
    model = tiny("llama")
    for layer, heads in ((1, 1), (2, 2)):
        attention = model.model.layers[layer].self_attn
        attention.num_key_value_groups = 6 // heads
        for name in ("k_proj", "v_proj"):
            weight = getattr(attention, name).weight[: heads * attention.head_dim]
            getattr(attention, name).weight = torch.nn.Parameter(weight.clone())
    heads = {1: {"num_key_value_heads": 1}, 2: {"num_key_value_heads": 2}}
    model.config.per_layer_config = heads
    return model


def _made(
    name: str, table: dict[str, tuple[str, str, dict[str, Any]]], changes: dict[str, Any]
) -> Any:
    config, model, settings = table[name]
    given = {**COMMON, "num_hidden_layers": 4, **settings, **changes}
    torch.manual_seed(hash_name(name))
    return getattr(transformers, model)(getattr(transformers, config)(**given)).eval()


def tiny(name: str, **changes: Any) -> Any:
    """A model with seeded random weights, fp32, in evaluation mode."""
    if name in HYBRIDS:
        return hybrid(name, **changes)
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
