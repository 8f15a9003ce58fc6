"""The table at the end of ``reasonalloc eval``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonalloc.cli import output
from reasonalloc.evaluation.batch import Job
from reasonalloc.evaluation.intervals import mean_interval


def report(
    jobs: Sequence[Job],
    rows: Sequence[dict[str, Any]],
    problems: Sequence[str],
    samples: int,
    task: str,
    as_json: bool,
) -> None:
    """Print one line per job, over the samples that were asked for; say what never compressed."""
    wanted = set(problems)
    asked = [row for row in rows if row["problem"] in wanted and row["sample"] < samples]
    found = []
    for job in jobs:
        key = job.arm, job.budget
        found.append(_line(job, [row for row in asked if (row["arm"], row["budget"]) == key]))
    if as_json:
        output.print_json({"task": task, "problems": len(wanted), "results": found})
    else:
        _show(found, task, len(wanted))
    for item in found:
        if item["never_compressed"]:
            output.note(
                f"{item['arm']} at budget {item['budget']} was never compressed: no text outgrew "
                "the budget at any boundary, so this is the full cache"
            )


def _line(job: Job, rows: list[dict[str, Any]]) -> dict[str, Any]:
    n, correct = len(rows), sum(row["correct"] for row in rows)
    marks: dict[str, list[bool]] = {}
    for row in rows:
        marks.setdefault(row["problem"], []).append(row["correct"])
    low, high = mean_interval([sum(own) / len(own) for own in marks.values()], n)

    def mean(name: str) -> float:
        return float(sum(row[name] for row in rows)) / n

    return {
        "arm": job.arm,
        "budget": job.budget,
        "n": n,
        "correct": correct,
        "pass_at_1": round(correct / n, 4),
        "interval95": [round(low, 4), round(high, 4)],
        "mean_tokens": round(mean("completion_tokens"), 1),
        "cap_hits": sum(row["finish"] == "length" for row in rows),
        "mean_layer_compressions": round(mean("compressions"), 1),
        "mean_kv_bytes": round(mean("kv_bytes")),
        "never_compressed": job.budget is not None and not any(r["compressions"] for r in rows),
    }


def _show(found: list[dict[str, Any]], task: str, problems: int) -> None:
    titles = ("arm", "budget", "n", "pass@1", "95 %", "tokens", "cap hits", "events", "KV")
    cells = []
    for item in found:
        low, high = item["interval95"]
        full = item["budget"] is None
        cells.append(
            (
                item["arm"],
                "-" if full else str(item["budget"]),
                str(item["n"]),
                f"{100 * item['pass_at_1']:.1f} %",
                f"{100 * low:.0f}-{100 * high:.0f}",
                f"{item['mean_tokens']:.0f}",
                str(item["cap_hits"]),
                "-" if full else f"{item['mean_layer_compressions']:.1f}",
                output.human(item["mean_kv_bytes"]),
            )
        )
    console = output.stdout()
    heading = f"{task}, {problems} problems"
    console.print(output.grid([(t, t != "arm") for t in titles], cells, heading))
    console.print(
        "pass@1: share of right samples (avg@n), 95 % Wilson interval, clustered by problem; cap "
        "hits: samples cut off at the token limit; means per sample: tokens, events (compressions "
        "of a layer), KV bytes. Paired comparisons: reasonalloc report."
    )
