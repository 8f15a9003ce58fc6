"""Models whose layers differ: in what they see, in their shapes, or in whose cache they read."""

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
    check_rising,
    check_two_turns,
    full_cache,
    generated,
)
from models import ABLE, UNEQUAL, prompt, unequal, unequal_heads
from reasonalloc import UnsupportedError, UsageError, plan
from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.hf.cache_layers import held_bytes
from reasonalloc.integrations.hf.replay import replay_logits
from reasonalloc.integrations.vllm.budget import make_budget
from reasonalloc.planning.shapes import layer_shapes
from reasonalloc.texts import Trajectory

KNOWN = [name for name, (_, model, _) in UNEQUAL.items() if hasattr(transformers, model)]
SHARED = [name for name in KNOWN if "num_kv_shared_layers" in UNEQUAL[name][2]]
NAMES = [name for name in KNOWN if ABLE or name not in (*SHARED, "mllama")]
every = pytest.mark.parametrize("name", NAMES)


@functools.cache
def made(name: str) -> Any:
    return unequal(name)


@every
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_a_budget_that_holds_everything_changes_nothing(name: str) -> None:
    check_a_budget_for_everything(made(name))


@every
def test_a_small_budget_in_a_batch(name: str) -> None:
    """Tokens change; a sequence alone and static steps give the same; positions rise."""
    model = made(name)
    shapes = layer_shapes(model.config, name)
    bounded = any(shape.sliding_window is not None for shape in shapes)
    check_a_small_budget(model, 24)
    if bounded:
        with pytest.raises(UnsupportedError, match="grow from step to step: use step='eager'"):
            reasonalloc.attach(model, **SMALL, step="compile")


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_as_planned(name: str, dtype: torch.dtype) -> None:
    """Of the compressed cache, and of transformers' own, from the configuration's fields alone."""
    model = made(name) if dtype == torch.float32 else unequal(name).to(dtype)
    kept = plan(model.config, batch=2, dtype=dtype, **SMALL).memory()
    check_planned_bytes(model, kept)
    full = full_cache(model, 10)
    bounded = [shape.sliding_window is not None for shape in kept.shapes]
    if full.is_sliding == bounded:  # older transformers forget it of Gemma 4 without shared layers
        assert held_bytes(full.layers) == kept.full_bytes(40)


@every
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_two_turns(name: str) -> None:
    """On one cache as in a fresh run, and as in a cache that was reset before."""
    check_two_turns(made(name), 27)


@every
def test_copies_go_on_alike(name: str, tmp_path: Path) -> None:
    """Deep copies, saved ones, repeated and selected sequences: the same next tokens."""
    model, ids = made(name), prompt(40, 2, seed=3)

    def following(cache: Any, rows: Tensor) -> Tensor:
        """Logits of the next ten tokens, over a boundary, of sequences with these first tokens."""
        return torch.stack(
            [
                model((rows + step) % 90 + 2, past_key_values=cache).logits[:, 0]
                for step in range(10)
            ]
        )

    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:
        cache, rows = attached.new_cache(), torch.tensor([[5], [17]])
        model(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        attached.save_cache(cache, tmp_path / "cache.safetensors")
        following(twin, rows + 1)  # which leaves the other as it was
        repeated, swapped = copy.deepcopy(cache), copy.deepcopy(cache)
        repeated.batch_repeat_interleave(2)
        swapped.batch_select_indices(torch.tensor([1, 0]))
        wanted = following(cache, rows)
        loaded = attached.load_cache(tmp_path / "cache.safetensors")
        assert torch.equal(following(loaded, rows), wanted)
        assert loaded.kv_bytes == cache.kv_bytes
        four = following(repeated, rows.repeat_interleave(2, dim=0))
        assert torch.allclose(four, wanted.repeat_interleave(2, dim=1), atol=1e-3)
        assert torch.allclose(following(swapped, rows.flip(0)), wanted.flip(1), atol=1e-3)


@pytest.mark.skipif("llama4" not in NAMES, reason="this transformers has no Llama 4")
def test_a_temperature_that_the_host_counts() -> None:
    """Without chunked layers static steps follow it; steps that are repeated would not."""
    model, ids = unequal("llama4", no_rope_layer_interval=1, floor_scale=8), prompt(20)
    tokens = []
    for step in ("eager", "static"):
        with reasonalloc.attach(model, **SMALL, step=step):
            tokens.append(model.generate(ids, max_new_tokens=24, do_sample=False))
    assert torch.equal(*tokens)
    for step in ("compile", "graph"):
        with pytest.raises(UnsupportedError, match="temperature follows a position"):
            reasonalloc.attach(model, **SMALL, step=step)


def test_chunks_alone_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="every layer keeps 32 tokens at most"):
        plan(unequal("llama4", no_rope_layer_interval=9).config, **SMALL)


needs_configs_per_layer = pytest.mark.skipif(
    not hasattr(transformers.PreTrainedConfig, "per_layer_config"),
    reason="this transformers has one configuration for all layers",
)


