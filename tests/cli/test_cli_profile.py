"""calibrate --objective kl, and the profile commands."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("scipy")

from interrupting import interrupt_calibration

import made_statistics
from models import tiny
from reasonalloc.calibrated.costs import CostProfile, load_costs
from reasonalloc.calibrated.demand import DemandProfile
from reasonalloc.report import curves

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [
        {"prompt_ids": list(range(10, 35)), "completion_ids": list(range(40, 75)), "kind": "up"},
        {"prompt": "w1 w2 w3", "completion": " ".join(f"w{i}" for i in range(30)), "kind": "[x]"},
        {"prompt_ids": list(range(5, 25)), "completion_ids": [*range(60, 90)] * 10},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def costs(layers: list[list[list[float]]], **changes: Any) -> CostProfile:
    """Three texts: as given, twice, and half as much; budgets 16 and 32."""
    half = [[[point / 2 for point in head] for head in layer] for layer in layers]
    double = [[[point * 2 for point in head] for head in layer] for layer in layers]
    profile = CostProfile(
        objective="kl",
        model_id="made",
        config_hash="0" * 16,
        policy="rkv",
        interval=8,
        window=4,
        samples=0,
        budgets=[16, 32],
        text_hashes=["a" * 64, "b" * 64, "c" * 64],
        kinds=["code", "prose", "code"],
        tokens=[10, 20, 10],
        costs=[layers, double, half],
    )
    return replace(profile, **changes)


LAYERS = [[[0.4, 0.1], [0.1, 0.02]], [[0.05, 0.0], [0.0, 0.0]], [[0.2, 0.1], [0.3, 0.1]]]


def demand(mean: list[float], curves: list[list[float]] | None = None) -> DemandProfile:
    curves = curves or [mean, [m + 1 for m in mean]]
    return DemandProfile(
        model_id="made",
        config_hash="0" * 16,
        rho=0.9,
        steps=8,
        prompt_hashes=[str(i) * 64 for i in range(len(curves))],
        demand_mean=mean,
        demand_max=[2 * m for m in mean],
        curves=curves,
    )


def test_calibrating_costs(call: Call, folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    base = ["calibrate", folder, "--objective", "kl", "--texts", texts, "-o", out]
    options = ["--budgets", "10,16", "--interval", "8", "--window", "4", "--policy", "h2o"]
    code, text, err = call(*base, *options, "--count", "2", "--stride", "2", "--json")
    assert code == 0, err
    assert "tokens will run through parts of the model" in err
    profile = load_costs(out)
    assert profile.kinds == ["up", "[x]"] and profile.tokens[0] in (17, 18)
    assert (profile.policy, profile.interval, profile.window) == ("h2o", 8, 4)
    assert json.loads(text)["costs"] == profile.curves()
    code, text, _ = call(*base, *options, "--count", "2")
    assert code == 0 and "budget 16" in text and "profile show" in text
    code, text, _ = call("profile", "stability", out)
    assert code == 0 and "[x]" in text and "Each kind against" in text


def test_completions_are_generated_for_costs(call: Call, folder: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "t.jsonl", tmp_path / "costs.json"
    texts.write_text('{"prompt": "w1 w2 w3 w4"}\n')
    base = ["calibrate", folder, "--objective", "kl", "--texts", texts, "-o", out]
    code, _, err = call(*base)
    assert code == 2 and "--generate N" in err and not out.exists()
    base += ["--interval", "8"]
    code, _, err = call(*base, "--generate", "30", "--budgets", "8,12")
    assert code == 0 and "rounding" not in err
    code, _, err = call(*base, "--generate", "30", "--budgets", "8,12", "--dtype", "bfloat16")
    assert code == 0 and "In bfloat16 rounding alone" in err
    assert load_costs(out).tokens == [29]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--objective", "kl"], "no texts: --objective kl needs --texts FILE"),
        ([], "no prompts: --objective attention-mass needs --prompts FILE"),
        (["--prompts", "p", "--texts", "t"], "--texts has no effect with --objective attention-"),
        (["--prompts", "p", "--stride", "2"], "--stride has no effect"),
        (["--objective", "kl", "--prompts", "p"], "--prompts has no effect with --objective kl"),
        (["--objective", "kl", "--max-new-tokens", "9"], "--max-new-tokens has no effect"),
        (["--objective", "kl", "--texts", "no/file"], "--texts='no/file' cannot be read"),
        (["--objective", "kl", "--texts", "T", "--budgets", "a"], "must be whole numbers"),
        (["--objective", "kl", "--texts", "T", "--budgets", "20,10"], "rising"),
        (["--objective", "kl", "--texts", "T", "--policy", "rvk"], "did you mean 'rkv'"),
        (["--objective", "kl", "--texts", "T", "--window", "50"], "budget of at least 50"),
    ],
)
def test_wrong_calibrations(
    arguments: list[str], message: str, call: Call, folder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.json"
    given = [texts if a == "T" else a for a in arguments]
    code, text, err = call("calibrate", folder, "-o", out, *given)
    assert (code, text) == (2, "") and message in err and err.count("error:") == 1
    assert not out.exists()


def test_bad_texts(call: Call, folder: Path, tmp_path: Path) -> None:
    texts, out = tmp_path / "t.jsonl", tmp_path / "o.json"
    base = ["calibrate", folder, "--objective", "kl", "-o", out, "--texts", texts]
    for line, message in (('{"kind": 3}', "line 1: kind=3"), ("", "holds none"), ("{", "line 1")):
        texts.write_text(line)
        code, _, err = call(*base)
        assert code == 2 and message in err
    texts.write_text('{"prompt": "w1", "completion": "w1 w2"}')
    code, _, err = call(*base[:-3], tmp_path / "o.txt", "--texts", texts)
    assert code == 2 and "ends in .json" in err


def test_ctrl_c(folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    options = ("--objective", "kl", "--interval", "1")
    interrupt_calibration(folder, "--texts", texts, "-o", out, *options)
    assert [p.name for p in tmp_path.iterdir()] == ["texts.jsonl"]


def test_show(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    path, page = tmp_path / "p.json", tmp_path / "page.html"
    demand([30.0, 20.0, 10.0]).save(path)
    code, text, err = call("profile", "show", path, "--budget", 20, "--plot", page)
    assert code == 0, err
    assert "30.0" in text and "budget 20" in text and "10.0-11.0" in text
    html = page.read_text("utf-8")
    assert "Plotly.react" in html and "<title>made</title>" in html
    assert "<script src" not in html and "<link" not in html.split("<body>")[0]
    code, text, _ = call("profile", "show", path, "--budget", 20, "--json")
    data = json.loads(text)
    assert data["demand_max"] == [60.0, 40.0, 20.0] and sum(data["budgets"]["20"]) == 60
    assert data["budgets"]["20"] == sorted(data["budgets"]["20"], reverse=True)

    costs(LAYERS, model_id="<b>&").save(path)
    code, text, _ = call("profile", "show", path, "--budget", 32, "--plot", page)
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()]
    # Tokens weigh 10, 20 and 10, costs 1, 2 and 1/2: the mean is 55/40 of the first.
    assert [row[2] for row in rows] == ["165", "0.00", "275"] and "budget 16" not in text
    assert "&lt;b&gt;&amp;" in page.read_text("utf-8")
    code, text, _ = call("profile", "show", path, "--heads")
    assert code == 0 and len([r for r in text.splitlines() if r.strip()[:1].isdigit()]) == 6
    code, text, _ = call("profile", "show", path, "--json")
    assert json.loads(text)["costs"][0][1] == pytest.approx([0.1375, 0.0275])


def test_statistics_are_shown(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    made_statistics.of_model(tiny("llama")).save(path)
    code, text, err = call("profile", "show", path)
    assert code == 0 and "entropy" in text, err
    assert json.loads(call("profile", "show", path, "--json")[1])["layers"] == [0, 1, 2]
    for arguments, message in (
        (["show", path, "--heads"], "--heads: statistics have no heads"),
        (["show", path, "--budget", 9], "--budget has no effect with statistics"),
        (["show", path, "--plot", tmp_path / "p.html"], "--plot: statistics have no page"),
        (["compare", path, path], "holds statistics, which have no curves to compare"),
    ):
        code, text, err = call("profile", *arguments)
        assert (code, text) == (2, "") and message in err


def test_compare(call: Call, tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    demand([1.0, 0.0, 0.0, 0.0]).save(a)
    demand([0.0, 0.0, 0.0, 1.0]).save(b)
    code, text, _ = call("profile", "compare", a, b, "--json")
    data = json.loads(text)
    assert data["emd"] == pytest.approx(0.75) and data["rank_correlation"] == pytest.approx(-1 / 3)
    demand([1.0, 2.0, 3.0, 4.0, 5.0, 9.0]).save(b)
    code, text, err = call("profile", "compare", a, b)
    assert code == 0 and "Distance 0.5" in " ".join(text.split()) and "layer counts differ" in err

    costs(LAYERS).save(a)
    costs(LAYERS[::-1], budgets=[32, 64], policy="h2o").save(b)
    code, text, err = call("profile", "compare", a, b, "--json")
    data = json.loads(text)
    assert data["budget"] == 32 and data["curves"][0] == pytest.approx([0.165, 0, 0.275])
    assert data["differences"] == ["policy differs: 'rkv' and 'h2o'"]
    costs(LAYERS).save(b)
    code, text, _ = call("profile", "compare", a, b, "--json")
    data = json.loads(text)
    assert data["emd"] == 0 and data["head_rank_correlation"] == pytest.approx(1)
    code, text, _ = call("profile", "compare", a, b)
    assert "Cost at budget 16" in text and "of heads 1.000" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "COST", "DEMAND"], "compare files of one kind"),
        (["compare", "COST", "OTHER"], "no budget is in both files: A was measured at 16, 32, B"),
        (["compare", "COST", "COST", "--budget", "20"], "--budget=20 is not in both files"),
        (["compare", "DEMAND", "DEMAND", "--budget", "20"], "no effect with attention mass"),
        (["stability", "DEMAND", "--budget", "20"], "no effect with attention mass"),
        (["stability", "COST", "--budget", "20"], "was not measured: choose from 16, 32"),
        (["stability", "ONE"], "one text alone"),
        (["show", "COST", "--budget", "20"], "was not measured"),
        (["show", "DEMAND", "--heads"], "has no heads"),
        (["show", "DEMAND", "--budget", "0"], "budget=0 is too small"),
        (["show", "no/file"], "cannot be read"),
        (["show", "TEXT"], "is no JSON file"),
        (["show", "LIST"], "must be an object"),
        (["show", "COST", "--plot", "no/folder/x.html"], "--plot 'no/folder/x.html': there is no"),
        (["show", "COST", "--plot", "COST"], "would write over"),
    ],
)
def test_refusals(arguments: list[str], message: str, call: Call, tmp_path: Path) -> None:
    costs(LAYERS).save(tmp_path / "COST")
    costs(LAYERS, budgets=[17, 33]).save(tmp_path / "OTHER")
    demand([3.0, 2.0, 1.0]).save(tmp_path / "DEMAND")
    demand([3.0, 2.0, 1.0], [[3.0, 2.0, 1.0]]).save(tmp_path / "ONE")
    (tmp_path / "TEXT").write_text("hello")
    (tmp_path / "LIST").write_text("[]")
    given = [tmp_path / a if a.isupper() else a for a in arguments]
    code, text, err = call("profile", *given)
    assert (code, text) == (2, "") and message in err and err.count("error:") == 1


def test_stability(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    costs(LAYERS).save(path)  # curves of one shape: nothing but the architecture
    code, text, _ = call("profile", "stability", path, "--json")
    data = json.loads(text)
    assert code == 0 and data["budget"] == 16
    assert data["summary"]["texts"]["emd"] == pytest.approx(
        {"n": 3, "median": 0, "low": 0, "high": 0}
    )
    assert data["summary"]["kinds"]["head_rank"]["low"] == pytest.approx(1)
    assert [held["name"] for held in data["kinds"]] == ["code", "prose"]
    assert "is a property of the architecture" in data["answer"] and "so few" in data["answer"]

    turned = costs(LAYERS)
    flat = [[[layer * 0.1 + 0.1, 0.1]] * 2 for layer in range(3)]
    replace(turned, costs=[LAYERS, LAYERS, flat], kinds=["a", "a", "b"]).save(path)
    code, text, _ = call("profile", "stability", path)
    assert code == 0 and "depends on the text" in " ".join(text.split())

    demand([1.0, 2.0, 3.0], [[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]).save(path)
    code, text, _ = call("profile", "stability", path, "--json")
    data = json.loads(text)
    assert [held["rank"] for held in data["texts"]] == pytest.approx([-1, -1])
    assert data["texts"][0]["emd"] == pytest.approx(2 / 9) and data["kinds"] == []
    demand([1.0, 1.0, 1.0]).save(path)
    code, text, _ = call("profile", "stability", path)
    assert code == 0 and "its ranks say nothing" in text


def test_costs_that_are_zero(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    costs([[[0.0, 0.0]] * 2] * 3).save(path)
    code, text, err = call("profile", "compare", path, path)
    assert code == 0 and "Distance -" in text, err
    code, text, _ = call("profile", "stability", path, "--json")
    assert code == 0 and json.loads(text)["summary"]["texts"]["emd"]["n"] == 0


def test_measures() -> None:
    assert curves.distance([1, 1], [1, 1, 1, 1]) == pytest.approx(0.125)
    assert curves.distance([0, 0], [1, 1]) is None
    assert curves.rank_correlation([1, 2], [1, 2]) is None
    assert curves.rank_correlation([1, 5, 2], [10, 50, 20]) == pytest.approx(1)
    assert curves.rank_correlation([1, 5, 2], [1, 1, 5, 5, 2, 2]) == pytest.approx(1)
    assert curves.spread([None, 1.0, 3.0]) == curves.Spread(2, 2.0, 1.0, 3.0)


def test_without_scipy(monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    demand([3.0, 2.0, 1.0]).save(path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "scipy" else found(name, *a)
    )
    for command in (["compare", path, path], ["stability", path]):
        code, _, err = call("profile", *command)
        assert code == 2 and "pip install 'reasonalloc[report]'" in err
    assert call("profile", "show", path)[0] == 0
