"""What cannot work is refused before the first token, in one sentence that names the remedy."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DeepseekV32Config,
    DogeConfig,
    DynamicCache,
    EncoderDecoderModel,
    GenerationConfig,
    GitConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    T5Config,
)

import reasonalloc
from models import COMMON, prompt, tiny
from reasonalloc import UnsupportedError, UsageError
from reasonalloc.errors import NothingToBudget
from reasonalloc.integrations.hf import attention
from reasonalloc.integrations.hf.cache import BudgetCache


def one_sentence(error: BaseException) -> None:
    assert "\n" not in str(error) and len(str(error)) < 300


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget=0 is too small"),
        ({"budget": -5}, "budget=-5 is too small"),
        ({"budget": 7}, "budget=7 cannot hold the observation window"),
        ({"budget": 10, "n_sink": 4}, "budget of at least 12"),
        ({"budget": 2.5}, "whole number"),
        ({"budget": 64, "interval": 0}, "interval=0 is too small"),
        ({"budget": 64, "window": 0}, "window=0"),
        ({"budget": 64, "n_sink": -1}, "n_sink=-1"),
        ({"budget": 64, "policy": "rvk"}, "did you mean 'rkv'"),
        ({"budget": 64, "layers": "pyramide"}, "did you mean 'pyramid'"),
        ({"budget": 64, "heads": "adkv"}, "did you mean 'adakv'"),
        ({"budget": 64, "arm": "pyramid_rkv"}, "did you mean 'pyramid-rkv'"),
        ({"budget": 64, "arm": "rkv/uniform"}, "has 2 parts"),
        ({"budget": 64, "arm": "full"}, "no compression"),
        ({"budget": 64, "arm": "rkv", "policy": "h2o"}, "one of the two"),
        ({"budget": 64, "policy": "rkv(lambda=1)"}, "'lambda'"),
        ({"budget": 64, "policy": "rkv(lam=.1, lam=.2)"}, "given twice"),
        ({"budget": 64, "policy": "rkv(threshold=nan)"}, "finite"),
        ({"budget": 64, "policy": ""}, "cannot be read"),
        ({"budget": 64, "attention": "flash"}, "'flash' is unknown"),
        ({"budget": 64, "record": "all"}, "record level"),
        ({"budget": 64, "layers": "profile"}, "needs a profile file"),
        ({"budget": 64, "profile": "x.json"}, "has no effect"),
        ({"budget": 64, "arm": "reasonalloc", "profile": "/no/such.json"}, "cannot be read"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match=message) as caught:
        reasonalloc.attach(model, **settings)
    one_sentence(caught.value)
    assert "generate" not in model.__dict__  # nothing half attached


@pytest.mark.skipif(
    not hasattr(transformers, "Gemma4AssistantForCausalLM"), reason="this transformers has none"
)
def test_an_assistant_without_a_cache() -> None:
    """It reads the keys of the model that it assists."""
    text = {"model_type": "gemma4_text", "vocab_size_per_layer_input": 0, "head_dim": 16}
    text |= {**COMMON, "hidden_size_per_layer_input": 0, "global_head_dim": 16}
    config = transformers.Gemma4AssistantConfig(text_config=text, backbone_hidden_size=32)
    model = transformers.Gemma4AssistantForCausalLM(config)
    with pytest.raises(NothingToBudget, match="read the cache of another model") as caught:
        reasonalloc.attach(model, budget=64)
    one_sentence(caught.value)


def test_attach_twice() -> None:
    model = tiny("llama")
    with (
        reasonalloc.attach(model, budget=20),
        pytest.raises(UsageError, match="has a KV budget already"),
    ):
        reasonalloc.attach(model, budget=20)


_BERT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
_BERT |= {"num_attention_heads": 2, "vocab_size": 50}


SMALL_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "image_size": 28}
SMALL_TOWER |= {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
MODELS: list[tuple[str, Any, str]] = [
    (
        "indexer",
        lambda: AutoModelForCausalLM.from_config(
            DeepseekV32Config(
                **{**COMMON, "num_key_value_heads": 6},
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=32,
                kv_lora_rank=16,
                q_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=16,
                index_topk=8,
                index_head_dim=8,
                index_n_heads=2,
            )
        ),
        "index_topk=8: an indexer chooses",
    ),
    (
        "a mask of cached values",
        lambda: AutoModelForCausalLM.from_config(DogeConfig(**COMMON)),
        "by the values of all KV heads",
    ),
    (
        "attention of its own beside a vision tower's",
        lambda: AutoModelForCausalLM.from_config(
            GitConfig(**{**COMMON, "num_hidden_layers": 1}, vision_config=SMALL_TOWER)
        ),
        "does not go through transformers' AttentionInterface",
    ),
    (
        "encoder-decoder",
        lambda: AutoModelForSeq2SeqLM.from_config(
            T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        "encoder-decoder",
    ),
    (
        "encoder-decoder of two models",
        lambda: EncoderDecoderModel(
            encoder=BertModel(BertConfig(**_BERT)),
            decoder=BertLMHeadModel(BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)),
        ),
        "encoder-decoder",
    ),
    (
        "sliding only",
        lambda: AutoModelForCausalLM.from_config(MistralConfig(**COMMON, sliding_window=16)),
        "bounded already",
    ),
    (
        "state space",
        lambda: AutoModelForCausalLM.from_config(
            MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2)
        ),
        "cannot run under a KV budget",
    ),
]


@pytest.mark.parametrize(("name", "make", "message"), MODELS, ids=[m[0] for m in MODELS])
def test_models(name: str, make: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        reasonalloc.attach(make(), budget=64)
    one_sentence(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 3}, "beam search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
        ({"cache_implementation": "static"}, "another cache"),
        ({"use_cache": False}, "use_cache=False"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "beam search"),
        ({"guidance_scale": 2.0}, "classifier-free guidance"),
        ({"prefill_chunk_size": 4}, "prefill in chunks"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attention weights"),
    ],
)
def test_generation_modes(settings: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=20), pytest.raises(UnsupportedError, match=message) as e:
        model.generate(prompt(10), max_new_tokens=5, **settings)
    one_sentence(e.value)


def test_assistant_model() -> None:
    model = tiny("llama")
    with (
        reasonalloc.attach(model, budget=20),
        pytest.raises(UnsupportedError, match="assisted decoding"),
    ):
        model.generate(prompt(10), max_new_tokens=5, assistant_model=tiny("llama"))


def test_caches() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=20) as first:
        with pytest.raises(UsageError, match="would not be compressed"):
            model.generate(prompt(10), past_key_values=DynamicCache())
        old = first.new_cache()
    with reasonalloc.attach(model, budget=30) as attached:
        with pytest.raises(UsageError, match="another attachment"):
            model.generate(prompt(10), past_key_values=old)
        cache = attached.new_cache()
        model(prompt(10, 2), past_key_values=cache)
        with pytest.raises(UsageError, match="holds 2 sequences"):
            model(prompt(1, 3), past_key_values=cache)
        for change in (cache.crop, cache.reorder_cache, cache.batch_repeat_interleave):
            with pytest.raises(UnsupportedError):
                change(torch.tensor([0]))
    with pytest.raises(UsageError, match="was detached"):
        model(prompt(1, 2), past_key_values=cache)


def test_a_positional_configuration_is_looked_at() -> None:
    model = tiny("llama")
    model.generation_config.num_beams = 3
    with reasonalloc.attach(model, budget=20):
        for config in (GenerationConfig(use_cache=False, num_beams=1), GenerationConfig()):
            with pytest.raises(UnsupportedError):
                model.generate(prompt(10), config, max_new_tokens=5)
    model.generation_config.num_beams = 1
    model.generation_config.cache_implementation = "hybrid"  # as in Gemma checkpoints
    with reasonalloc.attach(model, budget=20):
        assert model.generate(prompt(30), max_new_tokens=5).shape == (1, 35)


def test_interrupted_call() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=20, interval=4) as attached:
        cache = attached.new_cache()
        model(prompt(10), past_key_values=cache)
        hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(1), past_key_values=cache)
        hook.remove()
        with pytest.raises(UsageError, match="interrupted or failed"):
            model(prompt(1), past_key_values=cache)
        assert model.generate(prompt(30), max_new_tokens=9).shape == (1, 39)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_training_and_short_masks() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=20) as attached:
        cache = attached.new_cache()
        model(prompt(10), past_key_values=cache)
        with pytest.raises(UsageError, match="mask covers 2 tokens"):
            model(prompt(2), past_key_values=cache, attention_mask=torch.ones(1, 2))
        with pytest.raises(UsageError, match="the cache has seen 10"):
            model.generate(prompt(10), past_key_values=cache, max_new_tokens=3)
        model.train()
        with pytest.raises(UnsupportedError, match="cannot be trained through"):
            model(prompt(10), past_key_values=attached.new_cache())
        model(prompt(10), use_cache=False).logits.sum().backward()


@pytest.mark.parametrize("changed", [0, 1])
def test_keys_or_values_that_are_changed(changed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between cache and attention."""
    update = BudgetCache.update

    def changing(*args: Any, **kwargs: Any) -> Any:
        pair = list(update(*args, **kwargs))
        pair[changed] = pair[changed] * 1.0
        return tuple(pair)

    monkeypatch.setattr(BudgetCache, "update", changing)
    model = tiny("llama")
    with (
        pytest.raises(UnsupportedError, match="cannot run under a KV budget"),
        reasonalloc.attach(model, budget=20),
    ):
        model.generate(prompt(10), max_new_tokens=5)


