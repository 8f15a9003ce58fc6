"""Measure a checkpoint on the task ``chain``: ``python -m reasonalloc.boxed.evaluate FOLDER``.

Every problem is solved by greedy ``generate`` with the full cache; problems of one difficulty
have one length, so that a batch needs no padding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonalloc.evaluation.tasks.chain import (
    DIFFICULTIES,
    ChainGrade,
    Split,
    grade,
    problems,
)


@dataclass(frozen=True)
class LevelResult:
    """Exact counts of one difficulty."""

    variables: int
    problems: int
    correct: int
    exact_chains: int
    seconds: float


def evaluate(
    folder: Path,
    levels: Sequence[int],
    count: int,
    batch: int = 25,
    split: Split = "test",
    device: str = "cpu",
) -> list[LevelResult]:
    """Generate ``count`` completions at each difficulty and grade them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    results: list[LevelResult] = []
    for variables in levels:
        began = time.monotonic()
        todo = list(problems(count, variables, split))
        grades: list[ChainGrade] = []
        exact = 0
        for start in range(0, count, batch):
            part = todo[start : start + batch]
            chats = [[{"role": "user", "content": item.prompt}] for item in part]
            inputs = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).to(device)
            limit = part[0].solution_tokens + 32
            with torch.inference_mode():
                output = model.generate(**inputs, max_new_tokens=limit)
            width = inputs["input_ids"].shape[1]
            texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            grades.extend(grade(item.prompt, text) for item, text in zip(part, texts, strict=True))
            exact += sum(
                text.split() == item.solution.split()
                for item, text in zip(part, texts, strict=True)
            )
        correct = sum(item.correct for item in grades)
        seconds = round(time.monotonic() - began, 1)
        results.append(LevelResult(variables, count, correct, exact, seconds))
        print(json.dumps(asdict(results[-1])), flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="reasonalloc.boxed.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--levels", type=int, nargs="+", default=list(DIFFICULTIES))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--split", default="test", choices=["train", "calibration", "test"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="write the counts as JSON")
    options = parser.parse_args(arguments)
    results = evaluate(
        options.folder,
        options.levels,
        options.count,
        options.batch,
        options.split,
        options.device,
    )
    if options.out is not None:
        rows = [asdict(item) for item in results]
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
