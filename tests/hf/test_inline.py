"""Models whose modules compute attention themselves: ours stands for theirs, and gives the same."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import reasonalloc
from generations import (
    PADDED,
    SMALL,
    batch,
    check_a_budget_for_everything,
    check_a_small_budget,
    check_planned_bytes,
    check_rising,
    check_two_turns,
    full_cache,
    generated,
)
from models import INLINE, inline, prompt
from reasonalloc import UnsupportedError, plan
from reasonalloc.integrations.hf.cache_layers import held_bytes
from reasonalloc.integrations.hf.inline import stands
from reasonalloc.integrations.hf.inline.alibi import (
    Bias,
    ExactBias,
    RoundedBias,
    slopes_of_powers,
    slopes_up_to,
)
from reasonalloc.integrations.hf.replay import replay_logits
from reasonalloc.texts import Trajectory

# Their positions are columns, padding included: in transformers too, a batch changes what is said.
COLUMNS = ["trocr"]
STATIC = ["falcon", "falcon_heads", "falcon_new", "falcon_alibi", "falcon_uneven"]
STATIC += ["gpt_neox_japanese", "gpt_neo", "gpt_neo_global", "xglm"]
BIASED = ["falcon_alibi", "falcon_uneven", "bloom", "bloom_uneven", "mpt"]
every = pytest.mark.parametrize("name", INLINE)


@functools.cache
def made(name: str) -> Any:
    return inline(name)


@every
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_a_budget_that_holds_everything_changes_nothing(name: str) -> None:
    check_a_budget_for_everything(made(name), kinds=8 if name in COLUMNS else 20)


@every
def test_a_small_budget_in_a_batch(name: str) -> None:
    """Tokens change; a sequence alone and static steps give the same; positions rise."""
    model = made(name)
    if name not in COLUMNS:
        check_a_small_budget(model, 40, static=name in STATIC)
        return
    ids, mask = batch()
    full = generated(model, ids, mask, 40)
    with reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        assert not torch.equal(generated(model, ids, mask, 40, past_key_values=cache), full)
        check_rising(cache)
        alone = generated(model, ids[:1], mask[:1], 40)
        assert torch.equal(generated(model, ids[[0, 0]], mask[[0, 0]], 40)[:1], alone)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_as_planned(name: str, dtype: torch.dtype) -> None:
    """Of the compressed cache, and of transformers' own, from the configuration's fields alone."""
    model = made(name) if dtype == torch.float32 else inline(name).to(dtype)
    planned = plan(model.config, batch=2, dtype=dtype, **SMALL).memory()
    check_planned_bytes(model, planned)
    if not any(shape.sliding_window for shape in planned.shapes):  # theirs keeps everything
        assert held_bytes(full_cache(model, 1).layers) == planned.full_bytes(31)


@every
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_two_turns(name: str) -> None:
    check_two_turns(made(name), 7)


@every
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_are_those_of_transformers(name: str, implementation: str) -> None:
    """With and without a cache, with padding and without, in pieces and token by token."""
    if implementation == "sdpa" and not name.startswith("falcon"):
        pytest.skip("the others have eager attention alone")
    if implementation == "eager" and name in ("falcon_alibi", "falcon_uneven"):
        pytest.skip("transformers adds its biases twice")
    model = inline(name, attn_implementation=implementation)
    (ids, mask), later = batch(), prompt(30, 3, seed=8)
    pieces = [(prompt(20, 2, seed=6), None, prompt(9, 2, seed=7)), (ids, mask, later)]
    for first, own, rest in pieces:
        expected = logits(model, DynamicCache(config=model.config), first, own, rest)
        alone = model(first, attention_mask=own, use_cache=False).logits
        with reasonalloc.attach(model, budget=128) as attached:
            found = logits(model, attached.new_cache(), first, own, rest)
            again = model(first, attention_mask=own, use_cache=False).logits
        real = torch.ones_like(first, dtype=torch.bool) if own is None else own.bool()
        close(again[real], alone[real])
        for ours, theirs in zip(found, expected, strict=True):
            shown = real if ours.shape[1] == first.shape[1] else slice(None)
            close(ours[shown], theirs[shown])
    assert model.config._attn_implementation == implementation


def close(found: Tensor, expected: Tensor) -> None:
    """Within what float32 leaves of the largest logit after some layers, on any processor."""
    largest = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=2e-5 * largest, rtol=0)


@torch.no_grad()
def logits(
    model: Any, cache: Any, first: Tensor, mask: Tensor | None, rest: Tensor
) -> list[Tensor]:
    """Of a prompt, of three more tokens at once, and of the others one by one."""
    parts = [first, rest[:, :3], *rest[:, 3:].split(1, dim=1)]
    found = []
    for place, part in enumerate(parts):
        if mask is not None and place:
            mask = torch.cat([mask, torch.ones_like(part)], dim=1)
        found.append(model(part, attention_mask=mask, past_key_values=cache).logits)
    return found


@every
def test_modules_give_what_transformers_gives(name: str) -> None:
    """The first layer's attention to 1e-5; the others differ by what comes in as well."""
    model = inline(name, initializer_range=0.3)
    theirs, ours = [], []
    for kept, attached in ((theirs, False), (ours, True)):
        hooks = [
            module.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0]))
            for module in model.modules()
            if hasattr(module, "layer_idx") or hasattr(module, "attention_type")
        ]
        with torch.no_grad():
            if attached:
                with reasonalloc.attach(model, budget=64):
                    model(prompt(40, 2), use_cache=True)
            else:
                model(prompt(40, 2), use_cache=True)
        for hook in hooks:
            hook.remove()
    assert len(ours) == len(theirs) >= 3
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-3


