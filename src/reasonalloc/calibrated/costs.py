"""Cost profiles: what holding one KV head of one layer to a few tokens costs, measured."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reasonalloc.calibrated.demand import check_fingerprint
from reasonalloc.calibrated.reading import (
    check_choice,
    check_fields,
    check_object,
    check_texts,
    check_version,
    is_number,
    read_json,
)
from reasonalloc.calibrated.tables import cost_notes, cost_table, joint_table, spaced
from reasonalloc.errors import UsageError
from reasonalloc.files import replacing
from reasonalloc.tables import Shown, Table

#: Version 1 had no ``layer_costs``; it is still read.
SCHEMA_VERSION = 2
#: How costs were measured: one head compressed at a time and replayed, or estimated to second
#: order from gradients (see ``calibration``).
OBJECTIVES = ("kl", "fisher")
_REMEDY = "make one with 'reasonalloc calibrate --objective fisher'"


@dataclass(frozen=True)
class CostProfile(Shown):
    """KL(full || compressed) per token when one KV head alone is held to a budget.

    Attributes:
        objective: ``kl`` or ``fisher``.
        model_id: name of the model, for messages.
        config_hash: the model's fingerprint (``calibrated.demand.config_hash``).
        policy: which policy evicted.
        interval, window: the cadence, in tokens.
        samples: random directions per text (``fisher``), or 0.
        budgets: [points] tokens, rising; what a head was held to.
        text_hashes: SHA-256 of the token ids of each calibration text.
        kinds: per text, a label such as ``code``, or "".
        tokens: per text, completion tokens that were measured.
        costs: [texts][layers][kv_heads][points] nats per completion token, at least 0. Layers are
            those under a budget.
        layer_costs: [texts][layers][points], the same with all heads of a layer held to the budget
            together; empty in a file of version 1.
        joint: per checked budget, ``{"budget", "predicted", "measured", "uniform"}``: the KL that
            the summed costs predict, the measured one of all heads together, and that of equal
            budgets; nats per token.
    """

    objective: str
    model_id: str
    config_hash: str
    policy: str
    interval: int
    window: int
    samples: int
    budgets: list[int]
    text_hashes: list[str]
    kinds: list[str]
    tokens: list[int]
    costs: list[list[list[list[float]]]]
    layer_costs: list[list[list[float]]] = field(default_factory=list)
    joint: list[dict[str, float]] = field(default_factory=list)
    kind: str = "cost"
    version: int = SCHEMA_VERSION

    @property
    def layers(self) -> int:
        """Layers under a budget."""
        return len(self.costs[0])

    @property
    def kv_heads(self) -> int:
        """KV heads per layer."""
        return len(self.costs[0][0])

    def heading(self) -> str:
        """Return what was measured, how, of which model."""
        return (
            f"KL per token when one head is held to a budget: {self.model_id}, "
            f"{self.objective}, {self.policy}, texts: {len(self.tokens)}"
        )

    def tables(self) -> list[Table]:
        """Return costs of each layer, and the check of all heads at once if there is one."""
        return [cost_table(self, spaced(self.budgets)), *([joint_table([self])] * bool(self.joint))]

    def notes(self) -> list[str]:
        """Return the unit, and the budgets that the table leaves out."""
        return cost_notes(self, spaced(self.budgets))

    def curves(self, texts: list[int] | None = None) -> list[list[list[float]]]:
        """[layers][kv_heads][points] nats per token, mean over texts weighted by their tokens.

        Args:
            texts: indices of the texts to use; None for all.
        """
        heads = range(self.kv_heads)
        return [
            [self._mean([text[layer][head] for text in self.costs], texts) for head in heads]
            for layer in range(self.layers)
        ]

    def layer_curves(self, texts: list[int] | None = None) -> list[list[float]]:
        """[layers][points], as ``curves``, of whole layers.

        Raises:
            UsageError: the file has none.
        """
        if not self.layer_costs:
            raise UsageError(
                f"cost profile: the one of {self.model_id!r} has no costs of whole layers: "
                "calibrate again, or use those of heads"
            )
        return [
            self._mean([text[layer] for text in self.layer_costs], texts)
            for layer in range(self.layers)
        ]

    def _mean(self, curves: list[list[float]], texts: list[int] | None) -> list[float]:
        """[points] from [texts][points]."""
        used = range(len(self.tokens)) if texts is None else texts
        total = sum(self.tokens[t] for t in used)
        return [
            sum(self.tokens[t] * curves[t][point] for t in used) / total
            for point in range(len(self.budgets))
        ]

    def no_better(self) -> list[float]:
        """Return the checked budgets at which equal budgets measured no worse."""
        # Equal budgets that come from a plan differ from plainly equal ones by rounding.
        margin = 1 - 1e-3
        return [e["budget"] for e in self.joint if e["measured"] >= margin * e["uniform"]]

    def check_model(self, model_id: str, fingerprint: str, layers: int, kv_heads: int) -> None:
        """Refuse a profile of another model.

        Raises:
            UsageError: layers, heads or the configuration's fingerprint differ.
        """
        if (self.layers, self.kv_heads) != (layers, kv_heads):
            raise UsageError(
                f"cost profile: made for {self.model_id!r} with {self.layers} layers of "
                f"{self.kv_heads} KV heads, but {model_id!r} has {layers} of {kv_heads}: calibrate "
                "this model"
            )
        check_fingerprint("cost profile", self.model_id, self.config_hash, model_id, fingerprint)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, replacing ``path`` only once everything is written."""
        with replacing(Path(path)) as partial:
            partial.write_text(json.dumps(asdict(self)) + "\n")


