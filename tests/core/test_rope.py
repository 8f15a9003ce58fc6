"""Which rotary embeddings queries can be averaged under, and that others are refused."""

from __future__ import annotations

import cmath
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    Phi3Config,
    SmolLM3Config,
)

from models import COMMON, FACTORIES, tiny
from reasonalloc import UnsupportedError
from reasonalloc.integrations.hf.rope import read_rope
from reasonalloc.integrations.hf.rotation import check_rotation
from reasonalloc.rotary import Rope, from_features, to_features, turns

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORIES)
def test_models_rotate_as_read(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    for buffer, value in tiny(name).named_buffers():  # .to() rounds the frequencies as well
        if "inv_freq" in buffer:
            model.get_buffer(buffer).data = value
    before = model.config._attn_implementation
    rope = read_rope(model)
    check_rotation(model, rope, token=7)
    assert model.config._attn_implementation == before
    assert rope.head_dim == 2 * rope.pairs and rope.scaling == 1.0
    wrong = Rope(rope.frequencies[::-1], rope.scaling, rope.head_dim)
    with pytest.raises(UnsupportedError, match="does not rotate its queries by halves"):
        check_rotation(model, wrong, token=7)


def test_partial_and_rescaled_rotation() -> None:
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model = made(Phi3Config(**COMMON, rope_parameters=parameters))
    rope = read_rope(model)
    assert (rope.pairs, rope.head_dim, rope.features) == (2, 8, 6)
    check_rotation(model, rope, token=3)
    model = tiny("llama", rope_parameters={**YARN, "original_max_position_embeddings": 1024})
    rope = read_rope(model)
    assert rope.scaling > 1.1
    check_rotation(model, rope, token=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(n_layer=2, n_embd=48, n_head=4, vocab_size=97), "no rotary position embedding"),
        (CohereConfig(**COMMON), "layer 0 does not rotate its queries by halves"),
        (SmolLM3Config(**COMMON, no_rope_layers=[1, 1, 0]), "layer 2 does not rotate"),
    ],
)
def test_other_positions_are_refused(config: Any, message: str) -> None:
    model = made(config)
    with pytest.raises(UnsupportedError, match=message):
        check_rotation(model, read_rope(model), token=5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "'dynamic', which changes"),
        ({"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}, "M-RoPE"),
    ],
)
def test_types_that_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        read_rope(tiny("llama", rope_parameters=parameters))


def made(config: Any) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval()


def test_features_and_back() -> None:
    vectors = torch.randn(2, 3, 10)
    for pairs in (0, 1, 3, 5):
        features = to_features(vectors, pairs)
        assert features.shape == (2, 3, 10 - pairs)
        assert torch.equal(from_features(features, pairs), vectors)
        torch.testing.assert_close(features.abs().square().sum(-1), vectors.square().sum(-1))


def test_rotation_of_long_texts_is_exact() -> None:
    rope = Rope((1.0, 1e-3), 1.0, 6)
    found = turns(torch.tensor([10**6]), rope.rates(torch.device("cpu")))[0]
    expected = [cmath.exp(1j * angle) for angle in (1e6, 1e3, 0, 0)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.complex128))
