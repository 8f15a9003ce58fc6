"""The demo on a tiny random model and the real task: trace, page, JSON, Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from reasonalloc.cli import demo_boxed
from reasonalloc.errors import UsageError
from reasonalloc.evaluation import demo
from reasonalloc.evaluation.batch import Job, Settings, Stopped
from reasonalloc.files import check_writable
from reasonalloc.loading import load_model
from reasonalloc.report.demo import rank_arms
from reasonalloc.report.page import render, require_report, script_json
from reasonalloc.report.trace import STAYS, telling_problem, trace
from tiny_boxed import BUDGET, INTERVAL, PROBLEMS, VARIABLES, WINDOW, made_up, run_job, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("boxed"))


@pytest.fixture(scope="module")
def worker(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder), "float32", "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BUDGETS", (BUDGET, 32))
    monkeypatch.setattr(demo, "VARIABLES", VARIABLES)


@pytest.mark.parametrize("arm", ["rkv", "adakv", "pyramid-rkv", "reasonalloc"])
def test_the_trace_is_what_the_cache_kept(worker: Any, folder: Path, arm: str) -> None:
    model, tokenizer = worker
    settings = Settings(INTERVAL, WINDOW, folder / "profile.json", record="tokens")
    result = run_job(model, tokenizer, PROBLEMS, Job(arm, BUDGET), settings)
    words = ["w"] * (len(result.prompts[1]) + len(result.completions[1]))
    data = trace(result, 1, PROBLEMS[1], words, layers=2, kv_heads=4)
    assert data["boundaries"] == sorted({e.step for e in result.events})
    for event in result.events:
        at = data["boundaries"].index(event.step)
        assert data["budgets"][at][event.layer] == event.budgets[1].tolist()
        for head in range(4):
            gone = data["gone"][event.layer][head]
            alive = {p for p in range(event.step) if gone[p] == STAYS or gone[p] > at}
            assert alive == set(event.kept(1, head))


def test_a_layer_that_was_never_compressed_keeps_everything(worker: Any) -> None:
    settings = Settings(INTERVAL, WINDOW, record="tokens")
    result = run_job(*worker, PROBLEMS, Job("rkv", BUDGET), settings)
    result = replace(result, events=tuple(e for e in result.events if e.layer == 1))
    words = ["w"] * (len(result.prompts[0]) + len(result.completions[0]))
    data = trace(result, 0, PROBLEMS[0], words, layers=2, kv_heads=4)
    assert data["gone"][0] == [[STAYS] * len(words)] * 4
    assert data["budgets"][0][0] == [data["boundaries"][0]] * 4
    assert data["budgets"][0][1] == [BUDGET] * 4


def test_the_trace_finds_the_first_wrong_token() -> None:
    problem = PROBLEMS[0]
    words = ["<bos>", "find", "<think>", *problem.solution.split(), "<eos>"]
    result = demo.Recording(Job("rkv", 64), (True,), ((1, 2, 3),), ((1, 2),), ())
    assert trace(result, 0, problem, words, 2, 4)["wrong_from"] is None
    words[7] = "wrong"
    assert trace(result, 0, problem, words, 2, 4)["wrong_from"] == 7


def test_the_problem_shown_is_the_one_that_divides_the_arms() -> None:
    results = [
        demo.Recording(Job("a", 1), right, (), (), ()) for right in ((True, True), (True, False))
    ]
    assert telling_problem(results) == 1


def test_script_json_cannot_end_its_element() -> None:
    nasty = {"text": "</script><!--<script>&\u2028"}
    text = script_json(nasty)
    assert "<" not in text and ">" not in text and "\u2028" not in text
    assert json.loads(text) == nasty


def test_unwritable_pages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(UsageError, match="there is no folder"):
        check_writable(tmp_path / "no" / "page.html")
    with pytest.raises(UsageError, match=r"cannot be written|may not be written|no folder"):
        check_writable("/proc/page.html")
    assert check_writable(tmp_path / "page.html") == (tmp_path / "page.html").resolve()
    assert not list(tmp_path.iterdir())


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else 1)
    with pytest.raises(UsageError, match=r"needs plotly: pip install 'reasonalloc\[report\]'"):
        require_report()


def test_mistakes_are_found_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*_: Any) -> Any:
        raise RuntimeError("the model was loaded")

    monkeypatch.setattr(demo, "load_models", never)
    with pytest.raises(UsageError, match="is a folder"):
        demo_boxed.demo(out=str(tmp_path))
    with pytest.raises(UsageError, match="at least 1"):
        demo_boxed.demo(out=str(tmp_path / "a.html"), count=0)


@pytest.mark.usefixtures("small")
def test_a_foreign_profile_is_refused_before_the_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "boxed"
    shutil.copytree(folder, broken)
    text = (folder / "profile.json").read_text()
    (broken / "profile.json").write_text(
        re.sub(r'"config_hash": "\w+"', '"config_hash": "0"', text)
    )
    monkeypatch.setattr(demo, "Threads", None)
    with pytest.raises(UsageError, match="calibrate this model"):
        demo_boxed.demo(out=str(tmp_path / "a.html"), count=1, folder=broken)


def payload(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


@pytest.mark.usefixtures("small")
def test_the_demo_prints_json_and_writes_one_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    demo_boxed.demo(as_json=True, out=str(page), count=2, folder=folder)
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["results"]) == 1 + 2 * len(demo.ARMS)
    assert printed["problems"] == 2
    assert all(r["n"] == 2 for r in printed["results"])
    assert not printed["interrupted"]
    assert printed["missing_runs"] == 0
    text = page.read_text()
    assert text.count("plotly.js v") == 1
    head = text[: text.index("plotly.js v")]
    assert not re.search(r'(src|href)="', head)
    data = payload(page)
    assert data["rows"] == printed["results"]
    assert data["budgets"] == [BUDGET, 32]
    assert [a["arm"] for a in data["chain"]["arms"]] == list(demo.ARMS)
    assert data["chain"]["budget"] == BUDGET
    assert data["profile"]["mean"] == [30.0, 10.0]


@pytest.mark.usefixtures("small")
def test_an_interrupted_demo_still_reports(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = demo.Recorder.solve

    def run(self: Any, chunk: Any, watch: Any) -> Any:
        if chunk.job.arm == "h2o":
            signal.raise_signal(signal.SIGINT)
            while watch(1):
                pass
            raise Stopped
        return original(self, chunk, watch)

    monkeypatch.setattr(demo.Recorder, "solve", run)
    monkeypatch.setattr(demo, "WORKERS", 1)
    page = tmp_path / "page.html"
    with pytest.raises(typer.Exit) as stopped:
        demo_boxed.demo(out=str(page), count=1, folder=folder)
    assert stopped.value.exit_code == 130
    out, err = capsys.readouterr()
    assert "interrupted: 4 of 17 runs were finished" in " ".join(err.split())
    assert "best" in out and "h2o" not in out
    data = payload(page)
    assert data["missing"] == 13
    assert [r["arm"] for r in data["rows"]] == ["full", "best", "rkv", "snapkv"]


def test_without_a_profile_an_arm_is_left_out(folder: Path, tmp_path: Path) -> None:
    plan = demo.make_plan(tmp_path, 5)
    assert not {"reasonalloc", "best"} & set(plan.arms)
    assert plan.left_out is not None and "best, reasonalloc left out" in plan.left_out
    shutil.copy(folder / "costs.json", tmp_path)
    plan = demo.make_plan(tmp_path, 5)
    assert "best" in plan.arms and plan.costs is not None and plan.profile is None
    assert plan.left_out is not None and "profile.json" in plan.left_out
    assert demo.make_plan(folder, 5).arms == demo.ARMS


def test_text_on_the_page_is_escaped() -> None:
    row = rank_arms(made_up("full", None, 5, compressions=0))[0].data()
    page = render(
        {
            "version": "0",
            "count": 10,
            "variables": 2,
            "interval": 16,
            "window": 4,
            "prompt_tokens": 1,
            "chain_tokens": 2,
            "arms": [],
            "budgets": [],
            "rows": [row],
            "verdict": [],
            "missing": 3,
            "left_out": "<img src=x>",
            "profile": None,
            "chain": None,
        }
    )
    assert "&lt;img src=x&gt;" in page
    assert "<img" not in page[: page.index("plotly.js v")]
    assert "3 runs are missing" in page