def test_keys_that_are_attended_to_twice() -> None:
    def twice(*args: Any, **kwargs: Any) -> Any:
        attention.attention_forward(*args, **kwargs)
        return attention.attention_forward(*args, **kwargs)

    model = tiny("llama")
    with reasonalloc.attach(model, budget=20):
        AttentionInterface.register(attention.IMPLEMENTATION, twice)
        try:
            with pytest.raises(UnsupportedError, match="attends twice to the same keys"):
                model.generate(prompt(10), max_new_tokens=5)
        finally:
            attention.register()


def test_longrope() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 40,
    }
    config = Phi3Config(**COMMON, rope_parameters=rope, original_max_position_embeddings=40)
    model = AutoModelForCausalLM.from_config(config).eval()
    with reasonalloc.attach(model, budget=16, interval=4):
        with pytest.raises(UnsupportedError, match="at most 10 new tokens"):
            model.generate(prompt(30), max_new_tokens=30)
        assert model.generate(prompt(30), max_new_tokens=10, do_sample=False).shape == (1, 40)


def test_wrappers_and_shared_configurations() -> None:
    model = tiny("llama")
    with pytest.raises(UnsupportedError, match="attach to the model inside"):
        reasonalloc.attach(torch.nn.Sequential(model), budget=20)
    twin = type(model)(model.config)
    with (
        reasonalloc.attach(model, budget=20),
        pytest.raises(UsageError, match="shares its configuration"),
    ):
        reasonalloc.attach(twin, budget=20)