@needs_configs_per_layer
@pytest.mark.parametrize("arm", ["rkv", "rkv/pyramid/reasonalloc", "random/uniform/adakv"])
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_kv_heads_that_differ_among_layers_under_a_budget(arm: str) -> None:
    """A budget counts tokens per KV head: sums and bytes are exact, whatever divides them."""
    model, (ids, mask) = unequal_heads(), batch()
    full = generated(model, ids, mask, 40)
    with reasonalloc.attach(model, budget=2048, arm=arm):
        assert torch.equal(generated(model, ids, mask, 40), full)
    written = []
    for step in ("eager", "static"):
        with reasonalloc.attach(model, **SMALL, arm=arm, step=step) as attached:
            assert [shape.kv_heads for shape in attached.shapes] == [3, 1, 2]
            assert sum(attached.totals) == 6 * SMALL["budget"]
            if "pyramid" not in arm:
                assert attached.totals == (48, 16, 32)
            cache = attached.new_cache()
            written.append(generated(model, ids, mask, 24, past_key_values=cache))
            check_rising(cache)
            kept = attached.plan(batch=3)
            assert (cache.kv_bytes, cache.bookkeeping_bytes) == (
                kept.kv_bytes(49),
                kept.bookkeeping_bytes,
            )
            own = ids[1:2, PADDED[1] :]
            assert torch.equal(generated(model, own, torch.ones_like(own), 24)[0], written[-1][1])
    assert torch.equal(*written) and not torch.equal(written[0], full[:, :24])


@needs_configs_per_layer
def test_budgets_of_layers_with_different_kv_heads() -> None:
    model = unequal_heads()
    least = plan(model, budget=12, interval=4, window=4, layers="pyramid")
    assert sum(least.totals) == 72 and all(
        total >= 5 * shape.kv_heads for total, shape in zip(least.totals, least.shapes, strict=True)
    )
    size = least.memory().slab_bytes
    by_bytes = plan(model, budget=f"{size}B", interval=4, window=4)
    assert by_bytes.memory().slab_bytes == size and by_bytes.config.budget == 12
    with pytest.raises(UnsupportedError, match="use layers='uniform', or give the budget in"):
        plan(model, budget="64KiB", layers="pyramid", interval=4, window=4)


@needs_configs_per_layer
def test_layers_that_do_not_fit_the_plan_are_refused() -> None:
    """One with a sliding window too, of which the first call tells."""
    model = unequal("gemma4")
    model.config.sliding_window = 30  # the field is read again; heads are of the modules
    model.config.per_layer_config = {1: {"head_dim": 24}, 3: {"head_dim": 24}}
    with (
        torch.no_grad(),
        reasonalloc.attach(model, budget=64),
        pytest.raises(UnsupportedError, match=r"2 KV heads of width 24, .* says 3 of 24"),
    ):
        model(prompt(10), use_cache=True)


needs_layers = pytest.mark.skipif(not ABLE, reason="this transformers has other cache layers")


@pytest.mark.skipif(ABLE, reason="this transformers has the cache layers")
@pytest.mark.parametrize("name", SHARED)
def test_older_transformers_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"install transformers 5\.23"):
        reasonalloc.attach(made(name), **SMALL)


@needs_layers
def test_whose_cache_layers_read(capsys: pytest.CaptureFixture[str]) -> None:
    """A layer reads that of the last one of its type before; the queries of all are counted."""
    planned = plan(made("gemma4_shared").config, **SMALL)
    assert [shape.reads for shape in planned.shapes] == [None, None, None, None, 3, 2, 3]
    assert [shape.readers for shape in planned.shapes] == [(), (), (5,), (4, 6), (), (), ()]
    assert [shape.query_heads for shape in planned.shapes if shape.compressible] == [6, 18]
    assert planned.totals == (48, 48)
    planned.show()
    assert "layer 3's" in capsys.readouterr().out
    with pytest.raises(UnsupportedError, match="no layer of it has"):
        config = copy.deepcopy(made("gemma4_shared").config)
        config.num_kv_shared_layers = 7
        layer_shapes(config, "it")


@needs_layers
@pytest.mark.parametrize("name", ["gemma3n_full", "gemma4_shared"])
@pytest.mark.parametrize(
    "settings",
    [
        {"arm": "h2o/uniform/reasonalloc"},
        {"policy": "lazy_eviction"},
        {"policy": "value_aware(metric=output)"},
        {"prompt": "pin"},
        {"kv_dtype": "int8:int4"},
        {"kv_dtype": "int8", "policy": "h2o"},
    ],
)
def test_settings_on_shared_caches(name: str, settings: dict[str, Any]) -> None:
    """In a batch as alone, with static steps too, in the planned bytes."""
    model, (ids, mask) = made(name), batch()
    own, tokens = ids[1:2, PADDED[1] :], []
    for step in ("eager", "static") if name == "gemma3n_full" else ("eager",):
        with reasonalloc.attach(model, **SMALL, **settings, step=step) as attached:
            cache = attached.new_cache()
            tokens.append(generated(model, ids, mask, 24, past_key_values=cache))
            assert torch.equal(generated(model, own, torch.ones_like(own), 24)[0], tokens[-1][1])
            kept = attached.plan(batch=3, prompt_tokens=26)
            assert cache.kv_bytes == kept.kv_bytes(49)
            assert cache.bookkeeping_bytes == kept.bookkeeping_bytes
    assert torch.equal(tokens[0], tokens[-1])


