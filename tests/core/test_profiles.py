"""DemandProfile files: validated on load, bound to their model, turned into exact layer budgets."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import reasonalloc
import reference
from models import prompt, tiny
from reasonalloc import UsageError
from reasonalloc.calibrated.demand import DemandProfile, config_hash, load_profile


def make(model: Any, demand: list[float]) -> DemandProfile:
    return DemandProfile(
        model_id="tiny",
        config_hash=config_hash(model.config.to_dict()),
        rho=0.93,
        steps=512,
        prompt_hashes=["a" * 64],
        demand_mean=demand,
        demand_max=[2 * d for d in demand],
        curves=[demand],
    )


def test_budgets_follow_the_definition(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=5)
    demand = [300.0, 20.0, 45.0, 1.0, 110.0]
    path = tmp_path / "profile.json"
    make(model, demand).save(path)
    assert load_profile(path) == make(model, demand)
    with reasonalloc.attach(model, budget=40, arm="reasonalloc", profile=path, interval=8) as a:
        mean = 3 * 40
        assert list(a.totals) == reference.robustify(
            demand, 5 * mean, [mean // 4] * 5, [2 * mean] * 5, 0.5
        )
        model.generate(prompt(90), max_new_tokens=20, do_sample=False)
        assert a.recorder is not None and a.recorder.compressions == 5 * 3
    with reasonalloc.attach(model, budget=40, layers=f"profile({path})", heads="reasonalloc") as a:
        assert sum(a.totals) == 5 * mean


def test_demand_of_the_largest_head(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "profile.json"
    profile = dataclasses.replace(make(model, [30.0, 30.0, 30.0]), demand_max=[40.0, 90.0, 160.0])
    profile.save(path)

    def totals(layers: str) -> list[int]:
        with reasonalloc.attach(model, budget=40, layers=layers, profile=path) as attached:
            return list(attached.totals)

    assert totals("profile") == totals("profile(demand=mean)") == [120] * 3
    assert totals("profile(demand=max)") == reference.robustify(
        profile.demand_max, 360, [30] * 3, [240] * 3, 0.5
    )
    assert sorted(totals("shuffled(demand=max)")) == totals("profile(demand=max)")
    with pytest.raises(UsageError, match="profile: demand='most' must be 'mean' or 'max'"):
        totals("profile(demand=most)")


def test_profiles_that_do_not_say_how_they_were_measured(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile = make(tiny("llama"), [1.0, 2.0, 3.0])
    profile.save(path)
    data = json.loads(path.read_text())
    old = {name: data[name] for name in data if name not in ("window", "keys")}
    path.write_text(json.dumps(old))
    assert load_profile(path) == profile
    for wrong, message in {"window": 0, "keys": "prompt"}.items():
        path.write_text(json.dumps({**old, wrong: message}))
        with pytest.raises(UsageError, match=f"{wrong}={message!r}"):
            load_profile(path)


def test_shuffled_budgets_are_those_of_the_profile_on_other_layers(tmp_path: Path) -> None:
    model, path = tiny("llama", num_hidden_layers=5), tmp_path / "profile.json"
    make(model, [300.0, 20.0, 45.0, 1.0, 110.0]).save(path)

    def totals(layers: str) -> list[int]:
        given = {"budget": 40, "layers": layers, "profile": path, "interval": 8}
        with reasonalloc.attach(model, **given) as attached:
            model.generate(prompt(60), max_new_tokens=20, do_sample=False)
            assert attached.recorder is not None and attached.recorder.compressions > 0
            return list(attached.totals)

    wave = totals("profile")
    found = [totals(f"shuffled(seed={seed})") for seed in range(5)]
    assert all(sorted(each) == sorted(wave) for each in found)
    assert len({tuple(each) for each in found}) == 5 and wave not in found
    assert totals("shuffled") == found[0]  # one seed, one order
    assert sorted(totals("shuffled(gamma=1)")) == sorted(totals("profile(gamma=1)")) != sorted(wave)
    wrongs = {"seed=-1": "seed=-1 must be between 0", "least=2": "shuffled: least=2"}
    for wrong, message in wrongs.items():
        with pytest.raises(UsageError, match=message):
            totals(f"shuffled({wrong})")
    with pytest.raises(UsageError, match="layers='shuffled' needs a profile file"):
        reasonalloc.attach(model, budget=40, layers="shuffled")


def test_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    make(tiny("llama"), [1.0, 2.0, 3.0]).save(path)
    with pytest.raises(UsageError, match="4 compressible layers: calibrate this model"):
        attach_with(tiny("llama", num_hidden_layers=4), path)
    with pytest.raises(UsageError, match=r"not for .* calibrate this model"):
        attach_with(tiny("llama", intermediate_size=32), path)
    attach_with(tiny("llama"), path)


def attach_with(model: Any, path: Path) -> None:
    reasonalloc.attach(model, budget=40, arm="reasonalloc", profile=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version=2, expected 1"),
        ({"rho": 1.5}, "rho=1.5"),
        ({"steps": 0}, "steps=0"),
        ({"objective": "guess"}, "objective='guess'"),
        ({"demand_mean": []}, "demand_mean must be a list"),
        ({"demand_mean": [1, -2, 3]}, r"demand_mean\[1\]=-2"),
        ({"demand_mean": [1, float("nan"), 3]}, r"demand_mean\[1\]=nan"),
        ({"demand_max": [1, 2]}, "demand_max has 2 entries"),
        ({"curves": []}, "one list per prompt hash"),
        ({"curves": [[1, 2]]}, r"curves\[0\] has 2 entries"),
        ({"prompt_hashes": "abc"}, "prompt_hashes must be a list"),
        ({"model_id": 3}, "model_id must be text"),
        ({"surprise": 1}, "unknown field surprise"),
    ],
)
def test_broken_profiles(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "profile.json"
    data = dataclasses.asdict(make(tiny("llama"), [1.0, 2.0, 3.0])) | change
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_profiles(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    texts = {"{": "not valid JSON", "[]": "must be an object", '{"kind": "cost"}': "a cost profile"}
    for text, message in texts.items():
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_profile(path)
    data = dataclasses.asdict(make(tiny("llama"), [1.0]))
    del data["curves"]
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match="missing curves"):
        load_profile(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_profile(tmp_path)
