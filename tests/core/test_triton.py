"""The Triton kernels: interpreted, and compiled for real GPUs; neither needs one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patience import PATIENCE
from reasonalloc.attention import choose_backend
from reasonalloc.errors import UsageError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
HERE = Path(__file__).parents[1]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: triton looks at its variables once, when it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=PATIENCE
    )


@pytest.mark.parametrize(
    "cases", ["triton_cases.py", "paged_cases.py", "paged_coded_cases.py", "selftest_cases.py"]
)
def test_kernels_are_the_reference(cases: str) -> None:
    own = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / cases), **own)
    assert done.returncode == 0, done.stdout[-5000:]


# Every paged kernel takes three minutes; "paged" builds a few of them.
@pytest.mark.parametrize(
    "kernels",
    ["plain", "coded", "paged", "paged-coded", pytest.param("all-paged", marks=pytest.mark.long)],
)
def test_kernels_compile_for_gpus(kernels: str) -> None:
    done = run(str(HERE / "compile_kernels.py"), kernels)
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


def test_the_microbenchmark_runs(tmp_path: Path) -> None:
    script = str(HERE.parent / "benchmarks" / "kernel_bandwidth.py")
    small = "--device cpu --dtype float32 --batches 1,3 --budgets 24 --kv-heads 2 --group 2"
    options = f"{small} --head-dim 16 --repeats 4 --rotate 65536 --out {tmp_path / 'kernel.json'}"
    done = run(script, *options.split(), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "kernel.json").read_text())["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    assert all(row["relative_error"] < 1e-5 and len(row["ragged"]) == 4 for row in rows)


def test_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="needs a GPU, but the model is on cpu: use"):
        choose_backend("triton", torch.device("cpu"))
    assert type(choose_backend("auto", torch.device("cpu"))).__name__ == "Sdpa"
