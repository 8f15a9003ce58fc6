"""A text that is no continuation of what the cache saw: it goes back, or the call is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import reasonalloc
from models import FACTORIES, prompt, tiny
from reasonalloc import UnsupportedError, UsageError
from reasonalloc.integrations.hf.versions import cache_name

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
STEPS: tuple[Any, ...] = ("eager", "static", "compile")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arm", ["rkv", "random/uniform/adakv", "h2o"])
def test_dropped_thoughts(step: Any, arm: str) -> None:
    """Turn 2 leaves out what lies between the question and the answer of turn 1."""
    model = tiny("llama", num_hidden_layers=4)
    question, turn = prompt(20, 2), prompt(6, 2, seed=2)
    with reasonalloc.attach(model, budget=200, interval=8, step=step, arm=arm) as attached:
        cache = attached.new_cache()
        out = model.generate(question, past_key_values=cache, **GREEDY)
        for keep in (12, 3, 0):  # longer and shorter than what the cache has seen
            edited = torch.cat([out[:, :20], out[:, 40 - keep :], turn], dim=1)
            found = model.generate(edited, past_key_values=cache, **GREEDY)
            assert cache.get_seq_length() == edited.shape[1] + 19
            attached.detach()
            expected = model.generate(edited, **GREEDY)
            reattached = reasonalloc.attach(model, budget=200, interval=8, step=step, arm=arm)
            assert torch.equal(found, expected)
            attached = reattached
            cache = attached.new_cache()
            out = model.generate(question, past_key_values=cache, **GREEDY)
        attached.detach()


def test_what_was_evicted_since_is_refused_by_its_place() -> None:
    model = tiny("llama", num_hidden_layers=4)
    with reasonalloc.attach(model, budget=24, interval=8) as attached:
        cache = attached.new_cache()
        out = model.generate(prompt(20), past_key_values=cache, **GREEDY)
        edited = torch.cat([out[:, :20], out[:, 30:], prompt(6, 1, seed=2)], dim=1)
        same = int((edited[0, :30] != out[0, :30]).nonzero()[0])
        length = cache.get_seq_length()
        with pytest.raises(UsageError, match=rf"at token {same} of 36.*leave {cache_name()} out"):
            model.generate(edited, past_key_values=cache, **GREEDY)
        assert cache.get_seq_length() == length  # nothing was changed
        continued = torch.cat([out, prompt(6, 1, seed=2)], dim=1)
        model.generate(continued, past_key_values=cache, **GREEDY)


def test_back_to_after_the_latest_eviction() -> None:
    """Tokens since the latest compression can be taken back, also under a small budget."""
    model = tiny("llama", num_hidden_layers=4)
    ids = prompt(60)
    with reasonalloc.attach(model, budget=24, interval=16) as attached, torch.no_grad():
        found = []
        for detour in (False, True):
            cache = attached.new_cache()
            model(ids[:, :40], past_key_values=cache)  # compressed at 40
            for column in range(40, 45):
                model(ids[:, column : column + 1], past_key_values=cache)
            if detour:
                for _ in range(7):
                    model(prompt(1, 1, seed=9), past_key_values=cache)
                cache.crop(-7)
                assert cache.get_seq_length() == 45
            for column in range(45, 60):  # over the boundary at 56
                logits = model(ids[:, column : column + 1], past_key_values=cache).logits
            found.append((logits, cache.retained_tokens, cache.recorder.compressions))
            with pytest.raises(UnsupportedError, match="at 56 tokens it evicted"):
                cache.crop(50)
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("name", FACTORIES)
def test_crop_where_nothing_was_evicted(name: str) -> None:
    model = tiny(name)
    ids = prompt(30, 2)
    with reasonalloc.attach(model, budget=60, interval=8) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids[:, :20], past_key_values=cache)
        for change in (lambda: cache.crop(-3), lambda: cache.crop(11), lambda: cache.crop(0)):
            change()
        assert cache.get_seq_length() == 11
        found = model(ids[:, 11:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 11:]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        assert cache.kv_bytes == attached.plan(2).kv_bytes(30)


def test_crop_of_what_cannot_go_back() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=60, policy="h2o") as attached, torch.no_grad():
        cache = attached.new_cache()
        model(prompt(20), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="keeps numbers per token"):
            cache.crop(-2)
        cache.crop(-20)  # everything
        assert cache.get_seq_length() == 0
        model(prompt(20), past_key_values=cache)
    model = tiny("gemma2")  # a window of 24 tokens
    with reasonalloc.attach(model, budget=60) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(prompt(40), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="a layer its sliding window"):
            cache.crop(-2)


def test_ids_that_are_not_known_are_not_compared() -> None:
    """Embeddings have no ids: a cache that has seen some goes on as before."""
    model = tiny("llama")
    ids = prompt(20, 2)
    with reasonalloc.attach(model, budget=60) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
        text = torch.cat([prompt(20, 2, seed=7), prompt(4, 2)], dim=1)
        out = model.generate(text, past_key_values=cache, **GREEDY)
        assert out.shape == (2, 44)


class Words:
    """A tokenizer with a template that drops thoughts: ids are numbers in a text."""

    chat_template = "numbers"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> Any:
        ids: list[int] = []
        for message in messages:
            text = message["content"]
            if message["role"] == "assistant":
                text = " ".join(text.split()[-4:])  # the answer, without the thoughts
            ids += [90 if message["role"] == "user" else 91, *map(int, text.split())]
        return {"input_ids": torch.tensor([[*ids, 91]])}

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)


@pytest.mark.parametrize("step", STEPS)
def test_a_chat_whose_thoughts_are_dropped(step: Any) -> None:
    model = tiny("llama", num_hidden_layers=4)
    questions = [" ".join(map(str, prompt(12, 1, seed=s)[0].tolist())) for s in range(3)]
    tokenizer, messages, expected = Words(), [], []
    for question in questions:  # the full cache, from scratch in every turn
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages)["input_ids"]
        out = model.generate(ids, **GREEDY)
        messages.append({"role": "assistant", "content": tokenizer.decode(out[0, ids.shape[1] :])})
        expected.append(messages[-1]["content"])
    with reasonalloc.attach(model, budget=200, interval=8, step=step) as attached:
        chat = attached.chat(tokenizer, **GREEDY)
        prefilled = []
        for question, answer in zip(questions, expected, strict=True):
            assert chat.ask(question) == answer
            prefilled.append(chat.prefilled)
        assert prefilled == [14, 19, 19]  # the last answer and the new question alone
        assert chat.messages == messages
    with reasonalloc.attach(model, budget=24, interval=8, step=step) as attached:
        chat = attached.chat(tokenizer, **GREEDY)
        for question in questions:
            assert len(chat.ask(question).split()) == 20
    with reasonalloc.attach(model, budget=24) as attached:
        with pytest.raises(UsageError, match="no chat template"):
            attached.chat(object())
        with pytest.raises(UsageError, match="past_key_values is the chat's own"):
            attached.chat(tokenizer, past_key_values=None)


def test_the_text_after_a_reset_is_a_prompt() -> None:
    """HrmText reads prompts both ways, and asks the cache whether it is still empty."""
    kind = getattr(transformers, "HrmTextForCausalLM", None)
    if kind is None:
        pytest.skip("not in this transformers")
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.3}
    loops = {"num_hidden_layers": 1, "H_cycles": 2, "L_cycles": 2, "eos_token_id": None}
    torch.manual_seed(0)
    model = kind(transformers.HrmTextConfig(**sizes, **heads, **loops)).eval()
    ids = prompt(20)
    given = {"token_type_ids": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(ids, **given)
    assert not torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), wanted)
    with reasonalloc.attach(model, budget=200, window=4) as attached:
        cache = attached.new_cache()
        assert torch.equal(model.generate(ids, past_key_values=cache, **given), wanted)
        assert cache.is_initialized
        cache.reset()
        assert not cache.is_initialized
        assert torch.equal(model.generate(ids, past_key_values=cache, **given), wanted)
