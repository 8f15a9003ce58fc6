"""The paged kernel over runs of unequal lengths: share of the GPU's copy bandwidth.

    python benchmarks/paged_bandwidth.py --out paged.json

Heads as in Llama-8B; a request's runs have random lengths between a quarter and 7/4 of the mean, in
pages that lie in random blocks. Needs CUDA. Bytes are the keys and values of all tokens, once; the
copy's are those that it reads and those that it writes. ``store``: the new tokens of a step. With
``--kv-dtype`` all but the last 72 tokens of a run are coded.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from kernel_bandwidth import copy_bandwidth, numbers, show_micro, timed
from torch import Tensor

from reasonalloc.attention.kernels.paged import (
    CodedTables,
    Pool,
    RunTables,
    coded_splits,
    decode_splits,
    paged_decode,
    paged_decode_coded,
    paged_store,
    scratch_floats,
)
from reasonalloc.cli.output import grid, stdout
from reasonalloc.ops.codes import row_format
from reasonalloc.ops.page_rows import PageRows

TAIL = 72  # tokens of a coded run that are plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--fp8", action="store_true", help="pages of e4m3 numbers")
    parser.add_argument("--kv-dtype", help="of older tokens, such as int8:int4")
    parser.add_argument("--requests", default="1,8,32,128,256", type=numbers)
    parser.add_argument("--tokens", default=1100, type=int, help="mean length of a run")
    parser.add_argument(
        "--layers", default=32, type=int, help="read in turn, so that no cache helps"
    )
    parser.add_argument("--kv-heads", default=8, type=int)
    parser.add_argument("--group", default=4, type=int)
    parser.add_argument("--head-dim", default=128, type=int)
    parser.add_argument("--block-size", default=16, type=int)
    parser.add_argument("--splits", type=int, help="instead of those that the launcher chooses")
    parser.add_argument("--repeats", default=100, type=int)
    parser.add_argument("--rotate", default=1 << 28, type=int, help="bytes of the copy")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in ("splits", "fp8"):
        if options.kv_dtype is not None and getattr(options, name):
            parser.error(f"--kv-dtype {options.kv_dtype} does not go with --{name}: leave one out")
    if not torch.cuda.is_available():
        raise SystemExit("paged_bandwidth.py measures a GPU, and there is none here")
    options.device = torch.device("cuda")
    copy = copy_bandwidth(options)
    rows = [measure(options, requests, copy) for requests in options.requests]
    name = torch.cuda.get_device_name()
    show(rows, f"{name}, {options.dtype}, a copy reaches {copy / 1e9:.0f} GB/s")
    if options.out is not None:
        found = {"device": name, "torch": torch.__version__, "dtype": options.dtype}
        found |= {"fp8": options.fp8, "kv_dtype": options.kv_dtype, "tokens": options.tokens}
        options.out.write_text(json.dumps({**found, "copy_bytes_per_second": copy, "rows": rows}))


def measure(options: argparse.Namespace, requests: int, copy: float) -> dict[str, Any]:
    device, dtype = options.device, getattr(torch, options.dtype)
    heads, dim, layers = options.kv_heads, options.head_dim, options.layers
    tables, blocks, lengths = made(options, requests)
    shape = (int(blocks.max()) + 1, layers, heads, options.block_size, 2 * dim)
    pages = torch.empty(shape, dtype=dtype, device=device).normal_()
    pool = Pool.of(pages.to(torch.float8_e4m3fn) if options.fp8 else pages)
    query = torch.randn(requests, heads * options.group, dim, dtype=dtype, device=device)
    out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    longest = int(lengths.max())
    seen = torch.full((requests,), longest, dtype=torch.int32, device=device)
    slots = torch.arange(requests, dtype=torch.int32, device=device)
    token, last = query[:, :heads], seen - 1
    coded = None
    if options.kv_dtype is None:
        splits: tuple[int, ...] = (options.splits or decode_splits(requests, longest, query, pool),)
        read = int(lengths.sum()) * 2 * dim * pool.data.element_size()
    else:
        coded, tables, read = begin_coded(options, tables, lengths, pages)
        splits = coded_splits(requests, max(0, longest - TAIL), TAIL, query, pool)
    floats = scratch_floats(requests, heads * options.group, dim, sum(splits))
    scratch = torch.empty(floats, dtype=torch.float32, device=device)

    def decode(layer: int) -> None:
        where, into = (layer, blocks, seen, slots), (out, lse, scratch, *splits, dim**-0.5)
        if coded is None:
            paged_decode(query, pool, tables, *where, *into)
        else:
            paged_decode_coded(query, pool, tables, *coded, *where, *into)

    def store(layer: int) -> None:
        paged_store(token, token, query, pool, tables, layer, blocks, slots, slots, last)

    error = None
    if coded is None:
        error = error_of(options, pool, tables, blocks, lengths, query, out, decode)
    seconds = timed([lambda layer=layer: decode(layer) for layer in range(layers)], options)
    stores = timed([lambda layer=layer: store(layer) for layer in range(layers)], options)
    return {
        "requests": requests,
        "splits": "+".join(map(str, splits)),
        "relative_error": error,
        "decode": seconds,
        "store": stores,
        "share_of_copy": read / layers / statistics.median(seconds) / copy,
    }


def begin_coded(
    options: argparse.Namespace, tables: RunTables, lengths: Tensor, pages: Tensor
) -> tuple[tuple[CodedTables, list[PageRows]], RunTables, int]:
    """Let runs begin with coded tokens; ``pages`` are written.

    Returns:
        What the kernel must know of them, where the runs lie now, and the bytes of all tokens.
    """
    size, dim, dtype = options.block_size, options.head_dim, pages.dtype
    form = PageRows(
        row_format(options.kv_dtype, dim, dim, dtype), 1, 2 * size * dim * dtype.itemsize
    )
    coded = (lengths - TAIL).clamp_min(0)
    begin = -(-coded // form.per_page) * size
    shift = begin + lengths - coded - int(lengths.max())
    # Fewer pages than plain tokens take: each run has the first of its own.
    three = [x.to(options.device, torch.int32).contiguous() for x in (shift, coded, begin)]
    filled(pages, form)
    read = int(coded.sum()) * form.form.width
    read += int((lengths - coded).sum()) * 2 * dim * dtype.itemsize
    known = CodedTables(three[1], three[2]), [form] * options.kv_heads
    return known, RunTables(tables.first, three[0], tables.plain), read


def filled(pages: Tensor, form: PageRows) -> None:
    """Write rows of random tokens to all pages; as plain ones they are of no meaning.

    Args:
        pages: [blocks, layers, heads, size, 2 * head_dim].
        form: of every head.
    """
    dim = pages.shape[-1] // 2
    own = form.view(pages.view(torch.uint8).flatten(3).flatten(0, 2))
    tokens = torch.randn(form.per_page, 2, dim, dtype=torch.float32, device=pages.device)
    nothing = tokens.new_zeros(form.per_page, dtype=torch.int32)
    state = tokens.new_zeros(form.per_page, form.channels)
    own.copy_(form.encode(tokens[:, 0], tokens[:, 1], nothing, state))


def made(options: argparse.Namespace, requests: int) -> tuple[RunTables, Tensor, Tensor]:
    """Tables, blocks of the requests [requests, n], lengths [layers, requests, heads]."""
    layers, heads, size = options.layers, options.kv_heads, options.block_size
    random = torch.Generator().manual_seed(0)
    shares = 0.25 + 1.5 * torch.rand(requests, layers, heads, generator=random)
    lengths = (shares / shares.mean(dim=(1, 2), keepdim=True) * options.tokens).long()
    held = (-(-lengths // size)).flatten(1)
    first = (held.cumsum(1) - held).view(lengths.shape)
    most = -(-int(held.sum(1).max()) // (layers * heads))
    blocks = 1 + torch.randperm(requests * most, generator=random).view(requests, most)
    lengths, first = lengths.transpose(0, 1), first.transpose(0, 1)
    shift = lengths - int(lengths.max())
    three = [x.to(options.device, torch.int32).contiguous() for x in (first, shift, blocks)]
    plain = torch.zeros(requests, dtype=torch.int32, device=options.device)
    return RunTables(three[0], three[1], plain), three[2], lengths


def error_of(
    options: argparse.Namespace,
    pool: Pool,
    tables: RunTables,
    blocks: Tensor,
    lengths: Tensor,
    query: Tensor,
    out: Tensor,
    decode: Any,
) -> float:
    """Relative error of some heads; stops if it is large."""
    decode(1)
    size, heads, dim = options.block_size, options.kv_heads, options.head_dim
    worst = 0.0
    for row in {0, len(query) // 2, len(query) - 1}:
        for head in (0, heads - 1):
            length = int(lengths[1, row, head])
            place = torch.arange(length, device=options.device)
            number = tables.first[1, row, head] + place // size
            block = blocks[row, number // (options.layers * heads)].long()
            which = number % (options.layers * heads)
            run = pool.data[block, which // heads, which % heads, place % size].float()
            group = slice(head * options.group, (head + 1) * options.group)
            weights = (query[row, group].float() @ run[:, :dim].T * dim**-0.5).softmax(1)
            expected = weights @ run[:, dim:]
            worst = max(worst, float((out[row, group] - expected).norm() / expected.norm()))
    if not worst < 2e-2:
        raise SystemExit(f"{len(query)} requests: relative error {worst}")
    return worst


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = [
        [
            str(row["requests"]),
            str(row["splits"]),
            show_micro(row["decode"]),
            show_micro(row["store"]),
            f"{100 * row['share_of_copy']:.0f} %",
        ]
        for row in rows
    ]
    heads = ("requests", "splits", "decode us", "store us", "of a copy")
    stdout().print(grid([(head, True) for head in heads], table, title))


if __name__ == "__main__":
    main()
