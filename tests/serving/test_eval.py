"""``reasonalloc eval --engine vllm``: the same files and, greedily, the same tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import decided

from reasonalloc.cli.main import main
from reasonalloc.evaluation.facts import encode
from reasonalloc.evaluation.tasks.base import TASKS

pytest.importorskip("math_verify")

JOBS = ["--arms", "full,rkv/uniform/reasonalloc", "--budgets", "32"]


@pytest.fixture(scope="module")
def problems(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three problems whose completions leave no doubt, see ``clear``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [
        {
            "question": " ".join(f"w{(7 * i + j) % 50}" for j in range(20 + 10 * i)),
            "answer": "#### 1",
        }
        for i in range(9)
    ]
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"

    def write(chosen: list[int]) -> None:
        path.write_text("".join(json.dumps(rows[i]) + "\n" for i in chosen))

    write(list(range(len(rows))))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = TASKS.create("gsm8k").load(str(path), None).chosen
    prompts = [encode(tokenizer, problem.prompt) for problem in loaded]
    settings = {"budget": 32, "interval": 16, "arm": "rkv/uniform/reasonalloc"}
    every = ({}, settings, {**settings, "prompt": "pin"})
    room = torch.stack([decided(model, prompts, 120, own)[1] for own in every]).amin(dim=0)
    best = room.argsort(descending=True)[:3].tolist()
    assert min(room[best]) > 1
    write(sorted(best))
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Engines that do not compile, here and in workers: that takes a minute for each."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    with torch.compiler.set_stance("force_eager"):
        yield


def evaluate(folder: Path, problems: Path, out: Path, *more: str) -> int:
    task = ["--task", "gsm8k", "--data", str(problems), "--protocol", "greedy"]
    sizes = ["--max-new-tokens", "120", "--interval", "16", "--batch-size", "2"]
    return main(["eval", str(folder), *task, *sizes, *JOBS, "--out", str(out), *more])


def read(out: Path) -> tuple[dict[str, Any], dict[Any, dict[str, Any]]]:
    """The manifest and the samples."""
    first, *rest = map(json.loads, (out / "samples.jsonl").read_text().splitlines())
    return first["manifest"], {(r["arm"], r["budget"], r["problem"], r["sample"]): r for r in rest}


def test_greedy_samples_equal_those_of_transformers(
    folder: Path, problems: Path, tmp_path: Path
) -> None:
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
    assert manifest["vllm"].startswith("0.3")
    assert evaluate(folder, problems, out) == 2  # another engine's samples are not mixed in


def test_fewer_bits(folder: Path, problems: Path, tmp_path: Path) -> None:
    given = ("--kv-dtype", "int8", "--limit", "1", "--arms", "rkv", "--budgets", "24")
    out = [tmp_path / "hf", tmp_path / "vllm"]
    assert evaluate(folder, problems, out[0], *given) == 0
    assert evaluate(folder, problems, out[1], *given, "--engine", "vllm") == 0
    (_, expected), (_, found) = map(read, out)
    assert set(found) == set(expected) and len(found) == 1
    for name, row in expected.items():
        assert row["compressions"] > 0
        assert row["compressed_kv_bytes"] < 0.5 * row["full_16bit_kv_bytes"]
        # Of single tokens a code may differ, see test_bits.py.
        for field in ("prompt_tokens", "compressed_kv_bytes", "budget_tokens", "seed"):
            assert found[name][field] == row[field], (name, field)


def test_pinned_prompts(folder: Path, problems: Path, tmp_path: Path) -> None:
    given = ("--prompt", "pin", "--arms", "rkv/uniform/reasonalloc", "--limit", "2")
    out = [tmp_path / "hf", tmp_path / "vllm"]
    assert evaluate(folder, problems, out[0], *given) == 0
    assert evaluate(folder, problems, out[1], *given, "--engine", "vllm") == 0
    (_, expected), (_, found) = map(read, out)
    assert set(found) == set(expected) and len(found) == 2
    same = ("completion", "prompt_tokens", "compressions", "compressed_kv_bytes", "budget_tokens")
    for name, row in expected.items():
        assert row["compressions"] > 0
        assert {k: found[name][k] for k in same} == {k: row[k] for k in same}, name


@pytest.mark.long
def test_an_engine_per_worker(
    folder: Path, problems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
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
        (
            ["--arms", "rkv", "--prompt", "protect"],
            "--prompt protect cannot be used with --engine vllm",
        ),
        (
            ["--arms", "rkv", "--prompt", "pin", "--pin-limit", "9"],
            "--pin-limit cannot be used with --engine vllm",
        ),
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
