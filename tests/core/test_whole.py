"""Whole numbers of any kind are taken wherever a user gives them, and kept as plain ints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reasonalloc
from models import tiny
from reasonalloc.calibration import ablation, attention_mass, fisher, statistics
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.batch import Job, Settings
from reasonalloc.evaluation.protocols import Rules
from reasonalloc.evaluation.sampling import Sampling
from reasonalloc.integrations.vllm.settings import as_json
from reasonalloc.texts import Trajectory
from reasonalloc.whole import whole_number

KINDS = [int, np.int64, np.uint8, np.array, torch.tensor]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_kept_as_plain_ints(kind: Any) -> None:
    names = {"budget": 64, "interval": 16, "window": 4, "n_sink": 2, "seed": 3}
    config = CompressionConfig(**{name: kind(value) for name, value in names.items()})
    assert config == CompressionConfig(**names)
    assert all(type(getattr(config, name)) is int for name in names)
    assert json.loads(json.dumps(as_json(config)))["budget"] == 64
    settings = Settings(kind(16), kind(4), n_sink=kind(2), seed=kind(3))
    assert settings.config(Job("rkv", kind(64))) == config
    rules = Rules(Sampling(0.5, top_k=kind(5)), kind(8), kind(100))
    assert json.dumps([rules.samples, rules.max_new_tokens, rules.sampling.top_k]) == "[8, 100, 5]"
    with reasonalloc.attach(tiny("llama"), budget=kind(64), interval=kind(16)) as attached:
        assert attached.plan(batch=kind(2)) == attached.plan(batch=2)
        assert type(attached.plan(batch=kind(2)).kv_bytes(100)) is int
    text = Trajectory(tuple(map(kind, (1, 2))), tuple(map(kind, (3, 4))))
    assert text.key == Trajectory((1, 2), (3, 4)).key


@pytest.mark.parametrize(
    "value",
    [
        *(64.0, "64", None, True, [64]),
        *(np.bool_(True), np.float64(64), np.array([64])),
        *(torch.tensor(True), torch.tensor(64.0), torch.tensor([64])),
    ],
    ids=repr,
)
def test_others_are_refused(value: Any) -> None:
    for name in ("budget", "interval", "window", "n_sink", "seed"):
        with pytest.raises(UsageError, match=f"{name}=.* must be a whole number"):
            CompressionConfig(**{"budget": 64, name: value})
    with (
        reasonalloc.attach(tiny("llama"), budget=64) as attached,
        pytest.raises(UsageError, match=r"batch=.* must be a whole number"),
    ):
        attached.plan(batch=value)


def test_the_least_is_named() -> None:
    with pytest.raises(UsageError, match=r"^budget=0 is too small: give at least 1$"):
        whole_number("budget", np.int32(0), 1)


def test_the_most_is_named() -> None:
    with pytest.raises(UsageError, match=r"^budget=9 is too large: give at most 8$"):
        whole_number("budget", 9, 1, most=8)


def test_calibrations_write_what_they_measured(tmp_path: Path) -> None:
    model, number = tiny("llama"), np.int64
    prompts = [torch.arange(5, 25)[None]]
    made: list[Any] = [
        attention_mass(
            model, prompts, max_new_tokens=number(12), every=torch.tensor(8), window=number(4)
        ),
        statistics(model, prompts, max_new_tokens=number(12), every=number(8), window=number(4)),
    ]
    texts = [Trajectory(tuple(range(5, 25)), tuple(range(30, 70)))]
    shared: dict[str, Any] = {"budgets": np.array([8, 16]), "interval": number(8)}
    shared["window"] = number(4)
    made.append(ablation(model, texts, **shared, stride=number(4)))
    made += fisher(model, texts, policies=["rkv"], **shared, samples=number(1), seed=number(0))
    for index, profile in enumerate(made):
        path = tmp_path / f"{index}.{'safetensors' if index == 1 else 'json'}"
        profile.save(path)
        assert path.stat().st_size > 0
    for name in ("stride", "samples"):
        run = ablation if name == "stride" else fisher
        with pytest.raises(UsageError, match=f"{name}=1.5 must be a whole number"):
            run(model, texts, **shared, **{name: 1.5})  # type: ignore[operator]
