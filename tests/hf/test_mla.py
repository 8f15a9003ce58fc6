"""Multi-head latent attention: latents in the cache, scored and read as the keys of all heads."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import reasonalloc
from generations import (
    SMALL,
    batch,
    check_a_budget_for_everything,
    check_a_small_budget,
    check_planned_bytes,
    check_two_turns,
    full_cache,
    generated,
)
from models import ABLE, LATENTS, latent, prompt
from reasonalloc import UnsupportedError, plan
from reasonalloc.integrations.hf.cache_layers import held_bytes
from reasonalloc.integrations.hf.latent import LatentLayer
from reasonalloc.planning.shapes import layer_shapes

KNOWN = [name for name, (_, model, _) in LATENTS.items() if hasattr(transformers, model)]
HYBRIDS = ("kimi_linear", "bailing_hybrid")
NAMES = [name for name in KNOWN if ABLE or name not in HYBRIDS]
VALUE = "value_aware/uniform/uniform"
BACKENDS = ("eager", "sdpa", "cpp")


@functools.cache
def made(name: str) -> Any:
    return latent(name)


def cached() -> bool:
    """Whether the installed transformers caches latents, and not what they expand to."""
    shape = layer_shapes(made("deepseek_v3").config, "it")[0]
    assert shape.latent is not None
    return shape.latent.cached


every = pytest.mark.parametrize("name", NAMES)
needs_latents = pytest.mark.skipif(not cached(), reason="this transformers expands latents first")


@every
@pytest.mark.parametrize("arm", ["rkv", VALUE])
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_a_budget_that_holds_everything_changes_nothing(name: str, arm: str) -> None:
    check_a_budget_for_everything(made(name), arm=arm)


@every
def test_a_small_budget_in_a_batch(name: str) -> None:
    """Tokens change; a sequence alone and static steps give the same; positions rise."""
    for arm in ("rkv", VALUE):
        check_a_small_budget(made(name), 40, arm=arm)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("arm", ["rkv", "h2o/pyramid/adakv", "rkv/uniform/reasonalloc"])
def test_backends_agree(attention: str, arm: str) -> None:
    model, (ids, mask) = made("deepseek_v3"), batch()
    with reasonalloc.attach(model, arm=arm, **SMALL, attention="eager"):
        expected = generated(model, ids, mask, 40)
    for step in ("eager", "static"):
        with reasonalloc.attach(model, arm=arm, **SMALL, attention=attention, step=step):
            assert torch.equal(generated(model, ids, mask, 40), expected)


@pytest.mark.parametrize("name", ["deepseek_v3", "youtu"])
def test_a_compiled_step(name: str) -> None:
    """Also as the first call of a copied cache."""
    model, ids, outs = made(name), prompt(26), []
    for step in ("eager", "compile"):
        with reasonalloc.attach(model, **SMALL, step=step) as attached:
            cache = attached.new_cache()
            attached.prefill(ids[:, :-1], cache)
            for twin in (copy.deepcopy(cache), cache):
                ones = torch.ones_like(ids)
                outs.append(generated(model, ids, ones, 24, past_key_values=twin))
    assert all(torch.equal(out, outs[0]) for out in outs)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_as_planned(name: str, dtype: torch.dtype) -> None:
    """Of the compressed cache, and of transformers' own, from the configuration's fields alone."""
    model = made(name) if dtype == torch.float32 else latent(name).to(dtype)
    kept = plan(model.config, batch=2, dtype=dtype, **SMALL).memory()
    cache = check_planned_bytes(model, kept)
    assert held_bytes(full_cache(model, 1).layers) == kept.full_bytes(31)
    if cached():
        latents = [layer for layer in cache.layers if isinstance(layer, LatentLayer)]
        rows = sum(layer.compressor.slab.slots for layer in latents)
        assert rows == len(latents) * (SMALL["budget"] + SMALL["interval"])
        numbers = model.config.kv_lora_rank + model.config.qk_rope_head_dim
        assert cache.kv_bytes - kept.state_bytes == 2 * rows * numbers * dtype.itemsize


@every
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_two_turns(name: str) -> None:
    """On one cache as in a fresh run."""
    check_two_turns(made(name), 7)


@pytest.mark.parametrize("arm", ["rkv", VALUE])
@pytest.mark.parametrize("name", ["deepseek_v3", "longcat_flash"])
def test_copies_go_on_alike(name: str, arm: str, tmp_path: Path) -> None:
    """Deep copies, saved ones, repeated and selected sequences: the same next tokens."""
    model, ids = made(name), prompt(24, 2, seed=3)
    tokens = [prompt(1, 2, seed=seed) for seed in range(12)]  # beyond the next compression

    def read(cache: Any, change: Any = lambda ids: ids) -> Tensor:
        return torch.cat([model(change(t), past_key_values=cache).logits for t in tokens], dim=1)

    with torch.no_grad(), reasonalloc.attach(model, arm=arm, **SMALL) as attached:
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        attached.save_cache(cache, tmp_path / "cache.safetensors")
        twin, repeated, swapped = (copy.deepcopy(cache) for _ in range(3))
        repeated.batch_repeat_interleave(2)
        swapped.batch_select_indices(torch.tensor([1, 0]))
        wanted = read(cache)
        assert torch.equal(read(twin), wanted)
        assert torch.equal(read(attached.load_cache(tmp_path / "cache.safetensors")), wanted)
        four = read(repeated, lambda ids: ids.repeat_interleave(2, dim=0))
        assert torch.allclose(four, wanted.repeat_interleave(2, dim=0), atol=1e-3)
        assert torch.allclose(read(swapped, lambda ids: ids.flip(0)), wanted.flip(0), atol=1e-3)


@pytest.mark.parametrize("policy", ["rkv", "value_aware"])
def test_less_budget_is_farther_from_the_full_cache(policy: str) -> None:
    """KL of a known text's tokens: finite, lower with every budget, nothing if all is kept."""
    model, text = made("deepseek_v3"), prompt(160, 4, seed=8)
    full = divergence(model, text)
    found = []
    for budget in (12, 24, 48, 96, 192):
        with reasonalloc.attach(model, budget=budget, interval=8, window=4, policy=policy):
            found.append(float((full.exp() * (full - divergence(model, text))).sum(-1).mean()))
    assert all(0 <= kl < 100 for kl in found[:-1])
    assert found == sorted(found, reverse=True) and found[-2] > 1e-4
    assert abs(found[-1]) < 1e-5


