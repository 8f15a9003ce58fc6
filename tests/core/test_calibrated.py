"""The policy that a cost profile names, and the preset that uses it."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import made_costs
import reasonalloc
from models import prompt, tiny
from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.errors import UsageError
from reasonalloc.policies import POLICIES


def saved(profile: CostProfile, folder: Path) -> Path:
    path = folder / "costs.json"
    profile.save(path)
    return path


def test_it_is_the_policy_that_the_file_names(tmp_path: Path) -> None:
    profile = replace(made_costs.make(2, 3), policy="rkv(lam=0.3)")
    path = saved(profile, tmp_path)
    policy = POLICIES.create(f"calibrated(path={path})").resolve()
    assert policy == POLICIES.create("rkv(lam=0.3)")


@pytest.mark.parametrize("policy", ["value_aware", "rkv", "lazy_eviction"])
def test_best_generates_within_the_plan(policy: str, tmp_path: Path) -> None:
    model, ids = tiny("qwen3"), prompt(45)
    path = saved(replace(made_costs.of_model(model), policy=policy), tmp_path)
    settings = {"budget": 20, "interval": 8, "window": 4}
    parts = {"policy": policy, "layers": f"cost(path={path})", "heads": "planned"}
    with reasonalloc.attach(model, **settings, **parts) as named:
        expected = model.generate(ids, max_new_tokens=40, do_sample=False)
        plan = named.plan(batch=1)
    with reasonalloc.attach(model, arm="best", profile=path, **settings) as attached:
        out = model.generate(ids, max_new_tokens=40, do_sample=False, return_dict_in_generate=True)
        assert attached.plan(batch=1) == plan
        cache = out.past_key_values
        assert attached.recorder.compressions > 6
    assert torch.equal(out.sequences, expected)
    assert cache.kv_bytes == plan.kv_bytes(tokens=84)
    assert plan.state_channels == POLICIES.create(policy).state_channels
    planned = [tokens for layer in attached.planned for tokens in layer]
    assert sum(planned) == 9 * 20 and len(set(planned)) > 3


def test_refusals(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match="policy='calibrated' needs a cost profile"):
        reasonalloc.attach(model, budget=20, policy="calibrated")
    with pytest.raises(UsageError, match="cannot be read"):
        reasonalloc.attach(model, budget=20, arm="best", profile=tmp_path / "none.json")
    path = saved(made_costs.of_model(tiny("qwen3")), tmp_path)
    for arm in ("best", "calibrated/uniform/uniform"):
        with pytest.raises(UsageError, match="calibrate this model"):
            reasonalloc.attach(model, budget=20, arm=arm, profile=path)
    made = made_costs.of_model(model)
    for inside, message in (
        ("calibrated", "must be a real one"),
        ("calibrated(path=x)", "must be a real one"),
        ("rvk", "did you mean 'rkv'"),
    ):
        path = saved(replace(made, policy=inside), tmp_path)
        with pytest.raises(UsageError, match=message):
            reasonalloc.attach(model, budget=20, arm="best", profile=path)
    model.generate(prompt(5), max_new_tokens=2, do_sample=False)  # nothing was left attached


def test_another_cadence_is_said(tmp_path: Path) -> None:
    model = tiny("llama")
    costs = made_costs.of_model(model)
    path = saved(costs, tmp_path)
    own = {"interval": costs.interval, "window": costs.window}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with reasonalloc.attach(model, budget=24, arm="best", profile=path, **own):
            pass
    measured = f"interval={costs.interval}, window={costs.window}, prompt=evict"
    message = rf"measured at {measured}, this run has"
    changes = ({"interval": costs.interval + 1}, {"window": costs.window + 1}, {"prompt": "pin"})
    for change in changes:
        with (
            pytest.warns(reasonalloc.OtherCadence, match=message) as caught,
            reasonalloc.attach(model, budget=24, arm="best", profile=path, **{**own, **change}),
        ):
            pass
        assert caught[0].filename == __file__
