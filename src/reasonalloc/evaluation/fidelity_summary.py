"""What fidelity results say: means with intervals, by position and by kind of token."""

from __future__ import annotations

from typing import Any

from reasonalloc.evaluation.intervals import bootstrap_ratio
from reasonalloc.texts import Trajectory

POSITIONS = 8


def kind(text: str) -> str:
    """Kind of a token: ``number``, ``word``, ``space`` or ``symbol``."""
    core = text.strip()
    if not core:
        return "space"
    if any(c.isdigit() for c in core):
        return "number"
    return "word" if any(c.isalpha() for c in core) else "symbol"


def summarise(
    rows: list[dict[str, Any]],
    trajectories: list[Trajectory],
    jobs: list[tuple[str, int]],
    tokenizer: Any,
) -> list[dict[str, Any]]:
    """One entry per (arm, budget) of ``jobs``, over the given trajectories.

    Means are per predicted token; intervals are 95 %, from a bootstrap over trajectories. The
    ratio to the first arm of the same budget is paired: both arms of a draw see the same texts.
    """
    found = {(r["trajectory"], r["arm"], r["budget"]): r for r in rows}
    first = jobs[0][0]
    summary = []
    for arm, budget in jobs:
        own = [found[t.key, arm, budget] for t in trajectories]
        base = [found[t.key, first, budget] for t in trajectories]
        tokens = [float(len(row["kl"])) for row in own]
        sums = [sum(row["kl"]) for row in own]
        base_sums = [max(sum(row["kl"]), 1e-12) for row in base]
        low, high = bootstrap_ratio(sums, base_sums)
        summary.append(
            {
                "arm": arm,
                "budget": budget,
                "trajectories": len(own),
                "tokens": int(sum(tokens)),
                "kl": sum(sums) / sum(tokens),
                "kl_interval": bootstrap_ratio(sums, tokens),
                "kl_ratio_to_first": {
                    "value": sum(sums) / sum(base_sums),
                    "low": low,
                    "high": high,
                },
                "top1": sum(sum(row["agree"]) for row in own) / sum(tokens),
                "top1_interval": bootstrap_ratio([float(sum(r["agree"])) for r in own], tokens),
                "added_nll": sum(sum(row["added_nll"]) for row in own) / sum(tokens),
                "added_nll_interval": bootstrap_ratio([sum(r["added_nll"]) for r in own], tokens),
                "kl_by_position": _by_position(own),
                "kl_by_kind": _by_kind(own, trajectories, tokenizer),
                "kv_bytes": max(row["kv_bytes"] for row in own),
                "full_bytes": max(row["full_bytes"] for row in own),
                "compressions": sum(row["compressions"] for row in own),
            }
        )
    return summary


def _by_position(rows: list[dict[str, Any]]) -> list[float | None]:
    """Mean KL in equal parts of the completions, from their beginning to their end."""
    parts: list[list[float]] = [[] for _ in range(POSITIONS)]
    for row in rows:
        for index, value in enumerate(row["kl"]):
            parts[index * POSITIONS // len(row["kl"])].append(value)
    return [sum(part) / len(part) if part else None for part in parts]


def _by_kind(
    rows: list[dict[str, Any]], trajectories: list[Trajectory], tokenizer: Any
) -> dict[str, dict[str, float]]:
    """Mean KL by the kind of the token that had to be predicted, with the number of tokens."""
    kinds: dict[str, list[float]] = {}
    for row, trajectory in zip(rows, trajectories, strict=True):
        for token, value in zip(trajectory.completion_ids[1:], row["kl"], strict=True):
            kinds.setdefault(kind(tokenizer.decode([token])), []).append(value)
    return {
        name: {"kl": sum(values) / len(values), "tokens": len(values)}
        for name, values in sorted(kinds.items())
    }
