"""What the demo says: rows with intervals, the best arm of each budget, a verdict, the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from reasonalloc.calibrated.demand import load_profile
from reasonalloc.evaluation.demo import DemoPlan, DemoRun, Recording
from reasonalloc.evaluation.intervals import wilson
from reasonalloc.report.curves import wave
from reasonalloc.report.trace import telling_problem, trace
from reasonalloc.tables import human
from reasonalloc.version import __version__

OURS = "reasonalloc"
_NUMBERS = ("budget", "right", "accuracy", "95 %", "KV/seq", "tok/s")
#: Columns of the demo's table, and whether they hold numbers.
COLUMNS = [
    (name, name in _NUMBERS)
    for name in ("budget", "arm", "right", "accuracy", "95 %", "KV/seq", "tok/s", "")
]


@dataclass(frozen=True)
class Row:
    """One arm at one budget.

    Attributes:
        arm: its name; ``full`` has no budget.
        budget: mean tokens per layer and KV head.
        correct, n: right answers, problems.
        low, high: 95 % Wilson interval of the share of right answers.
        kv_bytes: most bytes of keys and values per sequence.
        tokens_per_second: of the whole batch.
        compressions: of layers, in the batch.
        best: whether no arm at this budget has more right answers (ties are all best).
    """

    arm: str
    budget: int | None
    correct: int
    n: int
    low: float
    high: float
    kv_bytes: int
    tokens_per_second: float
    compressions: int
    best: bool = False

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.n

    @property
    def idle(self) -> bool:
        """Whether there was a budget, but never a compression: the same as the full cache."""
        return self.budget is not None and self.compressions == 0

    def data(self) -> dict[str, Any]:
        """For JSON: sizes in bytes, shares between 0 and 1."""
        return {
            "arm": self.arm,
            "budget": self.budget,
            "correct": self.correct,
            "n": self.n,
            "accuracy": round(self.accuracy, 4),
            "interval95": [round(self.low, 4), round(self.high, 4)],
            "kv_bytes_per_sequence": self.kv_bytes,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "layer_compressions": self.compressions,
            "never_compressed": self.idle,
            "best": self.best,
        }


def rank_arms(samples: Sequence[dict[str, Any]]) -> list[Row]:
    """Return rows in the order full cache, then budgets from small to large, best arm first.

    Args:
        samples: rows of an ``EvaluationResult``, one sample per problem, one batch per arm and
            budget.
    """
    parts: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for sample in samples:
        parts.setdefault((sample["arm"], sample["budget"]), []).append(sample)
    rows = [_row(arm, budget, own) for (arm, budget), own in parts.items()]
    rows.sort(key=lambda row: (row.budget is not None, row.budget or 0, -row.correct))
    most: dict[int | None, int] = {}
    for row in rows:
        most[row.budget] = max(most.get(row.budget, 0), row.correct)
    return [
        replace(row, best=row.budget is not None and 0 < row.correct == most[row.budget])
        for row in rows
    ]


def _row(arm: str, budget: int | None, samples: Sequence[dict[str, Any]]) -> Row:
    correct, n = sum(sample["correct"] for sample in samples), len(samples)
    low, high = wilson(correct, n)
    seconds = samples[0]["seconds"]
    tokens = sum(sample["completion_tokens"] for sample in samples)
    return Row(
        arm=arm,
        budget=budget,
        correct=correct,
        n=n,
        low=low,
        high=high,
        kv_bytes=max(sample["kv_bytes"] for sample in samples),
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        compressions=max(sample["compressions"] for sample in samples),
    )


def verdict(rows: Sequence[Row]) -> list[str]:
    """Sentences on where ``reasonalloc`` is the best arm and where it is not."""
    ours = [row for row in rows if row.arm == OURS]
    if not ours:
        return ["reasonalloc did not run, so nothing here says how good it is."]
    first, shared, behind, none = [], [], [], []
    for row in ours:
        rivals = [r for r in rows if r.budget == row.budget and r.arm != OURS]
        if not rivals:
            continue
        ahead = max(rivals, key=lambda r: r.correct)
        if row.correct == ahead.correct == 0:
            none.append(str(row.budget))
        elif row.correct > ahead.correct:
            first.append(str(row.budget))
        elif row.correct == ahead.correct:
            shared.append(str(row.budget))
        else:
            behind.append(_behind(row, ahead))
    sentences = []
    if first:
        sentences.append(f"reasonalloc has the most right answers at {_budgets(first)}.")
    if shared:
        sentences.append(f"reasonalloc shares the first place at {_budgets(shared)}.")
    if behind:
        sentences.append(f"reasonalloc is not the best arm at {'; at '.join(behind)}.")
    if none:
        sentences.append(f"No arm has a right answer at {_budgets(none)}.")
    return sentences


def _behind(ours: Row, ahead: Row) -> str:
    apart = "do not overlap" if ahead.low > ours.high else "overlap"
    return (
        f"budget {ours.budget} ({ours.correct} of {ours.n} right, {ahead.arm} {ahead.correct} "
        f"of {ahead.n}; the intervals {apart})"
    )


def _budgets(names: list[str]) -> str:
    if len(names) == 1:
        return f"budget {names[0]}"
    return f"budgets {', '.join(names[:-1])} and {names[-1]}"


def table_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the cells under ``COLUMNS``, grouped by budget with an empty line between."""
    cells: list[tuple[str, ...]] = []
    for index, row in enumerate(rows):
        again = index > 0 and rows[index - 1].budget == row.budget
        if index and not again:
            cells.append(("",) * len(COLUMNS))
        cells.append(
            (
                "" if again else str(row.budget or "-"),
                "full cache" if row.budget is None else row.arm,
                f"{row.correct} of {row.n}",
                f"{100 * row.accuracy:.0f} %",
                f"{100 * row.low:.0f}-{100 * row.high:.0f} %",
                human(row.kv_bytes),
                f"{row.tokens_per_second:.0f}",
                "never compressed" if row.idle else "best" if row.best else "",
            )
        )
    return cells