@pytest.mark.parametrize("policy", ["rkv", "value_aware"])
def test_a_known_text_is_replayed_as_it_is_decoded(policy: str) -> None:
    model, text = made("deepseek_v3"), prompt(90, 2, seed=4)
    with torch.no_grad(), reasonalloc.attach(model, **SMALL, policy=policy) as attached:
        caches = [attached.new_cache(), attached.new_cache()]
        for cache in caches:
            model(text[:, :20], past_key_values=cache)
        with caches[0].replaying():
            replayed = model(text[:, 20:], past_key_values=caches[0]).logits
        single = [model(text[:, [at]], past_key_values=caches[1]).logits for at in range(20, 90)]
        torch.testing.assert_close(replayed, torch.cat(single, dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("policy", ["rkv", "value_aware"])
def test_a_pinned_prompt_stays(policy: str) -> None:
    model, ids = made("deepseek_v3"), prompt(20, 2)
    with reasonalloc.attach(model, **SMALL, policy=policy, prompt="pin") as attached:
        cache = attached.new_cache()
        generated(model, ids, torch.ones_like(ids), 40, past_key_values=cache)
        assert cache.kv_bytes == attached.plan(2, prompt_tokens=20).kv_bytes(59)
    for layer in cache.layers:
        rows = layer.compressor.slab.as_rows()
        assert bool((rows.gather(rows.positions)[..., :20] == torch.arange(20)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_half_precision(dtype: torch.dtype) -> None:
    """Rounding may turn a near-tie, after which texts part: the first tokens must agree."""
    model, (ids, mask) = latent("deepseek_v3").to(dtype), batch()
    full = generated(model, ids, mask, 4)
    with reasonalloc.attach(model, budget=90):
        assert torch.equal(generated(model, ids, mask, 4), full)
    with reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        assert generated(model, ids, mask, 30, past_key_values=cache).shape == (3, 30)
    slab = cache.layers[0].compressor.slab
    assert slab.keys.dtype == dtype and bool(torch.isfinite(slab.keys).all())


def divergence(model: Any, text: Tensor) -> Tensor:
    """Log probabilities of a known text's tokens after its first 24, decoded one by one."""
    logits = []
    with torch.no_grad():
        out = model(text[:, :24], use_cache=True)
        for at in range(24, text.shape[1]):
            logits.append(out.logits[:, -1])
            out = model(text[:, at : at + 1], past_key_values=out.past_key_values)
    return torch.stack(logits, dim=1).log_softmax(dim=-1)


@needs_latents
@pytest.mark.parametrize("use_cache", [False, True])
def test_without_a_budgeted_cache_nothing_changes(use_cache: bool) -> None:
    model, ids = made("deepseek_v3"), prompt(30, 2)
    with torch.no_grad():
        expected = model(ids).logits
        with reasonalloc.attach(model, **SMALL):
            own = model(ids, use_cache=use_cache).logits
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)
    model = latent("youtu").train()
    with reasonalloc.attach(model, **SMALL):
        model(ids, use_cache=False).logits.sum().backward()
    assert all(bool(layer.self_attn.kv_b_proj.weight.grad.any()) for layer in model.model.layers)


@needs_latents
def test_an_attached_model_is_copied_and_detached_as_a_plain_one() -> None:
    model, ids = latent("youtu"), prompt(20)
    with reasonalloc.attach(model, **SMALL):
        small = generated(model, ids, torch.ones_like(ids), 12)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert torch.equal(generated(model, ids, torch.ones_like(ids), 12), small)
    for plain in (model, *twins):
        attention = plain.model.layers[0].self_attn
        assert not {"expand_kv", "__getstate__"} & attention.__dict__.keys()
        out = generated(plain, ids, torch.ones_like(ids), 12)
        assert torch.equal(out, generated(made("youtu"), ids, torch.ones_like(ids), 12))


class Adapted(torch.nn.Linear):
    """A projection that is more than its weight, as adapters and quantised ones are."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 0.5 * input.sum(dim=-1, keepdim=True)


@needs_latents
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_projections_that_are_no_plain_matrix_or_change() -> None:
    model, (ids, mask) = latent("youtu"), batch()
    with reasonalloc.attach(model, budget=128):
        for scale in (1.0, 1.3):
            for layer in model.model.layers:
                layer.self_attn.kv_b_proj.weight.data.mul_(scale)
            out = generated(model, ids, mask, 30)
            assert torch.equal(out, without(model, ids, mask))
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.__class__ = Adapted
        out = generated(model, ids, mask, 30)
        assert torch.equal(out, without(model, ids, mask))
    with reasonalloc.attach(model, **SMALL):
        assert not torch.equal(generated(model, ids, mask, 30), out)


@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_an_adapter_of_the_expansion() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["kv_b_proj"], init_lora_weights=False)
    model, (ids, mask) = peft.get_peft_model(latent("youtu"), config).eval(), batch()
    full = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    assert not torch.equal(full[:, 26:], generated(made("youtu"), ids, mask, 40))
    with reasonalloc.attach(model, budget=128):
        assert torch.equal(
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False),
            full,
        )


def without(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """What a copy of an attached model writes."""
    return generated(copy.deepcopy(model), ids, mask, 30)


@needs_latents
@pytest.mark.parametrize("field", ["bias", "other"])
def test_another_expansion_is_refused(field: str) -> None:
    model = latent("youtu")
    attention = model.model.layers[1].self_attn
    old = attention.kv_b_proj
    wide = old.out_features + 6 * (field == "other")
    attention.kv_b_proj = torch.nn.Linear(old.in_features, wide, bias=field == "bias")
    with pytest.raises(UnsupportedError, match=r"layer 1 expands .* from 24 to 132 numbers"):
        reasonalloc.attach(model, **SMALL)
    assert "generate" not in model.__dict__


def test_what_is_refused_by_name() -> None:
    model = made("deepseek_v3")
    for name in ("DeepseekV32Config", "GlmMoeDsaConfig", "DeepseekV4Config", "HYV4Config"):
        if hasattr(transformers, name):
            with pytest.raises(UnsupportedError, match=r"index_topk=\d+: an indexer chooses"):
                layer_shapes(getattr(transformers, name)(), name)
    config = copy.deepcopy(model.config)
    config.v_head_dim = None
    with pytest.raises(UnsupportedError, match="its v_head_dim=None is no width"):
        layer_shapes(config, "it")
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 2
    with pytest.raises(UnsupportedError, match=r"num_key_value_heads=2 differs .* set them alike"):
        layer_shapes(config, "it")
    own = type("Own", (type(config),), {"__module__": "transformers_modules.own"})
    with pytest.raises(UnsupportedError, match="load it without trust_remote_code"):
        layer_shapes(own(), "it")


@needs_latents
def test_what_cannot_read_latents_is_refused_by_name() -> None:
    model = made("deepseek_v3")
    with pytest.raises(UnsupportedError, match=r"kv_dtype='int8': .* latents .* leave it out"):
        reasonalloc.attach(model, **SMALL, kv_dtype="int8")
    with pytest.raises(UnsupportedError, match=r"metric='output' .* use metric='value'"):
        reasonalloc.attach(model, **SMALL, policy="value_aware(metric=output)")
    if torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match=r"attention='triton' .* use attention='sdpa'"):
            reasonalloc.attach(model, **SMALL, attention="triton")


@pytest.mark.skipif(cached(), reason="this transformers caches latents")
@pytest.mark.parametrize("kv_dtype", ["int8", "int4h", "int8:int4"])
def test_expanded_keys_and_values_in_fewer_bits(kv_dtype: str) -> None:
    """Of different widths: backends agree, bytes are as planned."""
    model, (ids, mask), outs = made("deepseek_v3"), batch(), []
    for attention in BACKENDS:
        with reasonalloc.attach(model, **SMALL, kv_dtype=kv_dtype, attention=attention) as attached:
            cache = attached.new_cache()
            outs.append(generated(model, ids, mask, 30, past_key_values=cache))
            assert cache.kv_bytes == attached.plan(3).kv_bytes(cache.get_seq_length())
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_a_plan_compares_a_latent_with_what_it_expands_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = transformers.DeepseekV3Config()
    made_plan = plan(config, budget=1024, dtype="bfloat16")
    report = made_plan.report()["latent"]
    assert report["token_bytes"] == 1152 and report["expanded_token_bytes"] == 81920
    made_plan.show()
    shown = " ".join(capsys.readouterr().out.split())
    if cached():
        assert "a latent, 1.12 KiB; keys and values of 128 heads would take 80.00 KiB" in shown
        assert "1 x 576" in shown
    else:
        assert "5.15 and newer caches latents, 1.12 KiB" in shown and "128 x 192+128" in shown
