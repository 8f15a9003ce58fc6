"""The Triton kernels: interpreted, and compiled for real GPUs; neither needs one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reasonalloc.attention import choose_backend
from reasonalloc.errors import UsageError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
HERE = Path(__file__).parent


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: triton looks at its variables once, when it is imported."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def test_kernels_are_the_reference() -> None:
    own = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = str(HERE / "triton_cases.py")
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", cases, **own)
    assert done.returncode == 0, done.stdout[-5000:]


def test_kernels_compile_for_gpus() -> None:
    done = run(str(HERE / "compile_kernels.py"))
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


def test_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="needs a GPU, but the model is on cpu: use"):
        choose_backend("triton", torch.device("cpu"))
    assert type(choose_backend("auto", torch.device("cpu"))).__name__ == "Sdpa"
