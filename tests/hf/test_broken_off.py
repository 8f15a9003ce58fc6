"""Calls that broke off, came at the wrong time or with somebody else's cache: no wrong token."""

from __future__ import annotations

import copy
import gc
import types
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

import reasonalloc
from models import prompt, tiny
from reasonalloc import UnsupportedError, UsageError

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
OUT_OF_STEP = "interrupted or failed"


def interrupt(module: Any, call: int = 1) -> None:
    """Ctrl-C at a call of a module."""
    left = [call]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            handle.remove()
            raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_interrupted_prefill(name: str, layer: int) -> None:
    """What follows equals a fresh run, or is refused; whatever it does with the text."""
    model, ids = tiny(name), prompt(30, 2)
    edited = torch.cat([ids[:, :25], prompt(14, 2, seed=5)], dim=1)
    longer = torch.cat([ids, prompt(4, 2, seed=5)], dim=1)
    expected = [model.generate(t, max_new_tokens=9, **GREEDY) for t in (ids, edited, longer)]
    with reasonalloc.attach(model, budget=200, interval=8) as attached:
        for text, right in zip((ids, edited, longer), expected, strict=True):
            cache = attached.new_cache()
            attached.prefill(ids[:, :20], cache)
            interrupt(model.model.layers[layer])
            with pytest.raises(KeyboardInterrupt):
                model.generate(ids, past_key_values=cache, max_new_tokens=5, **GREEDY)
            if layer == 0:  # nothing was stored yet
                copy.deepcopy(cache).crop(-3)
                out = model.generate(text, past_key_values=cache, max_new_tokens=9, **GREEDY)
                assert torch.equal(out, right)
                continue
            for call in (
                lambda text=text, cache=cache: model.generate(text, past_key_values=cache),
                lambda cache=cache: cache.crop(15),
                lambda cache=cache: copy.deepcopy(cache),
                lambda cache=cache: model(prompt(1, 2), past_key_values=cache),
            ):
                with pytest.raises(UsageError, match=OUT_OF_STEP):
                    call()
            cache.reset()
            out = model.generate(text, past_key_values=cache, max_new_tokens=9, **GREEDY)
            assert torch.equal(out, right)


@pytest.mark.parametrize("step", ["eager", "static", "compile"])
def test_an_interrupted_decode_is_reset(step: Any) -> None:
    model, ids = tiny("llama"), prompt(20, 2)
    with reasonalloc.attach(model, budget=200, interval=8, step=step) as attached:
        expected = model.generate(ids, max_new_tokens=9, **GREEDY)
        cache = attached.new_cache()

        class Stop(StoppingCriteria):
            def __call__(self, ids: Any, *_: Any, **__: Any) -> Any:
                if ids.shape[1] == 24:
                    raise KeyboardInterrupt
                return torch.zeros(len(ids), dtype=torch.bool)

        with pytest.raises(KeyboardInterrupt):
            model.generate(
                ids,
                past_key_values=cache,
                max_new_tokens=9,
                stopping_criteria=StoppingCriteriaList([Stop()]),
                **GREEDY,
            )
        cache.reset()
        out = model.generate(ids, past_key_values=cache, max_new_tokens=9, **GREEDY)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("step", ["eager", "static", "compile"])
def test_sequences_are_exchanged_in_a_loop(step: Any) -> None:
    model, ids = tiny("llama"), prompt(20, 2)
    with (
        reasonalloc.attach(model, budget=200, interval=8, step=step) as attached,
        torch.no_grad(),
    ):
        cache = attached.new_cache()
        with attached.decoding(cache):
            out = model(input_ids=ids, past_key_values=cache)
            for step_number in range(14):
                token = out.logits[:, -1:].argmax(dim=-1)
                if step_number == 6:
                    cache.batch_select_indices([1, 1])  # as transformers, a list, too
                    token = token[[1, 1]]
                with torch.inference_mode(step_number % 2 == 0):
                    out = model(input_ids=token.clone(), past_key_values=cache, use_cache=True)
                if step_number >= 6:
                    assert torch.equal(out.logits[0], out.logits[1])
        cache.crop(np.int64(-2))


def test_a_refused_call_leaves_the_running_one_alone() -> None:
    model, ids = tiny("llama"), prompt(20, 2)
    with reasonalloc.attach(model, budget=200, interval=8) as attached:
        expected = model.generate(ids, max_new_tokens=12, **GREEDY)
        cache, refused = attached.new_cache(), []
        edited = torch.cat([ids[:, :10], prompt(30, 2, seed=8)], dim=1)

        class Other(StoppingCriteria):
            def __call__(self, ids: Any, *_: Any, **__: Any) -> Any:
                if not refused:
                    with pytest.raises(UsageError, match="in use") as error:
                        model.generate(edited, past_key_values=cache, max_new_tokens=3, **GREEDY)
                    refused.append(error)
                return torch.zeros(len(ids), dtype=torch.bool)

        out = model.generate(
            ids,
            past_key_values=cache,
            max_new_tokens=12,
            stopping_criteria=StoppingCriteriaList([Other()]),
            **GREEDY,
        )
        assert refused and torch.equal(out, expected)


