"""Arms that take turns step by step in one process: their ratios on a machine that wanders.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/paired_steps.py --step compile    # an idle machine
    OMP_NUM_THREADS=1 python benchmarks/paired_steps.py --steps 128            # a busy one

Every arm has a copy of the model that shares its weights. What disturbs a step disturbs its
neighbours alike, so the median of the ratios is the result. With one thread, time is CPU time of
this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import torch

from reasonalloc.benchmark.decode import Contender, products_alone, quartiles
from reasonalloc.benchmark.machine import machine
from reasonalloc.benchmark.shapes import SHAPES, build_shape
from reasonalloc.benchmark.turns import decoder, in_turns
from reasonalloc.config import CompressionConfig, Step, parse_arm

ARMS = ("rkv", "rkv/cost/planned", "rkv/uniform/reasonalloc", "best", "full")
PRODUCTS = "PyTorch's products with the weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--step", default="eager", choices=get_args(Step))
    parser.add_argument("--profile", default="benchmarks/fidelity/smollm2-costs.json")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = build_shape(options.shape, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, 100), generator=generator)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with ExitStack() as stack:
        sides = []
        for name in ARMS:
            arm = parse_arm(name)
            config = None
            if arm is not None:
                reads = options.profile if name in ("best", "rkv/cost/planned") else None
                config = CompressionConfig(
                    budget=128, interval=options.interval, arm=arm, profile=reads, step=options.step
                )
            # Past the first compressions; an interval begins where steps are timed.
            sides.append(decoder(stack, model, Contender(name, config), ids, 2 * options.interval))
        sides.append(products_alone(model, options.batch))
        times = in_turns(sides, options.steps, clock)
    seconds = dict(zip((*ARMS, PRODUCTS), times, strict=True))
    rows = summary(seconds, options.interval)
    report(rows, f"{options.shape}, batch {options.batch}, {options.step}", machine(model))
    if options.out is not None:
        data = {"batch": options.batch, "step": options.step, "machine": machine(model)}
        options.out.write_text(json.dumps({**data, "arms": rows, "seconds": seconds}))


def summary(seconds: dict[str, list[float]], interval: int) -> dict[str, dict[str, Any]]:
    """Per arm: its usual step, ratios to others without compressions, and with them."""
    usual = [i for i in range(len(seconds["rkv"])) if i % interval != interval - 1]

    def beside(own: list[float], other: list[float]) -> tuple[float, float, float]:
        return quartiles([own[i] / other[i] for i in usual])

    rows: dict[str, dict[str, Any]] = {}
    for name in ARMS:
        own = seconds[name]
        step = statistics.median(own[i] for i in usual)
        events = sum(s - step for i, s in enumerate(own) if i % interval == interval - 1)
        rows[name] = {
            "step_seconds": step,
            "to_products": beside(own, seconds[PRODUCTS]),
            "to_rkv": beside(own, seconds["rkv"]),
            "run_to_rkv": sum(own) / sum(seconds["rkv"]),
            "compression": events / sum(own) if name != "full" else None,
        }
    return rows


def report(rows: dict[str, dict[str, Any]], what: str, found: dict[str, Any]) -> None:
    def ratio(values: tuple[float, float, float]) -> str:
        return f"{values[1]:.3f} ({values[0]:.3f}-{values[2]:.3f})"

    print(f"{what}, {found['processor']} ({found['vectors']}), {found['threads']} threads\n")
    print("| arm | step, ms | / PyTorch's products | / rkv | run / rkv's run | compression |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        share = "" if row["compression"] is None else f"{100 * row['compression']:.1f} %"
        print(
            f"| `{name}` | {1e3 * row['step_seconds']:.1f} | {ratio(row['to_products'])} "
            f"| {ratio(row['to_rkv'])} | {row['run_to_rkv']:.3f} | {share} |"
        )


if __name__ == "__main__":
    main()
