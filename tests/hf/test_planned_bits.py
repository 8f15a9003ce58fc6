"""Tokens and bits of every head within the bytes of a budget: ``best-bytes``."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import made_costs
import reasonalloc
from models import prompt, tiny
from reasonalloc import UsageError
from reasonalloc.allocators.minimise import interpolate, minimise_bytes
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibration.fisher import fisher
from reasonalloc.texts import Trajectory

SETTINGS: dict[str, Any] = {"arm": "best-bytes", "interval": 8, "window": 4}


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random costs in which fewer bits cost a little, and most where much depends on a head."""
    made = made_costs.in_formats(made_costs.of_model(tiny("llama")))
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    made.save(path)
    return path


def generate(model: Any, ids: torch.Tensor, tokens: int = 50, **more: Any) -> torch.Tensor:
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **more)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("prompt_kind", ["evict", "pin"])
@pytest.mark.parametrize("step", ["eager", "static", "compile"])
def test_the_bytes_are_those_of_the_budget(costs: Path, step: str, prompt_kind: str) -> None:
    model, ids = tiny("llama"), prompt(30)
    settings = {**SETTINGS, "profile": costs, "prompt": prompt_kind, "step": step}
    plain = reasonalloc.plan(model, budget=16, interval=8, window=4).memory()
    with reasonalloc.attach(model, budget=16, record="tokens", **settings) as attached:
        cache = attached.new_cache()
        generate(model, ids, past_key_values=cache)
        plan, formats = attached.plan(prompt_tokens=30), attached.formats
        assert cache.kv_bytes == plan.kv_bytes(79)
        assert cache.bookkeeping_bytes == plan.bookkeeping_bytes
        alone = attached.plan()
        # Not a whole token's bytes are left over.
        for own, whole in (("slab_bytes", "slab_bytes"), ("floor_bytes", "floor_bytes")):
            assert 0 <= getattr(plain, whole) - getattr(alone, own) < 64
        assert formats is not None and {kind for row in formats for _, kind in row} > {"int4h"}
        pinned = 30 if prompt_kind == "pin" else 0
        for event in cache.recorder.events:
            most = [tokens + pinned for tokens, _ in formats[event.layer]]
            assert all(n <= m for n, m in zip(event.budgets[0].tolist(), most, strict=True))
        assert cache.recorder.compressions


def test_a_batch_equals_each_alone(costs: Path) -> None:
    model = tiny("llama")
    alone = [prompt(length, seed=length) for length in (5, 37)]
    ids, mask = torch.zeros(2, 37, dtype=torch.long), torch.ones(2, 37, dtype=torch.long)
    ids[0, 32:], ids[1], mask[0, :32] = alone[0][0], alone[1][0], 0
    with reasonalloc.attach(model, budget=16, profile=costs, **SETTINGS):
        together = generate(model, ids, attention_mask=mask)
        for row, one in enumerate(alone):
            assert torch.equal(generate(model, one)[0], together[row])


