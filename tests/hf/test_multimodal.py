"""Models that read images: what their text model caches has a budget, image tokens included."""

from __future__ import annotations

import functools
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
    SiglipVisionConfig,
)

import reasonalloc
from models import COMMON, VOCAB, prompt

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


MODELS: dict[str, tuple[Any, int]] = {"llava": (llava, 16), "gemma3": (gemma3, 4)}


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
    return inputs


def answer(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Any:
    return model.generate(**inputs, max_new_tokens=40, do_sample=False, **settings)


@pytest.mark.parametrize(
    ("name", "step"), [("llava", "eager"), ("llava", "static"), ("gemma3", "eager")]
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
