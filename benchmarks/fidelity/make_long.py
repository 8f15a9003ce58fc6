"""Texts of 4,096 and 8,192 tokens for the fidelity benchmark, calibration and test kept apart.

    python benchmarks/fidelity/make_long.py MODEL MATH.jsonl OUT_FOLDER [--dtype bfloat16] \\
        [--splits test]

Long code is modules of Python's standard library, long documents pages of its reference, long
solutions problems of MATH one after the other, and chains are the model's own, sampled with the
full cache and kept from ending. Each text has 48 prompt tokens. No page, module or problem of the
test is in a calibration text, of these or of ``make_trajectories.py``.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from make_trajectories import PROMPT, cut, generated, joined

from reasonalloc.loading import load_model

SHORT, LONG = 4096, 8192
CODE = {
    "calibration": (("tarfile", SHORT),),
    "test": (("typing", SHORT), ("inspect", SHORT), ("subprocess", SHORT), ("zipfile", LONG)),
}
PAGES = {
    "calibration": (("types", SHORT),),
    "test": (("string-methods", SHORT), ("typesseq", SHORT), ("debugger", SHORT)),
}
PROBLEMS = {"calibration": ((36, SHORT),), "test": ((100, SHORT), (150, LONG))}
ASKED = {
    "calibration": ("Find all prime numbers below 400. Think aloud, check every one of them.",),
    "test": (
        "Think aloud, step by step: in how many ways can 100 be paid with coins of 1, 5, 10 and "
        "25? Check the result twice.",
        "Plan a week in a small restaurant, day by day and hour by hour, and give reasons.",
    ),
}
#: A problem of MATH with its solution has 100 tokens and more.
EACH = 100


def _texts(
    model: Any, tokenizer: Any, solutions: list[dict[str, Any]], split: str
) -> Iterator[tuple[str, list[int]]]:
    for name, tokens in CODE[split]:
        source = inspect.getsource(import_module(name))
        yield "code", cut(tokenizer, iter([source[len(source) // 4 :]]), tokens)
    for name, tokens in PAGES[split]:
        yield "documents", cut(tokenizer, iter([topics[name]]), tokens)
    for start, tokens in PROBLEMS[split]:
        rows = solutions[start : start + tokens // EACH]
        pieces = joined(rows, "problem", "solution", "Problem: {}\n\nSolution: {}\n\n")
        yield "solutions", cut(tokenizer, pieces, tokens)
    for ids in generated(model, tokenizer, ASKED[split], SHORT):
        yield "chains", ids


def main() -> None:
    """Write ``long-calibration.jsonl``, ``long-test.jsonl`` or both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "math", "out"):
        parser.add_argument(name)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--splits", nargs="+", choices=list(ASKED), default=list(ASKED))
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, args.dtype, "cpu")[:2]
    solutions = [json.loads(line) for line in Path(args.math).read_text().splitlines()]
    for split in args.splits:
        lines = []
        for kind, ids in _texts(model, tokenizer, solutions, split):
            row = {"kind": kind, "prompt_ids": ids[:PROMPT], "completion_ids": ids[PROMPT:]}
            lines.append(json.dumps(row, separators=(",", ":")))
            print(split, kind, len(ids), repr(tokenizer.decode(ids[:24])), flush=True)
        (Path(args.out) / f"long-{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
