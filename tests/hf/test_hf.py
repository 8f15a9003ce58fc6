"""transformers' generate under a budget: equal to the full cache where it must be, and usable."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextIteratorStreamer

import reasonalloc
from models import FACTORIES, prompt, tiny
from reasonalloc.integrations.hf.versions import cache_name

ARMS = ["rkv", "snapkv/uniform/adakv", "h2o/pyramid/uniform", "rkv/uniform/reasonalloc", "random"]
GREEDY: dict[str, Any] = {"do_sample": False}


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of unequal lengths in one batch: ids and mask [batch, longest]."""
    longest = max(lengths)
    ids = prompt(longest, len(lengths), seed)
    mask = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


@pytest.mark.parametrize("name", FACTORIES)
def test_budget_that_holds_everything_equals_the_full_cache(name: str) -> None:
    model = tiny(name)
    ids, mask = left_padded([40, 23, 1])
    alone = prompt(33)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=50, **GREEDY)
    expected_alone = model.generate(alone, max_new_tokens=50, **GREEDY)
    for arm in ("rkv", "h2o/uniform/reasonalloc"):
        with reasonalloc.attach(model, budget=90, interval=16, arm=arm):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=50, **GREEDY)
            out_alone = model.generate(alone, max_new_tokens=50, **GREEDY)
        assert torch.equal(out, expected) and torch.equal(out_alone, expected_alone)
    assert torch.equal(model.generate(alone, max_new_tokens=50, **GREEDY), expected_alone)


@pytest.mark.parametrize("name", FACTORIES)
def test_batch_equals_alone_and_compression_matters(name: str) -> None:
    model = tiny(name)
    lengths = [40, 23, 5]
    ids, mask = left_padded(lengths)
    full = model.generate(ids, attention_mask=mask, max_new_tokens=60, **GREEDY)
    differs = False
    for arm in ARMS:
        with reasonalloc.attach(model, budget=24, interval=16, arm=arm) as attached:
            batch = model.generate(ids, attention_mask=mask, max_new_tokens=60, **GREEDY)
            assert attached.recorder is not None and attached.recorder.compressions > 0
            for row, length in enumerate(lengths):
                alone = model.generate(
                    ids[row : row + 1, 40 - length :], max_new_tokens=60, **GREEDY
                )
                assert torch.equal(alone[0, length:], batch[row, 40:]), f"{arm} row {row}"
        differs |= not torch.equal(batch, full)
    assert differs


def test_attention_backends_agree() -> None:
    model = tiny("llama")
    outs = []
    for backend in ("eager", "sdpa"):
        with reasonalloc.attach(
            model, budget=20, interval=8, heads="reasonalloc", attention=backend
        ):
            outs.append(model.generate(prompt(30, 2), max_new_tokens=50, **GREEDY))
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    full = model.generate(prompt(30, 2), max_new_tokens=40, **GREEDY)
    with reasonalloc.attach(model, budget=90, interval=8, attention="eager"):
        same = model.generate(prompt(30, 2), max_new_tokens=40, **GREEDY)
    # Rounding may turn a near-tie, after which texts part: the first tokens must agree.
    assert torch.equal(same[:, 30:34], full[:, 30:34])
    with reasonalloc.attach(model, budget=20, interval=8, heads="reasonalloc") as attached:
        cache = attached.new_cache()
        out = model.generate(prompt(30, 2), max_new_tokens=40, past_key_values=cache, **GREEDY)
    assert out.shape == (2, 70)
    assert cache.kv_bytes == attached_plan_bytes(model, 2, 20, 8, dtype, cache)
    for layer in cache.layers:
        slab = getattr(getattr(layer, "compressor", None), "slab", None)
        assert slab is None or (slab.keys.dtype == dtype and bool(torch.isfinite(slab.keys).all()))


def attached_plan_bytes(
    model: Any, batch: int, budget: int, interval: int, dtype: torch.dtype, cache: Any
) -> int:
    with reasonalloc.attach(model, budget=budget, interval=interval) as attached:
        return int(attached.plan(batch, dtype).kv_bytes(cache.get_seq_length()))


