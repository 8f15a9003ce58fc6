"""Prompts that stay on top of the budget."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import made_costs
import reasonalloc
from models import prompt, tiny
from reasonalloc import UsageError
from reasonalloc.allocators.head import HEAD_ALLOCATORS, HeadAllocator, HeadQuery
from reasonalloc.policies import POLICIES, Candidates, Policy

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


@pytest.mark.parametrize("kind", ["int8", "int8:int4", "planned"])
def test_turns_in_fewer_bits(kind: str, tmp_path: Path) -> None:
    """The storage grows with every turn, and what was coded stays so, bit by bit."""
    model = tiny("llama", num_key_value_heads=6)
    settings: dict[str, Any] = {"budget": 16, "window": 4, "interval": 8, "kv_dtype": kind}
    if kind == "planned":
        made_costs.in_formats(made_costs.of_model(model, 10)).save(tmp_path / "costs.json")
        settings |= {"arm": "best-bytes", "profile": tmp_path / "costs.json", "kv_dtype": "auto"}

    def coded(cache: Any, tokens: int) -> list[torch.Tensor]:
        rows = [layer.compressor.slab.as_rows() for layer in cache.layers]
        return [r.gather(t)[:, :, :tokens] for r in rows for t in (r.keys, r.values)]

    with (
        torch.no_grad(),
        reasonalloc.attach(model, prompt="pin", pin_turns=True, **settings) as own,
    ):
        assert kind != "planned" or any(len({k for _, k in layer}) > 1 for layer in own.formats)
        cache, seen = own.new_cache(), 0
        for tokens, seed in ((30, 1), (20, 2), (9, 3)):
            before = coded(cache, seen - 4) if seen else []
            model(prompt(tokens, 2, seed=seed), past_key_values=cache)
            after = coded(cache, seen - 4)
            assert all(torch.equal(old, new) for old, new in zip(before, after, strict=False))
            seen += tokens
        assert cache.kv_bytes == own.plan(2, prompt_tokens=seen).kv_bytes(seen)
        loaded = saved(own, cache, tmp_path / "cache.safetensors")
        one = {"attention_mask": torch.ones(2, seen + 1, dtype=torch.long)}
        outs = [
            model(prompt(1, 2, seed=4), past_key_values=each, **one).logits
            for each in (copy.deepcopy(cache), loaded, cache)
        ]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_with_room_it_makes_no_difference_which_turns_are_pinned(kv_dtype: str) -> None:
    model, found = tiny("llama"), []
    settings = {"budget": 200, "window": 4, "interval": 8, "kv_dtype": kv_dtype, "prompt": "pin"}
    for pins in (True, False):
        with torch.no_grad(), reasonalloc.attach(model, pin_turns=pins, **settings) as attached:
            cache = attached.new_cache()
            for tokens, seed in ((30, 1), (20, 2), (12, 3)):
                out = model(prompt(tokens, seed=seed), past_key_values=cache).logits
            found.append(out)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


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


def padded(*prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [1, n] of any length as one batch, left-padded, and its mask."""
    width = max(one.shape[1] for one in prompts)
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long) for _ in range(2))
    for row, one in enumerate(prompts):
        ids[row, width - one.shape[1] :], mask[row, width - one.shape[1] :] = one[0], 1
    return ids, mask


def saved(attached: Any, cache: Any, path: Path) -> Any:
    attached.save_cache(cache, path)
    return attached.load_cache(path)


def test_a_part_of_a_batch_with_shorter_prompts_is_saved(tmp_path: Path) -> None:
    model = tiny("llama")
    ids, mask = padded(prompt(37), prompt(5, seed=2))
    with reasonalloc.attach(model, **SETTINGS) as attached:
        cache = attached.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([1]))
        loaded = saved(attached, cache, tmp_path / "part.safetensors")
        more = torch.cat([ids[1:], prompt(2)], dim=1)
        seen = torch.cat([mask[1:], torch.ones(1, 2, dtype=torch.long)], dim=1)
        outs = [
            generate(model, more, attention_mask=seen, past_key_values=each)
            for each in (cache, loaded)
        ]
        assert torch.equal(*outs) and loaded.kv_bytes == cache.kv_bytes