def test_prompts() -> None:
    model = tiny("llama", max_position_embeddings=32)
    with (
        reasonalloc.attach(model, budget=20),
        pytest.raises(UsageError, match="40 tokens, but the model has 32 positions"),
    ):
        model.generate(prompt(40), max_new_tokens=5)
    with reasonalloc.attach(model, budget=20, protect_prompt=True) as attached:
        with pytest.raises(UsageError, match="raise the budget to at least 21"):
            model.generate(prompt(13), max_new_tokens=5)
        with pytest.raises(UsageError, match="protect_prompt"):
            model(prompt(13), past_key_values=attached.new_cache())
        model.generate(prompt(12), max_new_tokens=5)


def test_custom_masks() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=20) as attached:
        cache = attached.new_cache()
        model(prompt(4), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="pass a 2-D padding mask"):
            model(prompt(1), past_key_values=cache, attention_mask=torch.ones(1, 1, 1, 5).bool())


@pytest.mark.parametrize("layers", ["uniform", "pyramid"])
def test_the_budget_that_is_named_for_a_protected_prompt_is_enough(layers: str) -> None:
    model, ids = tiny("llama"), prompt(40)
    settings = {"layers": layers, "protect_prompt": True, "interval": 8}
    with (
        reasonalloc.attach(model, budget=24, **settings),
        pytest.raises(UsageError, match="at least") as error,
    ):
        model.generate(ids, max_new_tokens=20)
    budget = int(re.findall(r"at least (\d+)", str(error.value))[0])
    with reasonalloc.attach(model, budget=budget, **settings):
        model.generate(ids, max_new_tokens=20)
    if layers == "uniform":
        assert budget == 40 + 8


def test_an_output_projection_that_cannot_be_read() -> None:
    model = tiny("llama")
    layer = model.model.layers[1].self_attn
    layer.o_proj = torch.nn.Sequential(layer.o_proj)  # as quantised ones are: no plain matrix
    with pytest.raises(UnsupportedError, match=r"layer 1 .* use metric='value'") as caught:
        reasonalloc.attach(model, budget=20, policy="value_aware(metric=output)")
    one_sentence(caught.value)
    reasonalloc.attach(model, budget=20, policy="value_aware").detach()
