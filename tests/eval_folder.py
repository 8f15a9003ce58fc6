"""Folders such as ``reasonalloc eval`` writes, made up."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.samples import Sample

MANIFEST = {
    "kind": "eval",
    "task": "math500",
    "data_hash": "d0",
    "model": "made/up-1b",
    "dtype": "torch.float32",
    "device": "cpu",
    "protocol": "paper",
    "temperature": 0.6,
    "samples": 2,
    "seed": 0,
    "interval": 128,
    "profiles": {},
    "arm_files": {},
    "version": "0.1.0",
}


def row(arm: str, budget: int | None, problem: str, sample: int = 0, **changes: Any) -> dict:
    """One line of samples.jsonl."""
    data = {
        "task": "math500",
        "arm": arm,
        "budget": budget,
        "problem": problem,
        "sample": sample,
        "seed": sample,
        "prompt": f"What is {problem}?",
        "completion": "It is \\boxed{4}.",
        "prompt_tokens": 10,
        "completion_tokens": 100,
        "finish": "stop",
        "answer": "4",
        "gold": "4",
        "correct": True,
        "compressions": 0 if budget is None else 12,
        "kv_bytes": 4096 * (budget or 600),
        "full_kv_bytes": 4096 * 600,
        "budget_tokens": budget,
        "compressed_kv_bytes": 4096 * (budget or 600),
        "full_16bit_kv_bytes": 2048 * 600,
        "batch": 4,
        "seconds": 8.0,
        "peak_bytes": None,
    }
    return data | changes


def rows(
    problems: int = 10,
    samples: int = 2,
    arms: Sequence[str] = ("full", "rkv", "reasonalloc"),
    budgets: Sequence[int] = (128, 256),
    seed: int = 0,
    length: int = 60,
) -> list[dict]:
    """A whole run in which chances rise with the budget."""
    generator = random.Random(seed)
    words = [
        generator.choice(["so", "then", "x", "=", "we", "get", "3", "<b>"]) for _ in range(400)
    ]
    found = []
    for arm in arms:
        for budget in [None] if arm == "full" else budgets:
            for number in range(problems):
                for sample in range(samples):
                    chance = 0.8 if budget is None else 0.2 + budget / 800 + 0.1 * (arm == "rkv")
                    correct = generator.random() < chance
                    part = generator.randrange(5, length)
                    text = words[:part] + [arm, str(sample)] * ((length - part) // 2)
                    found.append(
                        row(
                            arm,
                            budget,
                            f"p{number}",
                            sample,
                            correct=correct,
                            answer="4" if correct else None,
                            completion=" ".join(text),
                            completion_tokens=generator.randrange(50, 900),
                            finish="stop" if correct else "length",
                            seconds=8.0 if budget is None else 4.0 + budget / 256,
                        )
                    )
    return found


def events(
    arms: Sequence[str] = ("rkv", "reasonalloc"), budgets: Sequence[int] = (128, 256)
) -> list[dict]:
    """Head budgets of the first problem."""
    return [
        {
            "arm": arm,
            "budget": budget,
            "problem": "p0",
            "sample": 0,
            "tokens": tokens,
            "layer": layer,
            "budgets": [budget + 3 * layer, budget - 3 * layer],
        }
        for arm in arms
        for budget in budgets
        for tokens in (128, 256, 384)
        for layer in range(4)
    ]


def write(
    folder: Path, lines: Sequence[dict], manifest: dict | None = None, heads: Sequence[dict] = ()
) -> Path:
    """Write and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    first = {"manifest": MANIFEST if manifest is None else manifest}
    text = "".join(json.dumps(line) + "\n" for line in (first, *lines))
    (folder / "samples.jsonl").write_text(text)
    if heads:
        (folder / "events.jsonl").write_text("".join(json.dumps(h) + "\n" for h in heads))
    return folder


def made(
    arm: str, right: Sequence[Sequence[bool]], budget: int | None = 64, **changes: Any
) -> list[Sample]:
    """Samples of one cell: ``right[problem][sample]``."""
    names = Sample.__dataclass_fields__
    return [
        Sample(
            **{
                k: v
                for k, v in row(arm, budget, f"p{i}", j, correct=correct, **changes).items()
                if k in names
            },
            file=Path("none"),
            offset=0,
        )
        for i, samples in enumerate(right)
        for j, correct in enumerate(samples)
    ]