@every
def test_detached_copied_and_pickled_models_are_plain(name: str) -> None:
    model = inline(name)
    ids = prompt(20, 2)
    before = model(ids, use_cache=False).logits
    implementation = model.config._attn_implementation
    with reasonalloc.attach(model, **SMALL):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for plain in (model, *twins):
        assert not any("forward" in module.__dict__ for module in plain.modules())
        assert plain.config._attn_implementation == implementation
        assert torch.equal(plain(ids, use_cache=False).logits, before)


@every
def test_copies_go_on_alike(name: str, tmp_path: Path) -> None:
    """Deep copies, saved ones, repeated and selected sequences: the same next tokens."""
    model, (ids, mask), token = made(name), batch(), prompt(1, 3, seed=4)
    longer = torch.cat([mask, torch.ones_like(token)], dim=1)
    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:

        def step(cache: Any, rows: Tensor) -> Tensor:
            own = {"attention_mask": longer[rows], "past_key_values": cache}
            found: Tensor = model(token[rows], **own).logits
            return found

        cache, whole = attached.new_cache(), torch.arange(3)
        model(ids, attention_mask=mask, past_key_values=cache)
        twin = copy.deepcopy(cache)
        attached.save_cache(cache, tmp_path / "cache.safetensors")
        step(twin, whole)  # which leaves the other as it was
        repeated, swapped = copy.deepcopy(cache), copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        swapped.batch_select_indices(torch.tensor([1, 0]))
        wanted = step(cache, whole)
        loaded = attached.load_cache(tmp_path / "cache.safetensors")
        assert torch.equal(step(loaded, whole), wanted) and loaded.kv_bytes == cache.kv_bytes
        twice, back = whole.repeat_interleave(2), torch.tensor([1, 0])
        assert torch.allclose(step(repeated, twice), wanted[twice], atol=1e-4)
        assert torch.allclose(step(swapped, back), wanted[back], atol=1e-4)


@every
def test_replay_equals_steps(name: str) -> None:
    model, ids = made(name), prompt(60, seed=3)[0].tolist()
    text = Trajectory(tuple(ids[:20]), tuple(ids[20:]))
    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        with cache.replaying():
            found = torch.cat(list(replay_logits(model, text, cache)))
        slow = attached.new_cache()
        each = [model(torch.tensor([ids[:20]]), past_key_values=slow).logits[0, -1:]]
        for place in range(20, 59):
            each.append(model(torch.tensor([[ids[place]]]), past_key_values=slow).logits[0])
        assert cache.retained_tokens == slow.retained_tokens
    torch.testing.assert_close(found, torch.cat(each), atol=2e-3, rtol=1e-3)


@every
def test_a_pinned_prompt_and_other_arms(name: str) -> None:
    model, (ids, mask) = made(name), batch()
    for arm in ("h2o/uniform/adakv", "snapkv/pyramid/uniform", "rkv/uniform/reasonalloc"):
        with reasonalloc.attach(model, **SMALL, arm=arm, prompt="pin") as attached:
            cache = attached.new_cache()
            generated(model, ids, mask, 40, past_key_values=cache)
            assert cache.kv_bytes == attached.plan(3, prompt_tokens=26).kv_bytes(65)
            for layer in cache.layers:
                slab = getattr(getattr(layer, "compressor", None), "slab", None)
                if slab is None:
                    continue
                rows = slab.as_rows()
                kept = rows.gather(rows.positions)
                for row, padding in enumerate(PADDED):
                    pinned = torch.arange(26 - padding)
                    assert bool((kept[row, :, : 26 - padding] == pinned).all())


