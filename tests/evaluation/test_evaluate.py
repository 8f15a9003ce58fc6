"""Evaluation and fidelity from Python: the same results as the commands', and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from test_eval import arguments, read

import reasonalloc
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS
from reasonalloc.config import Arm
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.evaluate import evaluate
from reasonalloc.evaluation.evaluation_result import Interrupted
from reasonalloc.evaluation.fidelity import fidelity
from reasonalloc.evaluation.progress import Observer
from reasonalloc.evaluation.tasks.chain_task import Chain
from reasonalloc.loading import load_model
from reasonalloc.policies import POLICIES, Candidates, Policy
from reasonalloc.policies.rkv import RKV
from reasonalloc.texts import Trajectory
from tiny_boxed import save_tiny

Call = Callable[..., tuple[int, str, str]]
SMALL: dict[str, Any] = {
    "budgets": 24,
    "limit": 2,
    "samples": 2,
    "max_new_tokens": 40,
    "interval": 8,
    "window": 4,
    "batch_size": 3,
    "progress": False,
}
TASK = "chain(variables=2)"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("boxed"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> dict[str, Any]:
    network, tokenizer = load_model(str(model), "auto", "cpu")
    return {"model": network, "tokenizer": tokenizer}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test makes known is unknown after it."""
    for registry in (POLICIES, HEAD_ALLOCATORS, LAYER_ALLOCATORS):
        monkeypatch.setattr(registry, "_entries", registry.entries())
        monkeypatch.setattr(registry, "_objects", {})


@dataclass(frozen=True)
class Oldest(Policy):
    """Keep what came first."""

    weight: float = 1.0

    def score(self, candidates: Candidates) -> torch.Tensor:
        return -candidates.positions.float() * self.weight


def test_a_folder_of_the_command_goes_on_from_python_and_back(
    call: Call, model: Path, loaded: dict[str, Any], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"arms": "full,rkv", "limit": 2}
    assert call(*arguments(model, tmp_path / "a", **changes))[0] == 0
    before = (tmp_path / "a" / "samples.jsonl").read_bytes()
    result = evaluate(**loaded, task=TASK, out=tmp_path / "a", **SMALL)
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == before
    evaluate(str(model), Chain(2), arms=["full", Arm("rkv")], out=tmp_path / "b", **SMALL)
    assert read(tmp_path / "a") == read(tmp_path / "b")
    code, out, err = call(*arguments(model, tmp_path / "b", **changes), "--json")
    assert code == 0 and "8 of 8 samples are in" in " ".join(err.split())
    assert json.loads(out)["results"] == json.loads(json.dumps(result.summary))


def test_a_result_without_a_folder(loaded: dict[str, Any]) -> None:
    pandas = pytest.importorskip("pandas")
    result = evaluate(**loaded, task=TASK, arms="full, rkv", **SMALL)
    assert not result.folder.exists()
    assert len(result.rows) == 8 and all(row["completion"] for row in result.rows)
    assert [(job.arm, job.budget) for job in result.jobs] == [("full", None), ("rkv", 24)]
    assert [line["n"] for line in result.summary] == [4, 4]
    for shown in (result.table(), str(result), result._repr_html_()):
        assert "pass@1" in shown and "rkv" in shown
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 8
    pytest.importorskip("plotly")
    (line,) = result.plot().data
    assert line.name == "rkv" and list(line.x) == [100 * result.summary[1]["kv_share"]]
    assert line.y[0] == result.summary[1]["pass_at_1"]


def test_own_parts_and_objects(loaded: dict[str, Any]) -> None:
    arms = [Arm(RKV(lam=0.3)), Arm(Oldest(2.0)), "snapkv"]
    result = evaluate(**loaded, task=TASK, arms=arms, **SMALL)
    names = ["rkv(lam=0.3)/uniform/uniform", "oldest(weight=2.0)/uniform/uniform", "snapkv"]
    assert [line["arm"] for line in result.summary] == names
    assert all(line["mean_layer_compressions"] > 0 for line in result.summary)
    texts = [Trajectory(tuple(range(5, 30)), tuple(range(30, 70)))]
    kept = fidelity(
        **loaded, texts=texts, arms=arms, budgets=12, interval=8, window=4, progress=False
    )
    assert [line["arm"] for line in kept.summary][:2] == names[:2]


class Stopping(Observer):
    """Presses Ctrl-C once some samples are there."""

    def finished(self, chunk: Any, tokens: int) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("out", [None, "results"])
