"""One sequence of a recorded run: which tokens each head still holds, and its budgets over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonalloc.core.recorder import Event
from reasonalloc.evaluation.demo import Recording
from reasonalloc.evaluation.tasks.chain import ChainProblem

#: Boundary number of tokens that were never evicted.
STAYS = -1


def trace(
    recording: Recording,
    sequence: int,
    problem: ChainProblem,
    words: list[str],
    layers: int,
    kv_heads: int,
) -> dict[str, Any]:
    """What the page shows of one arm on one problem.

    Args:
        recording: a run with ``record="tokens"``, without padding.
        sequence: the problem's place in the batch.
        problem: the problem.
        words: text of every token, prompt and completion.
        layers: layers of the model, all of them under a budget.
        kv_heads: KV heads per layer.

    Returns:
        ``boundaries``: tokens read at each compression; ``budgets``: [boundary][layer][head]
        tokens kept then; ``gone``: [layer][head][token] index of the boundary that evicted the
        token, or ``STAYS``; ``wrong_from``: index of the first token that differs from the exact
        chain, or None.
    """
    prompt = len(recording.prompts[sequence])
    events = [event for event in recording.events if event.step <= len(words)]
    boundaries = sorted({event.step for event in events})
    return {
        "arm": recording.job.arm,
        "correct": recording.correct[sequence],
        "words": words,
        "prompt": prompt,
        "boundaries": boundaries,
        "budgets": _budgets(events, boundaries, layers, sequence, kv_heads),
        "gone": [
            [
                _gone([e for e in events if e.layer == layer], boundaries, sequence, h, len(words))
                for h in range(kv_heads)
            ]
            for layer in range(layers)
        ],
        "wrong_from": _wrong_from(words, prompt, problem),
    }


def telling_problem(recordings: Sequence[Recording]) -> int:
    """The problem on which the arms disagree most evenly (the first of these)."""
    count = len(recordings[0].correct)
    right = [sum(recording.correct[i] for recording in recordings) for i in range(count)]
    return min(range(count), key=lambda i: (abs(2 * right[i] - len(recordings)), i))


def _budgets(
    events: list[Event], boundaries: list[int], layers: int, sequence: int, kv_heads: int
) -> list[list[list[int]]]:
    """Kept tokens; a layer that was not compressed at a boundary holds everything read."""
    known = {(e.step, e.layer): [int(b) for b in e.budgets[sequence]] for e in events}
    return [
        [known.get((step, layer), [step] * kv_heads) for layer in range(layers)]
        for step in boundaries
    ]


def _gone(
    events: list[Event], boundaries: list[int], sequence: int, head: int, length: int
) -> list[int]:
    gone = [STAYS] * length
    alive: set[int] = set()
    read = 0
    for event in events:
        alive.update(range(read, event.step))
        read = event.step
        kept = set(event.kept(sequence, head))
        for position in alive - kept:
            gone[position] = boundaries.index(event.step)
        alive = kept
    return gone


def _wrong_from(words: list[str], prompt: int, problem: ChainProblem) -> int | None:
    exact = problem.solution.split()
    place = 0
    for index in range(prompt, len(words)):
        if words[index].startswith("<") and words[index] != "<-":
            continue  # end of thought, end of text
        if place >= len(exact) or words[index] != exact[place]:
            return index
        place += 1
    return None
