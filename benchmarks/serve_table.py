"""The results of ``benchmarks/serve.py``: a Markdown table with a row per arm, mix and pool."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.intervals import student_quantile

#: Column: key of the file that ``vllm bench serve --save-result`` writes.
MEASURED = {
    "tok/s": "output_throughput",
    "TTFT p50, ms": "median_ttft_ms",
    "TTFT mean, ms": "mean_ttft_ms",
    "TTFT p99, ms": "p99_ttft_ms",
    "TPOT mean, ms": "mean_tpot_ms",
    "ITL p99, ms": "p99_itl_ms",
    "E2E mean, s": "mean_e2el_ms",
}
#: Column: metric of the server, of which a row has what all runs added.
COUNTED = {
    "engine steps": "vllm:iteration_tokens_total_count",
    "preemptions": "vllm:num_preemptions_total",
}
FIRST = ("arm", "budget", "interval", "mix", "scale", "KV memory", "requests/s", "requests")
LAST = ("model", "machine", "versions", "command")
BESIDE = "tok/s / full"
COLUMNS = (*FIRST, BESIDE, *MEASURED, *COUNTED, *LAST)
HEADING = """# vLLM's serving benchmark with and without a budget

`make bench-serve`: `vllm bench serve` against running servers, one per arm and pool. A number is
the mean of the runs and, after ±, half of its 95 % interval (Student's t over runs; each run has
other requests, the same for every arm). `requests` is runs x requests of a run, `requests/s` the
rate at which they are sent (inf: all at once), `scale` what lengths are multiplied by, `engine
steps` and `preemptions` those of all runs together. `in turns`: the servers of a pool took turns
run by run, and `tok/s / full` is what a run has beside plain vLLM's with the same requests. TTFT:
time to the first token, waiting included. TPOT: time per further token of a request, pauses
included. ITL: time between two tokens. E2E: time of a whole request.

"""


def summarise(
    runs: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]] | None = None
) -> dict[str, str]:
    """Cells of what was measured in several runs.

    Args:
        runs: what ``vllm bench serve`` saved of each, at least two.
        plain: that of plain vLLM, which took turns with them.
    """
    speeds = [[float(run[MEASURED["tok/s"]]) for run in several] for several in (runs, plain or ())]
    pairs = list(zip(*speeds, strict=True)) if plain else []
    cells = {BESIDE: interval([mine / other for mine, other in pairs]) if pairs else ""}
    for column, key in MEASURED.items():
        unit = 1000 if column.endswith(", s") else 1
        cells[column] = interval([float(run[key]) / unit for run in runs])
    return cells


def interval(values: Sequence[float]) -> str:
    """Mean and half of its 95 % interval: ``12.3 ± 0.4``."""
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) / math.sqrt(len(values))
    half = student_quantile(len(values) - 1) * spread
    digits = 0 if mean >= 100 else 1 if mean >= 10 else 2
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


@dataclass(frozen=True)
class Table:
    """Rows in a file, which is made with the first one."""

    path: Path

    def has(self, settings: dict[str, str]) -> bool:
        """Whether there is a row of the same arm, mix, pool, model, machine, versions, command."""
        wanted = _written(settings)
        return any(all(row[name] == wanted[name] for name in wanted) for row in self.rows())

    def rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        lines = [
            line for line in self.path.read_text("utf-8").splitlines() if line.startswith("| ")
        ]
        rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
        if not rows or rows[0] != list(COLUMNS):
            raise UsageError(
                f"--out={self.path} holds no table of this benchmark: give another file"
            )
        return [dict(zip(COLUMNS, row, strict=False)) for row in rows[1:]]

    def append(self, settings: dict[str, str], measured: dict[str, str]) -> None:
        cells = _written({**settings, **measured})
        if not self.path.exists():
            head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
            self.path.write_text(HEADING + head, encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"| {' | '.join(cells[name] for name in COLUMNS)} |\n")


def _written(cells: dict[str, str]) -> dict[str, str]:
    """Cells without what would end one."""
    return {name: " ".join(text.replace("|", "/").split()) or "-" for name, text in cells.items()}
