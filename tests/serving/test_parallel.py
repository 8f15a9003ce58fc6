"""Two tensor-parallel processes: the same tokens as on transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE

LENGTHS = (40, 150, 7, 100)
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts, settings = sys.argv[1], *map(json.loads, sys.argv[2:])
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024,
              tensor_parallel_size=2, kv_cache_memory_bytes=16 << 20,
              additional_config={"reasonalloc": settings})
    limits = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    out = llm.generate([{"prompt_token_ids": p} for p in prompts], limits, use_tqdm=False)
    print("TOKENS", json.dumps([list(o.outputs[0].token_ids) for o in out]))
"""


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("arm", ["rkv/pyramid/uniform", "streaming_llm/uniform/uniform"])
def test_two_processes(folder: Path, tmp_path: Path, clear: Callable[..., Any], arm: str) -> None:
    settings = {"budget": 64, "interval": 32, "arm": arm}
    prompts, expected = clear(LENGTHS, 150, **settings)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    arguments = [str(folder), json.dumps(prompts), json.dumps(settings)]
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
    assert json.loads(line.removeprefix("TOKENS ")) == expected
