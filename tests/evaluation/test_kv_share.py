"""Budgets in bytes in lists, and bytes as the axis of results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import made_costs
import reasonalloc
from eval_folder import MANIFEST, row, write
from models import prompt, tiny
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.evaluate import evaluate
from reasonalloc.evaluation.fidelity import fidelity
from reasonalloc.evaluation.fidelity_result import FidelityResult
from reasonalloc.evaluation.kv_share import SIZES
from reasonalloc.evaluation.samples import load_groups
from reasonalloc.loading import load_model
from reasonalloc.texts import Trajectory
from tiny_boxed import save_tiny

BYTES = "60%@100"
CADENCE: dict[str, Any] = {"interval": 8, "window": 4}


def text(prompt_tokens: int = 25, completion: int = 43, seed: int = 0) -> Trajectory:
    ids = prompt(prompt_tokens + completion, seed=seed)[0].tolist()
    return Trajectory(tuple(ids[:prompt_tokens]), tuple(ids[prompt_tokens:]))


def measure(model: Any, budgets: Any, **changes: Any) -> FidelityResult:
    settings = {"texts": [text(), text(seed=1)], "arms": "rkv", "progress": False, **CADENCE}
    return fidelity(model, budgets=budgets, **{**settings, **changes})


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_byte_budget_is_what_plan_says(name: str, dtype: torch.dtype) -> None:
    model = tiny(name).to(dtype)
    whole = reasonalloc.plan(model, budget=20, dtype=torch.bfloat16).full_bytes(1, 67, 2)
    found = []
    for kind in ("auto", "int8"):
        result = measure(model, f"20, {BYTES}", kv_dtype=kind)
        assert [item["budget"] for item in result.summary] == [20, BYTES]
        for item in result.summary:
            settings = {"budget": item["budget"], "tokens": 67, "kv_dtype": kind, **CADENCE}
            plan = reasonalloc.plan(model, arm="rkv", **settings)
            sizes = plan.report()["kv_bytes"]
            assert item["budget_tokens"] == plan.config.budget
            assert item["compressed_kv_bytes"] == sizes["after_compression"]
            assert item["kv_share"] == pytest.approx(sizes["after_compression"] / whole, abs=1e-6)
        found.append(result.summary[1])
    plain, coded = found
    assert coded["budget_tokens"] > 1.2 * plain["budget_tokens"]
    rows = plan.memory().row_bytes(next(s for s in plan.shapes if s.compressible), "auto")
    heads = sum(shape.kv_heads for shape in plan.shapes if shape.compressible)
    assert abs(coded["compressed_kv_bytes"] - plain["compressed_kv_bytes"]) <= rows * heads


def test_planned_bits_keep_to_a_byte_budget(tmp_path: Path) -> None:
    model = tiny("llama")
    made, path = made_costs.of_model(model), tmp_path / "costs.json"
    costs = {"costs": made.costs, "layer_costs": made.layer_costs}
    dataclasses.replace(made, coded={"int8": costs, "int4h": costs}).save(path)
    plain, planned = measure(model, [BYTES], arms="rkv,best-bytes", profile=path).summary
    assert planned["budget"] == plain["budget"] == BYTES
    assert planned["budget_tokens"] > 1.5 * plain["budget_tokens"]
    assert 0.95 * plain["kv_share"] < planned["kv_share"] <= plain["kv_share"]


def test_fidelity_goes_on_also_from_files_without_bytes(tmp_path: Path) -> None:
    model, out = tiny("llama"), tmp_path / "results.jsonl"
    whole = measure(model, ["20", BYTES], out=out)
    first, *lines = out.read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert {(r["budget"], r["budget_tokens"]) for r in rows} == {
        (item["budget"], item["budget_tokens"]) for item in whole.summary
    }
    old = [{k: v for k, v in r.items() if k not in SIZES} for r in rows if r["budget"] == 20]
    out.write_text(first + "".join(json.dumps(r) + "\n" for r in old))
    measure(model, f"20,{BYTES}", out=out)
    written = out.read_text()
    assert len(written.splitlines()) == 1 + 4
    assert measure(model, (BYTES, 20), out=out).rows == whole.rows[2:] + whole.rows[:2]
    assert measure(model, f"20,{BYTES}", out=out).summary == whole.summary
    assert out.read_text() == written


def test_fidelity_shows_bytes_and_tokens() -> None:
    pytest.importorskip("plotly")
    result = measure(tiny("llama"), [BYTES, 20], texts=[text(), text(30, 58)])
    assert result.reference is not None and result.reference.tokens == 77
    (line,) = result.plot().data
    small, large = sorted(result.summary, key=lambda item: item["kv_share"])
    assert list(line.x) == [100 * small["kv_share"], 100 * large["kv_share"]]
    assert line.text[1] == f"budget {BYTES}: {large['budget_tokens']:.0f} tokens"
    title = result.plot().layout.xaxis.title.text
    assert title.endswith("% of the 16-bit full cache at 77 tokens (mean length of the texts)")
    assert list(result.plot(axis="tokens").data[0].x) == [20, large["budget_tokens"]]
    with pytest.raises(UsageError, match="unknown axis 'byte': did you mean 'bytes'"):
        result.plot(axis="byte")
    shown = result.table()
    assert f"{BYTES} ({large['budget_tokens']:.0f} tokens)" in shown
    assert f"{100 * large['kv_share']:.1f} %" in shown and title in shown


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ("20,many", "budget='many' must be a whole number of tokens, a size as '64MiB'"),
        ("20,,24", "budget='' must be a whole number of tokens"),
        (["120%@100"], "budget='120%@100': give a share of at most 100%"),
        (["1KiB"], "budget='1KiB': .* is the least that interval=8 and window=4 take: give more"),
    ],
)
def test_refusals(budgets: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        measure(tiny("llama"), budgets)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = save_tiny(tmp_path_factory.mktemp("boxed"))
    return dict(zip(("model", "tokenizer"), load_model(str(folder), "auto", "cpu"), strict=True))


def sample(loaded: dict[str, Any], out: Path, **changes: Any) -> Any:
    small = {"arms": "full,rkv", "budgets": f"24,{BYTES}", "limit": 1, "samples": 2}
    small |= {"max_new_tokens": 40, "protocol": "quick", "temperature": 0.6, "progress": False}
    return evaluate(**loaded, task="chain(variables=2)", out=out, **CADENCE, **small | changes)


def test_samples_go_on_by_what_was_written(loaded: dict[str, Any], tmp_path: Path) -> None:
    part = sample(loaded, tmp_path, budgets=[BYTES], arms="rkv")
    assert part.reference.whose.startswith("mean length of all samples, ")
    longest = max(row["prompt_tokens"] for row in part.rows) + 40
    assert part.reference.whose.endswith(f", {longest} at most")
    before = (tmp_path / "samples.jsonl").read_text()
    result = sample(loaded, tmp_path)
    assert (tmp_path / "samples.jsonl").read_text().startswith(before)
    full, tokens, size = result.summary
    assert (full["budget"], tokens["budget"], size["budget"]) == (None, 24, BYTES)
    model = loaded["model"]
    for item in (tokens, size):
        plan = reasonalloc.plan(model, budget=item["budget"], arm="rkv", **CADENCE)
        assert item["budget_tokens"] == plan.config.budget
        assert item["compressed_kv_bytes"] == plan.report()["kv_bytes"]["after_compression"]
        whole = plan.full_bytes(1, 1, 2) * result.reference.tokens
        assert item["kv_share"] == pytest.approx(item["compressed_kv_bytes"] / whole, abs=1e-6)
    assert full["kv_share"] == 2 and full["budget_tokens"] is None  # 32 bits
    lengths = [r["prompt_tokens"] + r["completion_tokens"] - 1 for r in result.rows[2:4]]
    assert result.reference.tokens == sum(lengths) / 2
    assert "mean length with the full cache" in str(result)
    pytest.importorskip("plotly")
    (line,) = result.plot().data
    assert sorted(line.x) == sorted(100 * item["kv_share"] for item in (tokens, size))
    group = load_groups([str(tmp_path)])[0]
    assert {s.budget: s.budget_tokens for s in group.samples} == {
        item["budget"]: item["budget_tokens"] for item in result.summary
    }


def test_samples_without_bytes_go_on(loaded: dict[str, Any], tmp_path: Path) -> None:
    whole = sample(loaded, tmp_path, budgets=24)
    first, *lines = (tmp_path / "samples.jsonl").read_text().splitlines(keepends=True)
    old = [{k: v for k, v in json.loads(line).items() if k not in SIZES} for line in lines]
    (tmp_path / "samples.jsonl").write_text(first + "".join(json.dumps(r) + "\n" for r in old))
    result = sample(loaded, tmp_path, budgets=24)
    assert result.reference is None and len(result.rows) == 4
    assert [item["kv_share"] for item in result.summary] == [None, None]
    assert [item["pass_at_1"] for item in result.summary] == [
        item["pass_at_1"] for item in whole.summary
    ]
    pytest.importorskip("plotly")
    assert list(result.plot().data[0].x) == [24]  # tokens, since bytes are not known


def test_a_report_sorts_budgets_by_their_tokens(tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    from reasonalloc.report.results import results
    from reasonalloc.report.tables import cells_csv, markdown

    lines = [row("full", None, f"p{i}") for i in range(3)]
    for budget, tokens in (("4MiB", 150.0), (128, 128.0), (64, 64.0), ("25%@768", 100.5)):
        sizes = {"budget_tokens": tokens, "compressed_kv_bytes": int(4096 * tokens)}
        lines += [row("rkv", 64, f"p{i}", **sizes) | {"budget": budget} for i in range(3)]
    more = {"budget": "4MiB", "budget_tokens": 150.0}
    lines += [row("h2o", 64, f"p{i}") | more for i in range(3)]
    event = {"arm": "rkv", "budget": "4MiB", "problem": "p0", "sample": 0, "tokens": 9, "layer": 0}
    folder = write(tmp_path, lines, MANIFEST, [event | {"budgets": [150]}])
    data = results(load_groups([str(folder)]), None, paper=False)
    (group,) = data["groups"]
    assert group["budgets"] == [64, "25%@768", 128, "4MiB"]
    assert [run["budget"] for run in group["heads"]["runs"]] == ["4MiB"]
    assert [(p["base_budget"] or p["budget"]) for p in group["paired"] if p["arm"] == "h2o"] == [
        "4MiB"
    ]
    cell = next(c for c in group["cells"] if c["budget"] == "25%@768")
    assert cell["kv_share"] == pytest.approx(2 * 100.5 / 600, abs=1e-6)
    assert "25%@768 (100 tokens)" in markdown(data) and "25%@768" in cells_csv(data)
