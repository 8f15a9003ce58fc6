"""Demand profiles: JSON files, validated on load and bound to the model they were made for."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from reasonalloc.calibrated.reading import (
    check_choice,
    check_fields,
    check_object,
    check_texts,
    check_version,
    is_number,
    read_json,
)
from reasonalloc.errors import UsageError
from reasonalloc.files import replacing
from reasonalloc.tables import Column, Shown, Table

SCHEMA_VERSION = 1
OBJECTIVES = ("attention-mass",)
#: Whose attention mass is counted: of all tokens, or of generated ones alone.
KEYS = ("all", "generated")
# Files of version 1 that do not say these have their defaults.
_NEWER = ("window", "keys")
# What makes an architecture. Loading routes and later changes (dtype, padding token, quantisation,
# resized vocabulary) alter other fields of a configuration, and never these.
_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "layer_types",
    "sliding_window",
    # Those that have others, or other names.
    "alibi",
    "attention_k_eq_v",
    "cross_attention_layers",
    "global_head_dim",
    "kv_channels",
    "kv_lora_rank",
    "multi_query",
    "n_head",
    "n_heads",
    "n_layer",
    "n_layers",
    "n_recurrent_layers",
    "n_recurrent_loops",
    "new_decoder_architecture",
    "num_attention_heads_per_layer",
    "num_global_key_value_heads",
    "num_kv_heads",
    "num_kv_shared_layers",
    "per_layer_config",
    "qk_rope_head_dim",
    "v_head_dim",
)


def config_hash(config: dict[str, Any]) -> str:
    """Return the fingerprint of an architecture (of ``config.to_dict()``): 16 hex digits."""
    kept = {name: config[name] for name in _ARCHITECTURE if config.get(name) is not None}
    text = json.dumps(kept, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_fingerprint(
    file: str, made_for: str, config_hash: str, model_id: str, fingerprint: str
) -> None:
    """Refuse a calibrated file of another architecture.

    Args:
        file: what it is called in messages.
        made_for, config_hash: the model that the file was made for.
        model_id, fingerprint: the model that it is given to.

    Raises:
        UsageError: the fingerprints differ.
    """
    if config_hash != fingerprint:
        raise UsageError(
            f"{file}: made for {made_for!r} (configuration {config_hash}), not for {model_id!r} "
            f"(configuration {fingerprint}): calibrate this model"
        )


@dataclass(frozen=True)
class DemandProfile(Shown):
    """Demand per layer: tokens needed to keep a share ``rho`` of the attention mass.

    Attributes:
        model_id: name of the model, for messages.
        config_hash: the model's fingerprint; a profile fits that architecture only.
        rho: share of attention mass, 0 < rho < 1.
        steps: generated tokens per prompt.
        prompt_hashes: SHA-256 of each calibration prompt.
        demand_mean: [layers] tokens, mean over heads, steps and prompts.
        demand_max: [layers] tokens, maximum over heads, mean over steps and prompts.
        curves: [prompts][layers] tokens, the mean demand of each prompt.
        window: queries whose attention is averaged in a sample.
        keys: ``all``, or ``generated``: the prompt's tokens are not counted.
    """

    model_id: str
    config_hash: str
    rho: float
    steps: int
    prompt_hashes: list[str]
    demand_mean: list[float]
    demand_max: list[float]
    curves: list[list[float]]
    objective: str = "attention-mass"
    window: int = 8
    keys: str = KEYS[0]
    version: int = SCHEMA_VERSION
    kind: ClassVar[str] = "demand"

    @property
    def layers(self) -> int:
        """Layers under a budget."""
        return len(self.demand_mean)

    def heading(self) -> str:
        """Return what was measured, of which model."""
        return (
            f"Tokens for {self.rho:.0%} of the attention mass{self._counted}: {self.model_id}, "
            f"prompts: {len(self.curves)}"
        )

    @property
    def _counted(self) -> str:
        """What is not as usual, in words."""
        return " of generated tokens" if self.keys == "generated" else ""

    def tables(self) -> list[Table]:
        """Return a row per layer."""
        return [self.demand_table()]

    def demand_table(
        self, budgets: dict[int, list[int]] | None = None, prompts: bool = True, title: str = ""
    ) -> Table:
        """Return a row per layer: demand, and what it gets of each budget.

        Args:
            budgets: tokens per head of each layer, by budget.
            prompts: show the range over prompts as well.
            title: of the table.
        """
        columns: list[Column] = [("layer", True), ("mean over heads", True), ("largest head", True)]
        columns += [("prompts", True)] * prompts
        columns += [(f"budget {size}", True) for size in budgets or {}]
        rows: list[tuple[str, ...]] = []
        for index, mean in enumerate(self.demand_mean):
            each = [curve[index] for curve in self.curves] or [mean]
            cells = [str(index), f"{mean:.1f}", f"{self.demand_max[index]:.1f}"]
            cells += [f"{min(each):.1f}-{max(each):.1f}"] * prompts
            rows.append((*cells, *(str(layers[index]) for layers in (budgets or {}).values())))
        return Table(title, columns, rows)

    def check_model(self, model_id: str, fingerprint: str, layers: int) -> None:
        """Refuse a profile of another model.

        Raises:
            UsageError: the layer count or the configuration's fingerprint differs.
        """
        if len(self.demand_mean) != layers:
            raise UsageError(
                f"profile: made for {self.model_id!r} with {len(self.demand_mean)} layers, but "
                f"{model_id!r} has {layers} compressible layers: calibrate this model"
            )
        check_fingerprint("profile", self.model_id, self.config_hash, model_id, fingerprint)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, replacing ``path`` only once everything is written."""
        with replacing(Path(path)) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n")


