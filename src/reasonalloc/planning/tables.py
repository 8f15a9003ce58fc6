"""Tables of a budget's plan: bytes of the caches, and what every layer keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reasonalloc.planning.latents import LATENTS_SINCE
from reasonalloc.planning.memory import MemoryPlan
from reasonalloc.tables import Table, human


def layer_sizes(plan: MemoryPlan, tokens: int) -> list[dict[str, Any]]:
    """Return shape, budget (tokens) and KV bytes of every layer after ``tokens`` tokens."""
    totals, formats = iter(plan.totals), iter(plan.formats or ())
    layers = []
    for index, shape in enumerate(plan.shapes):
        own = (next(totals),) if shape.compressible else ()
        coded = (next(formats),) if plan.formats and shape.compressible else None
        one = replace(plan, shapes=(shape,), totals=own, formats=coded)
        layers.append(
            {
                "layer": index,
                "kv_heads": shape.kv_heads,
                "head_dim": shape.head_dim,
                "value_dim": shape.dims[1],
                "sliding_window": shape.sliding_window,
                "state_bytes": one.state_bytes,
                "reads": shape.reads,
                "budget_total": own[0] if own else None,
                "budget_per_head": own[0] / shape.kv_heads if own else None,
                "heads": [list(head) for head in coded[0]] if coded else None,
                "kv_bytes_full": one.full_bytes(tokens),
                "kv_bytes_compressed": one.kv_bytes(tokens),
            }
        )
    return layers


def size_table(report: dict[str, Any]) -> Table:
    """Return the bytes of the full and of the compressed cache."""
    sizes = report["kv_bytes"]
    full, compressed = sizes["full"], sizes["compressed"]
    change = (
        f"{full / compressed:.1f}x smaller"
        if compressed <= full
        else "larger: budget and interval exceed this context"
    )
    rows = [
        ("arm", f"{report['arm']}, budget {report['budget']}, interval {report['interval']}"),
        ("cache", f"{report['dtype']}, batch {report['batch']}, {report['tokens']} tokens each"),
        *_older(report),
        *_prompt(report),
        *_latents(report),
        ("full cache", human(full)),
        ("compressed", f"{human(compressed)} ({change})"),
        ("  in use after a compression", human(sizes["after_compression"])),
        ("  bookkeeping besides", human(report["bookkeeping_bytes"])),
    ]
    if report["memory"] is not None:
        best = report["memory"]["largest_batch"]
        rows.append(
            (
                f"largest batch in {human(report['memory']['bytes'])}",
                f"{best['compressed']} compressed, {best['full']} full (weights not counted)",
            )
        )
    return Table(f"KV cache of {report['model']}", [], rows)


def _older(report: dict[str, Any]) -> list[tuple[str, str]]:
    if report["kv_dtype"] == "auto":
        return []
    kinds = Counter(kind for layer in report["layers"] for _, kind in layer["heads"] or ())
    what = ", ".join(f"{count} heads {kind}" for kind, count in kinds.items())
    what = what or report["kv_dtype"]
    return [("older tokens", f"{what}; the last {report['window']} as they are")]


def _prompt(report: dict[str, Any]) -> list[tuple[str, str]]:
    if report["prompt"] != "pin":
        return []
    return [("pinned prompt", f"{report['prompt_tokens']} tokens per head, on top of the budget")]


def latent_sizes(plan: MemoryPlan) -> dict[str, Any] | None:
    """Return what a token takes in a layer with latent attention; None if there is none."""
    latent = next((shape.latent for shape in plan.shapes if shape.latent is not None), None)
    if latent is None:
        return None
    return {
        "cached": latent.cached,
        "heads": latent.heads,
        "token_bytes": latent.numbers * plan.itemsize,
        "expanded_token_bytes": latent.expanded_numbers * plan.itemsize,
    }


def _latents(report: dict[str, Any]) -> list[tuple[str, str]]:
    if (latent := report["latent"]) is None:
        return []
    one, expanded = human(latent["token_bytes"]), human(latent["expanded_token_bytes"])
    whole = f"keys and values of {latent['heads']} heads"
    if latent["cached"]:
        return [("a token of a layer", f"a latent, {one}; {whole} would take {expanded}")]
    return [
        (
            "a token of a layer",
            f"{whole}, {expanded}; transformers {LATENTS_SINCE} and newer caches latents, {one}",
        )
    ]


def layer_table(layers: Sequence[dict[str, Any]]) -> Table:
    """Return the budget and the bytes of each layer; equal neighbours share a row."""
    columns = (
        ("layer", False),
        ("KV heads x dim", True),
        ("tokens per head", True),
        ("per layer", True),
        ("compressed", True),
        ("full", True),
    )
    return Table("Budget of each layer", columns, [_row(group) for group in _equal(layers)])


def _equal(layers: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: list[list[dict[str, Any]]] = []
    for layer in layers:
        if groups and all(layer[key] == groups[-1][0][key] for key in layer if key != "layer"):
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def _row(group: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    first, last = group[0], group[-1]
    kept = first["budget_per_head"]
    return (
        str(first["layer"]) if first is last else f"{first['layer']}-{last['layer']} (each)",
        f"{first['kv_heads']} x {_width(first)}" if first["kv_heads"] else "",
        _kept(first),
        "" if kept is None else str(first["budget_total"]),
        human(first["kv_bytes_compressed"]),
        human(first["kv_bytes_full"]),
    )


def _width(layer: dict[str, Any]) -> str:
    """Return the width of a key, and that of a value if it is another."""
    key, value = layer["head_dim"], layer["value_dim"]
    return f"{key}" if value in (0, key) else f"{key}+{value}"


def _kept(layer: dict[str, Any]) -> str:
    """Return what a layer keeps: tokens per head, a sliding window, a state, another's, or none."""
    state = f"state, {human(layer['state_bytes'])}" if layer["state_bytes"] else ""
    if layer["budget_per_head"] is not None:
        return f"{layer['budget_per_head']:g}" + (f"; {state}" if state else "")
    if layer["sliding_window"] is not None:
        return f"sliding, {layer['sliding_window']}"
    if layer["reads"] is not None:
        return f"layer {layer['reads']}'s"
    return state or "nothing"
