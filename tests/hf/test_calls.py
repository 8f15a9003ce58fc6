"""Ways to call a model: each runs under the budget, or is refused by name before a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_refusals import one_sentence
from transformers import DynamicCache, GenerationMixin

import reasonalloc
from models import FACTORIES, prompt, tiny
from reasonalloc import BudgetCache, UnsupportedError, UsageError

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_loop_written_by_hand_gets_a_budget(name: str) -> None:
    model = tiny(name)
    for asked in ({"use_cache": True}, {}):  # models use a cache unless told otherwise
        with reasonalloc.attach(model, budget=24, interval=8) as attached:
            with torch.no_grad():
                out = model(prompt(30, 2), **asked)
                for _ in range(60):
                    token = out.logits[:, -1:].argmax(dim=-1)
                    out = model(token, past_key_values=out.past_key_values)
            cache = out.past_key_values
            assert isinstance(cache, BudgetCache) and cache.owner is attached
            assert cache.get_seq_length() == 90 and cache.recorder.compressions > 0
            assert cache.kv_bytes == attached.plan(2).kv_bytes(90)
            assert all(sum(row) <= 3 * 32 for layer in cache.retained_tokens for row in layer)
    with reasonalloc.attach(model, budget=24):
        out = model(prompt(30, 2), use_cache=True)  # gradients or not: it was asked for
        assert isinstance(out.past_key_values, BudgetCache)


def test_a_loop_by_hand_equals_generate() -> None:
    model = tiny("qwen2")
    with reasonalloc.attach(model, budget=24, interval=8):
        expected = model.generate(prompt(30), **GREEDY)
        with torch.inference_mode():
            out = model(prompt(30))
            tokens = [out.logits[:, -1:].argmax(dim=-1)]
            for _ in range(19):
                out = model(tokens[-1], past_key_values=out.past_key_values, use_cache=True)
                tokens.append(out.logits[:, -1:].argmax(dim=-1))
        assert torch.equal(torch.cat(tokens, dim=1), expected[:, 30:])


def test_other_caches_and_gradients() -> None:
    model = tiny("llama")
    reference = model(prompt(12)).logits
    with reasonalloc.attach(model, budget=24) as attached:
        for call in (model, model.model):
            with pytest.raises(UsageError, match="DynamicCache, which would not be compressed"):
                call(prompt(5), past_key_values=DynamicCache())
        plain = model(prompt(12)).logits  # gradients may be wanted: as without a budget
        torch.testing.assert_close(plain, reference)
        plain.sum().backward()
        out = model(prompt(12), past_key_values=attached.new_cache())
        with pytest.raises(UnsupportedError, match="gradients cannot pass"):
            out.logits.sum().backward()
        inside = model.model(prompt(12), past_key_values=attached.new_cache())
        assert inside.past_key_values.seen.ids.tolist() == prompt(12).tolist()


def test_training_mode() -> None:
    """RL generates in training mode; gradient checkpointing switches the cache off."""
    model = tiny("llama")
    with reasonalloc.attach(model, budget=24, interval=8) as attached:
        expected = model.generate(prompt(30), **GREEDY)
        model.train()
        assert torch.equal(model.generate(prompt(30), **GREEDY), expected)
        assert attached.recorder is not None and attached.recorder.compressions > 0
        loss = model(expected, labels=expected).loss  # between rollouts, the model is trained
        loss.backward()
        assert model.lm_head.weight.grad is not None
        model.gradient_checkpointing_enable()
        with pytest.raises(
            UnsupportedError, match=r"(gradient|activation)_checkpointing_disable"
        ) as error:
            model.generate(prompt(30), **GREEDY)
        one_sentence(error.value)
        model(expected, labels=expected).loss.backward()
        model.gradient_checkpointing_disable()
        assert torch.equal(model.generate(prompt(30), **GREEDY), expected)
        model.gradient_checkpointing_enable()
        model.eval()
        assert torch.equal(model.generate(prompt(30), **GREEDY), expected)
        with pytest.raises(UnsupportedError, match="cannot be trained through"):
            model.train()
            model(prompt(30), past_key_values=attached.new_cache())
    noisy = tiny("llama", attention_dropout=0.5).train()
    with (
        reasonalloc.attach(noisy, budget=24),
        pytest.raises(UnsupportedError, match=r"attention dropout 0\.5.*eval"),
    ):
        noisy.generate(prompt(30), **GREEDY)


def test_continuous_batching_is_refused_by_name() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=24):
        for name in ("generate_batch", "init_continuous_batching"):
            assert hasattr(GenerationMixin, name)
            with pytest.raises(UnsupportedError, match="continuous batching keeps a cache") as e:
                getattr(model, name)([[1, 2, 3]])
            one_sentence(e.value)
        with pytest.raises(UnsupportedError, match="another cache"):
            model.generate(prompt(5), cache_implementation="paged", **GREEDY)
    assert "generate_batch" not in model.__dict__


def test_drafts_and_several_tokens_at_once() -> None:
    model, draft = tiny("llama"), tiny("llama", num_hidden_layers=2)
    with (
        reasonalloc.attach(model, budget=24),
        pytest.raises(UnsupportedError, match="multi-token prediction"),
    ):
        model.generate(prompt(5), use_mtp=True, **GREEDY)
    with (
        reasonalloc.attach(draft, budget=24),
        pytest.raises(UnsupportedError, match="cannot be the draft of another's") as error,
    ):
        model.generate(prompt(5), assistant_model=draft, **GREEDY)
    one_sentence(error.value)


@pytest.mark.parametrize("how", ["method", "attribute"])
def test_attention_that_was_changed_since(how: str) -> None:
    model = tiny("llama")
    attached = reasonalloc.attach(model, budget=24)
    if how == "method":
        model.set_attn_implementation("eager")
    else:
        model.config._attn_implementation = "eager"
    for call in (
        lambda: model.generate(prompt(30), **GREEDY),
        lambda: model(prompt(30), past_key_values=attached.new_cache()),
    ):
        with pytest.raises(UsageError, match="set to 'eager' after attach") as error:
            call()
        one_sentence(error.value)
    attached.detach()
    with reasonalloc.attach(model, budget=24, interval=8):
        model.generate(prompt(30), **GREEDY)


def test_numbers_of_numpy() -> None:
    model = tiny("llama")
    numbers: dict[str, Any] = {
        "budget": np.int64(24),
        "interval": np.int32(8),
        "window": np.int16(4),
        "n_sink": np.uint8(2),
        "seed": np.int64(3),
    }
    with reasonalloc.attach(model, **numbers) as attached:
        out = model.generate(prompt(30), **GREEDY)
        assert attached.config.budget == 24 and type(attached.config.budget) is int
    with reasonalloc.attach(model, **{k: int(v) for k, v in numbers.items()}):
        assert torch.equal(model.generate(prompt(30), **GREEDY), out)
    for wrong in (np.float64(24), np.bool_(True), True, "24", 24.0):
        with pytest.raises(UsageError, match="whole number"):
            reasonalloc.attach(model, budget=wrong)


@pytest.fixture
def adapted() -> Any:
    """A model with an adapter of random weights."""
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("step", ["eager", "static", "compile"])
def test_adapters(adapted: Any, step: Any) -> None:
    full = adapted.generate(input_ids=prompt(30), **GREEDY)
    with reasonalloc.attach(adapted, budget=90, interval=8, step=step):
        assert torch.equal(adapted.generate(input_ids=prompt(30), **GREEDY), full)
    with reasonalloc.attach(adapted, budget=24, interval=8, step=step) as attached:
        under = adapted.generate(input_ids=prompt(30), **GREEDY)
        assert attached.recorder is not None and attached.recorder.compressions > 0
        with pytest.raises(UsageError, match="has a KV budget already"):
            reasonalloc.attach(adapted.get_base_model(), budget=24)
    with reasonalloc.attach(adapted.get_base_model(), budget=24, interval=8, step=step):
        assert torch.equal(adapted.generate(input_ids=prompt(30), **GREEDY), under)
    reasonalloc.attach(adapted, budget=24)
    reasonalloc.detach(adapted)
    merged = adapted.merge_and_unload()
    with reasonalloc.attach(merged, budget=24, interval=8, step=step):
        assert torch.equal(merged.generate(input_ids=prompt(30), **GREEDY), under)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_adapters_that_learn_tokens(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(model, config).eval()
    with pytest.raises(UnsupportedError, match="puts learned tokens into the cache") as error:
        reasonalloc.attach(wrapped, budget=24)
    one_sentence(error.value)
    with (
        reasonalloc.attach(wrapped.get_base_model(), budget=24),
        pytest.raises(UnsupportedError, match="puts learned tokens into the cache"),
    ):
        wrapped.generate(input_ids=prompt(30), **GREEDY)


def test_trl_style_rollouts(adapted: Any, tmp_path: Path) -> None:
    """Checkpointing is off while TRL generates; then a step of training, then again."""
    model = adapted
    model.train()
    with reasonalloc.attach(model, budget=24, interval=8) as attached:
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        texts = []
        for _ in range(2):
            model.get_base_model().gradient_checkpointing_disable()
            with torch.no_grad():
                texts.append(model.generate(input_ids=prompt(30, 2), **GREEDY))
            assert attached.recorder is not None and attached.recorder.compressions > 0
            model.get_base_model().gradient_checkpointing_enable()
            model.get_base_model().enable_input_require_grads()
            model(texts[-1], labels=texts[-1]).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        model.save_pretrained(tmp_path)  # the adapter alone
    assert texts[0].shape == (2, 50)
