"""Prompts that stay on top of the budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import made_costs
import reasonalloc
from models import prompt, tiny
from reasonalloc import UsageError

SETTINGS: dict[str, Any] = {"budget": 12, "interval": 8, "window": 4, "prompt": "pin"}
STEPS = ("eager", "static", "compile")


def generate(model: Any, ids: torch.Tensor, tokens: int = 40, **more: Any) -> torch.Tensor:
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", ["uniform", "reasonalloc"])
def test_what_is_kept(step: str, heads: str) -> None:
    model, ids = tiny("llama"), prompt(37)
    with reasonalloc.attach(model, heads=heads, step=step, record="tokens", **SETTINGS) as attached:
        generate(model, ids)
        recorder, totals = attached.recorder, attached.totals
    assert recorder is not None and recorder.compressions >= 3
    for event in recorder.events:
        kept = [event.kept(0, head) for head in range(3)]
        assert all(row[:37] == list(range(37)) for row in kept)
        assert sum(map(len, kept)) == totals[event.layer] + 3 * 37
        assert all(len(row) >= 37 + 4 for row in kept)


@pytest.mark.parametrize("step", STEPS)
def test_the_bytes_are_as_planned(step: str) -> None:
    model, ids = tiny("llama"), prompt(37)
    with reasonalloc.attach(model, step=step, policy="h2o", **SETTINGS) as attached:
        cache = attached.new_cache()
        model.generate(ids, max_new_tokens=30, do_sample=False, past_key_values=cache)
        plan = attached.plan(prompt_tokens=37)
        assert cache.kv_bytes == plan.kv_bytes(66)
        assert cache.bookkeeping_bytes == plan.bookkeeping_bytes
        assert plan.kv_bytes(66) - attached.plan().kv_bytes(66) == 2 * 3 * 3 * 37 * 8 * 4
    shown = reasonalloc.plan(model, prompt_tokens=37, **SETTINGS)
    report = shown.report()
    assert report["kv_bytes"]["compressed"] == shown.memory().kv_bytes(1)
    assert sum(layer["kv_bytes_compressed"] for layer in report["layers"]) == plan.kv_bytes(66)


@pytest.mark.parametrize("step", STEPS)
def test_with_room_it_is_the_full_cache(step: str) -> None:
    model, ids = tiny("llama"), prompt(37)
    full = generate(model, ids)
    never = pytest.warns(reasonalloc.CompressionNeverHappened)
    with reasonalloc.attach(model, step=step, **{**SETTINGS, "budget": 40}), never:
        assert torch.equal(generate(model, ids), full)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("policy", ["rkv", "h2o", "random"])
def test_a_batch_with_unequal_prompts_equals_each_alone(step: str, policy: str) -> None:
    model = tiny("llama")
    alone = [prompt(length, seed=length) for length in (5, 37, 21)]
    ids, mask = torch.zeros(3, 37, dtype=torch.long), torch.zeros(3, 37, dtype=torch.long)
    for row, one in enumerate(alone):
        ids[row, 37 - one.shape[1] :], mask[row, 37 - one.shape[1] :] = one[0], 1
    settings = {"policy": policy, "heads": "reasonalloc", "step": step, **SETTINGS}
    with reasonalloc.attach(model, **settings):
        together = generate(model, ids, attention_mask=mask)
        for row, one in enumerate(alone):
            assert torch.equal(generate(model, one)[0], together[row])


@pytest.mark.parametrize("step", STEPS)
def test_prompts_that_are_too_long_compete(step: str) -> None:
    model = tiny("llama")
    alone = [prompt(length, seed=length) for length in (9, 37)]
    ids, mask = torch.zeros(2, 37, dtype=torch.long), torch.ones(2, 37, dtype=torch.long)
    ids[0, 28:], ids[1], mask[0, :28] = alone[0][0], alone[1][0], 0
    limit = {"pin_limit": 20, "pin_overflow": "evict"}
    with reasonalloc.attach(model, step=step, **SETTINGS, **limit) as attached:
        together = generate(model, ids, attention_mask=mask)
        own = [generate(model, one)[0] for one in alone]
        assert torch.equal(torch.stack(own), together)
        assert attached.plan(prompt_tokens=37).slab_bytes == attached.plan().slab_bytes
    with reasonalloc.attach(model, step=step, **{**SETTINGS, "prompt": "evict"}):
        assert torch.equal(generate(model, alone[1])[0], own[1])


def test_prompts_that_are_too_long_are_refused() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, pin_limit=20, **SETTINGS) as attached:
        for use in (lambda: generate(model, prompt(21)), lambda: attached.plan(prompt_tokens=21)):
            with pytest.raises(UsageError, match="21 tokens, more than pin_limit=20"):
                use()
        with pytest.raises(UsageError, match="21 tokens, more than pin_limit=20"):
            model(prompt(21), use_cache=True)
        generate(model, prompt(20))


def turn(model: Any, ids: torch.Tensor, cache: Any, tokens: int) -> torch.Tensor:
    out: torch.Tensor = model.generate(
        ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, past_key_values=cache
    )
    return out


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("policy", ["rkv", "h2o"])
def test_turns(step: str, policy: str) -> None:
    """Each turn is pinned, or the first alone; the storage grows by what is pinned."""
    model, first, second = tiny("llama"), prompt(17), prompt(13, seed=5)
    for pins, held in ((True, 17 + 14), (False, 17)):
        settings = {**SETTINGS, "policy": policy, "step": step, "pin_turns": pins}
        with reasonalloc.attach(model, record="tokens", **settings) as attached:
            cache = attached.new_cache()
            out = turn(model, first, cache, 30)
            out = turn(model, torch.cat([out, second], dim=1), cache, 30)
            # The last token of an answer comes with the next turn.
            asked = [*range(17), *(range(46, 60) if pins else ())]
            event = cache.recorder.events[-1]
            assert event.step > 60 + 8
            for head in range(3):
                assert set(asked) <= set(event.kept(0, head))
            assert cache.kv_bytes == attached.plan(prompt_tokens=held).kv_bytes(out.shape[1] - 1)


@pytest.mark.parametrize("step", ["eager", "static"])
def test_copies_saved_caches_and_parts_of_a_batch(step: str, tmp_path: Path) -> None:
    model = tiny("llama")
    ids = torch.stack([prompt(20, seed=1)[0], prompt(20, seed=2)[0]])
    ids[0, :6] = 0
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with reasonalloc.attach(model, step=step, heads="reasonalloc", **SETTINGS) as attached:
        cache = attached.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        attached.save_cache(cache, tmp_path / "prompt.safetensors")
        more = torch.cat([ids, torch.full((2, 1), 7)], dim=1)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)

        def go_on(on: Any, rows: slice = slice(None)) -> torch.Tensor:
            return generate(model, more[rows], past_key_values=on, attention_mask=longer[rows])

        twin, loaded = copy.deepcopy(cache), attached.load_cache(tmp_path / "prompt.safetensors")
        part = copy.deepcopy(cache)
        part.batch_select_indices(torch.tensor([1]))
        whole = go_on(cache)
        assert torch.equal(go_on(twin), whole) and torch.equal(go_on(loaded), whole)
        assert torch.equal(go_on(part, slice(1, 2)), whole[1:])
        assert loaded.kv_bytes == cache.kv_bytes
    evicting = {**SETTINGS, "prompt": "evict", "heads": "reasonalloc", "step": step}
    refused = pytest.raises(UsageError, match="prompt=pin")
    with reasonalloc.attach(model, **evicting) as other, refused:
        other.load_cache(tmp_path / "prompt.safetensors")


def test_going_back_and_hidden_tokens() -> None:
    model, ids = tiny("llama"), prompt(20)
    with reasonalloc.attach(model, **{**SETTINGS, "budget": 60}) as attached:
        cache = attached.new_cache()
        out = turn(model, ids, cache, 30)
        edited = torch.cat([out[:, :35], prompt(4, seed=9)], dim=1)
        again = turn(model, edited, cache, 30)
        assert torch.equal(again, turn(model, edited, None, 30))
        hidden = torch.ones_like(again)
        hidden[:, 4:11] = 0
        more = torch.cat([again, prompt(3, seed=4)], dim=1)
        seen = torch.cat([hidden, torch.ones(1, 3, dtype=torch.long)], dim=1)
        one = generate(model, more, 60, past_key_values=cache, attention_mask=seen)
        kept = cache.layers[0].compressor.slab.as_rows()
        positions = kept.gather(kept.positions)[0, 0, : int(kept.lengths[0, 0])].tolist()
        assert positions[:13] == [*range(4), *range(11, 20)]
        assert one.shape[1] == 60
        cache.crop(0 - cache.get_seq_length())
        fresh = turn(model, prompt(9, seed=3), cache, 5)
        assert torch.equal(fresh, turn(model, prompt(9, seed=3), None, 5))
        assert cache.kv_bytes == attached.plan(prompt_tokens=9).kv_bytes(13)


def test_unequal_layers_hold_a_long_prompt(tmp_path: Path) -> None:
    """``protect`` refuses what does not fit into the smallest layer; ``pin`` has room."""
    model, ids = tiny("llama"), prompt(60)
    path = tmp_path / "costs.json"
    made_costs.of_model(model).save(path)
    arm = {"layers": "cost", "heads": "planned", "profile": path}
    protecting = {**SETTINGS, "prompt": "protect", "budget": 64}
    refused = pytest.raises(UsageError, match="protect_prompt")
    with reasonalloc.attach(model, **arm, **protecting), refused:
        generate(model, ids)
    with reasonalloc.attach(model, **arm, **SETTINGS) as attached:
        generate(model, ids)
        assert attached.recorder is not None and attached.recorder.compressions


def test_protect_prompt_is_another_name() -> None:
    model = tiny("llama")
    settings = {**SETTINGS, "budget": 30}
    outs = []
    for given in ({"prompt": "protect"}, {"protect_prompt": True, "prompt": "evict"}):
        with reasonalloc.attach(model, **{**settings, **given}) as attached:
            assert attached.config.prompt == "protect" and attached.config.protect_prompt
            outs.append(generate(model, prompt(20)))
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": "keep"}, "unknown prompt 'keep'"),
        ({"prompt": None}, "unknown prompt None"),
        ({"prompt": "pin", "protect_prompt": True}, "protect_prompt=True and prompt='pin'"),
        ({"pin_turns": True}, "pin_turns=True has no effect with prompt='evict'"),
        ({"pin_limit": 3}, "pin_limit=3 has no effect"),
        ({"prompt": "pin", "pin_limit": 0}, "pin_limit=0 is too small"),
        ({"prompt": "pin", "pin_overflow": "evict"}, "no effect without pin_limit"),
        ({"prompt": "pin", "pin_limit": 9, "pin_overflow": "drop"}, "unknown pin_overflow 'drop'"),
    ],
)
def test_wrong_settings(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        reasonalloc.CompressionConfig(budget=20, **given)