def test_copies_and_saved_caches(costs: Path, tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(30)
    with reasonalloc.attach(model, budget=16, profile=costs, **SETTINGS) as attached:
        cache = attached.new_cache()
        attached.prefill(ids, cache)
        attached.save_cache(cache, tmp_path / "cache.safetensors")
        loaded = attached.load_cache(tmp_path / "cache.safetensors")
        twin, more = copy.deepcopy(cache), torch.cat([ids, torch.tensor([[7]])], dim=1)
        outs = [generate(model, more, past_key_values=one) for one in (cache, twin, loaded)]
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_room_for_everything_is_the_full_cache_up_to_rounding(costs: Path) -> None:
    model, ids = tiny("llama"), prompt(20)
    everything = {**SETTINGS, "arm": "rkv/cost(bits=planned, least=30)/planned"}
    with reasonalloc.attach(model, budget=60, profile=costs, **everything) as attached:
        cache = attached.new_cache()
        attached.prefill(ids, cache)
        assert cache.recorder.compressions == 0
        assert cache.retained_tokens == [[[20] * 3]] * 3


def test_costs_are_measured_in_every_format(tmp_path: Path) -> None:
    model = tiny("llama")
    text = Trajectory(prompt(30)[0].tolist(), prompt(60, seed=3)[0].tolist())
    sizes = {"budgets": (8, 24, 200), "interval": 8, "window": 4, "samples": 2}
    (both,) = fisher(model, [text], policies=("rkv",), kv_dtypes=("auto", "int8", "int4"), **sizes)  # type: ignore[arg-type]
    (plain,) = fisher(model, [text], policies=("rkv",), **sizes)  # type: ignore[arg-type]
    assert both.costs == plain.costs and both.formats == ["auto", "int8", "int4"]
    at_most = {kind: torch.tensor(both.curves(None, kind))[..., -1].sum() for kind in both.formats}
    assert at_most["auto"] == 0 < at_most["int8"] < at_most["int4"]  # nothing evicted: bits alone
    both.save(tmp_path / "costs.json")
    assert load_costs(tmp_path / "costs.json") == both
    old = json.loads((tmp_path / "costs.json").read_text())
    del old["coded"]
    (tmp_path / "old.json").write_text(json.dumps({**old, "version": 2}))
    assert load_costs(tmp_path / "old.json").formats == ["auto"]


@pytest.mark.parametrize(
    ("given_settings", "words"),
    [
        ({"kv_dtype": "int8"}, "plans bits, and kv_dtype='int8' is given"),
        ({"arm": "rkv/cost(bits=planned)/uniform"}, "use heads='planned'"),
        ({"arm": "rkv/cost(bits=planned, by=layers)/planned"}, "leave by='layers' out"),
        ({"arm": "rkv/cost(bits=some)/planned"}, "must be 'fixed' or 'planned'"),
        ({"arm": "rkv/cost(itemsize=2)/planned"}, "itemsize has no effect"),
        ({"arm": "rkv/cost(bits=planned, itemsize=3)/planned"}, "itemsize=3 must be"),
    ],
)
def test_wrong_settings(costs: Path, given_settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\\(")):
        reasonalloc.attach(
            tiny("llama"), budget=16, profile=costs, **{**SETTINGS, **given_settings}
        )


def test_a_profile_without_formats(tmp_path: Path) -> None:
    made_costs.of_model(tiny("llama")).save(tmp_path / "costs.json")
    with pytest.raises(UsageError, match="calibrate with --kv-dtypes"):
        reasonalloc.attach(tiny("llama"), budget=16, profile=tmp_path / "costs.json", **SETTINGS)


@pytest.mark.parametrize(
    ("coded", "words"),
    [
        ([], "coded must be an object"),
        ({"int3": {}}, "kv_dtype='int3' must be one of"),
        ({"auto": {}}, "'auto' is no format in fewer bits"),
        ({"int8": {"costs": []}}, "must hold costs and layer_costs"),
        ({"int8": {"costs": [], "layer_costs": []}}, "an entry per text"),
    ],
)
def test_broken_profiles(costs: Path, tmp_path: Path, coded: Any, words: str) -> None:
    data = {**json.loads(costs.read_text()), "coded": coded}
    (tmp_path / "broken.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=words):
        load_costs(tmp_path / "broken.json")


@given(
    items=st.lists(st.tuples(st.floats(1e-3, 10), st.floats(0.2, 3)), min_size=1, max_size=3),
    loss=st.floats(1, 3),
    room=st.integers(0, 160),
)
def test_least_cost_in_bytes(items: list[tuple[float, float]], loss: float, room: int) -> None:
    """Nothing that leaves a head's largest step free costs less."""
    points = torch.tensor([2.0, 4.0, 8.0, 12.0], dtype=torch.float64)
    curves = torch.stack([scale * points**-slope for scale, slope in items])
    both, widths = torch.stack([curves, loss * curves]), torch.tensor([4.0, 1.0])
    lower, upper, fixed = 3, 10, 2
    sizes = torch.arange(lower, upper + 1, dtype=torch.float64)
    cost = torch.cat([interpolate(own, points, sizes) for own in both], dim=1)
    taken = (widths[:, None] * (sizes - fixed)).flatten()
    room += len(items)  # the least of everything
    formats, tokens = minimise_bytes(both, points, widths, room, lower, upper, fixed)
    place = formats * len(sizes) + tokens - lower
    assert taken[place].sum() <= room
    ours = sum(float(cost[item, at]) for item, at in enumerate(place))
    step = float(taken.max() - taken.min())
    best = min(
        sum(float(cost[item, at]) for item, at in enumerate(choice))
        for choice in itertools.product(range(len(taken)), repeat=len(items))
        if float(taken[list(choice)].sum()) <= max(room - step, len(items))
    )
    assert ours <= best + 1e-12
