"""The eval command with other steps and attention backends: the same samples, only faster."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")

from test_eval import arguments, read
from test_eval_sharded import gloo, run

import tiny_folder
from reasonalloc.cli.main import main
from reasonalloc.evaluation.samples import load_groups
from reasonalloc.integrations.hf.step import StaticStep
from tiny_boxed import save_tiny

Call = Callable[..., tuple[int, str, str]]
WAYS = [("eager", "cpp"), ("static", "eager"), ("compile", "auto"), ("compile", "sdpa")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("boxed"))


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert main(arguments(model, out)) == 0
    return out


@pytest.mark.parametrize(("step", "attention"), WAYS)
def test_samples_are_those_of_plain_steps(
    step: str, attention: str, call: Call, model: Path, whole: Path, tmp_path: Path
) -> None:
    code, _, err = call(*arguments(model, tmp_path, step=step, attention=attention))
    assert code == 0, err
    manifest, samples, events = read(tmp_path)
    expected_manifest, expected, expected_events = read(whole)
    assert samples == expected and events == expected_events
    assert [*manifest.pop("decoding")] == [f"step={step}, attention={attention}"]
    assert [*expected_manifest.pop("decoding")] == ["step=eager, attention=auto"]
    assert manifest == expected_manifest


def test_steps_are_what_was_asked_for(
    call: Call, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    init = StaticStep.__init__

    def spy(self: Any, forward: Any, cache: Any, device: Any, step: str) -> None:
        made.append(step)
        init(self, forward, cache, device, step)

    monkeypatch.setattr(StaticStep, "__init__", spy)
    small = {"limit": 1, "samples": 1}
    assert call(*arguments(model, tmp_path / "a", **small, step="static"))[0] == 0
    assert made == ["static", "static"]  # the two arms under a budget
    assert call(*arguments(model, tmp_path / "b", **small))[0] == 0
    assert len(made) == 2


def test_a_run_may_go_on_with_other_steps(
    call: Call, model: Path, whole: Path, tmp_path: Path
) -> None:
    """Also one of a version that did not note them."""
    assert call(*arguments(model, tmp_path, limit=2))[0] == 0
    path = tmp_path / "samples.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    old = json.loads(first)
    del old["manifest"]["decoding"]
    path.write_text("".join((json.dumps(old) + "\n", *rest)))
    assert not any("speed" in notice for notice in load_groups([str(tmp_path)])[0].notices)
    code, _, err = call(*arguments(model, tmp_path, step="static"))
    assert code == 0 and "12 of 24 samples are in" in err
    manifest, found, _ = read(tmp_path)
    ways = ["step=eager, attention=auto", "step=static, attention=auto"]
    assert [*manifest["decoding"]] == ways
    for row in (*found.values(), *(expected := read(whole)[1]).values()):
        row.pop("batch")
    assert found == expected
    (group,) = load_groups([str(tmp_path), str(whole)])
    assert any("do not compare their speed" in notice for notice in group.notices)


@pytest.mark.long
def test_workers(call: Call, model: Path, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run = arguments(model, tmp_path, workers=2, step="compile", attention="cpp")
    code, _, err = call(*run)
    assert code == 0, err
    assert read(tmp_path)[1] == read(whole)[1]
    code, _, err = call(*arguments(model, tmp_path / "x", workers=2, step="graph", device="cpu"))
    assert code == 2 and "step='graph' needs a GPU" in err and err.count("error:") == 1


@pytest.mark.long
@gloo
def test_two_processes(model: Path, whole: Path, tmp_path: Path) -> None:
    done = run(*arguments(model, tmp_path, arms="full,rkv", step="static"))
    assert done.returncode == 0, done.stderr
    found, expected = read(tmp_path)[1], read(whole)[1]
    assert found == {key: row for key, row in expected.items() if key in found} and len(found) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"step": "graph", "device": "cpu"},
            "step='graph' needs a GPU, but the model is on cpu: use step='comp",
        ),
        ({"step": "compil"}, "unknown step 'compil': did you mean 'compile'?"),
        ({"attention": "nosuch"}, "attention='nosuch' is unknown: choose one of auto"),
        ({"attention": "nosuch", "arms": "full"}, "attention='nosuch' is unknown"),
        ({"attention": "triton", "device": "cpu"}, "attention='triton' needs"),
        ({"step": "compile", "tp_plan": "auto"}, "give --step eager or static"),
        ({"step": "compile", "engine": "vllm"}, "--step compile has no effect with --engine vllm"),
        ({"attention": "cpp", "engine": "vllm"}, "--attention cpp has no effect with --engine"),
    ],
)
def test_refusals(
    change: dict[str, object], message: str, call: Call, model: Path, tmp_path: Path
) -> None:
    if "TRITON_INTERPRET" in os.environ and change.get("attention") == "triton":
        pytest.skip("it runs here")
    code, out, err = call(*arguments(model, tmp_path, **change))
    assert (code, out) == (2, "") and message in err and err.count("error:") == 1
    assert not (tmp_path / "samples.jsonl").exists()


def test_sliding_windows(call: Call, model: Path, tmp_path: Path) -> None:
    folder = tiny_folder.save_tiny(tmp_path / "model", name="gemma3")
    code, out, err = call(*arguments(folder, tmp_path / "out", step="compile"))
    assert (code, out) == (2, "") and "sliding window grow from step to step" in err
    assert "use step='eager'" in err and err.count("error:") == 1
    assert not (tmp_path / "out" / "samples.jsonl").exists()
