"""The report command on made-up folders: page, tables, refusals."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("plotly")
pytest.importorskip("jinja2")
pytest.importorskip("scipy")

from eval_folder import MANIFEST, events, row, rows, write
from reasonalloc.calibrated.demand import DemandProfile
from reasonalloc.cli.main import main
from reasonalloc.evaluation.samples import load_groups
from reasonalloc.report import drilldown, heads
from reasonalloc.report.results import results

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def payload(page: Path) -> dict[str, Any]:
    """The page's data, as its script reads it."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def test_a_page_and_its_tables(call: Call, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", rows(), heads=events())
    code, text, err = call("report", folder)
    assert code == 0, err
    assert "reasonalloc at budget 128 against rkv at budget 128" in text
    page = folder / "report.html"
    html = page.read_text()
    assert "src=" not in re.sub(r"<script>.*?</script>", "", html, flags=re.S)  # nothing is fetched
    (group,) = payload(page)["groups"]
    with (folder / "report.csv").open() as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == len(group["cells"]) == 5
    for found, cell in zip(cells, group["cells"], strict=True):
        right = [
            r["correct"] for r in rows() if (r["arm"], r["budget"]) == (cell["arm"], cell["budget"])
        ]
        assert float(found["pass@1"]) == cell["accuracy"] == pytest.approx(sum(right) / 20)
        assert float(found["pass@1_low"]) <= cell["accuracy"] <= float(found["pass@1_high"])
    with (folder / "report-paired.csv").open() as file:
        compared = list(csv.DictReader(file))
    paired = [row for row in compared if row["quantity"] == "correct"]
    assert [row for row in compared if row["quantity"] == "cut"][3]["arm"] == "reasonalloc"
    assert [(p["arm"], p["base_budget"]) for p in paired] == [
        ("full", "128"),
        ("full", "256"),
        ("reasonalloc", "128"),
        ("reasonalloc", "256"),
    ]
    assert "| reasonalloc | 128 | 10 |" in (folder / "report.md").read_text()
    run = group["heads"]["runs"][0]
    assert run["budgets"][0] == [[128, 128], [131, 125], [134, 122], [137, 119]]
    before = html
    assert call("report", folder)[0] == 0 and page.read_text() == before


def test_only_what_is_beyond_noise_is_called_clear(call: Call, tmp_path: Path) -> None:
    lines = [row("rkv", 64, f"p{i}", correct=i < 5) for i in range(20)]
    lines += [row("snapkv", 64, f"p{i}", correct=i < 6) for i in range(20)]
    lines += [row("h2o", 64, f"p{i}") for i in range(20)]
    folder = write(tmp_path / "run", lines)
    assert call("report", folder)[0] == 0
    html = (folder / "report.html").read_text()
    assert html.count(">clear</td>") == 1 and html.count(">within noise</td>") == 1
    table = (folder / "report.md").read_text()
    assert re.search(r"\| h2o .*\| yes \|", table) and re.search(r"\| snapkv .*\| no \|", table)


def test_samples_that_went_on_are_found_in_old_results(call: Call, tmp_path: Path) -> None:
    """Right answers, but no end of the turn: text and counts of saved samples tell."""
    on = {"completion": "It is \\boxed{4}." + " And so on." * 99, "finish": "length"}
    lines = [row("rkv", 64, f"p{i}") for i in range(20)]
    lines += [row("snapkv", 64, f"p{i}", **(on if i < 12 else {})) for i in range(20)]
    folder = write(tmp_path / "run", lines)
    code, text, err = call("report", folder)
    assert code == 0, err
    for words in ("+60.0 points cut at the limit", "+60.0 points going on after the answer"):
        assert f"snapkv at budget 64 against rkv at budget 64: {words}" in text
    (group,) = payload(folder / "report.html")["groups"]
    assert [cell["went_on"][0] for cell in group["cells"]] == [0.0, 0.6]
    assert [cell["cut"][0] for cell in group["cells"]] == [0.0, 0.6]
    rows = group["paired_endings"]
    assert [(r["quantity"], r["better"], r["worse"]) for r in rows] == [
        ("cut", 0, 12),
        ("went_on", 0, 12),
    ]
    assert rows[0]["p"] == pytest.approx(2 / 2**12)
    assert rows[0]["adjusted_p"] == pytest.approx(4 / 2**12)
    html = (folder / "report.html").read_text()
    assert html.count(">clear</td>") == 2 and "Cut samples, and samples that went on" in html
    assert "| went on | snapkv | 64 | 20 | +60.0 |" in (folder / "report.md").read_text()
    with (folder / "report.csv").open() as file:
        assert [c["went_on"] for c in csv.DictReader(file)] == ["0.0", "0.6"]