def load_profile(path: str | os.PathLike[str]) -> DemandProfile:
    """Read and validate a demand profile.

    Raises:
        UsageError: the file is missing, is no JSON or breaks the schema; says what and where.
    """
    data = read_json(path, "profile")
    if isinstance(data, dict) and data.get("kind") == "cost":
        raise UsageError(
            f"profile {str(path)!r} is a cost profile, and one of attention mass is read here: "
            "make one with 'reasonalloc calibrate'"
        )
    try:
        return _validated(data)
    except UsageError as error:
        raise UsageError(f"profile {str(path)!r} is broken: {error}; calibrate again") from None


def _validated(data: Any) -> DemandProfile:
    check_object(data)
    check_version(data, SCHEMA_VERSION)
    check_fields(data, [field.name for field in fields(DemandProfile)], _NEWER)
    check_choice(data, "objective", OBJECTIVES)
    check_texts(data, ("model_id", "config_hash"))
    if not is_number(data["rho"]) or not 0 < data["rho"] < 1:
        raise UsageError(f"rho={data['rho']!r} must lie between 0 and 1")
    for name in ("steps", "window"):
        value = data.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r} must be a positive whole number")
    if "keys" in data:
        check_choice(data, "keys", KEYS)
    hashes, curves = data["prompt_hashes"], data["curves"]
    if not isinstance(hashes, list) or not all(isinstance(h, str) for h in hashes):
        raise UsageError("prompt_hashes must be a list of texts")
    layers = _check_demand("demand_mean", data["demand_mean"], None)
    _check_demand("demand_max", data["demand_max"], layers)
    if not isinstance(curves, list) or len(curves) != len(hashes):
        raise UsageError("curves must hold one list per prompt hash")
    for index, curve in enumerate(curves):
        _check_demand(f"curves[{index}]", curve, layers)
    return DemandProfile(**data)


def _check_demand(name: str, values: Any, length: int | None) -> int:
    if not isinstance(values, list) or not values:
        raise UsageError(f"{name} must be a list of numbers, one per layer")
    if length is not None and len(values) != length:
        raise UsageError(f"{name} has {len(values)} entries, demand_mean has {length}")
    for index, value in enumerate(values):
        if not is_number(value) or value < 0:
            raise UsageError(f"{name}[{index}]={value!r} must be a number >= 0")
    return len(values)
