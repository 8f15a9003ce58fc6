"""The format of cost profiles: JSON objects, checked field by field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonalloc.calibrated.predictor import read_predictor
from reasonalloc.calibrated.reading import (
    LARGEST_WHOLE,
    check_choice,
    check_fields,
    check_object,
    check_texts,
    check_version,
    is_number,
)
from reasonalloc.errors import UsageError
from reasonalloc.kinds import is_coded

#: Version 1 had no ``layer_costs``, version 2 no ``coded``, version 3 no ``prompt``, version 4 no
#: ``foretells``; all are read.
SCHEMA_VERSION = 5
#: How costs were measured: one head compressed at a time and replayed, or estimated to second
#: order from gradients (see ``calibration``).
OBJECTIVES = ("kl", "fisher")
#: What happened to prompts.
PROMPTS = ("evict", "pin")
REMEDY = "make one with 'reasonalloc calibrate --objective fisher'"


def check_costs(data: Any, names: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a cost profile, of the present version.

    Args:
        data: what the file holds.
        names: of all fields.

    Raises:
        UsageError: it breaks the schema; says where.
    """
    check_object(data)
    if data.get("kind") != "cost":
        raise UsageError(f"it is another kind of file: {REMEDY}")
    if data.get("version") == 1 and "layer_costs" not in data:
        data = {**data, "layer_costs": [], "version": 2}
    if data.get("version") == 2:
        data = {"coded": {}, **data, "version": 3}
    if data.get("version") == 3:
        data = {"prompt": "evict", **data, "version": 4}
    if data.get("version") == 4:
        data = {"foretells": None, **data, "version": SCHEMA_VERSION}
    check_version(data, SCHEMA_VERSION)
    check_fields(data, names)
    check_choice(data, "objective", OBJECTIVES)
    check_choice(data, "prompt", PROMPTS)
    check_texts(data, ("model_id", "config_hash", "policy"))
    _check_settings(data)
    texts = _list("text_hashes", data["text_hashes"], None, str)
    _list("kinds", data["kinds"], texts, str)
    _list("tokens", data["tokens"], texts, int)
    if min(data["tokens"]) < 1:
        raise UsageError("tokens must be positive")
    points = len(data["budgets"])
    layers = _check_costs(data["costs"], texts, points)
    _check_layer_costs(data["layer_costs"], texts, layers, points)
    _check_coded(data, texts, points)
    read_predictor(data["foretells"], [len(layer) for layer in data["costs"][0]])
    for entry in data["joint"] if isinstance(data["joint"], list) else [None]:
        wanted = {"budget", "predicted", "measured", "uniform"}
        if not isinstance(entry, dict) or set(entry) != wanted:
            raise UsageError(f"joint must be a list of objects with {', '.join(sorted(wanted))}")
    return dict(data)


def _check_settings(data: dict[str, Any]) -> None:
    for name, least in (("interval", 1), ("window", 1), ("samples", 0)):
        if type(data[name]) is not int or not least <= data[name] <= LARGEST_WHOLE:
            raise UsageError(f"{name}={_short(data[name])} must be a whole number >= {least}")
    budgets = data["budgets"]
    if (
        not isinstance(budgets, list)
        or len(budgets) < 2
        or not all(type(b) is int and 0 < b <= LARGEST_WHOLE for b in budgets)
        or sorted(set(budgets)) != budgets
    ):
        raise UsageError("budgets must be at least two positive whole numbers, rising")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:20]}..."


def _list(name: str, values: Any, length: int | None, kind: type) -> int:
    if not isinstance(values, list) or not values or any(type(v) is not kind for v in values):
        raise UsageError(f"{name} must be a list with an entry per text")
    if length is not None and len(values) != length:
        raise UsageError(f"{name} has {len(values)} entries, text_hashes has {length}")
    return len(values)


def _check_costs(costs: Any, texts: int, points: int) -> int:
    """Return the number of layers, if all is well."""
    if not isinstance(costs, list) or len(costs) != texts:
        raise UsageError("costs must hold an entry per text")
    heads: list[int] = []
    for index, text in enumerate(costs):
        if (
            not isinstance(text, list)
            or not text
            or not all(isinstance(layer, list) and layer for layer in text)
        ):
            raise UsageError(f"costs[{index}] must be [layers][kv_heads][points]")
        heads = heads or [len(layer) for layer in text]
        if [len(layer) for layer in text] != heads:
            raise UsageError(f"costs[{index}] must have the layers and KV heads of costs[0]")
        for head in (head for layer in text for head in layer):
            if not isinstance(head, list) or len(head) != points or not all(map(_is_cost, head)):
                raise UsageError(
                    f"costs[{index}]: every head needs {points} numbers >= 0, one per budget"
                )
    return len(costs[0])


def _check_coded(data: dict[str, Any], texts: int, points: int) -> None:
    coded, heads = data["coded"], [len(layer) for layer in data["costs"][0]]
    if not isinstance(coded, dict):
        raise UsageError("coded must be an object: a format of kv_dtype to its costs")
    for kind, costs in coded.items():
        if not is_coded(kind):
            raise UsageError(f"coded: {kind!r} is no format in fewer bits")
        if not isinstance(costs, dict) or set(costs) != {"costs", "layer_costs"}:
            raise UsageError(f"coded[{kind!r}] must hold costs and layer_costs")
        layers = _check_costs(costs["costs"], texts, points)
        if [len(layer) for layer in costs["costs"][0]] != heads:
            raise UsageError(f"coded[{kind!r}] must have the layers and heads of costs")
        _check_layer_costs(costs["layer_costs"], texts, layers, points)


def _check_layer_costs(costs: Any, texts: int, layers: int, points: int) -> None:
    shape = f"layer_costs must be [], or {texts} texts x {layers} layers x {points} numbers >= 0"
    if not isinstance(costs, list) or len(costs) not in (0, texts):
        raise UsageError(shape)
    for text in costs:
        if not isinstance(text, list) or len(text) != layers:
            raise UsageError(shape)
        for curve in text:
            if not isinstance(curve, list) or len(curve) != points or not all(map(_is_cost, curve)):
                raise UsageError(shape)


def _is_cost(value: Any) -> bool:
    return is_number(value) and bool(value >= 0)
