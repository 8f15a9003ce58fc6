"""Masks over tokens that are cached already: what they hide is dropped, or the call is refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import reasonalloc
from examples import examples
from models import prompt, tiny
from reasonalloc import UsageError
from reasonalloc.core.window import QueryWindow

GREEDY: dict[str, Any] = {"do_sample": False}
STEPS: tuple[Any, ...] = ("eager", "static", "compile")


def ended_early(model: Any, ids: torch.Tensor) -> tuple[int, torch.Tensor]:
    """A token that one row alone writes early, and the first turn with it as the end."""
    plain = model.generate(ids, max_new_tokens=30, pad_token_id=0, **GREEDY)
    new = plain[:, ids.shape[1] :].tolist()
    for place in range(1, 20):
        for row in range(3):
            token = new[row][place]
            others = [other for i, other in enumerate(new) if i != row]
            if new[row].index(token) == place and not any(token in other for other in others):
                out = model.generate(
                    ids, max_new_tokens=30, eos_token_id=token, pad_token_id=0, **GREEDY
                )
                return token, out
    raise AssertionError("no row ends alone: take another seed")


def hidden_after(out: torch.Tensor, end: int, start: int) -> torch.Tensor:
    """[batch, columns] mask that hides what follows the first ``end`` behind ``start``."""
    mask = torch.ones_like(out)
    for row, ids in enumerate(out.tolist()):
        if end in ids[start:]:
            mask[row, ids.index(end, start) + 1 :] = 0
    return mask


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arm", ["rkv", "h2o/uniform/adakv"])
def test_pads_behind_an_early_end_are_not_seen_in_the_next_turn(step: Any, arm: str) -> None:
    model = tiny("llama", num_hidden_layers=4)
    ids, turn = prompt(20, 3, seed=4), prompt(7, 3, seed=5)
    end, first = ended_early(model, ids)
    mask = hidden_after(first, end, 20)
    assert not bool(mask.all())
    text = torch.cat([first, turn], dim=1)
    mask = torch.cat([mask, torch.ones_like(turn)], dim=1)
    again: dict[str, Any] = {
        "max_new_tokens": 20,
        "return_dict_in_generate": True,
        "output_logits": True,
        **GREEDY,
    }
    fresh = model.generate(text, attention_mask=mask, **again)
    options: dict[str, Any] = {"arm": arm, "step": step, "interval": 8}
    with reasonalloc.attach(model, budget=200, **options) as attached:
        cache = attached.new_cache()
        out = model.generate(
            ids,
            max_new_tokens=30,
            eos_token_id=end,
            pad_token_id=0,
            past_key_values=cache,
            **GREEDY,
        )
        assert torch.equal(out, first)
        second = model.generate(text, attention_mask=mask, past_key_values=cache, **again)
        assert torch.equal(second.sequences, fresh.sequences)
        torch.testing.assert_close(
            torch.stack(second.logits), torch.stack(fresh.logits), atol=1e-4, rtol=1e-4
        )
        shown = torch.cat([mask, torch.ones(3, 19, dtype=torch.long)], dim=1).sum(dim=1)
        for layer in cache.retained_tokens:  # hidden tokens cost no memory
            assert layer == [[int(n)] * 3 for n in shown]
        assert cache.kv_bytes == attached.plan(3).kv_bytes(cache.get_seq_length())
    with reasonalloc.attach(model, budget=24, **options) as attached:
        cache = attached.new_cache()
        first = model.generate(
            ids,
            max_new_tokens=30,
            eos_token_id=end,
            pad_token_id=0,
            past_key_values=cache,
            **GREEDY,
        )
        text, mask = torch.cat([first, turn], dim=1), hidden_after(first, end, 20)
        mask[0, 22:25] = 0  # and something in the middle
        mask = torch.cat([mask, torch.ones_like(turn)], dim=1)
        out = model.generate(
            text, attention_mask=mask, past_key_values=cache, max_new_tokens=20, **GREEDY
        )
        assert out.shape == (3, text.shape[1] + 20)
        assert cache.kv_bytes == attached.plan(3).kv_bytes(cache.get_seq_length())


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("hidden", [slice(3, 9), slice(0, 5), slice(25, 30), slice(0, 30)])
def test_any_hidden_part_of_the_past(name: str, hidden: slice) -> None:
    """In one sequence, with plain calls: as transformers' own cache has it."""
    model, ids = tiny(name), prompt(40, 2, seed=6)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, hidden] = 0
    places = torch.arange(30, 40).expand(2, -1)
    logits = []
    for own in (True, False):
        with torch.no_grad():
            if own:
                cache: Any = DynamicCache(config=model.config)
                attached = None
            else:
                attached = reasonalloc.attach(model, budget=60, interval=8)
                cache = attached.new_cache()
            model(ids[:, :30], past_key_values=cache)
            found = [
                model(
                    ids[:, 30:36],
                    attention_mask=mask[:, :36],
                    position_ids=places[:, :6],
                    past_key_values=cache,
                ).logits
            ]
            for column in range(36, 40):
                found.append(
                    model(
                        ids[:, column : column + 1],
                        attention_mask=mask[:, : column + 1],
                        position_ids=places[:, column - 30 : column - 29],
                        past_key_values=cache,
                    ).logits
                )
            logits.append(torch.cat(found, dim=1))
            if attached is not None:
                assert [row[1] for row in cache.retained_tokens] == [
                    [40 - len(range(30)[hidden])] * 3
                ] * len(cache.retained_tokens)
                attached.detach()
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