@needs_layers
@pytest.mark.once
@pytest.mark.parametrize("name", ["gemma3n_full", "gemma4_full_shared"])
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_compiled_steps_on_shared_caches(name: str) -> None:
    check_compiled_steps(made(name))
    check_a_budget_for_everything(made(name), step="compile")


@needs_layers
@pytest.mark.parametrize("name", ["gemma3n", "gemma4_full_shared"])
def test_a_replay_is_what_decoding_gives(name: str) -> None:
    """All layers go from boundary to boundary together, whatever the pieces are."""
    model, ids, fed = made(name), prompt(20, seed=4), prompt(30, seed=5)
    with torch.no_grad(), reasonalloc.attach(model, **SMALL, policy="h2o") as attached:
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        slowly = [model(token, past_key_values=cache).logits[0] for token in fed.split(1, dim=1)]
        text = Trajectory(tuple(ids[0].tolist()), (*fed[0].tolist(), 2))
        replayed = attached.new_cache()
        with replayed.replaying():
            pieces = list(replay_logits(model, text, replayed))
        assert [len(piece) for piece in pieces] == [1, 30]
        assert torch.allclose(pieces[1], torch.cat(slowly), atol=1e-3)
        assert replayed.retained_tokens == cache.retained_tokens
        with replayed.replaying(), pytest.raises(ValueError, match="up to its boundaries"):
            model(prompt(9), past_key_values=replayed)


@needs_layers
def test_what_is_refused_of_shared_caches_by_name() -> None:
    model = made("gemma4_full_shared")
    with pytest.raises(UnsupportedError, match=r"step='graph' .* share a cache were not"):
        reasonalloc.attach(model, **SMALL, step="graph")
    with pytest.raises(UnsupportedError, match=r"layer 1 has a cache that layers \[2, 3\] read"):
        make_budget(CompressionConfig(budget=16), "it", model.config, 1)


@needs_layers
@pytest.mark.parametrize("name", SHARED)
def test_a_call_that_broke_off_between_readers(name: str) -> None:
    """The owner has attended, a reader has not: the cache is out of step until it is reset."""
    model = made(name)
    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        wanted = model(prompt(30), past_key_values=cache).logits

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.layers[-1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(1), past_key_values=cache)
        hook.remove()
        with pytest.raises(UsageError, match="interrupted or failed"):
            model(prompt(1), past_key_values=cache)
        cache.reset()
        assert torch.equal(model(prompt(30), past_key_values=cache).logits, wanted)


@needs_layers
def test_keys_that_reach_a_reader_as_copies_are_refused() -> None:
    """As on several devices: a reader would see the new tokens alone."""
    model = unequal("gemma4_full_shared")
    kept = {}

    def take(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        states = kwargs["shared_kv_states"]
        for kind, pair in states.items():
            kept[kind] = tuple(tensor.clone() for tensor in pair)
            states[kind] = kept[kind]
        return args, kwargs

    model.model.layers[3].register_forward_pre_hook(take, with_kwargs=True)
    with (
        torch.no_grad(),
        reasonalloc.attach(model, **SMALL),
        pytest.raises(UnsupportedError, match="in copies"),
    ):
        model.generate(prompt(20), max_new_tokens=1)


@needs_layers
def test_a_cache_with_readers_goes_back() -> None:
    model, ids = made("gemma3n_full"), prompt(20)
    with torch.no_grad(), reasonalloc.attach(model, budget=64) as attached:
        cache = attached.new_cache()
        model(ids, past_key_values=cache)
        cache.crop(12)
        again = model(ids[:, 12:], past_key_values=cache).logits
        fresh = model(ids, past_key_values=attached.new_cache()).logits[:, 12:]
        assert torch.allclose(again, fresh, atol=1e-3)


@needs_layers
@pytest.mark.filterwarnings("ignore::reasonalloc.errors.CompressionNeverHappened")
def test_inside_a_multimodal_model() -> None:
    """As checkpoints come; text alone."""
    text = made("gemma4_shared").config.to_dict()
    special = {f"{name}_token_id": 90 + i for i, name in enumerate(("image", "video", "audio"))}
    special |= {f"{name}_token_id": 93 + i for i, name in enumerate(("boi", "eoi", "boa", "eoa"))}
    config = transformers.Gemma4Config(
        text_config=text, vision_config=None, audio_config=None, **special
    )
    torch.manual_seed(1)
    model, (ids, mask) = transformers.Gemma4ForConditionalGeneration(config).eval(), batch()
    ids = ids % 90
    full = generated(model, ids, mask, 60)
    with reasonalloc.attach(model, budget=128):
        assert torch.equal(generated(model, ids, mask, 60), full)
    with reasonalloc.attach(model, **SMALL):
        small, own = generated(model, ids, mask, 60), ids[1:2, PADDED[1] :]
        assert not torch.equal(small, full)
        assert torch.equal(generated(model, own, torch.ones_like(own), 60)[0], small[1])
