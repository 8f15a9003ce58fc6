"""Older keys and values in fewer bits, and budgets in bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import reasonalloc
from models import prompt, tiny
from reasonalloc import UsageError
from reasonalloc.config import CompressionConfig
from reasonalloc.evaluation.replay import full_logits, measure_fidelity
from reasonalloc.texts import Trajectory

SETTINGS: dict[str, Any] = {"budget": 20, "interval": 8, "window": 4}
STEPS = ("eager", "static", "compile")
FORMATS = ("int8", "fp8", "int4", "int4h", "int8:int4", "auto:int8", "int4h:auto")


def generate(model: Any, ids: torch.Tensor, tokens: int = 40, **more: Any) -> torch.Tensor:
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)
    return out[:, ids.shape[1] :]


@pytest.fixture
def uncoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The storage of coded tokens with a format that loses nothing."""
    monkeypatch.setattr(CompressionConfig, "coded", property(lambda self: True))


@pytest.mark.usefixtures("uncoded")
@pytest.mark.parametrize("step", ["eager", "static"])
@pytest.mark.parametrize("heads", ["uniform", "reasonalloc"])
@pytest.mark.parametrize("policy", ["rkv", "h2o", "value_aware", "streaming_llm"])
def test_a_format_that_loses_nothing(policy: str, heads: str, step: str) -> None:
    """Runs and tails together hold what one run would; prompts, turns and batches included."""
    model = tiny("llama")
    ids, mask = torch.stack([prompt(33, seed=s)[0] for s in (1, 2)]), torch.ones(2, 33).long()
    ids[0, :12], mask[0, :12] = 0, 0
    settings = {**SETTINGS, "policy": policy, "heads": heads}

    def turns() -> list[torch.Tensor]:
        with reasonalloc.attach(model, step=step, **settings) as attached:
            cache = attached.new_cache()
            first = generate(model, ids, 30, attention_mask=mask, past_key_values=cache)
            more = torch.cat([ids, first, ids[:, 20:]], dim=1)
            seen = torch.cat([mask, torch.ones(2, more.shape[1] - 33).long()], dim=1)
            second = generate(model, more, 30, attention_mask=seen, past_key_values=cache)
            return [first, second]

    coded = turns()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompressionConfig, "coded", property(lambda self: False))
        plain = turns()
    assert all(map(torch.equal, coded, plain))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_the_bytes_are_as_planned(kv_dtype: str, step: str) -> None:
    model, ids = tiny("llama"), prompt(30)
    settings = {**SETTINGS, "policy": "h2o", "prompt": "pin", "kv_dtype": kv_dtype}
    with reasonalloc.attach(model, step=step, **settings) as attached:
        cache = attached.new_cache()
        generate(model, ids, 34, past_key_values=cache)  # ends one token after a boundary
        plan = attached.plan(prompt_tokens=30)
        assert cache.kv_bytes == plan.kv_bytes(63)
        assert cache.bookkeeping_bytes == plan.bookkeeping_bytes
        assert cache.used_kv_bytes == plan.floor_bytes + 3 * 3 * 2 * 8 * 4
        assert cache.recorder.compressions
    report = reasonalloc.plan(model, prompt_tokens=30, **settings).report()
    assert sum(layer["kv_bytes_compressed"] for layer in report["layers"]) == plan.kv_bytes(63)


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_a_batch_equals_each_alone(kv_dtype: str) -> None:
    model = tiny("llama")
    alone = [prompt(length, seed=length) for length in (5, 37)]
    ids, mask = torch.zeros(2, 37, dtype=torch.long), torch.ones(2, 37, dtype=torch.long)
    ids[0, 32:], ids[1], mask[0, :32] = alone[0][0], alone[1][0], 0
    with reasonalloc.attach(model, heads="reasonalloc", kv_dtype=kv_dtype, **SETTINGS):
        together = generate(model, ids, attention_mask=mask)
        for row, one in enumerate(alone):
            assert torch.equal(generate(model, one)[0], together[row])


def kl(model: Any, text: Trajectory, **settings: Any) -> float:
    config = CompressionConfig(**settings)
    full = full_logits(model, text)
    values = measure_fidelity(model, text, full, config).kl
    return sum(values) / len(values)


def test_more_bits_lose_less() -> None:
    model = tiny("llama")
    text = Trajectory(prompt(30)[0].tolist(), prompt(80, seed=3)[0].tolist())
    room = {"budget": 200, "interval": 8, "window": 4}
    lost = {kind: kl(model, text, kv_dtype=kind, **room) for kind in ("auto", *FORMATS)}
    assert lost["auto"] == pytest.approx(0, abs=1e-6)
    assert 0 < lost["int8"] < lost["fp8"] < lost["int4"]
    assert lost["int8"] < lost["int8:int4"] < lost["int4"]


