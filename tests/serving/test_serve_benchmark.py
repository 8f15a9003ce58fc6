"""``benchmarks/serve.py`` with a real server and vLLM's own client."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from patience import PATIENCE

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve.py"


@pytest.mark.long
def test_a_row_and_no_second_one(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.md"
    line = [sys.executable, str(SCRIPT), "--model", str(folder), "--out", str(out), "--arms", "rkv"]
    line += ["--kv-memory", "4MiB", "--mixes", "reasoning", "--scale", "0.1"]
    line += ["--requests", "3", "--runs", "2"]
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    for expected in ("rkv at 96, 4MiB: 1 rows to measure", "rkv at 96, 4MiB: 0 rows to measure"):
        done = subprocess.run(
            line, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert expected in done.stderr
        (row,) = [text for text in out.read_text("utf-8").splitlines() if text.startswith("| rkv")]
        cells = [cell.strip() for cell in row.strip("| ").split(" | ")]
        assert cells[:9] == ["rkv", "96", "64", "reasoning", "0.1", "4MiB", "inf", "2 x 3", "-"]
        speed = float(cells[9].partition(" ± ")[0])
        assert speed > 0
        assert str(folder) not in row
