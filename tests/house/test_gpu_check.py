"""The command for the day a GPU is at hand, as far as a machine without one can try it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu_check.py"
WHERE = {"gpu": "toy", "torch": "2", "sources": "abc"}


@pytest.fixture(scope="module")
def check() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = started()
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("measures a GPU, and torch sees none here")


def test_parts_by_name(check: Any) -> None:
    done = started("--only", "kernels")
    assert done.returncode == 2 and "--only kernels begins the name of no part" in done.stderr
    listed = started("--list", "--only", "kernel, serve-long").stdout.splitlines()
    assert [line.split(":")[0] for line in listed] == [
        "kernel",
        *(f"serve-long-{s}-{b}" for s in ("1", "0.25") for b in ("stock", 1024, 2048, 16384)),
    ]
    names = [part.name for part in check.parts()]
    assert len(set(names)) == len(names)
    assert all(part.minutes < 8 and check.LIMIT == 480 for part in check.parts())


def test_files_that_parts_name_exist(check: Any) -> None:
    named = {word for part in check.parts() for word in part.command if word.endswith(".py")}
    assert len(named) > 8
    assert all((ROOT / word).is_file() for word in named)


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("import json, sys; json.dump({'x': 0.9}, open(sys.argv[1], 'w'))", "passed", None),
        (
            "import json, sys; json.dump({'x': 0.7}, open(sys.argv[1], 'w'))",
            "failed",
            "x 0.70 < 0.8",
        ),
        ("raise SystemExit('broken')", "failed", "broken"),
        ("import time; time.sleep(60)", "timed out", ""),
    ],
)
def test_what_came_of_a_part(check: Any, code: str, status: str, reason: str | None) -> None:
    part = check.Part("toy", ("-c", code, "OUT"), 1, least={"x": 0.8})
    row = check.run(part, 1.5 if status == "timed out" else 60)
    assert (row["status"], row.get("reason")) == (status, reason)


def test_a_part_goes_on_where_it_passed(check: Any, tmp_path: Path) -> None:
    path, part = tmp_path / "rows.jsonl", check.Part("toy", ("-c", "1"), 1)
    rows = check.Rows(path, WHERE)
    rows.add(part, {"status": "failed", "seconds": 1.0, "reason": "a\nlast"})
    assert not check.Rows(path, WHERE).passed(part)
    assert "| toy | failed | 1 | last |" in check.table([part], rows, True)
    rows.add(part, {"status": "passed", "seconds": 2.0, "figures": {"x": 0.12345}})
    assert check.Rows(path, WHERE).passed(part)
    assert "| toy | passed | 2 | x 0.1235 |" in check.table([part], rows, True)
    for other in ({**WHERE, "sources": "other"}, {**WHERE, "gpu": "other"}):
        assert not check.Rows(path, other).passed(part)
    assert not check.Rows(path, WHERE).passed(check.Part("toy", ("-c", "2"), 1))
    serving = check.Part("serving", ("-c", "1"), 1, vllm=True)
    assert "| serving | not measured |  | vLLM is not installed |" in check.table(
        [serving], rows, False
    )


def test_figures_of_the_benchmarks(
    check: Any, tmp_path: Path, folder: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    kernel = [{"batch": b, "budget": 512, "share_of_copy": b / 100} for b in (1, 32, 64, 128)]
    found = check.figures({"copy_bytes_per_second": 4e12, "rows": kernel})
    assert found["share_of_copy"] == 0.64 and found["lowest_share"] == 0.32
    out = tmp_path / "bench.json"
    small = "--device cpu --batch 1 --prompt 4 --new-tokens 3 --arms rkv"
    code, _, message = call("bench", folder, *small.split(), "--out", out)
    assert code == 0, message
    assert set(check.figures(json.loads(out.read_text()))) == {
        "rkv tokens_per_second",
        "rkv kv_bytes",
    }


def test_vllm_finds_the_plugin_where_nothing_is_installed(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = [
        (e.group, e.name, e.value)
        for e in importlib.metadata.distribution("reasonalloc").entry_points
    ]

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as without:
        without.setattr(importlib.metadata, "distribution", missing)
        with check.plugin(tmp_path):
            (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    entries = [(e.group, e.name, e.value) for e in found.entry_points]
    assert entries == [e for e in real if e[0].startswith("vllm.")] and len(entries) == 2