@pytest.mark.parametrize("kv_dtype", ["int8", "int4h"])
def test_replay_equals_decoding(kv_dtype: str) -> None:
    model, ids = tiny("llama"), prompt(30)
    settings = {**SETTINGS, "kv_dtype": kv_dtype, "heads": "reasonalloc"}
    with reasonalloc.attach(model, **settings) as attached:
        new = generate(model, ids, 50)
        cache = attached.new_cache()
        with cache.replaying(), torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            out = model(new[:, :-1], past_key_values=cache, use_cache=True)
    assert torch.equal(out.logits.argmax(-1)[0], new[0, 1:])


@pytest.mark.parametrize("step", ["eager", "static"])
def test_copies_and_saved_caches(step: str, tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(30)
    settings = {**SETTINGS, "kv_dtype": "int8:int4", "policy": "h2o", "step": step}
    with reasonalloc.attach(model, **settings) as attached:
        cache = attached.new_cache()
        attached.prefill(ids, cache)
        path = tmp_path / "cache.safetensors"
        attached.save_cache(cache, path)
        twin, loaded = copy.deepcopy(cache), attached.load_cache(path)
        more = torch.cat([ids, torch.tensor([[7]])], dim=1)
        outs = [generate(model, more, past_key_values=one) for one in (cache, twin, loaded)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    other = reasonalloc.attach(model, **{**settings, "kv_dtype": "int8"})
    refused = pytest.raises(UsageError, match="kv_dtype=int8:int4")
    with other as attached, refused:
        attached.load_cache(path)


def test_going_back() -> None:
    """Coded tokens stay coded, and the tokens that come instead are coded like others."""
    model, ids = tiny("llama"), prompt(30)
    settings = {**SETTINGS, "budget": 100, "kv_dtype": "int8"}
    with reasonalloc.attach(model, **settings) as attached:
        cache = attached.new_cache()
        out = generate(model, ids, 30, past_key_values=cache)
        edited = torch.cat([ids, out[:, :9], prompt(3, seed=9)], dim=1)
        again = generate(model, edited, 30, past_key_values=cache)
        assert again.shape[1] == 30 and cache.get_seq_length() == edited.shape[1] + 29
        held = cache.retained_tokens
        assert held == [[[71] * 3]] * 3
        slab = cache.layers[0].compressor.slab
        assert slab is not None and int(slab.tail_lengths.max()) <= slab.room


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kv_dtype": "int3"}, "kv_dtype='int3' must be one of auto, int8"),
        ({"kv_dtype": "int8:int4h"}, "kv_dtype='int8:int4h' must be one of"),
        ({"kv_dtype": None}, "kv_dtype=None must be one of"),
        ({"budget": "12"}, "budget='12' must be a whole number of tokens, a size"),
        ({"budget": "lots"}, "budget='lots' must be"),
        ({"budget": "12 apples"}, "budget='12 apples' is no size"),
        ({"budget": "120%@64"}, "at most 100%"),
        ({"budget": "1KiB"}, "is the least that interval=8 and window=4 take"),
    ],
)
def test_wrong_settings(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        reasonalloc.attach(tiny("llama"), **{**SETTINGS, **given})


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "int4"])
def test_a_budget_in_bytes(kv_dtype: str) -> None:
    """As many tokens as fit, and not one more."""
    model = tiny("llama")
    given = {**SETTINGS, "kv_dtype": kv_dtype}
    for size in ("64KiB", "50000B", "40%@256"):
        with reasonalloc.attach(model, **{**given, "budget": size}) as attached:
            tokens, plan = attached.config.budget, attached.plan()
        allowed = {"64KiB": 65536, "50000B": 50000}.get(size, int(0.4 * 2 * 3 * 3 * 8 * 4 * 256))
        more = reasonalloc.plan(model, **{**given, "budget": tokens + 1}).memory()
        assert plan.slab_bytes <= allowed < more.slab_bytes
        assert reasonalloc.plan(model, **{**given, "budget": size}).config.budget == tokens
        assert generate(model, prompt(20), 60).shape[1] == 60


def test_fewer_bits_hold_more_tokens() -> None:
    tokens = [
        reasonalloc.plan(tiny("llama"), **{**SETTINGS, "budget": "64KiB", "kv_dtype": kind})
        for kind in ("auto", "int8", "int8:int4", "int4")
    ]
    budgets = [plan.config.budget for plan in tokens]
    assert budgets == sorted(budgets) and budgets[1] > 1.8 * budgets[0]
