"""Training batches of the task ``chain``: a pure function of the run's seed and the step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tools.boxed.model import BOS, END_THINK, EOS, THINK, TOKENS
from torch import Tensor

from reasonalloc.evaluation.tasks.chain import ChainProblem, generate

#: Difficulties trained on; those below 8 are for learning the look-ups early.
LEVELS = (2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 48, 56, 64)
IGNORED = -100
_IDS = {token: index for index, token in enumerate(TOKENS)}


@dataclass(frozen=True)
class Batch:
    """Problems of one difficulty, hence of one length: ids and labels [B, T]."""

    ids: Tensor
    labels: Tensor
    variables: int


def encode(problem: ChainProblem) -> tuple[list[int], int]:
    """Return a problem's token ids with its special tokens, and the prompt's length."""
    prompt = [BOS, *problem.prompt.split(" "), THINK]
    thought, _, answer = problem.solution.rpartition(" answer ")
    words = [*prompt, *thought.split(" "), END_THINK, "answer", *answer.split(" "), EOS]
    return [_IDS[word] for word in words], len(prompt)


def largest_level(fraction: float, cap: int) -> int:
    """Return the most variables trained on after this fraction of the run (the curriculum)."""
    schedule = ((0.05, 6), (0.15, 12), (0.30, 20), (0.45, 32), (0.60, 48))
    for until, largest in schedule:
        if fraction < until:
            return min(cap, largest)
    return cap


def make_batch(seed: int, index: int, tokens: int, largest: int, floor: int = 2) -> Batch:
    """Make the batch number ``index``: about ``tokens`` tokens, one difficulty of the mix."""
    rng = random.Random(f"batch {seed} {index}")
    levels = [level for level in LEVELS if min(floor, largest) <= level <= largest]
    variables = rng.choice(levels)
    return _stack(variables, tokens, first=(seed * 10**9 + index) * 1024)


def _stack(variables: int, tokens: int, first: int) -> Batch:
    rows: list[Sequence[int]] = []
    prompt_length = 0
    while not rows or (len(rows) + 1) * len(rows[0]) <= tokens:
        ids, prompt_length = encode(generate(first + len(rows), variables, "train"))
        rows.append(ids)
    inputs = torch.tensor(rows, dtype=torch.int64, device="cpu")
    labels = inputs.clone()
    labels[:, :prompt_length] = IGNORED
    return Batch(inputs, labels, variables)