def test_a_protected_prompt_that_was_edited() -> None:
    model, ids = tiny("llama"), prompt(12, 2)
    settings: dict[str, Any] = {"budget": 24, "interval": 8, "protect_prompt": True, "window": 4}
    with reasonalloc.attach(model, **settings) as attached:
        cache = attached.new_cache()
        model.generate(ids, past_key_values=cache, max_new_tokens=3, **GREEDY)
        edited = torch.cat([ids[:, :3], prompt(40, 2, seed=5)], dim=1)
        for own in (cache, attached.new_cache()):
            with pytest.raises(UsageError, match="protect_prompt: the prompt has 43 tokens"):
                model.generate(edited, past_key_values=own, max_new_tokens=4, **GREEDY)
        shorter = edited[:, :15]
        out = model.generate(shorter, past_key_values=cache, max_new_tokens=30, **GREEDY)
        assert torch.equal(out, model.generate(shorter, max_new_tokens=30, **GREEDY))
        assert cache.layers[0].compressor.protected_columns == 15


def test_caches_of_other_models() -> None:
    first, second = tiny("llama"), tiny("qwen2")
    with (
        reasonalloc.attach(first, budget=200) as a,
        reasonalloc.attach(second, budget=24) as b,
    ):
        cache = a.new_cache()
        a.prefill(prompt(20), cache)
        for call in (
            lambda: second(prompt(3), past_key_values=cache),
            lambda: b.prefill(prompt(3), cache),
            lambda: second.generate(prompt(30), past_key_values=cache),
            lambda: b.decoding(cache).__enter__(),
        ):
            with pytest.raises(UsageError, match="another attachment"):
                call()


def test_a_new_turn_whose_mask_was_forgotten() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=200, interval=8) as attached:
        cache = attached.new_cache()
        model.generate(prompt(20), past_key_values=cache, max_new_tokens=12, **GREEDY)
        other = (prompt(5, 1, seed=6) + 1) % 90 + 2
        other[0, 0] = (prompt(20)[0, 0] + 1) % 90 + 2
        with pytest.raises(UsageError, match="the new turn alone with an attention_mask"):
            model.generate(other, past_key_values=cache, max_new_tokens=4, **GREEDY)
        text = torch.cat([cache.seen.ids.long(), prompt(3)], dim=1)
        for mask in (torch.ones(1, 25), torch.ones(1, 1, 1, text.shape[1])):
            with pytest.raises(UsageError, match="attention"):
                model.generate(
                    text, attention_mask=mask, past_key_values=cache, max_new_tokens=4, **GREEDY
                )
        assert cache.get_seq_length() == 31


def test_models_that_change_meanwhile() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=200) as attached:
        cache = attached.new_cache()
        attached.prefill(prompt(20), cache)
        model.bfloat16()
        with pytest.raises(UsageError, match=r"holds torch\.float32.*torch\.bfloat16 now"):
            attached.prefill(prompt(3), cache)
    model = tiny("llama")
    model.model.layers[1].register_forward_hook(lambda *_: None)
    for step in ("eager", "static"):
        with reasonalloc.attach(model, budget=24, step=step):
            model.generate(prompt(20), max_new_tokens=4, **GREEDY)
    with (
        reasonalloc.attach(model, budget=24, step="compile"),
        pytest.raises(UnsupportedError, match=r"hooks of 'model\.layers\.1'"),
    ):
        model.generate(prompt(20), max_new_tokens=4, **GREEDY)


def test_bound_methods_and_what_others_install() -> None:
    model = tiny("llama")
    model.forward = types.MethodType(type(model).forward, model)
    with reasonalloc.attach(model, budget=24):
        twin = copy.deepcopy(model)
        assert twin.forward.__self__ is twin
    model = tiny("llama")
    attached = reasonalloc.attach(model, budget=24, step="static")
    inner, calls = model.forward, []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return inner(*args, **kwargs)

    model.forward = counting
    attached.detach()
    with torch.no_grad():
        model(prompt(5))
    assert calls and model.forward is counting


def test_nothing_keeps_a_model_alive() -> None:
    for keep_cache in (False, True):
        model = tiny("llama")
        attached = reasonalloc.attach(model, budget=24, interval=8)
        out = model.generate(prompt(30), max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
        kept: list[Any] = [attached, attached.cache if keep_cache else None]
        attached.detach()
        alive = weakref.ref(model)
        del model, out
        gc.collect()
        assert alive() is None and len(kept) == 2
