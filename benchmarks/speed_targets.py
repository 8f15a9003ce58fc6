"""What `make bench` measured, against what a bounded cache should reach; Markdown on stdout.

python benchmarks/speed_targets.py bench-batch16.json bench-long1.json bench-long16.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

ONLINE = "rkv/uniform/reasonalloc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("batch16", "long1", "long16"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    batch16, long1, long16 = (
        json.loads(p.read_text()) for p in (options.batch16, options.long1, options.long16)
    )
    machine = batch16["machine"]
    print(f"{batch16['model']}, {machine['dtype']}, budget {batch16['budget']}, interval ", end="")
    print(f"{batch16['interval']}, {machine['processor']}, {machine['threads']} threads, ", end="")
    print(f"torch {machine['torch']}, transformers {machine['transformers']}\n")
    print("| what | target | measured | met |\n|---|---|---|---|")
    for what, limit, value, at_most in rows(batch16, long1, long16):
        met = value <= limit if at_most else value >= limit
        sign = "at most" if at_most else "at least"
        print(f"| {what} | {sign} {limit:g} | {value:.3f} | {'yes' if met else '**no**'} |")


def rows(
    batch16: dict[str, Any], long1: dict[str, Any], long16: dict[str, Any]
) -> list[tuple[str, float, float, bool]]:
    """What, limit, value, whether the limit is an upper one."""
    found: list[tuple[str, float, float, bool]] = []
    for name, data in (("1", long1), ("16", long16)):
        (arm,) = data["summary"][0]["arms"]
        last = str(data["new_tokens"])
        ratio = arm["step_seconds"][last] / arm["step_seconds"]["300"]
        found.append((f"batch {name}: a step at {last} tokens / at 300", 1.05, ratio, True))
    (entry,) = long1["summary"]
    step = entry["arms"][0]["quartiles"][1]
    found.append(
        ("batch 1: a step / its weight products alone", 1.1, step / entry["weight_products"], True)
    )
    arms = {arm["arm"]: arm for arm in batch16["summary"][0]["arms"]}
    runs = {run["arm"]: run for run in batch16["batches"][0]["runs"]}
    last = str(batch16["new_tokens"])
    uniform, full = arms["rkv"], arms["full"]
    unequal = next(arm for name, arm in arms.items() if name.startswith("rkv/cost"))
    whole = uniform["tokens_per_second"] / full["tokens_per_second"]
    found.append((f"batch 16, {last} tokens: tokens/s / full cache's", 2.0, whole, False))
    end = full["step_seconds"][last] / uniform["step_seconds"][last]
    found.append(("batch 16: the full cache's last step / ours", 3.5, end, False))
    ratio = unequal["quartiles"][1] / uniform["quartiles"][1]
    found.append(("batch 16: a step with unequal heads / with equal ones", 1.1, ratio, True))
    online = uniform["tokens_per_second"] / arms[ONLINE]["tokens_per_second"]
    found.append(("batch 16: time of a run, `reasonalloc` heads / equal heads", 1.01, online, True))
    for name in ("rkv", ONLINE):
        value = compression(runs[name]["steps"], batch16["interval"])
        found.append((f"batch 16: share of compression, `{name}`", 0.03, value, True))
    return found


def compression(steps: list[float], interval: int) -> float:
    """Share of a run: what the steps that end an interval take more than the others' median."""
    events = steps[interval - 1 :: interval]
    others = [s for i, s in enumerate(steps) if i % interval != interval - 1]
    return (sum(events) - len(events) * statistics.median(others)) / sum(steps)


if __name__ == "__main__":
    main()
