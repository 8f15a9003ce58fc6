"""What results of several arms say: rows with intervals, the best arm of each budget, a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reasonalloc.evaluation.arms import ArmResult
from reasonalloc.evaluation.intervals import wilson

OURS = "reasonalloc"


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
        compressions: of layers.
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


def summarise(results: Iterable[ArmResult]) -> list[Row]:
    """Rows in the order full cache, then budgets from small to large, best arm first."""
    rows = [_row(result) for result in results]
    rows.sort(key=lambda row: (row.budget is not None, row.budget or 0, -row.correct))
    most: dict[int | None, int] = {}
    for row in rows:
        most[row.budget] = max(most.get(row.budget, 0), row.correct)
    return [
        replace(row, best=row.budget is not None and 0 < row.correct == most[row.budget])
        for row in rows
    ]


def _row(result: ArmResult) -> Row:
    correct, n = sum(result.correct), len(result.correct)
    low, high = wilson(correct, n)
    return Row(
        arm=result.job.arm,
        budget=result.job.budget,
        correct=correct,
        n=n,
        low=low,
        high=high,
        kv_bytes=result.kv_bytes,
        tokens_per_second=result.tokens_per_second,
        compressions=result.compressions,
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
