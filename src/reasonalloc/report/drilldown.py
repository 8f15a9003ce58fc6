"""Problem by problem: who solved it, and the chains themselves as far as a page can hold them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasonalloc.evaluation.samples import Sample
from reasonalloc.evaluation.statistics import by_problem

#: Characters of a chain's beginning and end that are shown, and of all texts of a page.
HEAD, TAIL, PAGE = 6000, 2000, 6_000_000


@dataclass
class Room:
    """Characters that the page still has room for."""

    left: int = PAGE


def drilldown(
    problems: Sequence[str], cells: Sequence[Sequence[Sample]], room: Room
) -> dict[str, Any]:
    """Right and all samples of every problem and cell; chains of the most telling problems.

    Chains are the first sample of each cell. Problems on which the cells disagree most come first,
    until the page is full; what is left out is counted.

    Returns:
        ``problems``: per problem ``id``, ``counts`` [cells][right, all] and ``chains`` (or null);
        ``with_chains``: how many have them; ``head``, ``tail``: characters of a chain shown.
    """
    split = [by_problem(cell) for cell in cells]
    rows: list[dict[str, Any]] = []
    for problem in problems:
        taken = [cell.get(problem, []) for cell in split]
        counts = [[sum(s.correct for s in samples), len(samples)] for samples in taken]
        rows.append({"id": problem, "counts": counts, "chains": None})
    order = sorted(range(len(rows)), key=lambda i: -_disagreement(rows[i]["counts"]))
    shown = 0
    for index in order:
        if room.left <= 0:
            break
        rows[index].update(_chains([cell.get(problems[index], []) for cell in split], room))
        shown += 1
    return {
        "problems": [rows[index] for index in order],
        "with_chains": shown,
        "head": HEAD,
        "tail": TAIL,
    }


def _disagreement(counts: Sequence[Sequence[int]]) -> float:
    """Variance of the cells' shares of right samples."""
    shares = [right / n for right, n in counts if n]
    mean = sum(shares) / len(shares)
    return sum((share - mean) ** 2 for share in shares) / len(shares)


def _chains(cells: Sequence[Sequence[Sample]], room: Room) -> dict[str, Any]:
    chains: list[dict[str, Any] | None] = []
    prompt = gold = ""
    for samples in cells:
        if not samples:
            chains.append(None)
            continue
        first = min(samples, key=lambda s: s.sample)
        row = first.row()
        prompt, gold = str(row.get("prompt", "")), str(row.get("gold", ""))
        text = str(row.get("completion", ""))
        answer = row.get("answer")
        cut = max(0, len(text) - HEAD - TAIL)
        chains.append(
            {
                "sample": first.sample,
                "correct": first.correct,
                "finish": first.finish,
                "tokens": first.completion_tokens,
                "answer": None if answer is None else str(answer),
                "head": text[:HEAD] if cut else text,
                "tail": text[-TAIL:] if cut else "",
                "cut": cut,
            }
        )
        room.left -= len(text) - cut
    room.left -= min(len(prompt), HEAD)
    over = len(prompt) - HEAD
    if over > 0:
        prompt = f"{prompt[:HEAD]} ({over:,} characters left out)"
    return {"prompt": prompt, "gold": gold, "chains": chains}
