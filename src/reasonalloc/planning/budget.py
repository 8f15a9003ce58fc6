"""A budget divided among a model's layers, and the memory that it takes: known beforehand."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from reasonalloc.allocators.layer import LayerQuery
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.calibrated.shipped import shipped_name
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.ops.codes import row_format
from reasonalloc.planning.files import (
    check_alike,
    check_profile,
    other_cadence,
    with_shipped,
)
from reasonalloc.planning.memory import LayerShape, MemoryPlan, row_bytes
from reasonalloc.planning.parts import (
    Formats,
    bind_policy,
    plan_formats,
    plan_heads,
    plan_totals,
)
from reasonalloc.planning.sharding import HeadShard
from reasonalloc.planning.tables import latent_sizes, layer_sizes, layer_table, size_table
from reasonalloc.policies import ModelFacts, Policy
from reasonalloc.rotary import Rope
from reasonalloc.tables import Shown, Table, human, show
from reasonalloc.whole import whole_number

#: Context length at which a plan compares the caches unless another one is given, in tokens.
TOKENS = 32768


@dataclass(frozen=True, eq=False)
class BudgetPlan(Shown):
    """A budget divided among the layers of a model. Everything is checked when it is made.

    Attributes:
        config: the settings.
        shapes: all layers of the model.
        text_config: transformers' configuration of the decoder.
        name: the model's name, for messages.
        load_rope, load_output_metrics: read the model's rotary embedding and output projections,
            see ``ModelFacts``; None while its weights are not loaded.
        batch, tokens, prompt_tokens, dtype: sequences, tokens of each, of these in the (longest)
            prompt, and the cache's dtype that ``memory`` and ``show`` assume unless told otherwise.
        policy: the policy, bound to the model.
        totals: [compressible layers] retained tokens under the budget, all KV heads together.
        planned: [compressible layers][kv_heads] tokens, if the arm plans them beforehand.
        formats: [compressible layers][kv_heads] tokens and format of older ones, if the arm plans
            these as well; ``totals`` are then sums of these tokens.

    Raises:
        UsageError: a wrong setting, a budget that does not fit, a broken or foreign file.
        UnsupportedError: a policy that cannot work with the model.
    """

    config: CompressionConfig
    shapes: tuple[LayerShape, ...]
    text_config: Any = field(repr=False)
    name: str
    load_rope: Callable[[], Rope] | None = field(default=None, repr=False)
    load_output_metrics: Callable[[], Mapping[int, Tensor]] | None = field(default=None, repr=False)
    batch: int = 1
    tokens: int = TOKENS
    dtype: torch.dtype = torch.float32
    prompt_tokens: int = 0
    policy: Policy = field(init=False, repr=False)
    totals: tuple[int, ...] = field(init=False)
    planned: tuple[tuple[int, ...], ...] | None = field(init=False)
    formats: Formats | None = field(init=False)

    def __post_init__(self) -> None:
        for name in ("batch", "tokens"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        prompt = whole_number("prompt_tokens", self.prompt_tokens, 0, "tokens")
        object.__setattr__(self, "prompt_tokens", prompt)
        if not self._alike:
            check_alike(self.config, self.name)
        object.__setattr__(self, "config", with_shipped(self._in_tokens(), self._fingerprint))
        check_profile(self.config)
        for shape in self._budgeted:
            self._check_kv_dtype(shape)
        config, query = self.config, self._query(self.config.budget)
        object.__setattr__(self, "policy", bind_policy(config, self._facts()))
        object.__setattr__(self, "formats", plan_formats(config, query))
        object.__setattr__(self, "totals", plan_totals(config, query, self.formats))
        heads = [shape.kv_heads for shape in self._budgeted]
        planned = plan_heads(config, query, self.formats, self.totals, heads)
        object.__setattr__(self, "planned", planned)

    def _check_kv_dtype(self, shape: LayerShape) -> None:
        """Refuse a format that a layer's keys and values cannot be kept in."""
        kind = self.config.kv_dtype
        if self.config.coded and shape.latent is not None and shape.latent.cached:
            raise UnsupportedError(
                f"kv_dtype={kind!r}: {self.name} caches latents (MLA), which are not kept in fewer "
                "bits yet: leave it out"
            )
        if self.config.coded and shape.distances:
            raise UnsupportedError(
                f"kv_dtype={kind!r}: the attention of {self.name} has a bias by distance, which is "
                "not read over tokens in fewer bits yet: leave it out"
            )
        if self.config.coded and shape.bias:
            raise UnsupportedError(
                f"kv_dtype={kind!r}: keys of {self.name} carry the bias of their position (ALiBi), "
                "which fewer bits would round away: leave it out"
            )
        row_format(kind, *shape.dims, self.dtype, self.name)

    def _in_tokens(self) -> CompressionConfig:
        """Return the settings with a budget in tokens: as many as fit, if it was given in bytes."""
        config, size = self.config, self.config.size
        if size is None:
            return config
        item = self.dtype.itemsize
        allowed = size.size or int(
            size.share * sum(shape.full_bytes(1, size.tokens, item) for shape in self._budgeted)
        )

        def needed(tokens: int) -> int:
            """Bytes do not depend on how tokens are divided among equal layers and heads."""
            totals = tuple(tokens * shape.kv_heads for shape in self._budgeted)
            return MemoryPlan(
                tuple(self._budgeted),
                totals,
                1,
                config.interval,
                config.window,
                item,
                kv_dtype=config.kv_dtype,
            ).slab_bytes

        least = config.window + config.n_sink
        if needed(least) > allowed:
            raise UsageError(
                f"budget={size.text!r}: {human(needed(least))} is the least that interval="
                f"{config.interval} and window={config.window} take: give more bytes, a shorter "
                "interval or fewer bits (kv_dtype)"
            )
        tokens = least + (allowed - needed(least)) // (needed(least + 1) - needed(least))
        return dataclasses.replace(config, budget=tokens, size=None)

    def totals_at(self, budget: int) -> tuple[int, ...]:
        """Return ``totals`` as they would be under another budget."""
        known = budget == self.config.budget
        config, query = self.config, self._query(budget)
        formats = self.formats if known else plan_formats(config, query)
        return plan_totals(config, query, formats)

    def memory(
        self,
        batch: int | None = None,
        itemsize: int | None = None,
        prompt_tokens: int | None = None,
    ) -> MemoryPlan:
        """Return the exact bytes of a cache.

        Args:
            batch: sequences; None: those of the plan.
            itemsize: bytes of one number of the cache; None: of the plan's dtype.
            prompt_tokens: of the longest prompt, for ``prompt="pin"``: all pinned turns together;
                None: those of the plan.

        Raises:
            UsageError: no whole numbers, or too small ones; a prompt that would be refused.
        """
        return MemoryPlan(
            shapes=self.shapes,
            totals=self.totals,
            batch=whole_number("batch", self.batch if batch is None else batch, 1),
            interval=self.config.interval,
            window=self.config.window,
            itemsize=self.dtype.itemsize if itemsize is None else itemsize,
            keeps_queries=self.policy.needs_queries,
            state_channels=self.policy.state_channels,
            kv_dtype=self.config.kv_dtype,
            formats=self.formats,
            pinned=self.config.pinned(
                self.prompt_tokens if prompt_tokens is None else prompt_tokens
            ),
        )

    def full_bytes(self, batch: int, tokens: int, itemsize: int) -> int:
        """Return the KV bytes of the model's own cache after ``tokens`` tokens per sequence."""
        return self.memory(batch, itemsize).full_bytes(tokens)

    def parts(self, shard: HeadShard) -> list[tuple[int, Sequence[int] | None]]:
        """Return what a process keeps of every compressible layer.

        Args:
            shard: its part of the KV heads.

        Returns:
            Per layer the retained tokens of its heads together, and of each if they are planned.
        """
        planned = self.planned or [None] * len(self.totals)
        own = []
        for shape, total, heads in zip(self._budgeted, self.totals, planned, strict=True):
            tokens = shard.total(total, heads, shape.kv_heads)
            own.append((tokens, None if heads is None else shard.heads(heads)))
        return own

    def policy_of(self, shard: HeadShard) -> Policy:
        """Return the policy of a process.

        Args:
            shard: its part of the KV heads.

        Raises:
            UnsupportedError: the policy does not say how to divide what it read.
        """
        return self.policy if shard.size == 1 else self.policy.shard(shard.rank, shard.size)

    def formats_of(self, shard: HeadShard) -> list[Sequence[str] | None]:
        """Return per compressible layer how a process keeps older tokens of each of its heads.

        Args:
            shard: its part of the KV heads.

        Returns:
            Per layer a format per head, or None if they are not planned.
        """
        if self.formats is None:
            return [None] * len(self.totals)
        return [shard.heads([kind for _, kind in layer]) for layer in self.formats]

    @property
    def kv_heads(self) -> int:
        """KV heads of the first compressible layer, all processes together."""
        return self._budgeted[0].kv_heads

    @property
    def _alike(self) -> bool:
        """Whether all layers under a budget have the same shape."""
        return len({(s.kv_heads, s.query_heads, s.head_dim) for s in self._budgeted}) == 1

    @property
    def other_cadence(self) -> str | None:
        """What to say if a cost profile has another cadence than the run, else None."""
        return other_cadence(self.config)

    def report(self, memory: int | None = None) -> dict[str, Any]:
        """Return sizes as plain JSON values, in bytes.

        Args:
            memory: bytes for the cache, to say how many sequences fit; or None.
        """
        plan, config = self.memory(), self.config
        one = self.memory(batch=1)  # everything grows linearly with the batch
        fits = (
            None
            if memory is None
            else {
                "bytes": memory,
                "largest_batch": {
                    "full": memory // one.full_bytes(self.tokens),
                    "compressed": memory // (one.kv_bytes(self.tokens) + one.bookkeeping_bytes),
                },
            }
        )
        return {
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "tokens": self.tokens,
            "arm": str(config.arm),
            "budget": config.budget,
            "interval": config.interval,
            "window": config.window,
            "n_sink": config.n_sink,
            "kv_dtype": config.kv_dtype if self.formats is None else "planned",
            "shipped_profile": self.shipped,
            "prompt": config.prompt,
            "prompt_tokens": self.prompt_tokens,
            "kv_bytes": {
                "full": plan.full_bytes(self.tokens),
                "compressed": plan.kv_bytes(self.tokens),
                "after_compression": plan.compressed_bytes(self.tokens),
            },
            "latent": latent_sizes(plan),
            "bookkeeping_bytes": plan.bookkeeping_bytes,
            "layers": layer_sizes(plan, self.tokens),
            "memory": fits,
        }

    def tables(self, memory: int | None = None) -> list[Table]:
        """Return the sizes of the caches, and the budget and the bytes of each layer.

        Args:
            memory: see ``report``.
        """
        report = self.report(memory)
        return [size_table(report), layer_table(report["layers"])]

    def notes(self) -> list[str]:
        """Return which calibrated file of the package is read, if one is."""
        if self.shipped is None:
            return []
        return [
            f"Budgets by the profile of {self.shipped} that comes with the package. For another "
            "model of this architecture calibrate your own."
        ]

    def show(self, memory: int | None = None) -> None:
        """Print the tables on stdout.

        Args:
            memory: see ``report``.
        """
        show(self.tables(memory), notes=self.notes())

    @cached_property
    def shipped(self) -> str | None:
        """Model of the calibrated file of the package that is read; None: none is."""
        profile = self.config.profile
        return None if profile is None else shipped_name(os.fspath(profile))

    @cached_property
    def _budgeted(self) -> list[LayerShape]:
        return [shape for shape in self.shapes if shape.compressible]

    @cached_property
    def _fingerprint(self) -> str:
        return config_hash(self.text_config.to_dict())

    def _facts(self) -> ModelFacts:
        """What a policy may know of the model."""
        first = self._budgeted[0]
        return ModelFacts(
            model_id=self.name,
            config_hash=self._fingerprint,
            layers=len(self._budgeted),
            query_heads=first.query_heads,
            head_dim=first.query_dim - first.distances - first.query_sinks,
            load_rope=self.load_rope,
            load_output_metrics=self.load_output_metrics,
            kv_heads=tuple(shape.kv_heads for shape in self._budgeted),
            indices=tuple(i for i, shape in enumerate(self.shapes) if shape.compressible),
        )

    def _query(self, budget: int) -> LayerQuery:
        config = dataclasses.replace(self.config, budget=budget)
        return LayerQuery(
            layers=len(self._budgeted),
            kv_heads=self.kv_heads,
            budget=config.budget,
            window=config.window,
            n_sink=config.n_sink,
            model_id=self.name,
            config_hash=self._fingerprint,
            row_bytes=self._row_bytes if self._alike else None,
            heads=tuple(shape.kv_heads for shape in self._budgeted),
        )

    def _row_bytes(self, kind: str, itemsize: int) -> int:
        """Bytes of a token of a head in a format, where all layers have one shape."""
        return row_bytes(self._budgeted[0], kind, itemsize or self.dtype.itemsize)