def report_data(run: DemoRun, rows: Sequence[Row], workers: int) -> dict[str, Any]:
    """Return the result for ``--json``, sizes in bytes; ``workers`` ran at a time."""
    plan = run.plan
    return {
        "model": "boxed reasoner",
        "task": "chain",
        "split": "test",
        "variables": plan.variables,
        "problems": plan.count,
        "interval": plan.settings.interval,
        "window": plan.settings.window,
        "results": [row.data() for row in rows],
        "verdict": verdict(rows),
        "left_out": plan.left_out,
        "missing_runs": len(plan.jobs) - len(rows),
        "interrupted": run.interrupted,
        "workers": workers,
    }


def page_data(
    plan: DemoPlan,
    samples: Sequence[dict[str, Any]],
    recordings: Sequence[Recording],
    tokenizer: Any,
) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON data.

    Args:
        plan: what was asked for.
        samples: rows of the ``EvaluationResult``.
        recordings: the traced runs.
        tokenizer: the model's.
    """
    rows, problem = rank_arms(samples), plan.problems(1)[0]
    return {
        "version": __version__,
        "count": plan.count,
        "variables": plan.variables,
        "interval": plan.settings.interval,
        "window": plan.settings.window,
        "prompt_tokens": samples[0]["prompt_tokens"],
        "chain_tokens": problem.solution_tokens,
        "arms": [arm for arm in plan.arms if any(row.arm == arm for row in rows)],
        "budgets": sorted({row.budget for row in rows if row.budget is not None}),
        "rows": [row.data() for row in rows],
        "verdict": verdict(rows),
        "missing": len(plan.jobs) - len(rows),
        "left_out": plan.left_out,
        "profile": None if plan.profile is None else wave(load_profile(plan.profile)),
        "chain": _chain(plan, recordings, tokenizer),
    }


def _chain(
    plan: DemoPlan, recordings: Sequence[Recording], tokenizer: Any
) -> dict[str, Any] | None:
    """The traced arms on the problem on which they disagree most; None if none was recorded."""
    if not recordings:
        return None
    index = telling_problem(recordings)
    problem = plan.problems()[index]
    kv_heads = int(recordings[0].events[0].budgets.shape[1])
    layers = 1 + max(event.layer for recording in recordings for event in recording.events)
    arms = []
    for recording in recordings:
        ids = [*recording.prompts[index], *recording.completions[index]]
        words = tokenizer.convert_ids_to_tokens(ids)
        arms.append(trace(recording, index, problem, words, layers, kv_heads))
    return {
        "budget": recordings[0].job.budget,
        "problem": index,
        "answer": problem.answer,
        "right": sum(recording.correct[index] for recording in recordings),
        "arms": arms,
    }