def test_what_was_never_stored_cannot_be_shown() -> None:
    model, ids = tiny("llama"), prompt(20, 2)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :4] = 0
    with reasonalloc.attach(model, budget=40) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids[:, :15], attention_mask=mask[:, :15], past_key_values=cache)
        with pytest.raises(UsageError, match="shows tokens that an earlier call on this cache hid"):
            model(ids[:, 15:], attention_mask=torch.ones(2, 20), past_key_values=cache)
        with pytest.raises(UsageError, match="no attention_mask was given"):
            model(ids[:, 15:], past_key_values=cache)
        with pytest.raises(UsageError, match="no attention_mask was given"):
            model(ids[:, 15:16], past_key_values=cache)
        found = model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(found[:1], model(ids[:1]).logits[:, 15:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("step", STEPS)
def test_a_new_turn_alone(step: Any) -> None:
    """``input_ids`` of the new tokens only, a mask over everything; padded and not."""
    model = tiny("llama", num_hidden_layers=4)
    for padding in (0, 6):
        ids, turn = prompt(20, 3), prompt(5, 3, seed=3)
        mask = torch.ones(3, 20, dtype=torch.long)
        mask[2, :padding] = 0
        for budget in (200, 24):
            found = []
            with reasonalloc.attach(model, budget=budget, interval=8, step=step) as attached:
                for alone in (False, True):
                    cache = attached.new_cache()
                    out = model.generate(
                        ids,
                        attention_mask=mask,
                        max_new_tokens=15,
                        past_key_values=cache,
                        **GREEDY,
                    )
                    shown = torch.cat([mask, mask.new_ones(3, 20)], dim=1)
                    new = turn if alone else torch.cat([out, turn], dim=1)
                    if alone:  # the last token of a turn is never fed: it begins the next one
                        new = torch.cat([out[:, -1:], turn], dim=1)
                    second = model.generate(
                        new,
                        attention_mask=shown,
                        max_new_tokens=15,
                        past_key_values=cache,
                        **GREEDY,
                    )
                    found.append(second[:, -15:])
            assert torch.equal(*found)


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=6),
    st.booleans(),
)
@examples(100)
def test_queries_of_dropped_tokens_are_forgotten(
    window: int, history: list[tuple[int, int]], equal: bool
) -> None:
    """A window against a list of what its places hold: tokens come, and go again from the end."""
    ring, seen, number = QueryWindow(torch.zeros(2, 1, 1, 1), window), [0, 0], 0
    places: list[dict[int, tuple[int, float]]] = [{}, {}]
    for pushed, taken in history:
        valid = torch.ones(2, pushed, dtype=torch.bool)
        if not equal:
            valid[1, pushed // 2 :] = False
        fresh = torch.arange(number, number + pushed).float() + 1
        number += pushed
        before: Any = seen[0] if equal else torch.tensor(seen)
        ring.push(fresh.view(1, 1, -1, 1).expand(2, -1, -1, -1), before, None if equal else valid)
        for row in range(2):
            for value, real in zip(fresh.tolist(), valid[row].tolist(), strict=True):
                if real:
                    places[row][seen[row] % window] = (seen[row], value)
                    seen[row] += 1
        before = torch.tensor(seen)
        for row in range(2):
            seen[row] = max(0, seen[row] - taken)
            held = places[row].items()
            places[row] = {at: found for at, found in held if found[0] < seen[row]}
        ring.go_back(before, torch.tensor(seen))
        now = torch.tensor(seen)
        slab: Any = SimpleNamespace(batch=2, kv_heads=1)
        queries, positions = ring.read(now, slab)[:, 0, 0, :, 0], ring.positions(now)
        for row in range(2):
            for column, place in enumerate(range(seen[row] - window, seen[row])):
                known = places[row].get(place % window, (-1, 0.0))
                known = known if known[0] == place and place >= 0 else (-1, 0.0)
                found = (int(positions[row, column]), float(queries[row, column]))
                assert (max(-1, found[0]), found[1]) == known


def test_no_mask_is_needed_where_nothing_is_hidden_any_more() -> None:
    model = tiny("llama")
    ids, mask = prompt(20, 2), torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:15] = 0
    with reasonalloc.attach(model, budget=60, interval=8) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        alone = copy.deepcopy(cache)
        alone.batch_select_indices(torch.tensor([0]))
        found = model(prompt(3), past_key_values=alone).logits
        expected = model(torch.cat([ids[:1], prompt(3)], dim=1), use_cache=False).logits[:, -3:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(UsageError, match="no attention_mask was given"):
            model(prompt(3, 2), past_key_values=cache)
        cache.crop(11)
        found = model(ids[:, 11:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 11:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
