"""The eval command on Ray workers: the same results, also when a worker is killed."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("ray")

import psutil
import torch
from test_eval import arguments, read, samples_in, start, wait_for

from patience import PATIENCE
from reasonalloc.cli.main import main
from reasonalloc.config import Arm
from reasonalloc.errors import UsageError
from reasonalloc.evaluation import cluster
from reasonalloc.evaluation.batch import Job
from reasonalloc.evaluation.chunks import Chunk, Item
from reasonalloc.evaluation.evaluate import evaluate
from reasonalloc.policies import POLICIES, Candidates, Policy
from tiny_boxed import save_tiny

WORKERS = ("--workers", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("boxed"))


def two_cores() -> bool:
    return (psutil.cpu_count() or 1) >= 2


def workers_of(process: Any) -> list[Any]:
    """Worker processes that a run started."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if child.name().startswith("ray::Worker") or "ray::Worker" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.long
@pytest.mark.skipif(not two_cores(), reason="needs two cores")
def test_a_killed_worker_is_replaced(model: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert main(arguments(model, here, limit=8)) == 0
    process = start([*arguments(model, there, limit=8), *WORKERS])
    wait_for(there, 4, process)
    victims = workers_of(process)
    assert len(victims) == 2
    victims[0].kill()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert "died" in err and "takes its batch up again" in " ".join(err.split())
    assert read(there) == read(here)
    limit = time.monotonic() + PATIENCE
    while any(victim.is_running() for victim in victims):  # nothing stays behind
        assert time.monotonic() < limit
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.skipif(not two_cores(), reason="needs two cores")
def test_mistakes_are_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = json.loads((model / "profile.json").read_text())
    foreign = tmp_path / "foreign.json"
    foreign.write_text(json.dumps({**profile, "config_hash": "0" * 16}))
    run = arguments(model, tmp_path, arms="reasonalloc", profile=foreign)
    code, err = main([*run, *WORKERS]), capsys.readouterr().err
    assert code == 2 and "calibrate this model" in err and len(err.splitlines()) == 1, err
    code = main([*arguments(model, tmp_path), "--workers", "500"])
    assert code == 2 and "workers=500 is too many: Ray has" in capsys.readouterr().err
    code = main([*arguments(model, tmp_path), "--ray-address", "127.0.0.1:1"])
    assert code == 2 and "ray_address='127.0.0.1:1' does not answer" in capsys.readouterr().err
    assert samples_in(tmp_path) == 0


@pytest.mark.long
@pytest.mark.skipif(not two_cores(), reason="needs two cores")
def test_own_parts_reach_the_workers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES, "_entries", POLICIES.entries())  # forgotten after it
    monkeypatch.setattr(POLICIES, "_objects", {})

    class Earliest(Policy):
        def score(self, candidates: Candidates) -> torch.Tensor:
            return -candidates.positions.float()

    small: dict[str, Any] = {"budgets": 24, "limit": 2, "samples": 1, "max_new_tokens": 40}
    small |= {"interval": 8, "window": 4, "temperature": 0.6, "progress": False}
    arms = [Arm(Earliest())]
    here, there = (
        evaluate(str(model), "chain(variables=2)", arms=arms, workers=workers, **small).rows
        for workers in (1, 2)
    )
    texts = [sorted((row["problem"], row["completion"]) for row in rows) for rows in (here, there)]
    assert texts[0] == texts[1] and all(row["compressions"] for row in there)


def dying(ray: Any) -> type[Any]:
    class Worker:
        def __init__(self, arguments: Any, threads: Any, folder: Any) -> None: ...

        def check(self, known: Any) -> None:
            os._exit(1)

        def solve(self, chunk: Any, known: Any) -> None:
            os._exit(1)

        @ray.method(concurrency_group="watch")
        def steps(self) -> int:
            return 0

    return Worker


@pytest.mark.long
def test_a_chunk_that_kills_every_worker_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    died: list[int] = []
    observer: Any = SimpleNamespace(
        died=lambda worker, chunk: died.append(worker), stepped=lambda *_: None
    )
    monkeypatch.setattr(cluster, "_worker_class", dying)
    chunk = Chunk(Job("rkv", 24), (Item("60", "text", 0, 0),))
    nothing: Any = (None,) * 4
    with (
        cluster.Cluster(nothing, 1, None, observer) as workers,
        pytest.raises(UsageError, match="workers died 3 times on rkv, budget 24, problem '60"),
    ):
        list(workers.outcomes(deque([chunk])))
    assert died == [0, 0]


@pytest.mark.parametrize(
    ("message", "address", "tries"),
    [
        ("The current node timed out during startup.", None, 3),
        ("The current node timed out during startup.", "auto", 1),
        ("no such thing", None, 1),
    ],
)
def test_a_slow_start_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, message: str, address: str | None, tries: int
) -> None:
    """Ray's own limit is 30 s, whatever else the machine does."""
    import ray

    calls: list[str] = []

    def init(**settings: Any) -> None:
        calls.append(settings["address"])
        raise Exception(message)

    monkeypatch.setattr(ray, "init", init)
    nothing: Any = (None,) * 4
    with pytest.raises(UsageError, match=message[:12]):
        cluster.Cluster(nothing, 1, address, SimpleNamespace())  # type: ignore[arg-type]
    assert calls == [address or "local"] * tries


@pytest.mark.long
def test_a_model_that_kills_every_worker_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_worker_class", dying)
    nothing, observer = (None,) * 4, SimpleNamespace()
    with (
        cluster.Cluster(nothing, 1, None, observer) as workers,  # type: ignore[arg-type]
        pytest.raises(UsageError, match="workers died 3 times while they loaded the model"),
    ):
        workers.check([], [])
