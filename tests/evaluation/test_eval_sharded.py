"""The eval command with one model divided among two processes: the same results."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from test_eval import arguments, read
from transformers import AutoModelForCausalLM

import made_costs
import models
import reasonalloc
from patience import PATIENCE
from reasonalloc.cli.main import main
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.batch import Job
from reasonalloc.evaluation.chunks import Chunk, Item, Outcome
from reasonalloc.evaluation.sharded import _joined
from reasonalloc.integrations.hf.sharding import find_shard
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.sharding import HeadShard
from tiny_boxed import save_tiny

Call = Callable[..., tuple[int, str, str]]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("boxed"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *TORCHRUN, "-m", "reasonalloc", *arguments, "--tp-plan", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, env=environment
    )


@pytest.mark.long
@gloo
def test_two_processes_sample_what_one_does(model: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    costs = tmp_path / "costs.json"
    made = made_costs.of_model(AutoModelForCausalLM.from_pretrained(model))
    dataclasses.replace(made, policy="predicted_loss").save(costs)
    arms = "full,rkv,snapkv/pyramid/uniform,predicted_loss/uniform/uniform"
    changes = {"arms": arms, "profile": costs}
    assert main(arguments(model, here, **changes)) == 0
    first = run(*arguments(model, there, **changes, limit=2))
    assert first.returncode == 0, first.stderr
    second = run(*arguments(model, there, **changes))
    assert second.returncode == 0, second.stderr
    assert "16 of 32 samples are in" in second.stderr
    manifest, samples, events = read(there)
    expected_manifest, expected, expected_events = read(here)
    for row in (*samples.values(), *expected.values()):
        row.pop("batch")
    assert samples == expected and events == expected_events
    assert manifest.pop("tp_size") == 2
    if version("transformers") < "5.18":  # a process sees its own part of the weights only
        manifest.pop("weights_hash"), expected_manifest.pop("weights_hash")
    assert manifest == expected_manifest


@pytest.mark.long
@gloo
def test_heads_that_trade_are_not_mixed_with_whole_models(model: Path, tmp_path: Path) -> None:
    changes = {"arms": "snapkv/uniform/reasonalloc", "limit": 1}
    done = run(*arguments(model, tmp_path / "a", **changes))
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert main(arguments(model, tmp_path / "b", **changes)) == 2
    events = [json.loads(e) for e in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    assert events and all(len(e["budgets"]) == 4 for e in events)
    assert all(sum(e["budgets"][:2]) == sum(e["budgets"][2:]) == 48 for e in events)
    assert any(e["budgets"][0] != e["budgets"][1] for e in events)


def test_refusals(call: Call, model: Path, tmp_path: Path) -> None:
    base = [*arguments(model, tmp_path), "--tp-plan", "auto"]
    code, _, err = call(*base)
    assert code == 2 and "torchrun --nproc-per-node" in err
    code, _, err = call(*base, "--workers", "2")
    assert code == 2 and "give one of the two" in err
    code, _, err = call(*base, "--device-map", "auto")
    assert code == 2 and "device_map='auto' and tp_plan='auto'" in err


def test_shares_add_up() -> None:
    shards = [HeadShard(rank, 2) for rank in range(2)]
    assert [s.total(26, None, 4) for s in shards] == [14, 12]
    assert [s.total(26, [3, 9, 10, 4], 4) for s in shards] == [12, 14]
    assert shards[1].shape(LayerShape(4, 8, 16, None)) == LayerShape(2, 4, 16, None)


def test_a_model_that_was_not_divided_is_whole() -> None:
    model = models.tiny("llama")
    with reasonalloc.attach(model, budget=16) as attachment:
        assert attachment.shard == HeadShard() == find_shard(model, attachment.shapes)


def test_heads_that_do_not_divide_are_refused() -> None:
    class Divided:
        tp_size, tp_plan = 2, {"model.layers.*.self_attn.k_proj": "colwise"}

    with pytest.raises(reasonalloc.UnsupportedError, match="3 KV heads"):
        find_shard(Divided(), [LayerShape(3, 9, 16, None)])


def test_a_batch_that_does_not_fit_ends_the_run() -> None:
    chunk = Chunk(Job("rkv", 24), (Item("p", "text", 0, 0),) * 3)
    with pytest.raises(UsageError, match=r"3 sequences do not fit .* smaller --batch-size"):
        _joined(Outcome(None, [], "out of memory"), chunk)
