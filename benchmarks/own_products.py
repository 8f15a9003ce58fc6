"""Our products with a model's weights (`step="compile"`) beside PyTorch's, by rows.

    OMP_WAIT_POLICY=ACTIVE python benchmarks/own_products.py [--rows 1,4,16] [--dtype float32]

Every Linear of the shape is applied once per turn; the two take turns. GB/s: of weights, each read
once; GFLOP/s: two operations for each weight and row. Markdown on stdout.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from reasonalloc.benchmark.decode import quartiles
from reasonalloc.benchmark.machine import machine
from reasonalloc.benchmark.shapes import SHAPES, build_shape
from reasonalloc.benchmark.turns import in_turns
from reasonalloc.cpu_step.lowering import Call, drafts_of
from reasonalloc.cpu_step.program import Arena, Program
from reasonalloc.loading import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--rows", type=numbers, default="1,2,4,8,16,32", help="separated by commas")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    model = build_shape(options.shape, DTYPES[options.dtype], torch.device("cpu"))
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(layer.weight.numel() for layer in layers)
    size = layers[0].weight.element_size()
    found = machine(model)
    print(f"{options.shape}, {options.dtype}, {found['processor']} ({found['vectors']}), ", end="")
    print(f"{found['threads']} threads, torch {found['torch']}\n")
    print("| rows | PyTorch's, ms | ours, ms | quartiles | GB/s | GFLOP/s | times as fast |")
    print("|---|---|---|---|---|---|---|")
    for rows in options.rows:
        theirs, ours = side_by_side(layers, rows, options.turns)
        low, middle, high = quartiles(ours)
        print(
            f"| {rows} | {1e3 * statistics.median(theirs):.1f} | {1e3 * middle:.1f} "
            f"| {1e3 * low:.1f}-{1e3 * high:.1f} | {weights * size / middle / 1e9:.1f} "
            f"| {2 * weights * rows / middle / 1e9:.0f} "
            f"| {statistics.median(theirs) / middle:.2f} |",
            flush=True,
        )


def side_by_side(layers: list[Any], rows: int, turns: int) -> tuple[list[float], list[float]]:
    """Seconds of all products: by PyTorch, and by our program, in turns."""
    calls = []
    for layer in layers:
        x = torch.randn(rows, layer.in_features).to(layer.weight.dtype)
        weight = layer.weight.detach().t()
        calls.append(Call(torch.ops.aten.mm.default, (x, weight), {}, x @ weight))
    drafts = [draft for call in calls for draft in drafts_of(call) or refuse(rows)]
    program = Program(drafts, Arena(drafts, set()))

    def theirs() -> None:
        for _, (x, weight), _, out in calls:
            torch.mm(x, weight, out=out)

    with torch.no_grad():
        in_turns([theirs, program.run], 1)  # warm-up
        first, second = in_turns([theirs, program.run], turns)
    return first, second


def numbers(text: str) -> list[int]:
    """Positive numbers that are separated by commas."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(text)
    return found


def refuse(rows: int) -> Any:
    raise SystemExit(f"--rows: products of {rows} rows of this type are PyTorch's in our steps")


if __name__ == "__main__":
    main()
