"""The same numbers as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from typing import Any

from reasonalloc.evaluation.kv_share import budget_name, share_text
from reasonalloc.report.results import ENDINGS
from reasonalloc.tables import Table, human

#: What is compared, in words.
LABELS = {"correct": "right", "cut": "cut", "went_on": "went on"}

_PAIRED = [
    "samples",
    "arm",
    "budget",
    "problems",
    "difference (points)",
    "95 %",
    "better",
    "worse",
    "test",
    "p",
    "p adjusted (Holm)",
    "clear",
]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _estimate(estimate: list[float]) -> str:
    return f"{_percent(estimate[0])} ({_interval(*estimate[1:])})"


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(titles), line(["---"] * len(titles)), *map(line, rows), ""]


def samples_text(cell: dict[str, Any]) -> str:
    """How many samples a problem has: ``8`` or ``3 to 8``."""
    least, most = cell["per_problem"]
    return str(least) if least == most else f"{least} to {most}"


def group_table(group: dict[str, Any]) -> Table:
    """Return the table that the command prints for a group of results."""
    rows = [
        (
            "full" if cell["budget"] is None else budget_name(cell),
            cell["arm"],
            f"{cell['problems']} x {samples_text(cell)}",
            f"{100 * cell['accuracy']:.1f} %",
            f"{100 * cell['interval95'][0]:.1f}-{100 * cell['interval95'][1]:.1f}",
            f"{cell['tokens'][0]:.0f}",
            f"{100 * cell['cut'][0]:.0f} %",
            f"{100 * cell['went_on'][0]:.0f} %",
            human(cell["kv_bytes_per_sequence"]),
            share_text(cell["kv_share"]),
        )
        for cell in group["cells"]
    ]
    titles = ("budget", "arm", "n", "pass@1", "95 %", "tokens", "cut", "went on", "KV", "KV share")
    columns = [(title, title != "arm") for title in titles]
    return Table(f"{group['model']}, {group['task']}", columns, rows)


def markdown(data: dict[str, Any]) -> str:
    """All tables of the page."""
    lines = ["# Evaluation under a KV budget", ""]
    for group in data["groups"]:
        lines += [f"## {group['model']}, {group['task']}", ""]
        lines += [", ".join(f"{name}: {value}" for name, value in group["settings"]), ""]
        lines += [f"- {notice}" for notice in group["notices"]] + [""]
        titles = "arm|budget|problems|samples each|pass@1 (%)|95 %|pass@k (%)|tokens|cut (%)"
        titles += "|went on (%)|compressions|KV bytes|KV share|peak bytes|tokens/s"
        lines += _table(titles.split("|"), [_cell(cell) for cell in group["cells"]])
        if group["reference"] is not None:
            lines += [f"KV share: {group['reference']['title']}.", ""]
        lines += _paired(group["base"], group["paired"], "right answers")
        lines += _paired(group["base"], group["paired_endings"], "samples that were cut or went on")
        lines += _paper(group, data["paper"])
    lines += [f"Made by `reasonalloc report`, version {data['version']}.", ""]
    return "\n".join(lines)


def _cell(cell: dict[str, Any]) -> list[str]:
    """A row of the table of all runs."""
    return [
        cell["arm"],
        "full cache" if cell["budget"] is None else budget_name(cell),
        str(cell["problems"]),
        samples_text(cell),
        _percent(cell["accuracy"]),
        _interval(*cell["interval95"]),
        "; ".join(f"@{k}: {_estimate(v)}" for k, v in cell["pass_at"].items() if k != "1"),
        f"{cell['tokens'][0]:.0f}",
        _estimate(cell["cut"]),
        _estimate(cell["went_on"]),
        str(cell["compressions"]),
        str(cell["kv_bytes_per_sequence"]),
        share_text(cell["kv_share"]),
        "" if cell["peak_bytes"] is None else str(cell["peak_bytes"]),
        "" if cell["tokens_per_second"] is None else f"{cell['tokens_per_second']:.1f}",
    ]


def _paired(base: str | None, paired: list[dict[str, Any]], what: str) -> list[str]:
    """A table of comparisons with the base arm; nothing without any."""
    rows = [
        [
            LABELS[row["quantity"]],
            row["arm"],
            str(row["base_budget"] or row["budget"]),
            str(row["problems"]),
            f"{100 * row['difference'][0]:+.1f}",
            _interval(*row["difference"][1:]),
            str(row["better"]),
            str(row["worse"]),
            row["test"],
            f"{row['p']:.3g}",
            f"{row['adjusted_p']:.3g}",
            "yes" if row["beyond_noise"] else "no",
        ]
        for row in paired
    ]
    if not rows:
        return []
    head = f"Against {base}, paired by problem, {what}:"
    return [head, "", *_table(_PAIRED, rows), *(f"- {row['verdict']}" for row in paired), ""]


def _paper(group: dict[str, Any], source: dict[str, str] | None) -> list[str]:
    if source is None or group["paper"] is None:
        return []
    arms = group["paper"]["arms"]
    budgets = sorted({int(b) for numbers in arms.values() for b in numbers})
    head = (
        f"The paper's own numbers, another protocol, not to be compared directly: "
        f"{source['model']}, {source['protocol']} ({source['source']}). "
        f"Full cache: {group['paper']['full']}."
    )
    rows = [
        [arm, *(str(numbers.get(str(b), "")) for b in budgets)] for arm, numbers in arms.items()
    ]
    return [head, "", *_table(["arm (paper)", *map(str, budgets)], rows)]


def cells_csv(data: dict[str, Any]) -> str:
    """One line per group, arm and budget; shares between 0 and 1, sizes in bytes."""
    ks = sorted({int(k) for g in data["groups"] for c in g["cells"] for k in c["pass_at"]})
    file = io.StringIO()
    plain = ["problems", "samples", "cap_hits", "compressions", "kv_bytes_per_sequence"]
    plain += ["full_kv_bytes_per_sequence", "peak_bytes", "tokens_per_second"]
    plain += ["budget_tokens", "compressed_kv_bytes", "kv_share"]
    writer = csv.writer(file, lineterminator="\n")
    names = [*(f"pass@{k}" for k in ks), *ENDINGS]
    shares = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer.writerow(["group", "model", "task", "arm", "budget", *plain, "tokens_mean", *shares])
    for group in data["groups"]:
        for cell in group["cells"]:
            estimates = [v for k in ks for v in cell["pass_at"].get(str(k), ("", "", ""))]
            estimates += [v for name in ENDINGS for v in cell[name]]
            head = [group["id"], group["model"], group["task"], cell["arm"], cell["budget"]]
            writer.writerow([*head, *(cell[n] for n in plain), cell["tokens"][0], *estimates])
    return file.getvalue()


def paired_csv(data: dict[str, Any]) -> str:
    """One line per comparison; differences between -1 and 1.

    ``quantity`` is ``correct``, ``cut`` or ``went_on``.
    """
    file = io.StringIO()
    plain = ["quantity", "arm", "budget", "base", "base_budget", "problems", "better", "worse"]
    plain += ["test", "p"]
    plain += ["adjusted_p", "beyond_noise", "detectable", "problems_needed", "samples_needed"]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["group", "model", "task", *plain, "difference", "low", "high"])
    for group in data["groups"]:
        for row in (*group["paired"], *group["paired_endings"]):
            head = [group["id"], group["model"], group["task"]]
            writer.writerow([*head, *(row[name] for name in plain), *row["difference"]])
    return file.getvalue()
