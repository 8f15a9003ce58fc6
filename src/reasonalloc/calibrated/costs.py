"""Cost profiles: what holding one KV head of one layer to a few tokens costs, measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reasonalloc.calibrated.cost_schema import REMEDY, SCHEMA_VERSION, check_costs
from reasonalloc.calibrated.demand import check_fingerprint
from reasonalloc.calibrated.predictor import Predictor, read_predictor
from reasonalloc.calibrated.reading import read_json
from reasonalloc.calibrated.tables import milli, spaced
from reasonalloc.errors import UsageError
from reasonalloc.files import replacing
from reasonalloc.tables import Column, Shown, Table


@dataclass(frozen=True)
class CostProfile(Shown):
    """KL(full || compressed) per token when one KV head alone is held to a budget.

    Attributes:
        objective: ``kl`` or ``fisher``.
        model_id: name of the model, for messages.
        config_hash: the model's fingerprint (``calibrated.demand.config_hash``).
        policy: which policy evicted.
        interval, window: the cadence, in tokens.
        prompt: ``evict``; ``pin``: the prompt was kept on top of the budgets.
        samples: random directions per text (``fisher``), or 0.
        budgets: [points] tokens, rising; what a head was held to.
        text_hashes: SHA-256 of the token ids of each calibration text.
        kinds: per text, a label such as ``code``, or "".
        tokens: per text, completion tokens that were measured.
        costs: [texts][layers][kv_heads][points] nats per completion token, at least 0. Layers are
            those under a budget; KV heads may differ from layer to layer.
        layer_costs: [texts][layers][points], the same with all heads of a layer held to the budget
            together; empty in a file of version 1.
        joint: per checked budget, ``{"budget", "predicted", "measured", "uniform"}``: the KL that
            the summed costs predict, the measured one of all heads together, and that of equal
            budgets; nats per token.
        coded: per format of ``kv_dtype`` in which older tokens were kept as well, ``{"costs",
            "layer_costs"}`` as above: a head is held to the budget and to the format. Empty in a
            file of version 1 or 2.
        foretells: what ``predicted_loss`` reads, as in the file; None for other policies and in
            files up to version 4.
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
    coded: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompt: Literal["evict", "pin"] = "evict"
    foretells: dict[str, Any] | None = None
    kind: str = "cost"
    version: int = SCHEMA_VERSION

    @property
    def layers(self) -> int:
        """Layers under a budget."""
        return len(self.costs[0])

    @property
    def kv_heads(self) -> int:
        """KV heads per layer; of the first where they differ."""
        return len(self.costs[0][0])

    @property
    def heads(self) -> list[int]:
        """KV heads of each layer."""
        return [len(layer) for layer in self.costs[0]]

    @property
    def predictor(self) -> Predictor | None:
        """What foretells the loss of a token, if the policy does."""
        return read_predictor(self.foretells, self.heads)

    def heading(self) -> str:
        """Return what was measured, how, of which model."""
        return (
            f"KL per token when one head is held to a budget: {self.model_id}, "
            f"{self.objective}, {self.policy}, texts: {len(self.tokens)}"
        )

    def tables(self) -> list[Table]:
        """Return costs of each layer, and the check of all heads at once if there is one."""
        costs = self.cost_table(spaced(self.budgets))
        return [costs, joint_table([self])] if self.joint else [costs]

    def notes(self) -> list[str]:
        """Return the unit, and the budgets that the table leaves out."""
        return self.table_notes(spaced(self.budgets))

    def cost_table(self, budgets: Sequence[int], heads: bool = False, title: str = "") -> Table:
        """Return a row per layer or head, in 1/1000 nat per token.

        Args:
            budgets: some of the profile's, a column each.
            heads: a row per head; else per layer, summed over its heads.
            title: of the table.
        """
        points = [self.budgets.index(size) for size in budgets]
        columns: list[Column] = [("layer", True), ("head" if heads else "costliest head", True)]
        columns += [(f"budget {size}", True) for size in budgets]
        rows: list[tuple[str, ...]] = []
        for index, layer in enumerate(self.curves()):
            if heads:
                for number, head in enumerate(layer):
                    rows.append((str(index), str(number), *(milli(head[p]) for p in points)))
            else:
                worst = max(range(len(layer)), key=lambda h: layer[h][points[0]])
                sums = [milli(sum(head[p] for head in layer)) for p in points]
                rows.append((str(index), str(worst), *sums))
        return Table(title, columns, rows)

    def table_notes(self, shown: Sequence[int], how: str = "") -> list[str]:
        """Return the unit of ``cost_table``, the budgets that it leaves out and how to see them."""
        left = [str(size) for size in self.budgets if size not in shown]
        also = [f"Also measured at {', '.join(left)}{how}."] if left else []
        return [*also, "Costs in 1/1000 nat per token; of a layer: summed over its heads."]

    @property
    def formats(self) -> list[str]:
        """Formats that were measured."""
        return ["auto", *self.coded]

    def curves(
        self, texts: list[int] | None = None, kv_dtype: str = "auto"
    ) -> list[list[list[float]]]:
        """Return [layers][kv_heads][points] nats per token, a mean over the texts' tokens.

        Args:
            texts: indices of the texts to use; None for all.
            kv_dtype: one of ``formats``.
        """
        costs = self.costs if kv_dtype == "auto" else self.coded[kv_dtype]["costs"]
        return [
            [self._mean([text[layer][head] for text in costs], texts) for head in range(heads)]
            for layer, heads in enumerate(self.heads)
        ]

    def head_curves(self, texts: list[int] | None = None, kv_dtype: str = "auto") -> Tensor:
        """Return [heads of all layers, points] float64; arguments as for ``curves``."""
        rows = [head for layer in self.curves(texts, kv_dtype) for head in layer]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")

    def layer_curves(self, texts: list[int] | None = None) -> list[list[float]]:
        """Return [layers][points], as ``curves``, of whole layers.

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
        """Return [points] from [texts][points]."""
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

    def check_model(self, model_id: str, fingerprint: str, kv_heads: Sequence[int]) -> None:
        """Refuse a profile of another model.

        Args:
            model_id, fingerprint: of the model.
            kv_heads: of each of its layers under a budget.

        Raises:
            UsageError: layers, heads or the configuration's fingerprint differ.
        """
        if self.heads != list(kv_heads):
            raise UsageError(
                f"cost profile: made for {self.model_id!r} with {_heads_in_words(self.heads)}, "
                f"but {model_id!r} has {_heads_in_words(kv_heads)}: calibrate this model"
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
    data = read_json(path, "cost profile", REMEDY)
    try:
        return CostProfile(**check_costs(data, [field.name for field in fields(CostProfile)]))
    except UsageError as error:
        raise UsageError(f"cost profile {str(path)!r} is broken: {error}") from None


def _heads_in_words(kv_heads: Sequence[int]) -> str:
    """Return the number of layers and of the KV heads of each."""
    each = sorted(set(kv_heads))
    return f"{len(kv_heads)} layers of {' or '.join(map(str, each))} KV heads"


def joint_table(profiles: Sequence[CostProfile], title: str = "All heads at once") -> Table:
    """Return a row per profile and checked budget, in 1/1000 nat per token."""
    names = ("predicted", "measured", "equal budgets")
    columns: list[Column] = [("policy", False), ("budget", True), *((name, True) for name in names)]
    rows = [
        (
            profile.policy,
            f"{entry['budget']:.0f}",
            *(milli(entry[name]) for name in ("predicted", "measured", "uniform")),
        )
        for profile in profiles
        for entry in profile.joint
    ]
    return Table(title, columns, rows)
