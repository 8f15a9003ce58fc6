"""A step after many generated tokens beside one after few, in turns: both meet the same machine.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/early_late.py --batch 1 --step compile [--out FILE]

Two caches are filled first, one until shortly before `--late` new tokens, one until `--early`; then
they take turns, step by step, for whole intervals. The ratio of a pair of steps is late / early.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import torch

from reasonalloc.benchmark.decode import Contender, quartiles
from reasonalloc.benchmark.machine import machine
from reasonalloc.benchmark.shapes import SHAPES, build_shape
from reasonalloc.benchmark.turns import decoder, in_turns
from reasonalloc.config import CompressionConfig, Step, parse_arm


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--arm", default="rkv")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--step", default="eager", choices=get_args(Step))
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--early", type=int, default=300)
    parser.add_argument("--late", type=int, default=4000)
    parser.add_argument("--intervals", type=int, default=4, help="that are measured of each")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    count = options.intervals * options.interval
    if not count <= options.early < options.late:
        parser.error(f"--early {options.early}: at least {count} tokens, fewer than --late")
    model = build_shape(options.shape, torch.float32, torch.device("cpu"))
    config = CompressionConfig(
        budget=options.budget,
        interval=options.interval,
        arm=parse_arm(options.arm),
        step=options.step,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (options.batch, 100), generator=generator)
    with ExitStack() as stack:
        sides = [
            decoder(stack, model, Contender(options.arm, config), ids, tokens - count)
            for tokens in (options.late, options.early)
        ]
        late, early = in_turns(sides, count)
    ratios = [a / b for a, b in zip(late, early, strict=True)]
    low, middle, high = quartiles(ratios)
    found = {
        "machine": machine(model),
        **{k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "ratio": middle,
        "quartiles": [low, high],
        "ratio_of_sums": sum(late) / sum(early),
        "seconds": {"late": late, "early": early},
    }
    where = f"{found['machine']['processor']} ({found['machine']['vectors']})"
    print(f"{options.shape}, batch {options.batch}, {options.step}, {where}: ", end="")
    print(f"{1e3 * statistics.median(late):.1f} ms at {options.late} new tokens, ", end="")
    print(f"{1e3 * statistics.median(early):.1f} ms at {options.early}; in turns, ", end="")
    print(f"{count} steps each: {middle:.3f} ({low:.3f}-{high:.3f}), ", end="")
    print(f"compressions included {found['ratio_of_sums']:.3f}")
    if options.out is not None:
        options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
