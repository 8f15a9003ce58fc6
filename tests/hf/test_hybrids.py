"""Hybrid models: a budget for the layers whose cache grows, transformers' own states beside it."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import reasonalloc
from generations import (
    PADDED,
    SMALL,
    batch,
    check_a_budget_for_everything,
    check_a_small_budget,
    check_compiled_steps,
    check_planned_bytes,
    check_two_turns,
    full_cache,
    generated,
)
from models import ABLE, HYBRIDS, hybrid, prompt
from reasonalloc import UnsupportedError, UsageError, plan
from reasonalloc.calibration.fisher import fisher
from reasonalloc.errors import NothingToBudget
from reasonalloc.integrations.hf import own_cache
from reasonalloc.integrations.hf.own_cache import full_bytes
from reasonalloc.planning.shapes import layer_shapes
from reasonalloc.texts import Trajectory

NAMES = [name for name, (_, model, _) in HYBRIDS.items() if hasattr(transformers, model)]
# Those whose states several tokens go on from.
CONTINUING = [name for name in NAMES if name not in ("jamba", "zamba")]
# Those whose steps can be repeated: nothing grows, and no bias follows a position of the host.
COMPILED = [name for name in NAMES if not ("sliding" in name or name.startswith("inkling"))]


@functools.cache
def made(name: str) -> Any:
    return hybrid(name)


needs_layers = pytest.mark.skipif(not ABLE, reason="this transformers has other cache layers")
every = pytest.mark.parametrize("name", NAMES)


@pytest.mark.skipif(ABLE, reason="this transformers has the cache layers")
@pytest.mark.parametrize("name", ["lfm2", "falcon_h1", "jamba", "bamba"])
def test_older_transformers_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"install transformers 5\.23"):
        reasonalloc.attach(made(name), **SMALL)


@needs_layers
@every
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_a_budget_that_holds_everything_changes_nothing(name: str) -> None:
    check_a_budget_for_everything(made(name))


@needs_layers
@every
def test_a_small_budget_in_a_batch(name: str) -> None:
    """Tokens change; a sequence alone and static steps give the same; positions rise."""
    check_a_small_budget(made(name), 24)


@needs_layers
@pytest.mark.once
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_compiled_steps(name: str) -> None:
    check_compiled_steps(made(name), name in CONTINUING)
    check_a_budget_for_everything(made(name), step="compile")


def _in_type(model: Any, dtype: torch.dtype) -> Any:
    """The model as it is loaded in a type: some of its weights stay in float32."""
    exact = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
        if any(part in name for part in exact):
            tensor.data = tensor.data.float()
    return model


@needs_layers
@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_as_planned(name: str, dtype: torch.dtype) -> None:
    """Of the compressed cache, and of transformers' own, from the configuration's fields alone."""
    model = made(name) if dtype == torch.float32 else _in_type(hybrid(name), dtype)
    kept = plan(model.config, batch=2, dtype=dtype, **SMALL).memory()
    assert 0 < kept.state_bytes < kept.kv_bytes(30)
    cache = check_planned_bytes(model, kept)
    allocated = [t for layer in cache.layers for t in getattr(layer, "states", {}).values()]
    assert sum(t.untyped_storage().nbytes() for t in allocated) == kept.state_bytes
    assert full_bytes(full_cache(model, 1)) == kept.full_bytes(31)


def _starts_anew(cache: Any) -> None:
    assert not cache.has_previous_state() and cache.get_seq_length() == 0


@needs_layers
@pytest.mark.parametrize("name", CONTINUING)
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_two_turns(name: str) -> None:
    """On one cache as in a fresh run, and as in a cache that was copied, saved or reset before."""
    check_two_turns(made(name), 7, _starts_anew)


@needs_layers
@every
def test_copies_go_on_alike(name: str, tmp_path: Path) -> None:
    """Deep copies, saved ones, repeated and selected sequences: the same next tokens."""
    model, ids, token = made(name), prompt(24, 2, seed=3), prompt(1, 2, seed=4)
    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        attached.save_cache(cache, tmp_path / "cache.safetensors")
        model(prompt(1, 2, seed=9), past_key_values=twin)  # which leaves the other as it was
        repeated = copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        swapped = copy.deepcopy(cache)
        swapped.batch_select_indices(torch.tensor([1, 0]))
        wanted = model(token, past_key_values=cache).logits
        loaded = attached.load_cache(tmp_path / "cache.safetensors")
        assert torch.equal(model(token, past_key_values=loaded).logits, wanted)
        assert loaded.kv_bytes == cache.kv_bytes and loaded.is_linear == cache.is_linear
        four = model(token.repeat_interleave(2, dim=0), past_key_values=repeated).logits
        assert torch.allclose(four, wanted.repeat_interleave(2, dim=0), atol=1e-4)
        assert torch.allclose(
            model(token.flip(0), past_key_values=swapped).logits, wanted.flip(0), atol=1e-4
        )


@needs_layers
@every
def test_a_cache_answers_as_that_of_transformers(name: str) -> None:
    model, ids = made(name), prompt(12, 2)
    full = own_cache.full_cache(model)
    with torch.no_grad():
        model(ids, past_key_values=full)
    with torch.no_grad(), reasonalloc.attach(model, budget=64) as attached:
        cache = attached.new_cache()
        assert not cache.has_previous_state()
        model(ids, past_key_values=cache)
    if name == "minimax":  # transformers' keeps its states beside its layers
        for index, own in enumerate(full.linear_cache):
            if isinstance(own, Tensor):
                assert torch.allclose(cache.get_linear_cache(index), own, atol=1e-4)
    else:
        assert cache.is_linear == full.is_linear and cache.is_dummy == full.is_dummy
    assert cache.has_previous_state() and len(cache) == len(full)
    assert cache.get_seq_length() == full.get_seq_length() == 12
    for index, layer in enumerate(full.layers):
        for kind in ("conv", "recurrent"):
            own = getattr(layer, f"{kind}_states", {}).get(0)
            if own is not None:
                got = getattr(cache, f"get_{kind}_state")(index)
                assert torch.allclose(got, own, atol=1e-4)


@needs_layers
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_minimax_whose_first_layer_has_no_keys() -> None:
    """A padded batch gives what transformers gives each sequence alone.

    Its own cache takes layer 0 for one with keys, and pads a batch wrongly then.
    """
    model = hybrid("minimax", layer_types=2 * ["linear_attention", "full_attention"])
    ids, mask = batch()
    with reasonalloc.attach(model, budget=128):
        together = generated(model, ids, mask, 40)
    for row, padding in enumerate(PADDED):
        own = ids[row : row + 1, padding:]
        assert torch.equal(generated(model, own, torch.ones_like(own), 40)[0], together[row])


@needs_layers
def test_minimax_with_a_window_has_nothing_to_budget() -> None:
    with pytest.raises(NothingToBudget, match="every layer with attention keeps 24 tokens"):
        reasonalloc.attach(hybrid("minimax", sliding_window=24), **SMALL)


@needs_layers
def test_states_that_nobody_plans_do_not_matter_where_attention_is_bounded() -> None:
    config = transformers.RecurrentGemmaConfig(num_hidden_layers=3, sliding_window=24)
    with pytest.raises(NothingToBudget, match="every layer with attention keeps 24 tokens"):
        layer_shapes(config, "it")


@needs_layers
def test_a_state_goes_back_to_the_start_alone() -> None:
    model, ids = made("bamba"), prompt(20)
    with torch.no_grad(), reasonalloc.attach(model, budget=64) as attached:
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        assert cache.reach(10) == 0
        with pytest.raises(UnsupportedError, match="its sliding window or state"):
            cache.crop(10)
        cache.go_back(0)
        again = model(ids, past_key_values=cache).logits
        assert torch.equal(again, model(ids, past_key_values=attached.new_cache()).logits)
        mask = torch.ones(1, 23, dtype=torch.long)
        mask[0, 15] = 0
        with pytest.raises(UnsupportedError, match="layers with a state"):
            model(prompt(3), past_key_values=cache, attention_mask=mask)


@needs_layers
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_a_call_that_broke_off(layer: int) -> None:
    """Before, in and after the layers with keys: a state may have moved."""
    model = made("olmo_hybrid")
    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        model(prompt(10), past_key_values=cache)

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[layer].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(1), past_key_values=cache)
        hook.remove()
        with pytest.raises(UsageError, match="interrupted or failed"):
            model(prompt(1), past_key_values=cache)
        cache.reset()
        model(prompt(10), past_key_values=cache)


@needs_layers
def test_inside_and_outside_of_inference_mode() -> None:
    """The states are plain tensors, and no call keeps the graph of the one before."""
    model = made("falcon_h1")
    with reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        with torch.inference_mode():
            model(prompt(10), past_key_values=cache)
        for step in range(3):
            model(prompt(1, seed=step), past_key_values=cache)
        assert copy.deepcopy(cache).get_seq_length() == 13


@needs_layers
def test_streams_and_detached_models() -> None:
    model, ids = made("lfm2"), prompt(20)
    own = generated(model, ids, torch.ones_like(ids), 12)
    with reasonalloc.attach(model, **SMALL):
        streamer = Collected()
        out = model.generate(ids, max_new_tokens=12, do_sample=False, streamer=streamer)
        assert streamer.tokens == out[0].tolist()
        twin = copy.deepcopy(model)
    for plain in (model, twin):
        assert not any(module._forward_hooks for module in plain.modules())
        assert torch.equal(generated(plain, ids, torch.ones_like(ids), 12), own)


class Collected:
    """A streamer that keeps the ids."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        """Nothing to end."""


@needs_layers
def test_what_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"step='graph' .* use step='eager'"):
        reasonalloc.attach(made("bamba"), budget=64, step="graph")
    with (
        reasonalloc.attach(made("inkling"), **SMALL, step="compile"),
        pytest.raises(UnsupportedError, match=r"numbers of the host that change .* step='eager'"),
    ):
        made("inkling").generate(prompt(20), max_new_tokens=9, do_sample=False)
    model = made("jamba")
    with torch.no_grad(), reasonalloc.attach(model, budget=64) as attached:
        cache = attached.new_cache()
        model(prompt(10), past_key_values=cache)
        model(prompt(1), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="start with a new cache and the whole"):
            model(prompt(4), past_key_values=cache)
    with pytest.raises(UnsupportedError, match="state of an unknown form"):
        config = copy.deepcopy(made("bamba").config)
        config.mamba_d_state = None
        layer_shapes(config, "it")


@needs_layers
@pytest.mark.parametrize("name", ["lfm2", "falcon_h1"])
def test_costs_are_of_the_layers_with_a_budget(name: str, tmp_path: Path) -> None:
    model = made(name)
    ids = prompt(70, seed=3)[0].tolist()
    text = Trajectory(tuple(ids[:20]), tuple(ids[20:]))
    (costs,) = fisher(
        model,
        [text],
        policies=["value_aware"],
        budgets=(10, 16, 24),
        interval=SMALL["interval"],
        window=SMALL["window"],
        samples=2,
    )
    costs.save(tmp_path / "costs.json")
    layers = [shape for shape in layer_shapes(model.config, name) if shape.compressible]
    assert costs.layers == len(layers)
    settings = {**SMALL, "budget": 16, "arm": "best", "profile": tmp_path / "costs.json"}
    with reasonalloc.attach(model, **settings) as attached:
        assert sum(attached.totals) == len(layers) * layers[0].kv_heads * 16
        model.generate(prompt(20), max_new_tokens=30, do_sample=False)
        assert attached.recorder is not None and attached.recorder.compressions


@needs_layers
def test_a_state_of_another_size_than_planned_is_refused() -> None:
    model = hybrid("lfm2")
    model.config.conv_L_cache = 5  # the layers were built with 3
    with (
        torch.no_grad(),
        reasonalloc.attach(model, budget=64),
        pytest.raises(UnsupportedError, match="its memory cannot be planned"),
    ):
        model(prompt(10), use_cache=True)


@needs_layers
def test_a_plan_shows_what_each_layer_keeps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan(made("nemotron_h").config, **SMALL).show()
    shown = capsys.readouterr().out
    assert "state, 5.00 KiB" in shown and "nothing" in shown
    plan(made("falcon_h1").config, **SMALL).show()
    assert "16; state, 4.75 KiB" in capsys.readouterr().out
