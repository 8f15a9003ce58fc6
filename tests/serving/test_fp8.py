"""A KV cache of one byte per number: vLLM's own fp8, moved as it is."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import builder, greedy, random_prompts

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm.checks import asks_for_fp8
from reasonalloc.integrations.vllm.kernels import check_coded

# vLLM's kernel for processors needs it; our own does not (test_paged_path.py).
needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's kernel needs AVX-512"
)
LENGTHS = (40, 150)
FP8 = {"kv_cache_dtype": "fp8"}


@pytest.fixture
def scales(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Lets every layer have scales of its own, as a checkpoint with them does."""
    from vllm.model_executor.layers.attention import attention

    right = attention.set_default_quant_scales

    def give(key: float, value: float) -> None:
        made = 0

        def own(layer: Any, register_buffer: bool = False) -> None:
            nonlocal made
            right(layer, register_buffer)
            if register_buffer:  # else the same layer again, when weights are loaded
                made += 1
                layer.number = made
            own_key, own_value = key * layer.number, value * layer.number
            layer._k_scale.fill_(own_key)
            layer._v_scale.fill_(own_value)
            layer._k_scale_float, layer._v_scale_float = own_key, own_value

        monkeypatch.setattr(attention, "set_default_quant_scales", own)

    return give


@needs_avx512
@pytest.mark.parametrize("given", [None, (0.01, 0.002)])
def test_everything_fits_into_the_budget(
    engine: Callable[..., Any],
    scales: Callable[[float, float], None],
    given: tuple[float, float] | None,
) -> None:
    """Then the tokens are those of stock vLLM with the same cache."""
    prompts = random_prompts(LENGTHS)
    if given:
        scales(*given)
    expected = greedy(engine(**FP8), prompts, 24)
    if given:
        scales(*given)  # of the first layer again
    llm = engine({"budget": 512, "interval": 32}, **FP8)
    assert greedy(llm, prompts, 24) == expected
    coded = builder(llm).runs.pages.coded
    own = [(given[0] * n, given[1] * n) if given else (1.0, 1.0) for n in range(1, 5)]
    assert coded.scales == tuple(own)
    assert greedy(engine(), prompts, 24) != expected  # the format tells


@needs_avx512
@pytest.mark.parametrize(
    "arm",
    ["rkv/pyramid/reasonalloc", pytest.param("value_aware/uniform/adakv", marks=pytest.mark.long)],
)
def test_together_as_alone(engine: Callable[..., Any], arm: str) -> None:
    prompts = random_prompts(LENGTHS)
    llm = engine({"budget": 64, "interval": 32, "arm": arm}, **FP8)
    together = greedy(llm, prompts, 48)
    assert together == [greedy(llm, [prompt], 48)[0] for prompt in prompts]
    runs = builder(llm).runs
    assert runs.pages.raw.dtype == torch.uint8 and runs.version > 0
    assert together != greedy(engine({"budget": 512, "interval": 32}, **FP8), prompts, 48)


def test_what_the_processor_cannot_read(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedError, match=r"heads of 48 .* use the model's own type"):
        check_coded(48, 32)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    with pytest.raises(UnsupportedError, match="without AVX-512; use the model's own type"):
        engine({"budget": 64}, **FP8)


def test_a_checkpoint_that_asks_for_it() -> None:
    """vLLM learns of it when layers are made: too late for what is planned before."""
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    asks = {"quantization_config": {"quant_method": "compressed-tensors", **scheme}}
    for config in (asks["quantization_config"], SimpleNamespace(to_dict=lambda: scheme)):
        assert asks_for_fp8(SimpleNamespace(quantization_config=config))
    assert not asks_for_fp8(SimpleNamespace(quantization_config={"quant_method": "awq"}))
    assert not asks_for_fp8(SimpleNamespace())
