"""The decode kernel over ragged runs: share of the device's copy bandwidth, beside padded SDPA.

    python benchmarks/kernel_bandwidth.py --out kernel.json

Heads as in Llama-8B. The runs of a sequence have random lengths between a quarter and 7/4 of the
budget, with the same sum for all. ``padded``: SDPA over as many tokens per head, all of one length,
which is what a cache without ragged runs would read at best. Bytes are the keys and values of all
tokens, once; the copy's are those that it reads and those that it writes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonalloc.attention import BACKENDS
from reasonalloc.cache import Rows, Slab
from reasonalloc.cli.output import grid, stdout


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batches", default="1,8,32,128,256", type=numbers)
    parser.add_argument("--budgets", default="128,512,1024,4096", type=numbers)
    parser.add_argument("--kv-heads", default=8, type=int)
    parser.add_argument("--group", default=4, type=int)
    parser.add_argument("--head-dim", default=128, type=int)
    parser.add_argument("--repeats", default=100, type=int)
    parser.add_argument("--rotate", default=1 << 28, type=int, help="bytes that no cache holds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    copy = copy_bandwidth(options)
    rows = [measure(options, b, n, copy) for n in options.budgets for b in options.batches]
    cuda = options.device.type == "cuda"
    name = torch.cuda.get_device_name(options.device) if cuda else str(options.device)
    show(rows, f"{name}, {options.dtype}, a copy reaches {copy / 1e9:.0f} GB/s")
    if options.out is not None:
        found = {"device": name, "torch": torch.__version__, "dtype": options.dtype}
        options.out.write_text(json.dumps({**found, "copy_bytes_per_second": copy, "rows": rows}))


def measure(options: argparse.Namespace, batch: int, budget: int, copy: float) -> dict[str, Any]:
    dtype = getattr(torch, options.dtype)
    width = 2 * options.head_dim * dtype.itemsize
    read = batch * options.kv_heads * budget * width
    # Several slabs in turn, so that the device's cache cannot hold what is read.
    copies = max(1, min(16, -(-options.rotate // read)))
    slabs = [ragged_slab(options, batch, budget, dtype, seed) for seed in range(copies)]
    shape = (batch, options.kv_heads * options.group, 1, options.head_dim)
    query = torch.randn(shape, device=options.device, dtype=dtype)
    scaling = options.head_dim**-0.5
    ragged, padded = BACKENDS.create("triton"), BACKENDS.create("sdpa")
    expected, _ = BACKENDS.create("eager").decode(query, slabs[0], scaling, None, False)
    found, _ = ragged.decode(query, slabs[0], scaling, None, False)
    error = float((found - expected).float().norm() / expected.float().norm())
    if not error < 2e-2:
        raise SystemExit(f"batch {batch}, budget {budget}: relative error {error}")
    seconds = timed(
        [lambda s=s: ragged.decode(query, s, scaling, None, False) for s in slabs], options
    )
    for slab in slabs:
        slab.uniform_length = budget  # the same memory, read as runs of equal length
    uniform = timed(
        [lambda s=s: ragged.decode(query, s, scaling, None, False) for s in slabs], options
    )
    dense = timed(
        [lambda s=s: padded.decode(query, s, scaling, None, False) for s in slabs], options
    )
    return {
        "batch": batch,
        "budget": budget,
        "relative_error": error,
        "ragged": seconds,
        "equal": uniform,
        "padded_sdpa": dense,
        "share_of_copy": read / statistics.median(seconds) / copy,
    }


def ragged_slab(
    options: argparse.Namespace, batch: int, budget: int, dtype: torch.dtype, seed: int
) -> Slab:
    heads, device = options.kv_heads, options.device
    generator = torch.Generator().manual_seed(seed)
    shares = 0.25 + 1.5 * torch.rand(batch, heads, generator=generator)
    lengths = (shares / shares.mean(dim=1, keepdim=True) * budget).long().clamp_min(1)
    lengths[:, -1] += heads * budget - lengths.sum(dim=1)
    slots = heads * (budget + budget // 8)
    dim = options.head_dim
    slab = Slab(batch, heads, slots, dim, dim, dtype=dtype, device=device)
    longest = int(lengths.max())
    # All rows point to one token: where the runs lie is what matters; contents follow.
    slot = torch.zeros(batch, heads, longest, dtype=torch.int64, device=device)
    rows = Rows(slab.keys, slab.values, slab.positions, None, slot, lengths.to(device))
    keep = torch.arange(longest, device=device) < rows.lengths[..., None]
    slab.rewrite(rows, keep, None)
    slab.keys.normal_()
    slab.values.normal_()
    return slab


def copy_bandwidth(options: argparse.Namespace) -> float:
    """Bytes per second of a large copy, read and written ones."""
    source = torch.randint(0, 256, (options.rotate,), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    return 2 * options.rotate / statistics.median(timed([lambda: target.copy_(source)], options))


def timed(runs: Sequence[Callable[[], Any]], options: argparse.Namespace) -> list[float]:
    """Seconds of each of ``repeats`` calls, taking turns; a graph hides what launching costs."""
    for run in runs:
        run()
    if options.device.type != "cuda":
        return [clocked(runs[i % len(runs)]) for i in range(options.repeats)]
    graphs = [captured(run) for run in runs]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * options.repeats)]
    for i in range(options.repeats):
        marks[2 * i].record()
        graphs[i % len(graphs)].replay()
        marks[2 * i + 1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in zip(marks[::2], marks[1::2], strict=True)]


def captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def clocked(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def show_micro(seconds: Sequence[float]) -> str:
    """Median and quartiles, in microseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return f"{1e6 * middle:.1f} ({1e6 * low:.1f}-{1e6 * high:.1f})"


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    table = [
        [
            str(row["batch"]),
            str(row["budget"]),
            *(show_micro(row[kind]) for kind in ("ragged", "equal", "padded_sdpa")),
            f"{100 * row['share_of_copy']:.0f} %",
        ]
        for row in rows
    ]
    heads = ("batch", "budget", "ragged us", "equal us", "SDPA us", "of a copy")
    stdout().print(grid([(head, True) for head in heads], table, title))


if __name__ == "__main__":
    main()
