"""The parts of `make gpu-check` that serve run on a CPU too, on a smaller model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu_engine.py"
TINY = "--shape tiny --mix long --scale 0.05 --requests 6 --share 0.5 --dtype float32 --eager"


def test_throughput_of_a_mix(tmp_path: Path) -> None:
    out = tmp_path / "row.json"
    command = [sys.executable, str(SCRIPT), "throughput", *TINY.split(), "--budget", "64"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["requests"] == 6 and found["preemptions"] == 0
    assert 1 <= found["most_running"] <= 6 and found["steps"] >= 306  # the longest answer
    assert 0 < found["tpot_q1"] <= found["tpot_median"] <= found["tpot_q3"]
    assert found["tokens_per_second"] > 0 and found["ttft_median"] < found["seconds"]