def test_an_interrupted_call_keeps_what_is_there(
    loaded: dict[str, Any], out: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = None if out is None else tmp_path / out
    with pytest.raises(KeyboardInterrupt) as stopped:
        evaluate(**loaded, task=TASK, out=folder, **{**SMALL, "progress": Stopping()})
    assert isinstance(stopped.value, Interrupted)
    assert [row["arm"] for row in stopped.value.result.rows] == ["full"] * 3
    said = capsys.readouterr().err
    assert ("interrupted: 3 of 8 samples" in said) == (out is not None)
    if folder is not None:
        assert len(evaluate(**loaded, task=TASK, out=folder, **SMALL).rows) == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "needs its tokenizer"),
        ({"workers": 2}, "workers=2 cannot be used with a loaded model"),
        ({"ray_address": "auto"}, "ray_address='auto' cannot be used with a loaded model"),
        ({"dtype": "float16"}, "dtype='float16' cannot be used with a loaded model"),
        ({"device": "cpu"}, "device='cpu' cannot be used with a loaded model"),
        ({"device_map": "auto"}, "device_map='auto' cannot be used with a loaded model"),
        ({"tp_plan": "auto"}, "tp_plan='auto' cannot be used with a loaded model"),
        ({"engine": "vllm"}, "engine='vllm' cannot be used with a loaded model"),
        ({"trust_remote_code": True}, "trust_remote_code=True cannot be used with"),
        ({"arms": []}, "arms is empty"),
        ({"arms": "rvk"}, "did you mean 'rkv'"),
        ({"budgets": 3}, "give a budget of at least 4"),
        ({"task": "chian"}, "did you mean 'chain'"),
        ({"budgets": []}, "budgets is empty"),
        ({"budgets": 24.5}, "budget=24.5 must be a whole number"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_refusals(loaded: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        evaluate(**{**loaded, "task": TASK, **SMALL, **change})
    assert "\n" not in str(refused.value)


def test_an_attached_model_is_refused(loaded: dict[str, Any], model: Path) -> None:
    texts = [Trajectory((5, 6), (7, 8))]
    with reasonalloc.attach(loaded["model"], budget=24):
        for measure in (
            lambda: evaluate(**loaded, task=TASK, arms="full", **SMALL),
            lambda: fidelity(**loaded, texts=texts, progress=False),
        ):
            with pytest.raises(UsageError, match="has a KV budget already: detach"):
                measure()
    with pytest.raises(UsageError, match="tokenizer= has no effect with model="):
        evaluate(str(model), TASK, tokenizer=loaded["tokenizer"], **SMALL)


def test_fidelity_is_the_commands(
    call: Call, model: Path, loaded: dict[str, Any], tmp_path: Path
) -> None:
    texts = [
        Trajectory(tuple(range(5, 30)), tuple(range(30, 80))),
        Trajectory(tuple(range(40, 60)), tuple(range(10, 50))),
    ]
    file, out = tmp_path / "texts.jsonl", tmp_path / "results.jsonl"
    rows = [
        {"prompt_ids": list(t.prompt_ids), "completion_ids": list(t.completion_ids)} for t in texts
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    small: dict[str, Any] = {"arms": "rkv,random", "budgets": [12, 16], "progress": False}
    small |= {"interval": 8, "window": 4}
    result = fidelity(**loaded, texts=texts, out=out, **small)
    written = out.read_text()
    assert len(written.splitlines()) == 1 + 2 * 4 and len(result.rows) == 8
    command = ["fidelity", model, "--trajectories", file, "--interval", 8, "--window", 4]
    command += ["--arms", "rkv,random", "--budgets", "12,16", "--out", out, "--json"]
    code, printed, err = call(*command)
    assert code == 0, err
    assert out.read_text() == written  # nothing was computed again
    assert json.loads(printed)["results"] == json.loads(json.dumps(result.summary))
    assert fidelity(str(model), file, **small).summary == result.summary
    given = [texts[0], rows[1]]
    assert fidelity(**loaded, texts=given, **small).summary == result.summary
    alone = fidelity(loaded["model"], texts, **small)
    assert alone.rows == result.rows and alone.summary[0]["kl_by_kind"] == {}
    for mistake in (file, given):
        with pytest.raises(UsageError, match="needs the model's tokenizer: add tokenizer="):
            fidelity(loaded["model"], mistake, **small)
    for shown in (result.table(), str(result), result._repr_html_()):
        assert "top-1" in shown and "rkv" in shown
    pytest.importorskip("plotly")
    assert [line.name for line in result.plot().data] == ["rkv", "random"]
    pytest.importorskip("pandas")
    assert len(result.to_pandas()) == 8


def test_a_bar_is_shown(loaded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(**loaded, task=TASK, arms="full", **{**SMALL, "progress": None})
    fidelity(**loaded, texts=[Trajectory((5, 6), tuple(range(7, 30)))], budgets=12, arms="rkv")
    said = capsys.readouterr().err
    assert "Sampling" in said and "Replaying" in said
