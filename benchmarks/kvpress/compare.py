"""ReasonAlloc beside kvpress's DecodingPress: same weights, prompt, budget, interval and batch.

    make bench-kvpress

kvpress pins an older transformers, so it has an environment of its own; the two take turns, one
process at a time (A, B, A, B, ...), and the medians of the runs are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch

from reasonalloc.benchmark.shapes import SHAPES, build_shape
from reasonalloc.cli.output import grid, human, stdout
from reasonalloc.config import Step
from reasonalloc.loading import quiet

HERE = Path(__file__).parent
# kvpress's press, and the same method here.
PAIRS = {"snapkv": "snapkv", "adakv": "snapkv/uniform/adakv"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="python of kvpress's environment")
    parser.add_argument("--press", default="snapkv", choices=list(PAIRS))
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=1500)
    parser.add_argument("--budget", type=int, default=128)
    parser.add_argument("--interval", type=int, default=64)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--step", default="eager", help="ways to run our steps, separated by commas"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    arm, ways = PAIRS[options.press], options.step.split(",")
    if unknown := set(ways) - set(get_args(Step)):
        parser.error(f"--step: {unknown.pop()!r} is none of {', '.join(get_args(Step))}")
    names = [f"kvpress {options.press}", *(f"reasonalloc {arm}, {way}" for way in ways)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder, result = Path(temporary) / "model", Path(temporary) / "result.json"
        with quiet():
            build_shape(options.shape, torch.float32, torch.device("cpu")).save_pretrained(folder)
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        commands = [
            peer(options, folder, options.press, result),
            *(ours(options, folder, arm, way, result) for way in ways),
        ]
        sides = list(zip(names, commands, strict=True))
        for turn in range(options.repeats):
            for name, command in sides if turn % 2 == 0 else sides[::-1]:
                print(f"run {turn + 1} of {options.repeats}: {name}", file=sys.stderr)
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
                found[name].append(read(result))
    show(options, found)
    if options.out is not None:
        data = {**{k: str(v) for k, v in vars(options).items()}, "runs": found}
        options.out.write_text(json.dumps(data))


def common(options: argparse.Namespace) -> list[str]:
    names = ("batch", "prompt", "new_tokens", "budget", "interval", "window")
    return [x for n in names for x in (f"--{n.replace('_', '-')}", str(getattr(options, n)))]


def peer(options: argparse.Namespace, folder: Path, press: str, out: Path) -> list[str]:
    script = [options.peer_python, str(HERE / "peer.py"), str(folder)]
    return [*script, "--press", press, *common(options), "--out", str(out)]


def ours(options: argparse.Namespace, folder: Path, arm: str, way: str, out: Path) -> list[str]:
    # A process of its own as well: neither side inherits the other's memory or threads.
    script = [sys.executable, str(HERE / "own.py"), str(folder)]
    return [*script, "--arm", arm, "--step", way, *common(options), "--out", str(out)]


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def show(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]]) -> None:
    def median(name: str, value: Any) -> float:
        return statistics.median(value(run) for run in found[name])

    last, rows = options.interval, []
    whole = [median(name, lambda r: sum(r["steps"])) for name in found]
    end = [median(name, lambda r: statistics.mean(r["steps"][-last:])) for name in found]
    for name, total, tail in zip(found, whole, end, strict=True):
        rows.append(
            [
                name,
                f"{options.batch * options.new_tokens / total:.1f}",
                f"{1e3 * tail:.1f}",
                human(found[name][0]["kv_bytes"]),
                f"{whole[0] / total:.2f}x",
            ]
        )
    heads = [("", False), ("tok/s", True), ("ms a step, end", True), ("KV", True)]
    title = (
        f"{options.shape}, batch {options.batch}, budget {options.budget}, interval "
        f"{options.interval}, {options.new_tokens} tokens, {options.repeats} runs each, "
        f"{os.environ.get('OMP_NUM_THREADS', 'all')} threads"
    )
    stdout().print(grid([*heads, ("whole run", True)], rows, title))


if __name__ == "__main__":
    main()