def test_a_cache_that_went_back_into_a_turn_is_saved(tmp_path: Path) -> None:
    """The storage was made for more pinned tokens than there are."""
    model = tiny("llama")
    with reasonalloc.attach(model, pin_turns=True, **{**SETTINGS, "budget": 60}) as attached:
        cache = attached.new_cache()
        out = turn(model, prompt(20), cache, 10)
        turn(model, torch.cat([out, prompt(13, seed=4)], dim=1), cache, 3)
        cache.crop(-10)
        loaded = saved(attached, cache, tmp_path / "back.safetensors")
        text = torch.cat([cache.seen.ids.long(), prompt(3, seed=4)], dim=1)
        outs = [generate(model, text, 80, past_key_values=each) for each in (cache, loaded)]
        assert cache.recorder.compressions and torch.equal(*outs)
        assert loaded.kv_bytes == cache.kv_bytes


def test_saved_numbers_that_cannot_be(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "cache.safetensors"
    with reasonalloc.attach(model, **SETTINGS) as attached:
        cache = attached.new_cache()
        generate(model, prompt(20), 30, past_key_values=cache)
        attached.save_cache(cache, path)
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        usual = {"spans": [[0, 20]], "most": 20, "room": 20, "whole": True}
        for change in (
            {"most": 10**9, "room": 10**9},
            {"room": 10**9},
            {"most": -1},
            {"spans": [[0, 40]]},
            {"spans": [[20, 0]]},
            {"spans": [[0, 20], [0, 20]]},
            {"spans": [[[0, 1], 20]]},
            {"spans": [[0, 1000]], "most": 1000},
            None,
        ):
            numbers = json.loads(metadata["numbers"])
            assert numbers["0"]["pinned"] == usual
            numbers["0"]["pinned"] = None if change is None else usual | change
            save_file(tensors, path, {**metadata, "numbers": json.dumps(numbers)})
            with pytest.raises(UsageError, match="broken"):
                attached.load_cache(path)


def test_padding_of_a_turn_does_not_count_towards_the_limit() -> None:
    model = tiny("llama")
    ids = torch.cat([prompt(6, seed=1), prompt(6, seed=2)])
    with reasonalloc.attach(model, pin_turns=True, pin_limit=8, **SETTINGS) as attached:
        cache = attached.new_cache()
        out = turn(model, ids, cache, 4)
        asked, mask = padded(prompt(6, seed=5), prompt(6, seed=6))
        wide = torch.nn.functional.pad(asked, (4, 0))
        text = torch.cat([out, wide], dim=1)
        seen = torch.cat([torch.ones_like(out), torch.nn.functional.pad(mask, (4, 0))], dim=1)
        generate(model, text, 20, attention_mask=seen, past_key_values=cache)
        fresh = turn(model, ids, None, 4)
        cache = attached.new_cache()
        turn(model, ids, cache, 4)
        with pytest.raises(UsageError, match="9 tokens, more than pin_limit=8"):
            generate(model, torch.cat([fresh, ids, ids[:, :2]], dim=1), 4, past_key_values=cache)


@pytest.mark.parametrize("step", ["eager", "static"])
@pytest.mark.parametrize("arm", ["rkv", "h2o/uniform/adakv", "streaming_llm"])
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_prompts_shorter_than_window_and_sinks(step: str, arm: str, tokens: int) -> None:
    model = tiny("llama")
    settings = {"arm": arm, "step": step, "n_sink": 4, "record": "tokens", **SETTINGS}
    with reasonalloc.attach(model, **settings) as attached:
        cache = attached.new_cache()
        generate(model, prompt(tokens), past_key_values=cache)
        assert cache.recorder.events
        for event in cache.recorder.events:
            kept = [event.kept(0, head) for head in range(3)]
            assert all(set(range(max(4, tokens))) <= set(row) for row in kept)
            assert sum(map(len, kept)) == attached.totals[event.layer] + 3 * tokens


@pytest.mark.parametrize("arm", ["rkv/uniform/reasonalloc", "h2o/uniform/adakv", "tova"])
def test_a_batch_of_pinned_and_competing_prompts(arm: str) -> None:
    model = tiny("llama")
    alone = [prompt(length, seed=length) for length in (3, 30, 9, 10, 11)]
    arm = arm if "/" in arm else f"{arm}/uniform/adakv"
    limit = {"pin_limit": 10, "pin_overflow": "evict", "n_sink": 2}
    with reasonalloc.attach(model, arm=arm, **SETTINGS, **limit):
        ids, mask = padded(*alone)
        together = generate(model, ids, attention_mask=mask)
        for row, one in enumerate(alone):
            assert torch.equal(generate(model, one)[0], together[row])


def test_a_model_with_sliding_layers() -> None:
    model = tiny("gemma2")
    full = generate(model, prompt(37))
    never = pytest.warns(reasonalloc.CompressionNeverHappened)
    with reasonalloc.attach(model, **{**SETTINGS, "budget": 60}), never:
        assert torch.equal(generate(model, prompt(37)), full)
    with reasonalloc.attach(model, **SETTINGS) as attached:
        cache = attached.new_cache()
        generate(model, prompt(37), past_key_values=cache)
        assert cache.recorder.compressions
        assert cache.kv_bytes == attached.plan(prompt_tokens=37).kv_bytes(76)


@pytest.mark.parametrize("step", ["eager", "static"])
def test_parts_of_the_prompt_are_hidden_later(step: str) -> None:
    """What is hidden is dropped and the rest stays pinned; the storage stays, until it is reset."""
    model = tiny("llama")
    with reasonalloc.attach(model, step=step, record="tokens", **SETTINGS) as attached:
        cache = attached.new_cache()
        turn(model, prompt(20), cache, 30)
        for hidden, left in ((slice(2, 9), [0, 1, *range(9, 20)]), (slice(0, 20), [])):
            text = torch.cat([cache.seen.ids.long(), prompt(3, seed=8)], dim=1)
            mask = torch.ones_like(text)
            mask[:, hidden] = 0
            generate(model, text, attention_mask=mask, past_key_values=cache)
            event = cache.recorder.events[-1]
            kept = [event.kept(0, head) for head in range(3)]
            assert all(row[: len(left)] == left for row in kept)
            assert sum(map(len, kept)) == attached.totals[event.layer] + 3 * len(left)
        cache.reset()
        turn(model, prompt(2), cache, 5)
        assert cache.kv_bytes == attached.plan(prompt_tokens=2).kv_bytes(6)


class Watching(Policy):
    """Scores by position, and notes how many tokens it was shown."""

    shown: ClassVar[list[int]] = []

    def score(self, candidates: Candidates) -> torch.Tensor:
        self.shown.append(int(candidates.lengths.min()))
        return -candidates.positions.float()


class Dividing(HeadAllocator):
    """Gives the same to every head, and notes how many tokens it was shown."""

    shown: ClassVar[list[int]] = []

    def allocate(self, query: HeadQuery) -> torch.Tensor:
        self.shown.append(int(query.lengths.min()))
        return (query.total // query.lengths.shape[1])[:, None].expand_as(query.lengths)


def test_own_parts_see_the_prompt_or_what_competes(monkeypatch: pytest.MonkeyPatch) -> None:
    for registry in (POLICIES, HEAD_ALLOCATORS):
        monkeypatch.setattr(registry, "_entries", registry.entries())
        monkeypatch.setattr(registry, "_objects", {})
    model = tiny("llama")
    for kind in (Watching, Dividing):
        monkeypatch.setattr(kind, "shown", [])
    with reasonalloc.attach(model, policy=Watching, heads=Dividing, **SETTINGS):
        generate(model, prompt(20))
    assert min(Watching.shown) >= 20 + 12
    assert Dividing.shown == [shown - 20 for shown in Watching.shown]
