"""What a run is made of: a model's name, samples to be taken, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from reasonalloc.evaluation.batch import Job


@dataclass(frozen=True)
class ModelSpec:
    """What ``load_model`` is called with."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    device_map: str | None = None
    tp_plan: str | None = None
    engine: str = "transformers"


@dataclass(frozen=True)
class Item:
    """One sample to be taken: the problem's id and prompt, the sample's number and seed."""

    problem: str
    prompt: str
    sample: int
    seed: int


@dataclass(frozen=True)
class Chunk:
    """What is completed in one batch.

    Attributes:
        job: arm and budget.
        items: the samples.
        record: whether the head budgets of the first one are recorded.
    """

    job: Job
    items: tuple[Item, ...]
    record: bool = False

    def split(self, size: int) -> list[Chunk]:
        """The same in batches of at most ``size``."""
        parts = [self.items[i : i + size] for i in range(0, len(self.items), size)]
        return [replace(self, items=p, record=self.record and i == 0) for i, p in enumerate(parts)]


@dataclass(frozen=True)
class Outcome:
    """What became of a chunk: one row per item, or None if memory did not suffice.

    ``events`` are the rows of ``events.jsonl``; ``reason`` is the allocator's own message.
    """

    rows: list[dict[str, Any]] | None
    events: list[dict[str, Any]]
    reason: str = ""


@dataclass(frozen=True)
class Facts:
    """What a manifest and the checks before a run need to know of a loaded model.

    Attributes:
        config_hash, weights_hash, template_hash: fingerprints; the last is None without a chat
            template.
        dtype, device: as loaded.
        longest: tokens of the longest prompt.
        positions: tokens that the model has positions for, if it says so.
    """

    config_hash: str
    weights_hash: str
    template_hash: str | None
    dtype: str
    device: str
    longest: int
    positions: int | None