@every
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_a_text_goes_back(name: str) -> None:
    model, ids = made(name), prompt(30, 2)
    with torch.no_grad(), reasonalloc.attach(model, budget=60, interval=8) as attached:
        cache = attached.new_cache()
        model(ids[:, :20], past_key_values=cache)
        cache.crop(11)
        found = model(ids[:, 11:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, 11:]
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """As near to single precision as transformers is itself; everything that is kept is finite."""
    ids, found = prompt(30, 2), []
    with torch.no_grad():
        exact = made(name)(ids, use_cache=False).logits
        model = inline(name).to(dtype)
        found.append(model(ids, use_cache=False).logits)
        with reasonalloc.attach(model, budget=90):
            found.append(model(ids, use_cache=True).logits)
    theirs, ours = ((own.float() - exact).norm() / exact.norm() for own in found)
    assert float(ours) < 1.5 * float(theirs) + 0.01
    with reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        generated(model, ids, torch.ones_like(ids), 40, past_key_values=cache)
        assert all(
            bool(torch.isfinite(layer.compressor.slab.keys).all())
            for layer in cache.layers
            if hasattr(layer, "compressor")
        )


@pytest.mark.parametrize("name", BIASED)
def test_kept_keys_carry_the_bias_of_their_positions(name: str) -> None:
    model, (ids, mask) = made(name), batch()
    with reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        generated(model, ids, mask, 40, past_key_values=cache)
    heads = model.config.num_attention_heads
    dim = model.config.hidden_size // heads
    for layer in cache.layers:
        rows = layer.compressor.slab.as_rows()
        kept, keys = rows.gather(rows.positions), rows.gather(rows.keys)[..., dim:] * 2.0**20
        held = torch.arange(kept.shape[-1]) < rows.lengths[..., None]
        if name == "mpt":  # columns
            kept = kept + torch.tensor(PADDED)[:, None, None]
            found, wanted = keys[..., 0] + keys[..., 1], kept.float()
        else:
            slopes = slopes_of_powers(heads)[:, None]
            assert torch.equal(keys[..., 0], keys[..., 1])
            found, wanted = keys[..., 1], slopes * kept
            if name.startswith("falcon"):
                wanted = slopes.bfloat16() * kept
        assert torch.equal(found[held], wanted.float()[held])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [1, 6, 8, 12])
def test_channels_give_the_bias(heads: int, dtype: torch.dtype) -> None:
    """As exactly as the type of the model can hold it, at positions far behind."""
    scaling, places = 64**-0.5, torch.tensor([[0, 1, 255, 256, 777, 2047]])
    query, key = (
        torch.zeros(1, heads, 6, 64, dtype=dtype),
        torch.zeros(1, heads, 6, 64, dtype=dtype),
    )
    powers, largest = slopes_of_powers(heads), slopes_up_to(heads, 8)
    kinds: list[tuple[Bias, Tensor]] = [
        (RoundedBias(powers, None, 1.0), (powers[:, None] * places).to(dtype)),
        (
            RoundedBias(powers, torch.bfloat16, None),
            (powers[:, None].bfloat16() * places).to(dtype) * scaling,
        ),
        (ExactBias(largest), largest[:, None] * places),
    ]
    for bias, wanted in kinds:
        long, wide = bias.folded(query, key, places, scaling)
        assert long.dtype == wide.dtype == dtype and bool(torch.isfinite(long).all())
        found = (long.double()[:, :, -1:] * scaling @ wide.double().transpose(-1, -2))[0, :, 0]
        wanted = wanted.double() - wanted[:, -1:].double()  # the own bias of the last query is gone
        assert float(found.abs().amin()) <= 8.0  # as near to 0 as the type allows
        torch.testing.assert_close(found - found[:, -1:], wanted, rtol=2e-5, atol=1e-4)


def test_slopes_are_those_of_transformers() -> None:
    from transformers.models.bloom import modeling_bloom
    from transformers.models.mpt import modeling_mpt

    for heads in (1, 2, 6, 8, 12, 16, 71, 112):
        ones = torch.ones(1, 2, dtype=torch.long)
        alibi = modeling_bloom.build_alibi_tensor(ones, heads, torch.float32)
        assert torch.equal(slopes_of_powers(heads), alibi[:, 0, 1])
        bias = modeling_mpt.build_mpt_alibi_tensor(heads, 2)
        assert torch.equal(slopes_up_to(heads, 8), -bias[:, 0, 0])


