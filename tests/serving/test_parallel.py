"""Two processes, which share heads or layers: the same tokens as on transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_bits import mostly

from conftest import INTERPRETED
from patience import PATIENCE

LENGTHS = (40, 150, 7, 100)
# vLLM's V1 runner has no pipelines on a CPU; V2's kernels are interpreted, in two processes.
PIPELINE = [
    pytest.mark.long,
    pytest.mark.skipif(not INTERPRETED, reason="needs the V2 model runner"),
]
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, settings, engine = sys.argv[1], *map(json.loads, sys.argv[2:5])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024,
              kv_cache_memory_bytes=16 << 20, additional_config={"reasonalloc": settings},
              **engine)
    limits = SamplingParams(temperature=0, max_tokens=int(sys.argv[5]), ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], limits, use_tqdm=False)
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in out]))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("shared", "arm"),
    [
        ("tensor", "predicted_loss/pyramid/uniform"),
        pytest.param("tensor", "tri_attention/pyramid/uniform", marks=pytest.mark.long),
        pytest.param("tensor", "rkv/pyramid/uniform", marks=pytest.mark.long),
        # Every head keeps to its own plan, so nothing depends on who holds it.
        pytest.param("tensor", "best-bytes", marks=pytest.mark.long),
        pytest.param("tensor", "streaming_llm/uniform/uniform", marks=pytest.mark.long),
        # Each stage has layers of other budgets than the other one has; chance is a layer's own.
        pytest.param("pipeline", "random/pyramid/uniform", marks=PIPELINE),
        pytest.param("pipeline", "rkv/pyramid/reasonalloc", marks=PIPELINE),
    ],
)
def test_two_processes(
    folder: Path,
    tmp_path: Path,
    clear: Callable[..., Any],
    files: Callable[..., Any],
    shared: str,
    arm: str,
) -> None:
    settings: dict[str, Any] = {"budget": 64, "interval": 32, "arm": arm}
    if arm in (made := files(32)):
        settings["profile"] = made[arm]
    if shared == "pipeline":
        settings |= {"budget": 24, "interval": 16}
    new = 150 if shared == "tensor" else 40
    prompts, expected = clear(LENGTHS if shared == "tensor" else (40, 7), new, **settings)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    engine = json.dumps({f"{shared}_parallel_size": 2, "max_num_seqs": 4})
    arguments = [str(folder), json.dumps(prompts), json.dumps(settings), engine, str(new)]
    done = subprocess.run(
        [sys.executable, str(program), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(s for s in done.stdout.splitlines() if s.startswith("TOKENS "))
    found = json.loads(line.removeprefix("TOKENS "))
    assert mostly(found, expected) if arm == "best-bytes" else found == expected