def test_json(call: Call, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", rows(4, 1))
    code, text, _ = call("report", folder, "--json", "-o", tmp_path / "x.html")
    data = json.loads(text)
    assert code == 0 and [Path(f).name for f in data["files"]] == [
        "x.html",
        "x.md",
        "x.csv",
        "x-paired.csv",
    ]
    assert all(Path(f).is_file() for f in data["files"])
    assert data["groups"][0]["cells"][0]["problems"] == 4


def test_another_base(call: Call, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", rows())
    code, text, _ = call("report", folder, "--base", "full")
    assert code == 0 and "rkv at budget 256 against full" in text
    code, _, err = call("report", folder, "--base", "rvk")
    assert code == 2 and "did you mean 'rkv'?" in err and err.count("\n") == 1


def test_groups_stay_apart(call: Call, tmp_path: Path) -> None:
    first = write(tmp_path / "a", rows())
    second = write(tmp_path / "b", rows(arms=("random",)), {**MANIFEST, "temperature": 1.0})
    code, _, err = call("report", first, second, "--base", "rkv")
    assert code == 0, err
    page = payload(first / "report.html")
    assert [g["base"] for g in page["groups"]] == ["rkv", None]
    assert any("no paired table" in notice for notice in page["groups"][1]["notices"])
    assert "2 groups of results" in (first / "report.html").read_text()


def test_the_papers_numbers_are_marked(call: Call, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", rows())
    other = write(tmp_path / "other", [row("rkv", 64, f"p{i}", task="gsm8k") for i in range(3)])
    assert call("report", folder)[0] == 0
    assert "81.64" not in (folder / "report.html").read_text()
    code, _, err = call("report", folder, other, "--paper")
    assert code == 0 and "no numbers for gsm8k" in err
    text = (folder / "report.md").read_text()
    assert "another protocol" in text and "81.64" in text
    assert "81.64" in (folder / "report.html").read_text()


def test_the_wave_of_the_runs_profile(tmp_path: Path) -> None:
    curve = [9.0, 3.0, 5.0]
    path = tmp_path / "profile.json"
    DemandProfile("m", "0" * 16, 0.93, 5, ["0" * 64], curve, curve, [curve]).save(path)
    manifest = {**MANIFEST, "profiles": {"profile": str(path)}}
    folder = write(tmp_path / "run", rows(), manifest)
    (group,) = results(load_groups([str(folder)]), None, False)["groups"]
    assert group["profile"]["mean"] == curve
    path.write_text("{}")
    (group,) = results(load_groups([str(folder)]), None, False)["groups"]
    assert group["profile"] is None and "no wave" in group["notices"][-1]
    path.unlink()
    (group,) = results(load_groups([str(folder)]), None, False)["groups"]
    assert group["profile"] is None and group["notices"] == []


def test_text_cannot_break_the_page(call: Call, tmp_path: Path) -> None:
    nasty = "</script><script>alert(1)</script>"
    manifest = {**MANIFEST, "model": nasty}
    lines = [row("rkv", 64, nasty + str(i), completion=nasty, prompt=nasty) for i in range(3)]
    folder = write(tmp_path / "run", lines, manifest)
    assert call("report", folder)[0] == 0
    assert "alert(1)</script>" not in (folder / "report.html").read_text()
    assert payload(folder / "report.html")["groups"][0]["model"] == nasty


def test_one_problem_that_differs(call: Call, tmp_path: Path) -> None:
    """Of several samples each: one gap between two arms, which proves nothing."""
    made = [
        row(arm, budget, f"p{problem}", sample, correct=(arm, problem, sample) != ("rkv", 0, 0))
        for arm, budget in (("full", None), ("rkv", 128))
        for problem in range(30)
        for sample in range(2)
    ]
    folder = write(tmp_path / "run", made)
    code, _, err = call("report", folder)
    assert code == 0, err
    (group,) = payload(folder / "report.html")["groups"]
    assert [pair["p"] for pair in group["paired"]] == [1.0]


@pytest.mark.parametrize("name", ["samples.jsonl", "events.jsonl"])
def test_results_are_not_written_over(call: Call, tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "run", rows(), heads=events())
    before = (folder / name).read_bytes()
    code, _, err = call("report", folder, "--out", folder / "." / name)
    assert code == 2 and "would write over" in err and name in err
    assert (folder / name).read_bytes() == before and not (folder / "report.html").exists()


def test_long_runs_say_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for i in range(12):
        text = "a" * 300 + "b" * 300
        lines.append(row("rkv", 64, f"p{i}", completion=text, correct=i == 7))
        lines.append(row("snapkv", 64, f"p{i}", completion=text))
    many = [
        {"arm": "rkv", "budget": 64, "problem": "p0", "sample": 0, "tokens": t, "layer": 0}
        | {"budgets": [t]}
        for t in range(1000)
    ]
    folder = write(tmp_path / "run", lines, heads=many)
    monkeypatch.setattr(drilldown, "HEAD", 100)
    monkeypatch.setattr(drilldown, "TAIL", 50)
    groups = load_groups([str(folder)])
    room = drilldown.Room(left=1000)
    problems = [f"p{i}" for i in range(12)]
    cells = [[s for s in groups[0].samples if s.arm == arm] for arm in ("rkv", "snapkv")]
    found = drilldown.drilldown(problems, cells, room)
    assert found["with_chains"] == 4  # 2 chains of 150 characters and a prompt each
    assert found["problems"][-1]["id"] == "p7"  # on which both agree
    assert [p["chains"] is not None for p in found["problems"]] == [True] * 4 + [False] * 8
    chain = found["problems"][0]["chains"][0]
    assert (len(chain["head"]), len(chain["tail"]), chain["cut"]) == (100, 50, 450)
    run = heads.head_budgets([folder], ["rkv"], [64])["runs"][0]  # type: ignore[index]
    assert run["boundaries"] == 1000 and len(run["tokens"]) == heads.BOUNDARIES
    assert run["tokens"][0] == 0 and run["tokens"][-1] == 999


def test_unfinished_and_idle_runs_say_so(tmp_path: Path) -> None:
    lines = rows(6, 2, arms=("full", "rkv"), budgets=(128,))[:-3]
    lines = [{**line, "compressions": 0} for line in lines]
    folder = write(tmp_path / "run", lines)
    (folder / "events.jsonl").write_text('{"broken\n[]\n{"budgets": [1]}\n')
    (group,) = results(load_groups([str(folder)]), None, False)["groups"]
    notices = " ".join(group["notices"])
    assert "unfinished" in notices and "same number of samples" in notices
    assert "never compressed" in notices and group["heads"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "is no folder"),
        (["."], "has no samples.jsonl"),
        (["run", "-o", "run"], "is a folder"),
        (["run", "-o", "none/x.html"], "there is no folder"),
        ([], "Missing argument"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "run", rows(3, 1))
    monkeypatch.chdir(tmp_path)
    code, out, err = call("report", *arguments)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_a_folder_that_may_not_be_written(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "run", rows(3, 1))
    page = folder / "report.html"
    page.write_text("mine")
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != page and real(p, mode))
    code, _, err = call("report", folder)
    assert code == 2 and "may not be written" in err and page.read_text() == "mine"


def test_a_full_disk_leaves_the_old_page(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "run", rows(3, 1))
    page = folder / "report.html"
    page.write_text("old")
    real = Path.write_text

    def full(path: Path, text: str, **more: Any) -> int:
        real(path, text[:100], **more)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, _, err = call("report", folder)
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    assert page.read_text() == "old"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "samples.jsonl"]


def test_ctrl_c(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "run", rows(3, 1))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reasonalloc.report.results.results", interrupt)
    code, _, err = call("report", folder)
    assert code == 130 and "interrupted" in err
    assert [p.name for p in folder.iterdir()] == ["samples.jsonl"]
