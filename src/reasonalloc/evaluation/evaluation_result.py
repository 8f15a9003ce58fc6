"""What an evaluation found: samples, and one line per arm and budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.batch import Job
from reasonalloc.evaluation.folder import SAMPLES, key_of
from reasonalloc.evaluation.intervals import mean_interval
from reasonalloc.evaluation.kv_share import (
    Reference,
    budget_name,
    kv_summary,
    sample_reference,
    share_text,
)
from reasonalloc.evaluation.result import Result, budget_figure
from reasonalloc.tables import Table, human

#: What the numbers of the table are.
LEGEND = (
    "pass@1: share of right samples (avg@n), 95 % Wilson interval, clustered by problem; cut: "
    "share that the token limit ended; went on: share with much text or another turn after the "
    "answer; means per sample: tokens, events (compressions of a layer), KV bytes. Paired "
    "comparisons: reasonalloc report."
)


@dataclass(frozen=True)
class EvaluationResult(Result):
    """Samples of arms on a task.

    Attributes:
        task: its name.
        problems: ids of the problems that were asked for.
        jobs: (arm, budget) in the order of the table; the budget is None for the full cache.
        samples: per problem, as asked for.
        folder: where the samples are; a folder that is gone if ``out`` was not given.
        taken: what the summary needs of the samples that were asked for.
        max_new_tokens: bound of every sample.
    """

    task: str
    problems: tuple[str, ...]
    jobs: tuple[Job, ...]
    samples: int
    folder: Path
    taken: tuple[dict[str, Any], ...]
    max_new_tokens: int | None = None

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Samples with all fields of ``samples.jsonl``, texts included; read when first used.

        Among them: ``arm``, ``budget``, ``problem``, ``sample``, ``prompt``, ``completion``,
        ``answer``, ``gold``, ``correct``, ``prompt_tokens``, ``completion_tokens``, ``kv_bytes``.
        """
        wanted = {key_of(row) for row in self.taken}
        if not wanted:
            return []
        with (self.folder / SAMPLES).open(encoding="utf-8") as file:
            next(file)  # the manifest
            rows = [json.loads(line) for line in file]
        return [row for row in rows if key_of(row) in wanted]

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """Per arm and budget that has samples: accuracy with its interval, tokens, bytes.

        Fields: ``arm``, ``budget``, ``n`` (samples), ``correct``, ``pass_at_1`` (0 to 1),
        ``interval95`` [low, high], ``mean_tokens`` (generated), ``cap_hits``,
        ``cut`` and ``went_on`` (shares of samples that the token limit ended, and that went on
        after their answer, see ``endings.went_on``), each with ``..._interval95``,
        ``mean_layer_compressions``, ``mean_kv_bytes`` (per sequence), ``never_compressed``;
        ``budget_tokens`` (mean per layer and KV head), ``compressed_kv_bytes`` (mean per sequence
        right after a compression; of the full cache at its end), ``kv_share`` (these bytes by those
        of ``reference``). The last two are None where only an older version took samples.
        """
        parts = [(job, self._of(job)) for job in self.jobs]
        return [_line(job, rows) | kv_summary(rows, self.reference) for job, rows in parts if rows]

    @cached_property
    def reference(self) -> Reference | None:
        """The full cache that is 100 %: in 16 bits, at the mean final length of the full cache's
        samples; if it did not run, of all samples.
        """
        return sample_reference(self.taken, self.max_new_tokens)

    def tables(self) -> list[Table]:
        """See ``Result``."""
        titles = ["arm", "budget", "n", "pass@1", "95 %", "tokens", "cut", "went on"]
        titles += ["events", "KV", "KV share"]
        heading = f"{self.task}, {len(self.problems)} problems"
        columns = [(title, title != "arm") for title in titles]
        return [Table(heading, columns, [_cells(item) for item in self.summary])]

    def plot(self, axis: str = "bytes") -> Any:
        """Return a figure of plotly: accuracy against KV bytes or tokens, with 95 % intervals.

        Args:
            axis: ``bytes``, right after a compression, as % of ``reference``; or ``tokens``.

        Raises:
            UsageError: another axis, or plotly is not installed.
        """
        share = None if self.reference is None else self.reference.title
        return budget_figure(self.summary, "pass_at_1", "interval95", "pass@1", axis, share)

    def notes(self) -> list[str]:
        """Return the lines below the table."""
        return [*self.legend(), *self.never_compressed()]

    def legend(self) -> list[str]:
        """Return what the numbers of the table are."""
        return [LEGEND, *([] if self.reference is None else [f"KV share: {self.reference.title}."])]

    def never_compressed(self) -> list[str]:
        """Return a sentence for each arm that never compressed."""
        return [
            f"{item['arm']} at budget {item['budget']} was never compressed: no text outgrew "
            "the budget at any boundary, so this is the full cache"
            for item in self.summary
            if item["never_compressed"]
        ]

    def _of(self, job: Job) -> list[dict[str, Any]]:
        return [row for row in self.taken if (row["arm"], row["budget"]) == (job.arm, job.budget)]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an evaluation; what was finished until then is in ``result``."""

    def __init__(self, result: EvaluationResult) -> None:
        super().__init__("interrupted")
        self.result = result


def _line(job: Job, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n = len(rows)
    correct, interval = _count(rows, lambda row: row["correct"])
    cut, cut_interval = _count(rows, lambda row: row["finish"] == "length")
    went_on, went_on_interval = _count(rows, lambda row: row["went_on"])

    def mean(name: str) -> float:
        return float(sum(row[name] for row in rows)) / n

    return {
        "arm": job.arm,
        "budget": job.budget,
        "n": n,
        "correct": correct,
        "pass_at_1": round(correct / n, 4),
        "interval95": interval,
        "mean_tokens": round(mean("completion_tokens"), 1),
        "cap_hits": cut,
        "cut": round(cut / n, 4),
        "cut_interval95": cut_interval,
        "went_on": round(went_on / n, 4),
        "went_on_interval95": went_on_interval,
        "mean_layer_compressions": round(mean("compressions"), 1),
        "mean_kv_bytes": round(mean("kv_bytes")),
        "never_compressed": job.budget is not None and not any(r["compressions"] for r in rows),
    }


def _count(
    rows: Sequence[dict[str, Any]], mark: Callable[[dict[str, Any]], bool]
) -> tuple[int, list[float]]:
    """How many samples are marked, and the 95 % interval of their share."""
    marks: dict[str, list[bool]] = {}
    for row in rows:
        marks.setdefault(row["problem"], []).append(mark(row))
    low, high = mean_interval([sum(own) / len(own) for own in marks.values()], len(rows))
    return sum(map(sum, marks.values())), [round(low, 4), round(high, 4)]


def _cells(item: dict[str, Any]) -> tuple[str, ...]:
    low, high = item["interval95"]
    full = item["budget"] is None
    return (
        item["arm"],
        "-" if full else budget_name(item),
        str(item["n"]),
        f"{100 * item['pass_at_1']:.1f} %",
        f"{100 * low:.0f}-{100 * high:.0f}",
        f"{item['mean_tokens']:.0f}",
        f"{100 * item['cut']:.0f} %",
        f"{100 * item['went_on']:.0f} %",
        "-" if full else f"{item['mean_layer_compressions']:.1f}",
        human(item["mean_kv_bytes"]),
        share_text(item["kv_share"]),
    )
