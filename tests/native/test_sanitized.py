"""Whether the sanitizers of ``make sanitize`` see what they are there for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "REASONALLOC_SANITIZE" not in os.environ, reason="the loops are built without sanitizers"
)
# Calls without the checks of Python, on memory that is too short.
CALLS = {
    "heap-buffer-overflow": """
own, rows, index = torch.zeros(2, 2), torch.zeros(4, 2), torch.arange(4)
keep, offsets = torch.ones(4, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
at = [t.data_ptr() for t in (own, rows, index, keep, offsets)]
library().reasonalloc_move_rows(*at, 1, 1, 4, 4, 4, 8, 1)
""",
    "misaligned address": """
x = torch.zeros(64, dtype=torch.uint8)
numbers = torch.zeros(2, dtype=torch.int64)
at = [x.data_ptr() + 1, *[numbers.data_ptr()] * 3]
library().reasonalloc_robustify(*at, 1.0, 1, 2, x.data_ptr())
""",
}


@pytest.mark.parametrize("fault", CALLS)
def test_a_fault_is_seen(fault: str) -> None:
    preload = " ".join(
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
        for name in ("libasan", "libstdc++")
    )
    program = (
        "import torch, sanitized; sanitized.prepare()\n"
        "from reasonalloc.ops.native.build import library\n" + CALLS[fault]
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "LD_PRELOAD": preload, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and fault in done.stderr, done.stderr[-2000:]
