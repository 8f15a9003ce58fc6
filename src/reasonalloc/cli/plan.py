"""``reasonalloc plan``: the exact memory of a cache, before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

Batch = Annotated[int, typer.Option("--batch", help="Sequences.", min=1)]
Tokens = Annotated[
    int, typer.Option("--tokens", help="Context length to compare at, in tokens.", min=1)
]
Memory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Memory for the cache (24GiB, 800MB): print the largest batch that fits.",
    ),
]


def command(
    context: typer.Context,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    budget: o.Budget = o.DEFAULT_BUDGET,
    arm: o.ArmName = "rkv",
    interval: o.Interval = 128,
    window: o.Window = 8,
    n_sink: o.Sinks = 0,
    profile: o.ProfileFile = None,
    batch: Batch = 1,
    tokens: Tokens = 32768,
    memory: Memory = None,
    as_json: o.Json = False,
) -> None:
    """Exact bytes of the KV cache before the first token, compressed and full.

    Only the model's configuration is read, not its weights.
    """
    name = o.pick_model(model, model_option)
    size = None if memory is None else output.parse_size(memory)
    config = o.compression(
        context,
        arm,
        budget=budget,
        interval=interval,
        window=window,
        n_sink=n_sink,
        profile=profile,
    )
    if config is None:
        raise UsageError(
            f"--arm {arm} has no budget to plan: choose an arm that compresses, the full cache is "
            "printed beside it"
        )
    from reasonalloc.loading import load_config, resolve_dtype

    with output.stderr().status("Reading the model's configuration"):
        model_config = load_config(name, trust_remote_code)
    kind = resolve_dtype(dtype, model_config)
    layout = o.make_layout(model_config, name, config)
    limit = getattr(model_config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        output.note(f"--tokens {tokens} is more than the {limit} positions that the model has")
    report: dict[str, Any] = {
        "model": name,
        "dtype": str(kind).removeprefix("torch."),
        "batch": batch,
        "tokens": tokens,
        "arm": str(config.arm),
        "budget": budget,
        "interval": interval,
        "window": window,
        "n_sink": n_sink,
        **_sizes(layout, batch, tokens, kind.itemsize),
        "memory": None if size is None else _batches(layout, tokens, kind.itemsize, size),
    }
    if as_json:
        output.print_json(report)
    else:
        _show(report)


def _sizes(layout: o.Layout, batch: int, tokens: int, itemsize: int) -> dict[str, Any]:
    plan = layout.plan(batch, itemsize)
    return {
        "kv_bytes": {
            "full": plan.full_bytes(tokens),
            "compressed": plan.kv_bytes(tokens),
            "after_compression": plan.floor_bytes + plan.sliding_bytes(tokens),
        },
        "bookkeeping_bytes": plan.bookkeeping_bytes,
        "layers": _layers(layout, batch, tokens, itemsize),
    }


def _layers(layout: o.Layout, batch: int, tokens: int, itemsize: int) -> list[dict[str, Any]]:
    from reasonalloc.planning.memory import MemoryPlan

    totals = iter(layout.totals or ())
    interval = layout.config.interval if layout.config else 0
    layers = []
    for index, shape in enumerate(layout.shapes):
        own = (next(totals),) if shape.compressible else ()
        one = MemoryPlan((shape,), own, batch, interval, 0, itemsize)
        layers.append(
            {
                "layer": index,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "sliding_window": shape.sliding_window,
                "budget_total": own[0] if own else None,
                "budget_per_head": own[0] / shape.kv_heads if own else None,
                "kv_bytes_full": one.full_bytes(tokens),
                "kv_bytes_compressed": one.kv_bytes(tokens),
            }
        )
    return layers


def _batches(layout: o.Layout, tokens: int, itemsize: int, size: int) -> dict[str, Any]:
    plan = layout.plan(1, itemsize)  # everything grows linearly with the batch
    return {
        "bytes": size,
        "largest_batch": {
            "full": size // plan.full_bytes(tokens),
            "compressed": size // (plan.kv_bytes(tokens) + plan.bookkeeping_bytes),
        },
    }


def _show(report: dict[str, Any]) -> None:
    sizes, console = report["kv_bytes"], output.stdout()
    full, compressed = sizes["full"], sizes["compressed"]
    change = (
        f"{full / compressed:.1f}x smaller"
        if compressed <= full
        else "larger: the budget exceeds this context"
    )
    rows = [
        ("arm", f"{report['arm']}, budget {report['budget']}, interval {report['interval']}"),
        ("cache", f"{report['dtype']}, batch {report['batch']}, {report['tokens']} tokens each"),
        ("full cache", output.human(full)),
        ("compressed", f"{output.human(compressed)} ({change})"),
        ("  in use after a compression", output.human(sizes["after_compression"])),
        ("  bookkeeping besides", output.human(report["bookkeeping_bytes"])),
    ]
    if report["memory"] is not None:
        best = report["memory"]["largest_batch"]
        rows.append(
            (
                f"largest batch in {output.human(report['memory']['bytes'])}",
                f"{best['compressed']} compressed, {best['full']} full (weights not counted)",
            )
        )
    console.print(output.pairs(rows, title=f"KV cache of {report['model']}"))
    console.print()
    console.print(_table(report["layers"]))


def _table(layers: list[dict[str, Any]]) -> Any:
    """Equal neighbours share a row."""
    groups: list[list[dict[str, Any]]] = []
    for layer in layers:
        same = groups and all(layer[k] == groups[-1][0][k] for k in layer if k != "layer")
        if same:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    rows = []
    for group in groups:
        first, last = group[0], group[-1]
        kept = first["budget_per_head"]
        rows.append(
            (
                str(first["layer"])
                if first is last
                else f"{first['layer']}-{last['layer']} (each)",
                f"{first['kv_heads']} x {first['head_dim']}",
                f"sliding, {first['sliding_window']}" if kept is None else f"{kept:g}",
                "" if kept is None else str(first["budget_total"]),
                output.human(first["kv_bytes_compressed"]),
                output.human(first["kv_bytes_full"]),
            )
        )
    columns = (
        ("layer", False),
        ("KV heads x dim", True),
        ("tokens per head", True),
        ("per layer", True),
        ("compressed", True),
        ("full", True),
    )
    return output.grid(columns, rows, "Budget of each layer")
