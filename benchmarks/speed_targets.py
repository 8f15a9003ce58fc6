"""What `make bench` and `make bench-kvpress` measured, against what a bounded cache should reach.

python benchmarks/speed_targets.py FOLDER     # with bench-*.json; Markdown on stdout
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ONLINE, UNEQUAL = "rkv/uniform/reasonalloc", "rkv/cost/planned"
#: What, limit (None: no target), value, whether the limit is an upper one.
Row = tuple[str, "float | None", float, bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = {
        path.stem.removeprefix("bench-"): json.loads(path.read_text())
        for path in sorted(folder.glob("bench-*.json"))
    }
    for name, data in found.items():
        if "command" in data:
            machine = data["machine"]
            where = f"{machine['processor']} ({machine['vectors']})"
            print(f"- `{name}`: {data['model']}, {machine['dtype']}, {where}, ", end="")
            print(f"{machine['threads']} threads, torch {machine['torch']}, transformers ", end="")
            print(f"{machine['transformers']}: `{data['command']}`")
    print("\n| what | target | measured | met |\n|---|---|---|---|")
    for what, limit, value, at_most in rows(found):
        if limit is None:
            print(f"| {what} | | {value:.3f} | |")
            continue
        met = value <= limit if at_most else value >= limit
        sign = "at most" if at_most else "at least"
        print(f"| {what} | {sign} {limit:g} | {value:.3f} | {'yes' if met else '**no**'} |")


def rows(found: dict[str, Any]) -> Iterator[Row]:
    """One row per claim that the files at hand speak of."""
    for name, batch in (("long1", 1), ("long16", 16)):
        if name in found:
            yield from constant(found[name], batch)
    yield from in_turns(found)
    if "full" in found:
        yield from beside_full(found["full"])
    if "arms" in found:
        yield from among_arms(found["arms"])
    for name, what, limit in (
        ("snapkv", "tokens/s, equal heads / kvpress's DecodingPress(SnapKVPress)", 1.0),
        ("adakv", "tokens/s, unequal heads / kvpress's DecodingPress(AdaKVPress)", 2.0),
    ):
        if name in found:
            times = {
                side: statistics.median(sum(run["steps"]) for run in runs)
                for side, runs in found[name]["runs"].items()
            }
            (_, peer), *ours = times.items()
            tokens = found[name]["new_tokens"]
            for side, seconds in ours:
                way = side.partition(", ")[2]
                run = f"batch 16{'' if way == 'eager' else ', ' + way}, {tokens} tokens"
                yield f"{run}: {what}", limit, peer / seconds, False


def of(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ways to run a step that were measured (`, compile`; nothing: eager), with arms by name."""
    arms = {arm["arm"]: arm for arm in data["summary"][0]["arms"]}
    for way in dict.fromkeys(name.removeprefix("rkv") for name in arms if name.startswith("rkv,")):
        yield way, {name.removesuffix(way): arm for name, arm in arms.items() if name.endswith(way)}
    if "rkv" in arms:
        yield "" if data["step"] == "eager" else f", {data['step']}", arms


def constant(data: dict[str, Any], batch: int) -> Iterator[Row]:
    for way, arms in of(data):
        arm, last = arms["rkv"], data["new_tokens"]
        what = f"batch {batch}{way}: a step at {last} tokens / at 300"
        ratio = arm["step_seconds"][str(last)] / arm["step_seconds"]["300"]
        yield f"{what}, one interval each, minutes apart", 1.05, ratio, True
        if batch == 1:
            ratio = arm["quartiles"][1] / data["summary"][0]["weight_products"]
            yield f"batch 1{way}: a step / its weight products alone", 1.1, ratio, True


def in_turns(found: dict[str, Any]) -> Iterator[Row]:
    for name in sorted(found):
        if name.startswith("constant"):
            data = found[name]
            way = "" if data["step"] == "eager" else f", {data['step']}"
            what = (
                f"batch {data['batch']}{way}: a step at {data['late']} tokens / at {data['early']}"
            )
            yield f"{what}, in turns", 1.05, data["ratio_of_sums"], True
    if "paired" in found:
        data = found["paired"]
        what = f"batch {data['batch']}, {data['step']}, in turns"
        unequal, online = data["arms"][UNEQUAL], data["arms"][ONLINE]
        yield f"{what}: a step, heads of 16 to 384 / equal heads", 1.1, unequal["to_rkv"][1], True
        ratio = online["run_to_rkv"]
        yield f"{what}: time of a run, `reasonalloc` heads / equal heads", 1.01, ratio, True


def beside_full(data: dict[str, Any]) -> Iterator[Row]:
    full = next(arm for arm in data["summary"][0]["arms"] if arm["arm"] == "full")
    last = str(data["new_tokens"])
    for way, arms in of(data):
        what, ours = f"batch 16{way}, {last} tokens", arms["rkv"]
        ratio = ours["tokens_per_second"] / full["tokens_per_second"]
        yield f"{what}: tokens/s / the full cache's", 2.0, ratio, False
        ratio = full["step_seconds"][last] / ours["step_seconds"][last]
        yield f"{what}: the full cache's last step / ours", 3.5, ratio, False


def among_arms(data: dict[str, Any]) -> Iterator[Row]:
    for way, arms in of(data):
        what, ours = f"batch 16{way}", arms["rkv"]
        steps = {name: arm["quartiles"][1] / ours["quartiles"][1] for name, arm in arms.items()}
        yield f"{what}: a step, heads of 16 to 384 / equal heads", 1.1, steps[UNEQUAL], True
        online = ours["tokens_per_second"] / arms[ONLINE]["tokens_per_second"]
        yield f"{what}: time of a run, `reasonalloc` heads / equal heads", 1.01, online, True
        yield f"{what}: a step of `best` / of `rkv`", None, steps["best"], True
        for name, arm in arms.items():
            runs = [r["steps"] for r in data["batches"][0]["runs"] if r["arm"] == arm["arm"]]
            share = statistics.median(compression(steps, data["interval"]) for steps in runs)
            yield f"{what}: share of compression, `{name}`", 0.03, share, True


def compression(steps: list[float], interval: int) -> float:
    """Share of a run: what the steps that end an interval take more than the others' median."""
    events = steps[interval - 1 :: interval]
    others = [s for i, s in enumerate(steps) if i % interval != interval - 1]
    return (sum(events) - len(events) * statistics.median(others)) / sum(steps)


if __name__ == "__main__":
    main()
