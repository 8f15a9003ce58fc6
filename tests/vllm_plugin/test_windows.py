"""Blocks of layers with sliding windows, against counting them one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    MptConfig,
)

from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm.accounting import Accounting
from reasonalloc.integrations.vllm.budget import make_budget, up_to
from reasonalloc.integrations.vllm.checks import check_prompt
from reasonalloc.integrations.vllm.windows import Groups, Windows, divide
from reasonalloc.planning.memory import LayerShape


def shapes(*widths: int | None) -> list[LayerShape]:
    return [LayerShape(2, 4, 16, sliding_window=width) for width in widths]


def test_groups() -> None:
    # As in vLLM: the rarer kind says how many layers a group has, unless both are about as many.
    assert divide(shapes(None, None)) == Groups(2, 1, ())
    assert divide(shapes(None, *5 * [8]) * 2) == Groups(2, 1, 5 * (8,))
    assert divide(shapes(*13 * [None], *12 * [8])) == Groups(13, 1, (8,))
    assert divide(shapes(None, None, None, 8)) == Groups(1, 3, (8,))
    assert divide(shapes(None, 8, 8, 16)) == Groups(1, 1, (8, 8, 16))


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.sampled_from([1, 4, 16]),
    st.integers(1, 120),
    st.integers(1, 120),
    st.integers(1, 40),
    st.integers(1, 3),
)
def test_no_request_ever_holds_more(
    widths: list[int], size: int, start: int, more: int, chunk: int, steps: int
) -> None:
    windows = Windows(tuple(widths), size, chunk * steps, steps)
    last = start + more
    ends = [*range(chunk, start, chunk), *range(start, last + 1)]
    for step, tokens in enumerate(ends):
        processed = ends[step - steps] if step >= steps else 0  # the others are in flight
        held = 0
        for width in widths:
            blocks = {position // size for position in range(tokens)}
            # Behind the window of the first token that is not computed.
            blocks -= {b for b in blocks if (b + 1) * size <= processed - width + 1}
            held += len(blocks)
        known = processed >= start
        assert held <= (windows.decode(tokens) if known else windows.prefill(tokens))
        assert held <= windows.peak(start, last)
        if steps == 1 and tokens > start:
            assert held == windows.held(tokens)


def test_bytes_of_a_request() -> None:
    config = CompressionConfig(budget=64, interval=32, arm=Arm("rkv", "uniform", "uniform"))
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    model = Gemma3TextConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=40,
        layer_types=kinds,
    )
    plan = make_budget(config, "tiny", model, 1, 128, 1)
    sizes = Accounting(plan, 32, 4)
    assert sizes.block_bytes == 2 * 2 * 2 * 16 * 32 * 4  # of two layers
    # (128 + 2 * 63) // 32 = 7 pages per layer, 4 per block; windows of 40 tokens lie in 3 blocks.
    assert sizes.blocks == 4 + 2 * 3
    found = sizes.account(40, 200)
    assert found.kept == 2 * 2 * (64 + (239 - 72) % 32)
    assert found.evicted == 2 * 2 * 239 - found.kept
    # Tokens 199 to 238 lie in blocks 6 and 7.
    assert found.held_bytes == (4 + 2 * 2) * sizes.block_bytes
    assert found.full_bytes == (8 + 2 * 2) * sizes.block_bytes
    # A pool of 41 blocks but one: 10 at their peak each.
    assert sizes.fits(41 * sizes.block_bytes, 4096) == 4
    reserve = sizes.layouts[0].reserve
    assert check_prompt(300, reserve, 10 + 2 * 7, 4096) is None
    assert "shorten it to" in str(check_prompt(400, reserve, 10 + 2 * 7, 4096))


def test_models_that_cannot() -> None:
    config = CompressionConfig(budget=64, arm=Arm("rkv", "uniform", "uniform"))
    shape = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    few = GptOssConfig(**shape, layer_types=[*3 * ["full_attention"], "sliding_attention"])
    with pytest.raises(UnsupportedError, match="into 3 groups; run it on transformers"):
        make_budget(config, "tiny", few, 1)
    with pytest.raises(UnsupportedError, match="attention in chunks"):
        make_budget(config, "tiny", Llama4TextConfig(**shape), 1)
    for biased in (
        BloomConfig(n_head=4, n_layer=2, hidden_size=64),
        FalconConfig(alibi=True, num_attention_heads=4, hidden_size=64, multi_query=False),
        MptConfig(d_model=64, n_heads=4, n_layers=2),
    ):
        with pytest.raises(UnsupportedError, match=r"layer 0 has .*\(ALiBi\) .*; run it on"):
            make_budget(config, "tiny", biased, 1)


def test_an_interval_that_no_request_reaches_keeps_no_room() -> None:
    endless = CompressionConfig(budget=64, interval=10**6, arm=Arm("rkv", "uniform", "uniform"))
    assert up_to(endless, 2048).interval == 2048
    assert up_to(endless, 10**7) is endless
