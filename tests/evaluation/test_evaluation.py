"""Arms on problems, intervals, workers, summaries; with a tiny random model."""

from __future__ import annotations

import signal
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reasonalloc import attach
from reasonalloc.errors import UsageError
from reasonalloc.evaluation import threads
from reasonalloc.evaluation.batch import Job, Settings, Stopped
from reasonalloc.evaluation.chunks import Chunk, Item, Outcome
from reasonalloc.evaluation.demo import ARMS, SPARE_TOKENS
from reasonalloc.evaluation.intervals import wilson
from reasonalloc.evaluation.progress import Observer
from reasonalloc.evaluation.threads import Threads
from reasonalloc.loading import load_model
from reasonalloc.report.demo import rank_arms, verdict
from tiny_boxed import BUDGET, INTERVAL, PROBLEMS, WINDOW, made_up, run_job, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("boxed"))


@pytest.fixture(scope="module")
def worker(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder), "float32", "cpu")


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(trials - successes, trials)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_refuses_nonsense() -> None:
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no share"):
            wilson(successes, trials)


def test_full_cache_is_plain_generate(worker: tuple[Any, Any]) -> None:
    model, tokenizer = worker
    result = run_job(model, tokenizer, PROBLEMS, Job("full"), Settings(INTERVAL, WINDOW))
    limit = max(p.solution_tokens for p in PROBLEMS) + SPARE_TOKENS
    for prompt, completion in zip(result.prompts, result.completions, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(ids, max_new_tokens=limit, do_sample=False)
        assert tuple(expected[0, len(prompt) :].tolist()) == completion
    tokens = len(result.prompts[0]) + limit - 1
    with attach(model, budget=BUDGET) as attachment:
        assert result.kv_bytes == attachment.plan(1).full_bytes(tokens)
    assert len(result.correct) == 3
    assert result.compressions == 0


def test_compressed_bytes_are_the_plan(worker: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = worker
    settings = Settings(INTERVAL, WINDOW, folder / "profile.json", folder / "costs.json")
    for arm in ARMS:
        result = run_job(model, tokenizer, PROBLEMS, Job(arm, BUDGET), settings)
        with attach(model, budget=BUDGET, interval=INTERVAL, window=WINDOW) as attachment:
            assert result.kv_bytes == attachment.plan(1).slab_bytes, arm
        assert result.compressions > 2
        assert 0 < result.prefill_seconds < result.seconds


def test_answers_are_graded_and_cut_at_the_end_token(worker: tuple[Any, Any]) -> None:
    model, tokenizer = worker
    end = tokenizer.eos_token
    texts = [p.solution + f" {end} ok ok" for p in PROBLEMS]
    texts[1] = PROBLEMS[1].solution.rsplit(" ", 2)[0] + f" x . {end}"  # no digit: no answer
    ids = tokenizer([t.replace(" x ", " ok ") for t in texts], padding=True, return_tensors="pt")

    def generate(input_ids: Any, **_: Any) -> Any:
        return torch.cat([input_ids, ids["input_ids"]], dim=1)

    fake = SimpleNamespace(
        generate=generate,
        get_decoder=model.get_decoder,
        device=model.device,
        config=model.config,
        generation_config=model.generation_config,
    )
    result = run_job(fake, tokenizer, PROBLEMS, Job("full"), Settings(INTERVAL, WINDOW))
    assert result.correct == (True, False, True)
    assert all(c[-1] == tokenizer.eos_token_id for c in result.completions)


def test_a_watcher_stops_a_run(worker: tuple[Any, Any]) -> None:
    seen: list[int] = []

    def watch(steps: int) -> bool:
        seen.append(steps)
        return steps < 5

    with pytest.raises(Stopped):
        run_job(*worker, PROBLEMS, Job("rkv", BUDGET), Settings(INTERVAL, WINDOW), watch)
    assert seen == [1, 2, 3, 4, 5]
    assert "generate" not in worker[0].__dict__  # detached all the same


def chunks(count: int) -> deque[Chunk]:
    """One job each, at budgets from 1 on."""
    item = Item("p", "text", 0, 0)
    return deque(Chunk(Job("rkv", budget), (item,)) for budget in range(1, count + 1))


class Fake:
    """A solver that does what it is told, and notes its chunks."""

    def __init__(self, run: Any = lambda chunk, watch: None) -> None:
        self.run, self.used = run, []

    def solve(self, chunk: Chunk, watch: Any) -> Outcome:
        self.used.append(chunk)
        watch(1)
        self.run(chunk, watch)
        return Outcome([], [])


def test_jobs_keep_their_order_and_use_every_worker() -> None:
    solvers = [Fake(), Fake()]
    todo = chunks(8)
    wanted = list(todo)
    finished = [chunk for chunk, _ in Threads(solvers, Observer()).outcomes(todo)]
    assert sorted(finished, key=wanted.index) == wanted and len(finished) == 8
    assert not todo
    for solver in solvers:
        assert solver.used and solver.used == sorted(solver.used, key=wanted.index)


def test_ctrl_c_keeps_what_was_finished() -> None:
    def run(chunk: Chunk, watch: Any) -> None:
        if chunk.job.budget == 2:
            signal.raise_signal(signal.SIGINT)
            while watch(1):
                pass
            raise Stopped

    finished = []
    with pytest.raises(KeyboardInterrupt):
        for chunk, _ in Threads([Fake(run)], Observer()).outcomes(chunks(3)):
            finished.append(chunk.job.budget)
    assert finished == [1]


def test_no_job_starts_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(threads, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def run(chunk: Chunk, watch: Any) -> None:
        now[0] = 7.0

    todo = chunks(8)
    wanted = list(todo)
    finished = [chunk for chunk, _ in Threads([Fake(run)], Observer(), until=6.0).outcomes(todo)]
    assert finished == wanted[:1]


def test_an_error_in_a_worker_comes_out() -> None:
    def run(chunk: Chunk, watch: Any) -> None:
        raise UsageError("broken")

    with pytest.raises(UsageError, match="broken"):
        list(Threads([Fake(run), Fake(run)], Observer()).outcomes(chunks(3)))


def test_rows_mark_ties_and_runs_without_compression() -> None:
    results = [
        made_up("random", 64, 2),
        made_up("rkv", 64, 7),
        made_up("reasonalloc", 64, 7),
        made_up("rkv", 32, 0),
        made_up("full", None, 10, compressions=0),
        made_up("rkv", 999, 10, compressions=0),
    ]
    rows = rank_arms([sample for result in results for sample in result])
    assert (rows[0].arm, rows[0].budget) == ("full", None)
    assert [r.budget for r in rows] == [None, 32, 64, 64, 64, 999]
    assert {(r.arm, r.budget) for r in rows if r.best} == {
        ("rkv", 64),
        ("reasonalloc", 64),
        ("rkv", 999),
    }
    assert [r.budget for r in rows if r.idle] == [999]
    assert rows[0].tokens_per_second == 10


def test_the_verdict_says_where_ours_is_behind() -> None:
    def say(*pairs: tuple[str, int]) -> str:
        return " ".join(verdict(rank_arms([s for arm, c in pairs for s in made_up(arm, 64, c)])))

    assert (
        "not the best arm at budget 64 (1 of 10 right, rkv 10 of 10; the intervals do not"
        in say(("reasonalloc", 1), ("rkv", 10))
    )
    assert "intervals overlap" in say(("reasonalloc", 5), ("rkv", 6))
    assert "most right answers at budget 64" in say(("reasonalloc", 6), ("rkv", 5))
    assert "shares the first place at budget 64" in say(("reasonalloc", 5), ("rkv", 5))
    assert "No arm has a right answer at budget 64" in say(("reasonalloc", 0), ("rkv", 0))
    assert "did not run" in say(("rkv", 5))