def load_costs(path: str | os.PathLike[str]) -> CostProfile:
    """Read and validate a cost profile.

    Raises:
        UsageError: the file is missing, is no JSON or breaks the schema; says what and where.
    """
    data = read_json(path, "cost profile", _REMEDY)
    try:
        return _validated(data)
    except UsageError as error:
        raise UsageError(f"cost profile {str(path)!r} is broken: {error}") from None


def _validated(data: Any) -> CostProfile:
    check_object(data)
    if data.get("kind") != "cost":
        raise UsageError(f"it is another kind of file: {_REMEDY}")
    if data.get("version") == 1 and "layer_costs" not in data:
        data = {**data, "layer_costs": [], "version": SCHEMA_VERSION}
    check_version(data, SCHEMA_VERSION)
    check_fields(data, CostProfile)
    check_choice(data, "objective", OBJECTIVES)
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
    for entry in data["joint"] if isinstance(data["joint"], list) else [None]:
        wanted = {"budget", "predicted", "measured", "uniform"}
        if not isinstance(entry, dict) or set(entry) != wanted:
            raise UsageError(f"joint must be a list of objects with {', '.join(sorted(wanted))}")
    return CostProfile(**data)


def _check_settings(data: dict[str, Any]) -> None:
    for name, least in (("interval", 1), ("window", 1), ("samples", 0)):
        if type(data[name]) is not int or data[name] < least:
            raise UsageError(f"{name}={data[name]!r} must be a whole number >= {least}")
    budgets = data["budgets"]
    if (
        not isinstance(budgets, list)
        or len(budgets) < 2
        or not all(type(b) is int and b > 0 for b in budgets)
        or sorted(set(budgets)) != budgets
    ):
        raise UsageError("budgets must be at least two positive whole numbers, rising")


def _list(name: str, values: Any, length: int | None, kind: type) -> int:
    if not isinstance(values, list) or not values or any(type(v) is not kind for v in values):
        raise UsageError(f"{name} must be a list with an entry per text")
    if length is not None and len(values) != length:
        raise UsageError(f"{name} has {len(values)} entries, text_hashes has {length}")
    return len(values)


def _check_costs(costs: Any, texts: int, points: int) -> int:
    """The number of layers, if all is well."""
    if not isinstance(costs, list) or len(costs) != texts:
        raise UsageError("costs must hold an entry per text")
    shape: tuple[int, int] | None = None
    for index, text in enumerate(costs):
        if not isinstance(text, list) or not text or not isinstance(text[0], list) or not text[0]:
            raise UsageError(f"costs[{index}] must be [layers][kv_heads][points]")
        shape = shape or (len(text), len(text[0]))
        heads = [head for layer in text for head in (layer if isinstance(layer, list) else [None])]
        if len(text) != shape[0] or len(heads) != shape[0] * shape[1]:
            raise UsageError(f"costs[{index}] must have {shape[0]} layers of {shape[1]} KV heads")
        for head in heads:
            if not isinstance(head, list) or len(head) != points or not all(map(_is_cost, head)):
                raise UsageError(
                    f"costs[{index}]: every head needs {points} numbers >= 0, one per budget"
                )
    return len(costs[0])


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
