"""Steps over keys and values in fewer bits beside full-width ones, in turns in one process.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/coded_steps.py --step compile    # an idle machine
    OMP_NUM_THREADS=1 python benchmarks/coded_steps.py --step compile         # a busy one

R-KV with equal budgets in every format, on random weights; what disturbs a step disturbs its
neighbours alike, so the median of the ratios is the result. With one thread, time is CPU time.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from typing import get_args

import torch

from reasonalloc.benchmark.decode import Contender, quartiles
from reasonalloc.benchmark.machine import machine
from reasonalloc.benchmark.shapes import SHAPES, build_shape
from reasonalloc.benchmark.turns import decoder, in_turns
from reasonalloc.config import CompressionConfig, Step
from reasonalloc.planning.model_plan import plan_config


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--step", default="compile", choices=get_args(Step))
    parser.add_argument("--kv-dtypes", default="auto,int8,fp8,int8:int4,int4h")
    options = parser.parse_args()
    model = build_shape(options.shape, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, 100), generator=generator)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    kinds = options.kv_dtypes.split(",")
    configs = [
        CompressionConfig(
            budget=options.budget, interval=options.interval, step=options.step, kv_dtype=kind
        )
        for kind in kinds
    ]
    with ExitStack() as stack:
        sides = [
            decoder(stack, model, Contender(kind, config), ids, 2 * options.interval)
            for kind, config in zip(kinds, configs, strict=True)
        ]
        times = in_turns(sides, options.steps, clock)
    usual = [i for i in range(options.steps) if i % options.interval != options.interval - 1]
    made = machine(model)
    print(f"{options.shape}, batch {options.batch}, budget {options.budget}, {options.step}, "
          f"{made['processor']} ({made['vectors']}), {made['threads']} threads\n")  # fmt: skip
    print(f"| format | step / {kinds[0]}'s | run / {kinds[0]}'s | KV bytes / {kinds[0]}'s |")
    print("|---|---|---|---|")
    sizes = [plan_config(model, config).memory().slab_bytes for config in configs]
    for kind, own, size in zip(kinds, times, sizes, strict=True):
        low, middle, high = quartiles([own[i] / times[0][i] for i in usual])
        print(
            f"| `{kind}` | {middle:.3f} ({low:.3f}-{high:.3f}) | {sum(own) / sum(times[0]):.3f} "
            f"| {size / sizes[0]:.3f} |"
        )


if __name__ == "__main__":
    main()
