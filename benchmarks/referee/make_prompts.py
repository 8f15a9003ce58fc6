"""Prompts of four kinds for ``run.sh``: eight of each.

    python benchmarks/referee/make_prompts.py MATH.jsonl GSM8K.jsonl OUT_FOLDER

Problems come from the two files (fields ``problem`` and ``question``), from their ends, which no
other benchmark here uses; tasks for code are written below; documents are pages of Python's own
documentation, with a question behind them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

EACH = 8
TASKS = (
    "Write a Python class for a least-recently-used cache, with tests.",
    "Write a Python function that parses command-line options without libraries, and explain it.",
    "Implement Dijkstra's algorithm in Python with a heap, and show an example.",
    "Write a Python script that counts words in a folder of text files, using several processes.",
    "Implement a small tokenizer and a recursive-descent parser for arithmetic in Python.",
    "Write a Python decorator that retries a function with exponential back-off, with tests.",
    "Implement a binary search tree in Python with insertion, deletion and iteration.",
    "Write a Python program that plays tic-tac-toe perfectly, with comments.",
)
PAGES = ("numeric-types", "objects", "naming", "with", "class", "function", "sequence-types", "try")
LETTERS = 2400


def main() -> None:
    """Write four files."""
    maths, questions, out = sys.argv[1:]
    problems = [json.loads(line)["problem"] for line in Path(maths).read_text().splitlines()]
    asked = [json.loads(line)["question"] for line in Path(questions).read_text().splitlines()]
    pages = [topics[name][:LETTERS] for name in PAGES]
    kinds = {
        "maths": problems[-EACH:],
        "questions": asked[-EACH:],
        "code": list(TASKS),
        "documents": [f"{page}\n\nSummarise the text above, point by point." for page in pages],
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, prompts in kinds.items():
        lines = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (Path(out) / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
