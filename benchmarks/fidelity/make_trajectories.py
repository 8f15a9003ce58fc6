"""Texts for the fidelity benchmark: five kinds, calibration and test kept apart.

    python benchmarks/fidelity/make_trajectories.py MODEL MATH.jsonl GSM8K.jsonl OUT_FOLDER \\
        [--chats N] [--dtype bfloat16]

Worked solutions and question-answer pairs come from the two files (fields ``problem`` and
``solution``; ``question`` and ``answer``), code and technical prose from Python's standard library,
licence prose from the installed packages, and generated text from the model itself, sampled with
the full cache. Each trajectory has 48 prompt tokens and 720 completion tokens.

``--chats`` adds problems of MATH through the chat template, N for calibration and 2 N for test,
which the model answers greedily with the full cache in at most 720 tokens: answers that end count.
OUT_FOLDER is made if it is not there.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from reasonalloc.evaluation.completions import complete_all, turn_ends
from reasonalloc.evaluation.facts import encode
from reasonalloc.evaluation.tasks.base import BOXED
from reasonalloc.loading import load_model
from reasonalloc.texts import Trajectory, as_trajectory

PROMPT, COMPLETION = 48, 720
#: Problems that chats ask, by their places in the file: no other kind of text uses them.
CHATS = {"calibration": range(36, 100), "test": range(184, 250)}
CODE = {
    "calibration": ("heapq", "textwrap", "csv"),
    "test": ("argparse", "statistics", "difflib", "configparser", "fractions"),
}
TOPICS = {
    "calibration": ("execmodel", "customization", "import"),
    "test": ("compound", "attribute-access", "formatstrings", "typesmapping"),
}
ASKED = {
    "calibration": (
        "Explain step by step how a bicycle stays upright, in detail.",
        "Write a long story about a lighthouse keeper who finds a map.",
        "Solve step by step: a train leaves at 9 and another at 10. Invent the numbers.",
    ),
    "test": (
        "Write a detailed essay about the history of bread.",
        "Write a long story about two sisters who repair an old boat.",
        "Explain step by step how to plan a garden for a small school, with reasons.",
        "Think aloud, step by step: how many piano tuners work in a large city?",
        "Explain in detail how a computer program is compiled and run.",
    ),
}


def joined(rows: list[dict[str, Any]], first: str, second: str, names: str) -> Iterator[str]:
    """Endless text: one problem after the other, from the given rows."""
    for row in rows:
        yield names.format(row[first], row[second])


def cut(tokenizer: Any, pieces: Iterator[str], tokens: int = PROMPT + COMPLETION) -> list[int]:
    """Return the first ``tokens`` token ids of the pieces, one after the other."""
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= tokens:
            return ids[:tokens]
    raise SystemExit(f"only {len(ids)} tokens: take a longer text")


def generated(
    model: Any, tokenizer: Any, texts: Sequence[str], tokens: int = PROMPT + COMPLETION
) -> list[list[int]]:
    """Answers of the model, sampled in one batch, with their prompts."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    prompts = [{"input_ids": encode(tokenizer, text)} for text in texts]
    inputs = tokenizer.pad(prompts, return_tensors="pt")
    torch.manual_seed(0)
    new = tokens - int(inputs["attention_mask"].sum(dim=1).min())
    out = model.generate(
        **inputs,
        min_new_tokens=new,
        max_new_tokens=new,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    begins = (inputs["attention_mask"] == 0).sum(dim=1).tolist()
    rows = [row[begin:].tolist() for row, begin in zip(out, begins, strict=True)]
    return [row[:tokens] for row in rows]


def _kinds(model: Any, tokenizer: Any, math: str, gsm8k: str, split: str) -> Iterator[Any]:
    solutions = [json.loads(line) for line in Path(math).read_text().splitlines()]
    answers = [json.loads(line) for line in Path(gsm8k).read_text().splitlines()]
    test = split == "test"
    for start in range(100, 184, 12) if test else range(0, 36, 12):
        rows = solutions[start : start + 12]
        pieces = joined(rows, "problem", "solution", "Problem: {}\n\nSolution: {}\n\n")
        yield "solutions", cut(tokenizer, pieces)
    for start in range(100, 136, 12) if test else range(0, 12, 12):
        pieces = joined(answers[start : start + 12], "question", "answer", "Q: {}\nA: {}\n\n")
        yield "questions", cut(tokenizer, pieces)
    for name in CODE[split]:
        source = inspect.getsource(import_module(name))
        yield "code", cut(tokenizer, iter([source[len(source) // 3 :]]))
    for name in TOPICS[split]:
        yield "prose", cut(tokenizer, iter([topics[name]]))
    if test:
        licence = Path(torch.__file__).parents[1] / f"torch-{torch.__version__}.dist-info"
        texts = sorted(licence.rglob("LICENSE*"), key=lambda p: p.stat().st_size)
        yield "prose", cut(tokenizer, iter([texts[-1].read_text(errors="replace")[4000:]]))
    for ids in generated(model, tokenizer, ASKED[split]):
        yield "generated", ids


def _chats(
    model: Any, tokenizer: Any, math: str, split: str, count: int
) -> Iterator[tuple[str, Trajectory]]:
    """Chats of the model's own that end, in the order of the problems."""
    rows = [json.loads(line) for line in Path(math).read_text().splitlines()]
    problems = [rows[place]["problem"] for place in CHATS[split] if place < len(rows)]
    ends, found = turn_ends(model, tokenizer), 0
    while problems and found < count:
        asked, problems = problems[: 2 * count], problems[2 * count :]
        texts = [
            as_trajectory({"messages": [_question(problem)]}, tokenizer, "a chat")[0]
            for problem in asked
        ]
        for text in complete_all(model, texts, COMPLETION, batch=2 * count):
            if text.completion_ids[-1] in ends and found < count:
                found += 1
                yield "chats", text
    if found < count:
        raise SystemExit(f"{split}: only {found} of {count} chats end within {COMPLETION} tokens")


def _question(problem: str) -> dict[str, str]:
    return {"role": "user", "content": f"{problem}\n\n{BOXED}"}


def main() -> None:
    """Write ``calibration.jsonl`` and ``test.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "math", "gsm8k", "out"):
        parser.add_argument(name)
    parser.add_argument("--chats", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    Path(args.out).mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(args.model, args.dtype, "cpu")[:2]
    if args.chats and not tokenizer.chat_template:
        raise SystemExit(f"--chats {args.chats}: {args.model} has no chat template: leave it out")
    for split in ("calibration", "test"):
        lines = []
        texts = (
            (kind, Trajectory(tuple(ids[:PROMPT]), tuple(ids[PROMPT:])))
            for kind, ids in _kinds(model, tokenizer, args.math, args.gsm8k, split)
        )
        wanted = args.chats * (1 + (split == "test"))
        for kind, text in (*texts, *_chats(model, tokenizer, args.math, split, wanted)):
            row = {
                "kind": kind,
                "prompt_ids": text.prompt_ids,
                "completion_ids": text.completion_ids,
            }
            lines.append(json.dumps(row, separators=(",", ":")))
            begin = repr(tokenizer.decode(text.prompt_ids[:24]))
            print(split, kind, len(text.prompt_ids) + len(text.completion_ids), begin, flush=True)
        (Path(args.out) / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
