"""Policies and allocators of the user's own, in every kind of run, from outside of the package."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import reasonalloc
from tiny_boxed import save_tiny

# As a user's script: nothing of it is inside of the package, or importable by a worker.
SCRIPT = '''
import json
import sys
from dataclasses import dataclass

import torch

import reasonalloc
from reasonalloc import Arm, Candidates, HeadAllocator, HeadQuery
from reasonalloc import LayerAllocator, LayerQuery, Policy


@dataclass(frozen=True)
class EveryOther(Policy):
    """Tokens at multiples of ``step`` before all others."""

    step: int = 2

    def score(self, candidates: Candidates) -> torch.Tensor:
        return (candidates.positions % self.step == 0).float()


class FirstHeadMost(HeadAllocator):
    """Twice as many tokens for the first head."""

    def allocate(self, query: HeadQuery) -> torch.Tensor:
        demand = torch.ones_like(query.lengths)
        demand[:, 0] = 2
        return query.divide(demand, query.floor(0.0, 0))


class LaterMore(LayerAllocator):
    """One token more per head in the last layer, one less in the first."""

    def allocate(self, query: LayerQuery) -> list[int]:
        totals = [query.kv_heads * query.budget] * query.layers
        totals[0] -= query.kv_heads
        totals[-1] += query.kv_heads
        return totals


def main(model: str, out: str) -> None:
    arms = [Arm(EveryOther(3), LaterMore, FirstHeadMost()), "rkv"]
    common = {"arms": arms, "budgets": 24, "interval": 8, "progress": False}
    found = {}
    for workers in (1, 2):
        result = reasonalloc.evaluate(
            model,
            "chain(variables=2)",
            limit=3,
            samples=1,
            protocol="quick",
            max_new_tokens=40,
            workers=workers,
            out=f"{out}/{workers}",
            **common,
        )
        found[f"evaluate {workers}"] = sorted(
            (row["arm"], row["problem"], row["completion"], row["compressions"])
            for row in result.rows
        )
    loaded, tokenizer = reasonalloc.load_model(model)
    text = {"prompt_ids": [*range(5, 25)], "completion_ids": [*range(30, 70)]}
    measured = reasonalloc.fidelity(loaded, [text], tokenizer=tokenizer, **common)
    found["fidelity"] = sorted({row["arm"] for row in measured.rows})
    print(json.dumps(found))


main(*sys.argv[1:])
'''


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_evaluated_in_this_process_on_ray_and_replayed(tmp_path: Path) -> None:
    model, script = save_tiny(tmp_path / "model"), tmp_path / "script.py"
    script.write_text(SCRIPT, "utf-8")
    source = str(Path(reasonalloc.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, *sys.path])}
    command = [sys.executable, str(script), str(model), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    own = "every_other(step=3)/later_more/first_head_most"
    assert found["evaluate 1"] == found["evaluate 2"]
    assert {row[0] for row in found["evaluate 1"]} == {own, "rkv"}
    assert all(row[3] > 0 for row in found["evaluate 1"])
    assert found["fidelity"] == [own, "rkv/uniform/uniform"]
