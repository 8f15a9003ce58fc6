"""The boxed reasoner's architecture and tokenizer: plain transformers, no custom code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from reasonalloc.evaluation.tasks.chain import VOCABULARY

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
THINK, END_THINK = "<think>", "</think>"
#: Special tokens first, then the task's words, so that the pad token is 0.
TOKENS = (PAD, BOS, EOS, THINK, END_THINK, *VOCABULARY)
MAX_POSITIONS = 4096
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} {{ message['content'] }} {{ eos_token }}"
    "{% else %} {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <think>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: one token a word, words separated by white space."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    build = cast(Callable[..., PreTrainedTokenizerFast], PreTrainedTokenizerFast)
    tokenizer = build(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[THINK, END_THINK],
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_config(
    hidden: int = 128, layers: int = 6, head_dim: int = 32, inner: int = 256, theta: float = 1e8
) -> Qwen3Config:
    """Return the configuration: 8 query heads on 4 KV heads, tied embeddings.

    ``theta`` is large on purpose: the fast rotary pairs serve short offsets and the slow ones
    turn so little within 4,096 positions that they match names by content at any distance.
    """
    return Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=True,
        attention_bias=False,
        pad_token_id=TOKENS.index(PAD),
        bos_token_id=TOKENS.index(BOS),
        eos_token_id=TOKENS.index(EOS),
    )


def build_model(config: Qwen3Config, seed: int, attention: str = "sdpa") -> Qwen3ForCausalLM:
    """Build the model with random weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config._attn_implementation = attention
        model = Qwen3ForCausalLM(config)
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            elif "embed" in name:
                torch.nn.init.normal_(weight, std=config.hidden_size**-0.5)
            elif "q_norm" in name or "k_norm" in name:
                torch.nn.init.constant_(weight, 1.25)
    model.generation_config = GenerationConfig.from_dict(
        {
            "do_sample": False,
            "max_new_tokens": 2048,
            "pad_token_id": config.pad_token_id,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
        }
    )
    return model


def save_checkpoint(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write the model, tokenizer, chat template and generation config for transformers."""
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
