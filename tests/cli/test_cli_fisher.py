"""calibrate --objective fisher, and the arm best."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")

from interrupting import interrupt_calibration

from reasonalloc.calibrated.costs import load_costs
from reasonalloc.cli.main import main

Call = Callable[..., tuple[int, str, str]]
SMALL = ["--budgets", "8,16,32", "--interval", "8", "--window", "4", "--samples", "2"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, " ".join(captured.err.split())

    return run


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [
        {"prompt_ids": list(range(10, 35)), "completion_ids": list(range(40, 90)), "kind": "up"},
        {"prompt": "w1 w2 w3", "completion": " ".join(f"w{i}" for i in range(30))},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_from_texts_to_the_best_arm(call: Call, folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    base = ["calibrate", folder, "--objective", "fisher", "--texts", texts, "-o", out, *SMALL]
    code, text, err = call(*base, "--check", "20", "--json")
    assert code == 0, err
    assert "636 tokens will run through the model, forwards and backwards" in err
    assert "then 530 to check" in err and "rounding" not in err
    data, profile = json.loads(text), load_costs(out)
    assert profile.objective == "fisher" and profile.kinds == ["up", ""] and profile.samples == 2
    assert data["policy"] == profile.policy and data["costs"] == profile.curves()
    assert set(data["joint"]) == {"predicted_loss", "rkv"}
    assert data["joint"][profile.policy] == profile.joint
    measured = {name: entries[0]["measured"] for name, entries in data["joint"].items()}
    assert min(measured, key=lambda name: measured[name]) == profile.policy
    assert all(math.isfinite(value) for entry in profile.joint for value in entry.values())
    with_file = ["run", folder, "--prompt", "w1 w2 w3 w4", "--arm", "best", "--profile", out]
    small = ["--budget", "20", "--interval", "8", "--window", "4", "--max-new-tokens", "60"]
    code, text, err = call(*with_file, *small, "--json")
    assert code == 0, err
    assert json.loads(text)["compressed"]
    code, text, _ = call("profile", "show", out)
    assert code == 0 and "All heads at once" in text and profile.policy in text


def test_what_is_read_is_not_written_over(call: Call, tmp_path: Path) -> None:
    for objective, name in (("fisher", "--texts"), ("attention-mass", "--prompts")):
        given = tmp_path / f"{objective}.json"
        given.write_text('{"prompt": "w1 w2", "completion": "w3 w4"}\n')
        out = tmp_path / "." / given.name
        code, _, err = call(
            "calibrate", "no/model", "--objective", objective, name, given, "-o", out
        )
        assert code == 2 and "would write over" in err
        assert given.read_text().startswith('{"prompt"')


def test_tables_and_defaults(call: Call, folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    base = ["calibrate", folder, "--objective", "fisher", "--texts", texts, "-o", out, *SMALL]
    code, text, err = call(*base, "--policy", "rkv(lam=0.2, kernel=3),h2o", "--dtype", "bfloat16")
    assert code == 0 and "In bfloat16 rounding alone" in err
    words = " ".join(text.split())
    assert "all heads at once" in words and "--arm best --profile" in words
    # 75 tokens are too few for 64: a quarter of them.
    assert [entry["budget"] for entry in load_costs(out).joint] == [18]
    assert load_costs(out).policy in ("rkv(lam=0.2, kernel=3)", "h2o")
    for none in ("0", ""):
        code, text, err = call(*base, "--policy", "h2o", "--check", none)
        assert code == 0 and "to check" not in err and "at once" not in text
        assert load_costs(out).joint == []


def test_the_check_of_measured_costs(call: Call, folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    base = ["calibrate", folder, "--objective", "kl", "--texts", texts, "-o", out, *SMALL[:-2]]
    code, text, err = call(*base, "--check", "12,24")
    assert code == 0 and "then 530 to check" in err
    assert [entry["budget"] for entry in load_costs(out).joint] == [12, 24]
    # The window and 8 tokens for each head: nothing is left to divide.
    assert "At budget 12 equal budgets measured no worse" in err
    assert "all heads at once" in " ".join(text.split())


def test_tables_show_some_of_many_budgets(
    call: Call, folder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "costs.json"
    base = ["calibrate", folder, "--objective", "fisher", "--texts", texts, "-o", out]
    code, text, err = call(*base, "--policy", "h2o", "--interval", "8", "--samples", "1")
    assert code == 0, err
    _, shown, _ = call("profile", "show", out)
    for page in (text, shown):
        assert "budget 16" in page and "budget 384" in page and "budget 24" not in page
    assert "Also measured at 24, 48, 96, 128, 256: see --budget." in shown
    assert "budget 24" in call("profile", "show", out, "--budget", "24")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--interval", "0"], "interval=0 is too small: give at least 1"),
        (["--samples", "0"], "samples=0 is too small: give at least 1"),
        (
            ["--check", "500"],
            "check=500: give different budgets, at least 8 (the window), that evict",
        ),
        (["--check", "a"], "check='a' must be whole numbers"),
        (["--check", "4,32"], "at least 8 (the window)"),
        (["--check", "0"], "policy='predicted_loss,rkv': which of them is kept"),
        (["--policy", "rkv,rvk"], "did you mean 'rkv'"),
        (["--policy", "calibrated"], "name a policy of its own"),
        (["--policy", ","], "policies: none given"),
        (["--stride", "2"], "--stride has no effect with --objective fisher"),
        (["--budgets", "32,16"], "rising"),
        (["--budgets", "90,99"], "even the smallest holds every text"),
        (["--objective", "kl", "--policy", "rkv,h2o"], "--objective kl measures one policy"),
        (["--objective", "kl", "--samples", "2"], "--samples has no effect with --objective kl"),
        (["--objective", "attention-mass", "--check", "9"], "--check has no effect"),
    ],
)
def test_wrong_calibrations(
    arguments: list[str], message: str, call: Call, folder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o.json"
    given = ["--objective", "fisher", *arguments]
    files = ["--prompts" if "attention-mass" in given else "--texts", texts, "-o", out]
    code, text, err = call("calibrate", folder, *files, *given)
    assert (code, text) == (2, "") and message in err and err.count("error:") == 1
    assert not out.exists()


def test_ctrl_c_leaves_the_old_file(folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    out.write_text("old")
    options = ("--objective", "fisher", "--interval", "1", "--samples", "20000")
    interrupt_calibration(folder, "--texts", texts, "-o", out, *options)
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["costs.json", "texts.jsonl"]
