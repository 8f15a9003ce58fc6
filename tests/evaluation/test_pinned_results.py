"""Results of runs that pin the prompt: what they say of the cache, and which runs go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from test_eval import arguments, call  # noqa: F401

import reasonalloc
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.evaluate import evaluate
from reasonalloc.evaluation.fidelity import fidelity
from reasonalloc.loading import load_model
from reasonalloc.texts import Trajectory
from tiny_boxed import save_tiny

Call = Callable[..., tuple[int, str, str]]
SMALL: dict[str, Any] = {
    "budgets": 12,
    "limit": 2,
    "samples": 1,
    "max_new_tokens": 40,
    "interval": 8,
    "window": 4,
    "batch_size": 3,
    "progress": False,
}
TEXTS = [
    Trajectory(tuple(range(5, 30)), tuple(range(30, 80))),
    Trajectory(tuple(range(40, 60)), tuple(range(10, 50))),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("boxed"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> dict[str, Any]:
    network, tokenizer = load_model(str(model), "auto", "cpu")
    return {"model": network, "tokenizer": tokenizer}


@pytest.mark.parametrize("arm", ["rkv", "h2o/pyramid/adakv"])
@pytest.mark.parametrize("limit", [None, 1])
def test_samples_say_what_a_cache_of_their_own_did(
    arm: str, limit: int | None, loaded: dict[str, Any], tmp_path: Path
) -> None:
    pin: dict[str, Any] = {"prompt": "pin", "pin_limit": limit}
    pin["pin_overflow"] = "refuse" if limit is None else "evict"
    result = evaluate(**loaded, task="chain(variables=2)", arms=arm, **SMALL, **pin)
    network = loaded["model"]
    for row in result.rows:
        settings = {"arm": arm, "budget": 12, "interval": 8, "window": 4, **pin}
        with reasonalloc.attach(network, **settings) as attached:
            cache = attached.new_cache()
            ids = torch.arange(2, 2 + row["prompt_tokens"])[None] % 50
            attached.prefill(ids, cache)
            for token in range(row["completion_tokens"] - 1):
                network(torch.tensor([[token]]), past_key_values=cache)
        assert row["kv_bytes"] == cache.kv_bytes
        assert row["compressions"] == cache.recorder.compressions > 0


def test_a_folder_that_protects_goes_on_and_none_is_mixed(
    call: Call,  # noqa: F811
    model: Path,
    loaded: dict[str, Any],
    tmp_path: Path,
) -> None:
    old, pinned = tmp_path / "old", tmp_path / "pinned"
    small = {"arms": "rkv", "limit": 2, "samples": 1, "budgets": 80}
    given = arguments(model, old, **small)
    assert call(*given, "--protect-prompt")[0] == 0
    before = (old / "samples.jsonl").read_bytes()
    manifest = json.loads(before.splitlines()[0])["manifest"]
    assert manifest["protect_prompt"] is True and "pin_prompt" not in manifest
    python: dict[str, Any] = {**loaded, **SMALL, "budgets": 80, "task": "chain(variables=2)"}
    for same in ({"prompt": "protect"}, {"protect_prompt": True}):
        evaluate(**python, arms="rkv", out=old, **same)
        assert (old / "samples.jsonl").read_bytes() == before
    assert call(*given, "--prompt", "protect")[0] == 0
    for other in ((), ("--prompt", "pin")):
        code, _, err = call(*given, *other)
        assert code == 2 and "was made with" in err
    assert (old / "samples.jsonl").read_bytes() == before

    assert call(*arguments(model, pinned, **small), "--prompt", "pin")[0] == 0
    before = (pinned / "samples.jsonl").read_bytes()
    evaluate(**python, arms="rkv", out=pinned, prompt="pin")
    assert (pinned / "samples.jsonl").read_bytes() == before
    evaluate(**{**python, "limit": 3}, arms="rkv", out=pinned, prompt="pin")
    assert (pinned / "samples.jsonl").read_bytes().startswith(before)
    for settings in ({}, {"prompt": "protect"}, {"prompt": "pin", "pin_limit": 200}):
        with pytest.raises(UsageError, match="pin_prompt"):
            evaluate(**python, arms="rkv", out=pinned, **settings)


def test_too_long_a_prompt_ends_a_run(call: Call, model: Path, tmp_path: Path) -> None:  # noqa: F811
    given = arguments(model, tmp_path, arms="rkv", limit=1, samples=1)
    code, _, err = call(*given, "--prompt", "pin", "--pin-limit", "3")
    assert code == 2 and "more than pin_limit=3" in err


def test_fidelity_goes_on_and_is_not_mixed(
    call: Call,  # noqa: F811
    model: Path,
    loaded: dict[str, Any],
    tmp_path: Path,
) -> None:
    file, out = tmp_path / "texts.jsonl", tmp_path / "results.jsonl"
    rows = [
        {"prompt_ids": list(t.prompt_ids), "completion_ids": list(t.completion_ids)} for t in TEXTS
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    small: dict[str, Any] = {"arms": "rkv,random", "budgets": [12], "progress": False}
    small |= {"interval": 8, "window": 4}
    command = ["fidelity", model, "--trajectories", file, "--interval", 8, "--window", 4]
    command += ["--arms", "rkv,random", "--budgets", "12", "--json"]
    result = fidelity(**loaded, texts=TEXTS, out=out, prompt="pin", **small)
    written = out.read_text()
    code, printed, err = call(*command, "--out", out, "--prompt", "pin")
    assert code == 0 and out.read_text() == written, err
    assert json.loads(printed)["results"] == json.loads(json.dumps(result.summary))
    for settings in ({}, {"prompt": "pin", "pin_limit": 90}):
        with pytest.raises(UsageError, match="pin_prompt"):
            fidelity(**loaded, texts=TEXTS, out=out, **settings, **small)
    assert call(*command, "--out", out)[0] == 2

    small["budgets"] = [40]  # room for a protected prompt
    old = tmp_path / "old.jsonl"
    fidelity(**loaded, texts=TEXTS, out=old, protect_prompt=True, **small)
    written = old.read_text()
    manifest = json.loads(written.splitlines()[0])["manifest"]
    assert manifest["protect_prompt"] is True
    assert not {"prompt", "pin_prompt", "pin_limit", "pin_overflow"} & set(manifest)
    fidelity(**loaded, texts=TEXTS, out=old, prompt="protect", **small)
    assert old.read_text() == written
    with pytest.raises(UsageError, match="protect_prompt"):
        fidelity(**loaded, texts=TEXTS, out=old, **small)
    with pytest.raises(UsageError, match="25 tokens, more than pin_limit=24"):
        fidelity(**loaded, texts=TEXTS, prompt="pin", pin_limit=24, **small)