@pytest.mark.parametrize("name", sorted({*INLINE} - {*STATIC}))
def test_static_steps_are_refused(name: str) -> None:
    why = r"step='static' .*does not take position_ids.* use step='eager'"
    with pytest.raises(UnsupportedError, match=why):
        reasonalloc.attach(made(name), **SMALL, step="static")


def test_compiled_steps_of_a_growing_table_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="its table of positions grows"):
        reasonalloc.attach(made("xglm"), **SMALL, step="compile")


@pytest.mark.parametrize("name", sorted({*STATIC} - {"xglm", "gpt_neo"}))
def test_compiled_steps_give_the_same_tokens(name: str) -> None:
    model, (ids, mask) = made(name), batch()
    with reasonalloc.attach(model, **SMALL):
        expected = generated(model, ids, mask, 30)
    with reasonalloc.attach(model, **SMALL, step="compile"):
        assert torch.equal(generated(model, ids, mask, 30), expected)


@pytest.mark.parametrize("name", BIASED)
def test_hidden_tokens_before_others_are_refused(name: str) -> None:
    """Their positions would change; at the end of what was seen they may be hidden."""
    model, ids = made(name), prompt(12, 2)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, 10:12] = 0
    with torch.no_grad():
        full = DynamicCache(config=model.config)
        model(ids, past_key_values=full)
        expected = model(ids[:, :3], attention_mask=mask, past_key_values=full).logits
        with reasonalloc.attach(model, budget=64) as attached:
            cache = attached.new_cache()
            model(ids, past_key_values=cache)
            found = model(ids[:, :3], attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            mask[1, 4] = 0
            with pytest.raises(UnsupportedError, match="hides tokens before others that stay"):
                model(ids[:, :1], attention_mask=mask, past_key_values=cache)


@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_what_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match="its query heads share keys, but each has a bias"):
        reasonalloc.attach(inline("falcon", alibi=True), budget=64)
    for name in BIASED:
        with pytest.raises(UnsupportedError, match="carry the bias of their position"):
            reasonalloc.attach(made(name), budget=64, kv_dtype="int8")
    with pytest.raises(UnsupportedError, match="'eager', with which transformers adds the ALiBi"):
        reasonalloc.attach(inline("falcon_alibi", attn_implementation="eager"), budget=64)
    monkeypatch.setattr(stands, "_EXACT", 20)
    with reasonalloc.attach(made("mpt"), budget=64):
        made("mpt").generate(prompt(9), max_new_tokens=11, do_sample=False)
        with pytest.raises(UnsupportedError, match="MPT attends to 20 tokens at most"):
            made("mpt").generate(prompt(9), max_new_tokens=13, do_sample=False)
    model = inline("falcon")
    attention: Any = model.transformer.h[1].self_attention
    attention.forward = functools.partial(type(attention).forward, attention)
    with pytest.raises(UnsupportedError, match="a forward that is not its own"):
        reasonalloc.attach(model, budget=64)
    assert model.config._attn_implementation != "reasonalloc"


@pytest.mark.parametrize("name", ["xglm", "trocr"])
def test_states_of_an_encoder_are_refused(name: str) -> None:
    settings = {"add_cross_attention": True} if name == "xglm" else {"is_decoder": True}
    model = inline(name, **settings)
    given = {"encoder_hidden_states": torch.zeros(1, 4, 48), "use_cache": True}
    with torch.no_grad(), reasonalloc.attach(model, budget=64):
        assert model.generate(prompt(9), max_new_tokens=3, do_sample=False).shape == (1, 12)
        with pytest.raises(UnsupportedError, match="attends to the states of an encoder"):
            model(prompt(9), **given)


def test_hooks_and_gradients_stay() -> None:
    """Hooks on the modules run; a plain pass in training has the gradients of transformers."""
    model = inline("bloom").train()
    ids, calls = prompt(12), []
    expected = torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0]
    attention: nn.Module = model.transformer.h[0].self_attention
    attention.register_forward_hook(lambda *_: calls.append(1))
    with reasonalloc.attach(model, budget=64):
        found = torch.autograd.grad(model(ids, labels=ids).loss, model.lm_head.weight)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert calls
