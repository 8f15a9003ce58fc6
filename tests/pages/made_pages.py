"""The pages, made of small data that nobody measured."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eval_folder import MANIFEST, events, row, rows, write
from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.demand import DemandProfile
from reasonalloc.cli.main import main
from reasonalloc.core.recorder import Event
from reasonalloc.evaluation.demo import DemoPlan, Recording
from reasonalloc.evaluation.kv_share import SIZES
from reasonalloc.report.demo import page_data
from reasonalloc.report.page import render

ARMS = ("best", "rkv", "snapkv", "h2o", "streaming_llm", "pyramid-rkv", "reasonalloc", "random")
BUDGETS = (64, 48, 96, 128)
LAYERS, KV_HEADS, COUNT, INTERVAL = 3, 2, 8, 32
DEMAND = [120.5, 40.25, 300.0]


class Words:
    """A tokenizer whose tokens are whole words."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> tuple[int, ...]:
        words = text.split()
        self.words += [word for word in words if word not in self.words]
        return tuple(self.words.index(word) for word in words)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.words[i] for i in ids]


def save_demand(path: Path) -> Path:
    curves = [DEMAND, [value + 20 for value in DEMAND], [value - 20 for value in DEMAND]]
    most = [2 * value for value in DEMAND]
    hashes = [str(i) * 64 for i in range(len(curves))]
    DemandProfile("made/up-1b", "0" * 16, 0.93, 8, hashes, DEMAND, most, curves).save(path)
    return path


def costs() -> CostProfile:
    """Costs of layer l, head h at budget b: (l + 1)(h + 1) / b nats per token."""
    budgets = [16, 32, 64]
    table = [
        [[(layer + 1) * (head + 1) / budget for budget in budgets] for head in range(KV_HEADS)]
        for layer in range(LAYERS)
    ]
    return CostProfile(
        objective="kl",
        model_id="<b>made/up & more-1b",
        config_hash="0" * 16,
        policy="rkv",
        interval=8,
        window=4,
        samples=0,
        budgets=budgets,
        text_hashes=["a" * 64, "b" * 64],
        kinds=["code", "prose"],
        tokens=[10, 30],
        costs=[table, table],
    )


def _events(length: int, generator: random.Random) -> tuple[Event, ...]:
    """Each head keeps, of what it holds and what came since, a few at random."""
    held: dict[tuple[int, int], list[int]] = {}
    found = []
    for read in range(2 * INTERVAL, length, INTERVAL):
        for layer in range(LAYERS):
            kept = []
            for head in range(KV_HEADS):
                before = held.get((layer, head))
                seen = list(range(read)) if before is None else before
                new = [] if before is None else list(range(read - INTERVAL, read))
                count = 28 + 8 * layer + 6 * head
                held[layer, head] = sorted(generator.sample(seen + new, count))
                kept.append(held[layer, head])
            budgets = torch.tensor([[len(positions) for positions in kept]])
            offsets = torch.cumsum(budgets, 1) - budgets
            positions = torch.tensor([[p for part in kept for p in part]], dtype=torch.int32)
            found.append(Event(read, layer, budgets, positions, offsets))
    return tuple(found)


def demo_results(plan: DemoPlan, words: Words) -> tuple[list[Recording], list[dict[str, Any]]]:
    """The first problem is traced at the first budget; every second arm fails on it."""
    problems = plan.problems()
    prompts = tuple(words.encode(problem.prompt + " <think>") for problem in problems)
    right = [words.encode(problem.solution + " <end>") for problem in problems]
    (nothing,) = words.encode("nothing")
    results, samples = [], []
    for number, job in enumerate(plan.jobs):
        generator = random.Random(number)
        share = 0.9 if job.budget is None else job.budget / 150
        correct = [number % 2 == 0, *(generator.random() < share for _ in right[1:])]
        chains = list(right)
        if not correct[0]:
            chains[0] = (*right[0][:40], nothing, *right[0][41:])
        traced = job.budget == plan.traced
        events = _events(len(prompts[0]) + len(chains[0]), generator) if traced else ()
        results.append(Recording(job, tuple(correct), prompts, tuple(chains), events))
        samples += [
            {
                "arm": job.arm,
                "budget": job.budget,
                "correct": mark,
                "prompt_tokens": len(prompts[0]),
                "completion_tokens": len(chain),
                "kv_bytes": 4096 * (job.budget or 400),
                "seconds": 2.0 + number / 10,
                "compressions": 0 if job.budget in (None, 128) else 90,
            }
            for mark, chain in zip(correct, chains, strict=True)
        ]
    return results, samples


class Pages:
    """Files of the pages in a folder, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def results(self) -> list[Recording]:
        """What the demo's page shows."""
        return self._made[0]

    @cached_property
    def demo(self) -> Path:
        traced = [result for result in self.results if result.events]
        page = self.folder / "demo.html"
        page.write_text(render(page_data(self._plan, self._made[1], traced, self._words)), "utf-8")
        return page

    @cached_property
    def report(self) -> Path:
        """Two groups that do not compare; the second is of an older version."""
        manifest = {**MANIFEST, "profiles": {"profile": str(save_demand(self.folder / "p.json"))}}
        first = write(self.folder / "a", report_rows(), manifest, events())
        warm = {**MANIFEST, "temperature": 1.0, "model": "made/up-" + "long" * 12}
        lines = [row("random", 64, f"p{i}", correct=i < 2) for i in range(4)]
        lines = [{k: v for k, v in line.items() if k not in SIZES} for line in lines]
        second = write(self.folder / "b", lines, warm)
        assert main(["report", str(first), str(second), "--paper", "--base", "rkv"]) == 0
        return first / "report.html"

    @cached_property
    def demand(self) -> Path:
        return _plot(save_demand(self.folder / "demand.json"))

    @cached_property
    def costs(self) -> Path:
        costs().save(self.folder / "costs.json")
        return _plot(self.folder / "costs.json")

    @cached_property
    def _made(self) -> tuple[list[Recording], list[dict[str, Any]]]:
        return demo_results(self._plan, self._words)

    @cached_property
    def _plan(self) -> DemoPlan:
        profile = save_demand(self.folder / "profile.json")
        return DemoPlan(self.folder, ARMS, BUDGETS, COUNT, 6, profile, None, None, 1)

    @cached_property
    def _words(self) -> Words:
        return Words()


def report_rows() -> list[dict]:
    """Samples of the report's first group."""
    return rows(arms=("full", "rkv", "reasonalloc", "snapkv"), length=240)


def _plot(file: Path) -> Path:
    page = file.with_suffix(".html")
    assert main(["profile", "show", str(file), "--plot", str(page)]) == 0
    return page
