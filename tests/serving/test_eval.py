"""``reasonalloc eval --engine vllm``: the same files and, greedily, the same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reasonalloc.cli.main import main

pytest.importorskip("math_verify")

JOBS = ["--arms", "full,rkv/uniform/reasonalloc", "--budgets", "32"]


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    rows = [
        {
            "question": " ".join(f"w{(7 * i + j) % 50}" for j in range(20 + 30 * i)),
            "answer": "#### 1",
        }
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(folder: Path, problems: Path, out: Path, *more: str) -> int:
    task = ["--task", "gsm8k", "--data", str(problems), "--protocol", "greedy"]
    sizes = ["--max-new-tokens", "120", "--interval", "16", "--batch-size", "2"]
    return main(["eval", str(folder), *task, *sizes, *JOBS, "--out", str(out), *more])


def read(out: Path) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """The manifest and the samples."""
    first, *rest = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    return first["manifest"], {(r["arm"], r["budget"], r["problem"], r["sample"]): r for r in rest}


def test_greedy_samples_equal_those_of_transformers(
    folder: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert evaluate(folder, problems, tmp_path / "hf") == 0
    out = tmp_path / "vllm"
    assert evaluate(folder, problems, out, "--engine", "vllm", "--limit", "2") == 0
    assert evaluate(folder, problems, out, "--engine", "vllm") == 0  # goes on
    (_, expected), (manifest, found) = read(tmp_path / "hf"), read(out)
    assert set(found) == set(expected)
    assert len(found) == 6
    same = ("completion", "completion_tokens", "prompt_tokens", "finish", "seed", "compressions")
    for name, row in expected.items():
        assert {k: found[name][k] for k in same} == {k: row[k] for k in same}, name
        assert (found[name]["compressions"] > 0) == (name[1] is not None)
    assert manifest["engine"] == "vllm"
    assert manifest["vllm"].startswith("0.32")
    assert evaluate(folder, problems, out) == 2  # another engine's samples are not mixed in


def test_an_engine_per_worker(
    folder: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = [tmp_path / "one", tmp_path / "two"]
    assert evaluate(folder, problems, out[0], "--engine", "vllm") == 0
    assert evaluate(folder, problems, out[1], "--engine", "vllm", "--workers", "2") == 0
    (one, expected), (two, found) = map(read, out)
    assert one == two
    assert set(found) == set(expected)
    for name, row in expected.items():
        for field in ("completion", "compressions", "kv_bytes", "finish", "seed"):
            assert found[name][field] == row[field], (name, field)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--device-map", "auto"], "--device-map cannot be used with --engine vllm"),
        (["--protect-prompt"], "--protect-prompt cannot be used"),
        (["--arms", "h2o"], "looks at the attention"),
    ],
)
def test_refused(
    folder: Path,
    problems: Path,
    tmp_path: Path,
    more: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate(folder, problems, tmp_path / "out", "--engine", "vllm", *more) == 2
    assert says in capsys.readouterr().err
