"""Wrong arguments of the Python API: one line that names the field, never a trace from inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reasonalloc
from models import tiny
from reasonalloc import UsageError
from reasonalloc.allocators.head.reasonalloc import ReasonAllocHeads
from reasonalloc.texts import Trajectory

TEXT = Trajectory(tuple(range(5, 15)), tuple(range(20, 30)))


def evaluate(**changes: Any) -> Any:
    return reasonalloc.evaluate(
        **{"model": "nowhere", "task": "chain", "progress": False, **changes}
    )


def fidelity(**changes: Any) -> Any:
    given = {"texts": [TEXT], "arms": "rkv", "budgets": 8, "progress": False, **changes}
    return reasonalloc.fidelity(tiny("llama"), **given)


def plan(**changes: Any) -> Any:
    return reasonalloc.plan(**{"model": tiny("llama").config, "budget": 12, **changes})


def attach(**changes: Any) -> Any:
    return reasonalloc.attach(tiny("llama"), **{"budget": 12, **changes})


def calibrate(**changes: Any) -> Any:
    given = {"tokenizer": None, "texts": [TEXT], "objective": "fisher", "progress": False}
    return reasonalloc.calibrate(tiny("llama"), **{**given, **changes})


CALLS: dict[str, Callable[[], Any]] = {
    "out=''": lambda: evaluate(out="", arms="rkv"),
    "out=3": lambda: fidelity(out=3),
    "arms=3": lambda: evaluate(arms=3),
    "arms: None": lambda: evaluate(arms=[None]),
    "protocol": lambda: evaluate(protocol=["paper"]),
    "temperature": lambda: evaluate(temperature="hot"),
    "step": lambda: evaluate(step=3),
    "progress": lambda: evaluate(progress="yes"),
    "task": lambda: evaluate(task=3),
    "arm=3": lambda: attach(arm=3),
    "arm=<class": lambda: attach(arm=reasonalloc.Arm),
    "protect_prompt": lambda: attach(protect_prompt="no"),
    "dtype": lambda: plan(dtype=3),
    "model=3": lambda: plan(model=3),
    "model=None": lambda: reasonalloc.load_model(None),  # type: ignore[arg-type]
    "path=3": lambda: reasonalloc.open_calibrated(3),  # type: ignore[arg-type]
    "texts=3": lambda: calibrate(texts=3),
    "texts=4": lambda: fidelity(texts=4),
    "objective 3": lambda: calibrate(objective=3),
    "objective ['kl']": lambda: calibrate(objective=["kl"]),
    "tokenizer=3": lambda: calibrate(tokenizer=3),
    "tokenizer='qwen'": lambda: fidelity(tokenizer="qwen"),
    "tokenizer=4": lambda: evaluate(model=tiny("llama"), tokenizer=4),
    "prompt_ids=3": lambda: Trajectory(3, ()),  # type: ignore[arg-type]
    "prompt_ids=()": lambda: Trajectory((), (1, 2)),
    "prompt_ids=[[1, 2]]": lambda: Trajectory([[1, 2]], (1, 2)),  # type: ignore[arg-type]
    "completion_ids=(1,)": lambda: Trajectory((1,), (1,)),
    "completion_ids='ab'": lambda: Trajectory((1,), "ab"),  # type: ignore[arg-type]
    "dtype=torch.int8": lambda: plan(dtype=torch.int8),
    "model=4": lambda: reasonalloc.detach(4),
    "tokens": lambda: plan().memory(1).kv_bytes(-1),
    "budget=99999999999999": lambda: plan(budget=99999999999999),
    "interval=1000": lambda: attach(interval=10**30),
    "seed=1000": lambda: attach(seed=10**30),
    "kernel=1000": lambda: attach(arm="rkv(kernel=1000000000000000000000)/uniform/uniform"),
    "beta=120": lambda: attach(arm="rkv/uniform/reasonalloc(beta=120)"),
    "beta=nan": lambda: ReasonAllocHeads(beta=float("nan")),
    "gamma=300": lambda: attach(arm="rkv/profile(gamma=300)/uniform"),
    "attention=['sdpa']": lambda: attach(attention=["sdpa"]),
    "profile=3": lambda: fidelity(profile=3),
    "profile=[None]": lambda: fidelity(profile=[None]),
    "check=16": lambda: calibrate(check=16),
    "check='16'": lambda: calibrate(check="16"),
    "policy=3": lambda: calibrate(policy=3),
    "kv_dtypes=None": lambda: calibrate(kv_dtypes=None),
    "budgets=8": lambda: calibrate(budgets=8),
    "count=-1": lambda: calibrate(count=-1),
    "count=True": lambda: calibrate(count=True),
    "count=1.5": lambda: calibrate(count=1.5),
    "generate=1": lambda: calibrate(generate=1),
    "tell=3": lambda: calibrate(tell=3),
    "temperature=1e-310": lambda: evaluate(temperature=1e-310),
    "temperature=inf": lambda: evaluate(temperature=float("inf")),
    "top_p=0.3": lambda: evaluate(protocol="greedy", top_p=0.3),
    "top_k=5": lambda: evaluate(protocol="paper", samples=1, temperature=0, top_k=5),
}


@pytest.mark.parametrize("field", CALLS)
def test_wrong_arguments(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        CALLS[field]()
    assert field in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_detached_handle() -> None:
    handle = attach()
    handle.detach()
    for use in (handle.plan, handle.__enter__, handle.new_cache):
        with pytest.raises(UsageError, match="was detached: call attach"):
            use()