def test_sampling_is_reproducible_and_streams() -> None:
    model = tiny("llama")
    settings: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "top_p": 0.9}
    with reasonalloc.attach(model, budget=20, interval=8):
        torch.manual_seed(3)
        first = model.generate(prompt(30), num_return_sequences=3, **settings)
        torch.manual_seed(3)
        again = model.generate(prompt(30), num_return_sequences=3, **settings)
        assert first.shape == (3, 70) and torch.equal(first, again)
        assert not torch.equal(first[0], first[1])

        plain = model.generate(prompt(30), max_new_tokens=40, **GREEDY)
        streamer = TextIteratorStreamer(Digits(), skip_prompt=True)
        thread = threading.Thread(
            target=model.generate,
            args=(prompt(30),),
            kwargs={"max_new_tokens": 40, "streamer": streamer, **GREEDY},
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text.split() == [str(int(t)) for t in plain[0, 30:]]


class Digits:
    """A tokenizer as far as a streamer needs one: ids as numbers."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(i)} " for i in ids)


def test_several_calls_do_not_influence_each_other() -> None:
    model = tiny("qwen2")
    with reasonalloc.attach(model, budget=20, interval=8):
        first = model.generate(prompt(30), max_new_tokens=40, **GREEDY)
        model.generate(prompt(25, 4, seed=5), max_new_tokens=20, **GREEDY)
        assert torch.equal(model.generate(prompt(30), max_new_tokens=40, **GREEDY), first)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("arm", ["rkv", "h2o/uniform/adakv"])
def test_conversation_on_one_cache(name: str, arm: str) -> None:
    model = tiny(name)
    turn = prompt(12, 2, seed=9)

    def talk(cache: Any) -> torch.Tensor:
        out = model.generate(prompt(30, 2), max_new_tokens=21, past_key_values=cache, **GREEDY)
        for _ in range(2):
            ids = torch.cat([out, turn], dim=1)
            out = model.generate(ids, max_new_tokens=21, past_key_values=cache, **GREEDY)
        return out

    expected = talk(DynamicCache(config=model.config))
    with reasonalloc.attach(model, budget=200, interval=16, arm=arm) as attached:
        assert torch.equal(talk(attached.new_cache()), expected)
    with reasonalloc.attach(model, budget=24, interval=16, arm=arm) as attached:
        cache = attached.new_cache()
        out = talk(cache)
        assert out.shape == expected.shape and not torch.equal(out, expected)
        assert cache.get_seq_length() == out.shape[1] - 1
        assert cache.kv_bytes == attached.plan(2).kv_bytes(cache.get_seq_length())


def test_conversation_with_padding_equals_alone() -> None:
    model = tiny("llama")
    ids, mask = left_padded([20, 9])
    turn, turn_mask = left_padded([10, 4], seed=2)
    lengths = [(20, 10), (9, 4)]
    with reasonalloc.attach(model, budget=18, interval=8, heads="reasonalloc") as attached:

        def talk(rows: slice, first: int, second: int) -> torch.Tensor:
            cache = attached.new_cache()
            a, am = ids[rows, 20 - first :], mask[rows, 20 - first :]
            b, bm = turn[rows, 10 - second :], turn_mask[rows, 10 - second :]
            out = model.generate(
                a, attention_mask=am, max_new_tokens=13, past_key_values=cache, **GREEDY
            )
            am = torch.cat([am, am.new_ones(len(am), 13), bm], dim=1)
            both = torch.cat([out, b], dim=1)
            out = model.generate(
                both, attention_mask=am, max_new_tokens=30, past_key_values=cache, **GREEDY
            )
            return out[:, -30:]

        together = talk(slice(0, 2), 20, 10)
        for row, (first, second) in enumerate(lengths):
            assert torch.equal(talk(slice(row, row + 1), first, second)[0], together[row])


def test_plain_forward_calls_and_padding_in_mid_decode() -> None:
    """A custom decode loop: masking a sequence's new tokens out equals leaving them away."""
    model = tiny("llama")
    ids = prompt(26, 2)
    with reasonalloc.attach(model, budget=16, interval=4, arm="snapkv/uniform/reasonalloc") as a:
        cache = a.new_cache()
        mask = torch.ones(2, 20, dtype=torch.long)
        model(ids[:, :20], attention_mask=mask, past_key_values=cache)
        for step in range(6):
            real = torch.tensor([[1], [step % 2]])
            mask = torch.cat([mask, real], dim=1)
            places = (mask.cumsum(1) - 1)[:, -1:]
            logits = model(
                ids[:, 20 + step : 21 + step],
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
            ).logits
        held = cache.retained_tokens
        # Both were compressed to 48 after four steps; of two more, one is real in row 1.
        assert all([sum(row) for row in layer] == [48 + 6, 48 + 3] for layer in held)
        single = a.new_cache()
        model(ids[:1, :20], past_key_values=single)
        for step in range(6):
            alone = model(ids[:1, 20 + step : 21 + step], past_key_values=single).logits
        torch.testing.assert_close(logits[:1], alone, rtol=1e-4, atol=1e-4)
        other = a.new_cache()
        model(ids[1:, :20], past_key_values=other)
        for step in (1, 3, 5):  # a boundary after every fourth step, as in the batch
            if step == 5:
                boundary(other)
            alone = model(ids[1:, 20 + step : 21 + step], past_key_values=other).logits
        torch.testing.assert_close(logits[1:], alone, rtol=1e-4, atol=1e-4)


def boundary(cache: Any) -> None:
    """Let the next boundary come now: the steps in which this sequence was masked count too."""
    for layer in cache.layers:
        layer.compressor.progress._since = 0
        slab = layer.compressor.slab
        layer.compressor._compress(slab, slab.as_rows(), layer.compressor._logits)


def test_forward_without_a_cache_is_untouched() -> None:
    for name in ("llama", "gemma2"):
        model = tiny(name)
        expected = model(prompt(30, 2), use_cache=False).logits
        with reasonalloc.attach(model, budget=16):
            inside = model(prompt(30, 2), use_cache=False).logits
        torch.testing.assert_close(inside, expected, rtol=1e-3, atol=1e-3)


def test_records() -> None:
    model = tiny("llama")
    with reasonalloc.attach(
        model, budget=20, interval=8, arm="rkv/pyramid/reasonalloc", record="tokens"
    ) as attached:
        model.generate(prompt(40, 2), max_new_tokens=40, **GREEDY)
        recorder, totals = attached.recorder, attached.totals
    assert recorder is not None
    assert recorder.compressions == len(recorder.events) == 3 * 5
    assert [e.step for e in recorder.events if e.layer == 1] == [40, 48, 56, 64, 72]
    for event in recorder.events:
        assert event.budgets.sum(1).tolist() == [totals[event.layer]] * 2
        for row in range(2):
            for head in range(3):
                kept = event.kept(row, head)
                assert kept == sorted(set(kept)) and len(kept) == int(event.budgets[row, head])
                assert set(range(event.step - 8, event.step)) <= set(kept)


def test_reports_when_compression_never_happened() -> None:
    model = tiny("llama")
    with (
        reasonalloc.attach(model, budget=500),
        pytest.warns(reasonalloc.CompressionNeverHappened, match="never compressed: 29 tokens"),
    ):
        model.generate(prompt(20), max_new_tokens=10, **GREEDY)


def test_detach_restores_everything() -> None:
    model = tiny("llama")
    before, keys = model.config._attn_implementation, set(model.__dict__)
    attached = reasonalloc.attach(model, budget=20)
    assert model.config._attn_implementation == "reasonalloc"
    reasonalloc.detach(model)
    reasonalloc.detach(model)
    attached.detach()
    assert model.config._attn_implementation == before and set(model.__dict__) == keys
    with pytest.raises(reasonalloc.UsageError, match="was detached"):
        attached.generate(prompt(5))
    with pytest.raises(ZeroDivisionError), reasonalloc.attach(model, budget=20):
        raise ZeroDivisionError
    assert model.config._attn_implementation == before


def test_two_models_and_a_model_with_its_own_generate() -> None:
    first, second = tiny("llama"), tiny("qwen3")
    calls = []
    original = type(first).generate

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(first, *args, **kwargs)

    first.generate = own
    with reasonalloc.attach(first, budget=20, interval=8):
        with reasonalloc.attach(second, budget=30, interval=8) as other:
            first.generate(prompt(30), max_new_tokens=20, **GREEDY)
            second.generate(prompt(40), max_new_tokens=20, **GREEDY)
            assert other.recorder is not None and other.recorder.compressions > 0
        assert first.config._attn_implementation == "reasonalloc"
    assert first.generate is own and cache_name() in calls[0]


def test_gradient_modes_mix_on_one_cache() -> None:
    model = tiny("llama")
    for heads in ("uniform", "reasonalloc"):
        with reasonalloc.attach(model, budget=20, interval=4, heads=heads) as attached:
            cache = attached.new_cache()
            with torch.inference_mode():
                model(prompt(30, 2), past_key_values=cache)
                model(prompt(1, 2), past_key_values=cache)
            for _ in range(5):
                model(prompt(1, 2), past_key_values=cache)
            with torch.inference_mode():
                assert bool(torch.isfinite(model(prompt(1, 2), past_key_values=cache).logits).all())


def test_autocast() -> None:
    model = tiny("llama")
    with (
        reasonalloc.attach(model, budget=20, interval=4, heads="reasonalloc"),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        assert model.generate(prompt(30, 2), max_new_tokens=20, **GREEDY).shape == (2, 50)


def test_padding_alone_is_no_compression() -> None:
    model = tiny("llama")
    ids, mask = left_padded([40, 12])
    with (
        reasonalloc.attach(model, budget=24, interval=4) as attached,
        pytest.warns(reasonalloc.CompressionNeverHappened),
    ):
        cache = attached.new_cache()
        model(ids[1:], attention_mask=mask[1:], past_key_values=cache)
        assert cache.recorder.compressions == 0
        model.generate(ids[1:], attention_mask=mask[1:], max_new_tokens=8, **GREEDY)
