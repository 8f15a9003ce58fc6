"""Calibrated files that come with the package: an arm reads them if no file is named."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from reasonalloc.calibrated.costs import CostProfile, load_costs
from reasonalloc.calibrated.demand import DemandProfile, load_profile
from reasonalloc.errors import UsageError

#: Kind of file, and how names of shipped ones begin. Statistics are too large.
_PREFIXES = {"cost profile": "costs", "profile": "demand"}
_DIGITS = 6


@dataclass(frozen=True)
class ShippedFile:
    """A calibrated file that comes with the package.

    Attributes:
        kind: as messages call it: ``cost profile`` or ``profile``.
        path: where it is.
        config_hash: of the architectures that it suits.
    """

    kind: str
    path: Path
    config_hash: str

    def load(self) -> CostProfile | DemandProfile:
        """Return what it holds."""
        return load_costs(self.path) if self.kind == "cost profile" else load_profile(self.path)


@cache
def shipped_files() -> tuple[ShippedFile, ...]:
    """Return all of them, sorted by their names."""
    folder = Path(str(resources.files("reasonalloc") / "shipped"))
    found = []
    for path in sorted(folder.glob("*.json")):
        prefix, _, config_hash = path.stem.rpartition("-")
        kind = next(kind for kind, own in _PREFIXES.items() if own == prefix)
        found.append(ShippedFile(kind, path, config_hash))
    return tuple(found)


def find_shipped(kind: str, config_hash: str) -> str | None:
    """Return the path of the shipped file of a kind for an architecture, if there is one.

    Args:
        kind: ``cost profile``, ``profile`` or ``statistics``.
        config_hash: of the model, see ``calibrated.demand.config_hash``.
    """
    for file in shipped_files():
        if (file.kind, file.config_hash) == (kind, config_hash):
            return str(file.path)
    return None


def shipped_name(path: str | None) -> str | None:
    """Return the model that a shipped file was measured on; None: the path is no shipped file."""
    for file in shipped_files():
        if str(file.path) == path:
            return file.load().model_id
    return None


def file_name(profile: CostProfile | DemandProfile) -> str:
    """Return the name under which a calibrated file would be shipped."""
    kind = "cost profile" if isinstance(profile, CostProfile) else "profile"
    return f"{_PREFIXES[kind]}-{profile.config_hash}.json"


def condensed(profile: Any, model_id: str | None = None) -> CostProfile | DemandProfile:
    """Return a calibrated file as small as one that is shipped: means over its texts.

    Budgets that are planned from it are those of the whole file, up to the rounding to 6 digits.

    Args:
        profile: a cost profile or a demand profile.
        model_id: the model's name; None: as it is.

    Raises:
        UsageError: statistics, or a file that names a folder of this machine as its model.
    """
    if not isinstance(profile, CostProfile | DemandProfile):
        raise UsageError("statistics are too large to be shipped: share profiles and cost profiles")
    name = profile.model_id if model_id is None else model_id
    if not name.strip() or "\\" in name or name.startswith(("/", ".", "~")):
        raise UsageError(
            f"model_id={name!r} is a path of this machine: add --name with the model's public name"
        )
    profile = replace(profile, model_id=name)
    return _costs(profile) if isinstance(profile, CostProfile) else _demand(profile)


def _costs(profile: CostProfile) -> CostProfile:
    if len(profile.tokens) == 1:
        return profile
    kinds = Counter(kind or "other" for kind in profile.kinds)
    foretells = profile.foretells
    return replace(
        profile,
        foretells=foretells and {**foretells, "weights": _rounded(foretells["weights"])},
        text_hashes=[_joined(profile.text_hashes)],
        kinds=[f"mean of {len(profile.tokens)} texts: " + _counted(kinds)],
        tokens=[sum(profile.tokens)],
        costs=_rounded([profile.curves()]),
        layer_costs=_rounded([profile.layer_curves()]) if profile.layer_costs else [],
        coded={
            kind: {
                "costs": _rounded([profile.curves(kv_dtype=kind)]),
                "layer_costs": _rounded([_layer_curves(profile, kind)])
                if profile.coded[kind]["layer_costs"]
                else [],
            }
            for kind in profile.coded
        },
    )


def _layer_curves(profile: CostProfile, kind: str) -> list[list[float]]:
    """[layers][points] of whole layers in a format: a mean over the texts' tokens."""
    return replace(profile, layer_costs=profile.coded[kind]["layer_costs"]).layer_curves()


def _demand(profile: DemandProfile) -> DemandProfile:
    count = len(profile.curves)
    if count == 1:
        return profile
    means = [sum(layer) / count for layer in zip(*profile.curves, strict=True)]
    return replace(
        profile,
        prompt_hashes=[_joined(profile.prompt_hashes)],
        demand_mean=_rounded(profile.demand_mean),
        demand_max=_rounded(profile.demand_max),
        curves=_rounded([means]),
    )


def _joined(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _rounded(values: Any) -> Any:
    """Nested lists of numbers, to so many digits."""
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.{_DIGITS}g}")
