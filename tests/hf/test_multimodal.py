"""Models that read images: what their text model caches has a budget, image tokens included.

Layers that attend to the image alone (Mllama) keep all of it.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
)

import reasonalloc
from models import ABLE, COMMON, VOCAB, prompt, unequal
from reasonalloc import UnsupportedError, UsageError, plan

IMAGE = VOCAB - 1  # id of the image's tokens
SMALL: dict[str, Any] = {"budget": 16, "interval": 8, "window": 4}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}


def llava() -> Any:
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION),
            text_config=LlamaConfig(**COMMON),
            image_token_index=IMAGE,
            image_seq_length=16,
        )
    )


def gemma3() -> Any:
    """Tokens of one image see each other."""
    layers = ["sliding_attention", "full_attention", "full_attention"]
    text = Gemma3TextConfig(
        **COMMON, head_dim=16, sliding_window=24, query_pre_attn_scalar=16, layer_types=layers
    )
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=SiglipVisionConfig(**VISION).to_dict(),
            text_config=text.to_dict(),
            image_token_id=IMAGE,
            boi_token_id=IMAGE - 1,
            eoi_token_id=IMAGE - 2,
            mm_tokens_per_image=4,
            initializer_range=0.3,
        )
    )
    with torch.no_grad():  # zeros before training
        model.model.multi_modal_projector.mm_input_projection_weight.normal_()
    return model


def mllama() -> Any:
    """The second layer attends to the image."""
    vision = {key: value for key, value in VISION.items() if key != "num_attention_heads"}
    vision |= {"attention_heads": 2, "num_global_layers": 1, "intermediate_layers_indices": [0]}
    vision |= {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    text = {**COMMON, "model_type": "mllama_text_model", "cross_attention_layers": [1]}
    model = MllamaForConditionalGeneration(
        MllamaConfig(
            vision_config={**vision, "vision_output_dim": 64},
            text_config=text,
            image_token_index=IMAGE,
        )
    )
    layer = model.model.language_model.layers[1]
    with torch.no_grad():  # zeros before training
        layer.cross_attn_attn_gate.fill_(2.0), layer.cross_attn_mlp_gate.fill_(2.0)
    return model


#: How they are made, and tokens of an image in the text.
MODELS: dict[str, tuple[Any, int]] = {
    "llava": (llava, 16),
    "gemma3": (gemma3, 4),
}
if ABLE:
    MODELS["mllama"] = (mllama, 1)
needs_layers = pytest.mark.skipif(not ABLE, reason="this transformers has other cache layers")


@functools.cache
def made(name: str) -> Any:
    torch.manual_seed(len(name))
    return MODELS[name][0]().eval()


def asked(name: str, batch: int) -> dict[str, Tensor]:
    """An image, then a question, as a processor would give them."""
    ids = prompt(30, batch, seed=7) % IMAGE
    ids[:, 5 : 5 + MODELS[name][1]] = IMAGE
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 16, 16, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "mllama":  # one image of two tiles, which the tokens before it do not see
        seen = (torch.arange(30) >= 5).long()
        inputs |= {
            "pixel_values": images[:, None, None].repeat(1, 1, 2, 1, 1, 1),
            "aspect_ratio_ids": torch.full((batch, 1), 2),
            "aspect_ratio_mask": torch.ones(batch, 1, 2, dtype=torch.long),
            "cross_attention_mask": seen[None, :, None, None].repeat(batch, 1, 1, 2),
        }
    return inputs


def answer(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=40, do_sample=False, **settings)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("llava", "eager"),
        ("llava", "static"),
        ("gemma3", "eager"),
        pytest.param("mllama", "eager", marks=needs_layers),
        pytest.param("mllama", "static", marks=needs_layers),
    ],
)
def test_an_image_is_read_under_a_budget(name: str, step: Any) -> None:
    model, inputs = made(name), asked(name, 2)
    full = answer(model, inputs)
    other = answer(model, {**inputs, "pixel_values": -inputs["pixel_values"]})
    assert not torch.equal(full, other)
    with reasonalloc.attach(model, budget=80, step=step):
        assert torch.equal(answer(model, inputs), full)
    with reasonalloc.attach(model, step=step, **SMALL) as attached:
        out = answer(model, inputs, return_dict_in_generate=True)
        assert not torch.equal(out.sequences, full)
        assert attached.recorder is not None and attached.recorder.compressions > 3
        alone = {key: value[1:] for key, value in inputs.items()}
        assert torch.equal(answer(model, alone)[0], out.sequences[1])


@pytest.mark.parametrize("name", MODELS)
def test_text_alone(name: str) -> None:
    model, ids = made(name), prompt(30, 2, seed=7) % IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    full = answer(model, inputs)
    with reasonalloc.attach(model, budget=80):
        assert torch.equal(answer(model, inputs), full)
    with reasonalloc.attach(model, **SMALL):
        assert not torch.equal(answer(model, inputs), full)


@pytest.mark.parametrize("name", MODELS)
def test_a_second_question(name: str) -> None:
    """A second turn on one cache, without the image, is what one call with everything gives."""
    model, inputs = made(name), asked(name, 1)
    with reasonalloc.attach(model, budget=120):
        first = answer(model, inputs, return_dict_in_generate=True)
        more = torch.cat([first.sequences, prompt(6, seed=2) % IMAGE], dim=1)
        again = {**inputs, "input_ids": more, "attention_mask": torch.ones_like(more)}
        if name == "gemma3":
            again["token_type_ids"] = (more == IMAGE).long()
        fresh = answer(model, again)
        again.pop("pixel_values")
        second = answer(model, again, past_key_values=first.past_key_values)
    assert torch.equal(second, fresh)


@needs_layers
def test_layers_that_attend_to_an_image(tmp_path: Path) -> None:
    """They keep what transformers keeps of it, on top of the plan, in copies and files too."""
    model, inputs = made("mllama"), asked("mllama", 2)
    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        model(**inputs, past_key_values=cache)
        image = (
            2 * 2 * 3 * 2 * 17 * 8 * 4
        )  # both, sequences, KV heads, tiles, patches, width, bytes
        assert cache.kv_bytes == attached.plan(batch=2).kv_bytes(30) + image
        attached.save_cache(cache, tmp_path / "cache.safetensors")
        token, seen = prompt(1, 2), inputs["cross_attention_mask"][:, -1:]
        loaded = attached.load_cache(tmp_path / "cache.safetensors")
        turned, twin = copy.deepcopy(cache), copy.deepcopy(cache)
        turned.batch_select_indices(torch.tensor([1, 0]))

        def following(own: Any, ids: Tensor) -> Tensor:
            logits: Tensor = model(ids, cross_attention_mask=seen, past_key_values=own).logits
            return logits

        wanted = following(cache, token)
        assert torch.equal(following(loaded, token), wanted)
        assert torch.equal(following(twin, token), wanted)
        assert torch.allclose(following(turned, token.flip(0)), wanted.flip(0), atol=1e-4)
        cache.reset()
        assert cache.kv_bytes == attached.plan(batch=2).kv_bytes(0)
        again = model(**inputs, past_key_values=cache).logits
        assert torch.equal(again, model(**inputs, past_key_values=attached.new_cache()).logits)


@needs_layers
def test_a_cache_with_an_image_does_not_go_back_by_itself() -> None:
    """The text would be read anew, and the call need not bring the image."""
    model, inputs = made("mllama"), asked("mllama", 1)
    with reasonalloc.attach(model, budget=120) as attached:
        first = answer(model, inputs, return_dict_in_generate=True)
        edited = first.sequences.clone()
        edited[0, 20] = 3
        ones = torch.ones_like(edited)
        with pytest.raises(UsageError, match="differ from what the cache has seen at token 20"):
            model.generate(
                edited, attention_mask=ones, past_key_values=first.past_key_values, max_new_tokens=2
            )
        assert attached.attached


@needs_layers
def test_what_is_refused_of_layers_that_attend_to_an_image() -> None:
    model = made("mllama")
    with pytest.raises(UnsupportedError, match="attend to an image were not tested"):
        reasonalloc.attach(model, **SMALL, step="compile")
    with pytest.raises(UnsupportedError, match="its first layer attends to an image"):
        plan(unequal("mllama", cross_attention_layers=[0]).config, **SMALL)


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def qwen2_5_vl() -> tuple[Any, dict[str, Tensor]]:
    """A model whose positions behind an image are shifted, and a question with one."""
    image, start = 96, 94
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "vocab_size": 97,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        "rope_parameters": _MROPE,
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "patch_size": 14,
        "window_size": 56,
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=image, vision_start_token_id=start
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(2, 90, (1, 14), generator=generator)
    seen = torch.cat([torch.tensor([[start]]), torch.full((1, 16), image)], dim=1)
    ids = torch.cat([words[:, :6], seen, words[:, 6:]], dim=1)
    pixels = torch.randn(64, 3 * 2 * 14 * 14, generator=generator)
    return model, {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == image).long(),
    }


def test_a_text_takes_the_shift_of_its_positions_along(tmp_path: Path) -> None:
    """The model remembers that of the text it read last, which may be another one."""
    model, inputs = qwen2_5_vl()
    how = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), reasonalloc.attach(model, budget=200, window=4) as attached:
        cache = attached.new_cache()
        mask = torch.ones_like(inputs["input_ids"])
        first = model.generate(attention_mask=mask, past_key_values=cache, **inputs, **how)
        more = torch.cat([first, prompt(5, seed=3)], dim=1)
        new = more[:, cache.get_seq_length() :]
        path = tmp_path / "cache.safetensors"
        attached.save_cache(cache, path)

        def go_on(own: Any) -> Tensor:
            seen = torch.ones_like(more)
            out: Tensor = model.generate(new, attention_mask=seen, past_key_values=own, **how)
            return out[:, new.shape[1] :]

        def following(own: Any) -> Tensor:
            logits: Tensor = model(new, past_key_values=own).logits
            return logits

        assert cache.shift is not None and int(cache.shift) < 0
        wanted, logits = go_on(copy.deepcopy(cache)), following(copy.deepcopy(cache))
        full = model.model.rope_deltas
        for _ in range(2):
            model.generate(prompt(20, seed=4), **how)  # another text, without an image
            assert not torch.equal(model.model.rope_deltas, full)
            assert torch.equal(go_on(attached.load_cache(path)), wanted)
            model.generate(prompt(20, seed=4), **how)
            assert torch.equal(following(copy.deepcopy(cache)), logits)
        twice = copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        assert twice.shift is not None and twice.shift.shape == (2, 1)
        cache.reset()
        assert cache.shift is None
