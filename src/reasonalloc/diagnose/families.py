"""Which model families of the installed transformers run under a KV budget: each is tried as a toy."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from reasonalloc.errors import ReasonAllocError, UsageError, unknown_name

Verdict = Literal["works", "refused", "fails", "not tried"]

PROMPT, NEW = 20, 40
#: Sizes of a toy, by the names that configurations have for them.
TOY: dict[str, Any] = {
    "vocab_size": 97,
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
    "v_head_dim": 16,
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


@dataclass(frozen=True)
class Family:
    """A model family, tried.

    Attributes:
        name: ``model_type`` of its configurations.
        model: class of the model.
        verdict: ``works``: with a budget that evicts nothing a toy wrote the tokens of the full
            cache, and a small budget compressed; ``refused``: ``attach`` said why not; ``fails``:
            neither; ``not tried``: no toy could be made.
        reason: what was said or seen; "" if it works.
        kinds: kinds of its layers, as transformers names them.
    """

    name: str
    model: str
    verdict: Verdict
    reason: str = ""
    kinds: tuple[str, ...] = ()


def family_names() -> list[str]:
    """Return the model types that the installed transformers can load as causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_families(names: Sequence[str] = ()) -> Iterator[Family]:
    """Try families one after the other; a second or two each.

    Args:
        names: model types; none: all.

    Raises:
        UsageError: transformers has no such family.
    """
    known = family_names()
    for name in names:
        if name not in known:
            raise unknown_name("family", name, dict.fromkeys(known))
    for name in names or known:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            yield try_family(name)


def try_family(name: str) -> Family:
    """Build a toy of a family, attach a budget and compare it with the full cache."""
    from reasonalloc.loading import quiet

    model_name = _model_name(name)
    with quiet():
        try:
            config = toy_config(name)
            kinds = _kinds(config)
            torch.manual_seed(0)
            model = _model_class(model_name)(config).eval()
        except Exception as error:  # whatever a family's code says to sizes that it does not expect
            return Family(name, model_name, "not tried", _line(error))
        try:
            return Family(name, model_name, *_compare(model), kinds)
        except ReasonAllocError as error:
            return Family(name, model_name, "refused", _line(error), kinds)
        except Exception as error:
            return Family(name, model_name, "fails", _line(error), kinds)


def toy_config(name: str) -> Any:
    """Return a configuration of a family with toy sizes and every kind of layer that it has.

    Raises:
        Exception: whatever the family's configuration says to such sizes.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    whole = kind()
    text = whole.get_text_config(decoder=True)
    kind = type(text)
    fields = {**vars(text), **dict.fromkeys(getattr(kind, "attribute_map", {}))}
    given = {field: value for field, value in TOY.items() if field in fields}
    for field in ("layer_types", "layers_block_type"):
        types = fields.get(field)
        if isinstance(types, list) and types:
            given[field] = few_layers(types, given.get("num_hidden_layers", 4))
    try:
        return kind(**given)
    except Exception:
        given.pop("layers_block_type", None)
        return kind(**given)


def few_layers(types: Sequence[str], count: int) -> list[str]:
    """Return so many layers that have every kind in its order; the last kinds are repeated."""
    kinds = list(dict.fromkeys(types))
    return [*kinds, *kinds[::-1] * count][: max(count, len(kinds))]


def _compare(model: Any) -> tuple[Verdict, str]:
    from reasonalloc import attach

    ids = torch.randint(2, 97, (1, PROMPT))
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    with attach(model, budget=16, interval=8, window=4) as attached:  # refused before it runs
        small = model.generate(ids, **how)
        recorder = attached.recorder
        compressions = 0 if recorder is None else recorder.compressions
    full = model.generate(ids, **how)
    with attach(model, budget=PROMPT + NEW, interval=8, window=4):
        whole = model.generate(ids, **how)
    if not torch.equal(whole, full):
        return "fails", "with a budget that evicts nothing it writes other tokens than the full cache"
    if small.shape != full.shape or not compressions:
        return "fails", "a small budget never compressed"
    return "works", ""


def _model_name(name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return found if isinstance(found, str) else found[0]


def _model_class(name: str) -> Any:
    return getattr(importlib.import_module("transformers"), name)


def _kinds(config: Any) -> tuple[str, ...]:
    types = getattr(config, "layer_types", None) or ["full_attention"]
    return tuple(dict.fromkeys(types))


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, UsageError) else text[:300]
