"""Arms that take turns step by step in one process: their ratios on a machine that others use too.

    OMP_NUM_THREADS=1 python benchmarks/paired_steps.py --batch 16 --steps 128

Every arm has a copy of the model that shares its weights. Time is CPU time of this process; what
disturbs it disturbs neighbouring steps alike, so the median of the ratios is the result.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache

from reasonalloc.benchmark.decode import weight_products
from reasonalloc.benchmark.shapes import build_shape
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.integrations.hf import attach_config

ARMS = ("rkv", "rkv/cost/planned", "rkv/uniform/reasonalloc", "best", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--profile", default="benchmarks/fidelity/smollm2-costs.json")
    options = parser.parse_args()
    time.perf_counter = time.process_time
    model = build_shape("smollm2-135m", torch.float32, torch.device("cpu"))
    ids = torch.randint(0, 49152, (options.batch, 100), generator=torch.Generator().manual_seed(0))
    runs: dict[str, tuple[Any, Any]] = {}
    for name in ARMS:
        twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        arm = parse_arm(name)
        if arm is None:
            runs[name] = twin, DynamicCache(config=twin.config)
            continue
        reads = options.profile if name in ("best", "rkv/cost/planned") else None
        config = CompressionConfig(budget=128, interval=options.interval, arm=arm, profile=reads)
        runs[name] = twin, attach_config(twin, config).new_cache()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    products = []
    with torch.inference_mode():
        for twin, cache in runs.values():
            twin(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        for step in range(options.steps):
            products += weight_products(model, options.batch, 1)
            for name in ARMS[step % len(ARMS) :] + ARMS[: step % len(ARMS)]:
                twin, cache = runs[name]
                start = time.perf_counter()
                twin(input_ids=ids[:, :1], past_key_values=cache)
                seconds[name].append(time.perf_counter() - start)
    report(seconds, products, options.interval)


def report(seconds: dict[str, list[float]], products: list[float], interval: int) -> None:
    def middle(own: list[float], other: list[float]) -> str:
        ratios = [a / b for i, (a, b) in enumerate(zip(own, other, strict=True)) if plain(i)]
        low, median, high = statistics.quantiles(ratios, n=4)
        return f"{median:.3f} ({low:.3f}-{high:.3f})"

    def plain(step: int) -> bool:
        return step % interval != interval - 1

    print("| arm | step, ms | / weight products | / rkv | run / rkv's run | compression |")
    print("|---|---|---|---|---|---|")
    for name, own in seconds.items():
        usual = statistics.median(s for i, s in enumerate(own) if plain(i))
        events = [s - usual for i, s in enumerate(own) if not plain(i)]
        beside = [middle(own, products), middle(own, seconds["rkv"])]
        whole = sum(own) / sum(seconds["rkv"])
        share = sum(events) / (usual * len(own) + sum(events))
        print(f"| `{name}` | {1e3 * usual:.1f} | {beside[0]} | {beside[1]} | ", end="")
        print(f"{whole:.3f} | {100 * share:.1f} % |")


if __name__ == "__main__":
    main()
