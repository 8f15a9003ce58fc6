"""What the parts of an arm plan for a model, checked: its policy, tokens and formats of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LayerQuery
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError
from reasonalloc.planning.files import make_layer_allocator, make_policy
from reasonalloc.policies import ModelFacts, Policy
from reasonalloc.whole import whole_number, whole_numbers

#: [compressible layers][kv_heads] tokens and format of older ones.
Formats = tuple[tuple[tuple[int, str], ...], ...]


def bind_policy(config: CompressionConfig, facts: ModelFacts) -> Policy:
    """Return the arm's policy, bound to a model.

    Raises:
        UsageError: it cannot be bound, or is wrong in itself.
        UnsupportedError: it cannot work with the model.
    """
    policy: Any = make_policy(config).bind(facts)
    name = f"policy={config.arm.policy!r}"
    if not isinstance(policy, Policy):
        raise UsageError(f"{name}: bind() returned {policy!r}: return a policy, such as self")
    channels = whole_number(f"{name}: state_channels", policy.state_channels, 0)
    if channels and type(policy).observe is Policy.observe:
        raise UsageError(f"{name} has state_channels, but no observe(): define it")
    if not 0 <= policy.recent_fraction <= 1:
        raise UsageError(
            f"{name}: recent_fraction={policy.recent_fraction!r} must lie between 0 and 1"
        )
    return policy


def plan_formats(config: CompressionConfig, query: LayerQuery) -> Formats | None:
    """Return tokens and format of every head, if the arm plans formats; else None.

    Raises:
        UsageError: the arm's head allocator does not follow them, or another format is asked for.
    """
    arm = config.arm
    formats = make_layer_allocator(config).plan_formats(query)
    if formats is None:
        return None
    name = f"layers={arm.layers!r}"
    if not HEAD_ALLOCATORS.create(arm.heads).needs_plan:
        raise UsageError(
            f"{name} plans bits per head, which heads={arm.heads!r} does not follow: use "
            "heads='planned'"
        )
    if config.kv_dtype != "auto":
        raise UsageError(
            f"{name} plans bits, and kv_dtype={config.kv_dtype!r} is given: leave it out"
        )
    return tuple(tuple((int(n), str(kind)) for n, kind in layer) for layer in formats)


def plan_totals(
    config: CompressionConfig, query: LayerQuery, formats: Formats | None
) -> tuple[int, ...]:
    """Return the tokens of every layer under the budget, all its KV heads together.

    Args:
        config: the arm.
        query: the budget, and the layers under it.
        formats: what ``plan_formats`` returned.

    Raises:
        UsageError: the layer allocator returned something else than it should.
    """
    if formats is not None:
        return tuple(sum(tokens for tokens, _ in layer) for layer in formats)
    given = make_layer_allocator(config).allocate(query)
    name = f"layers={config.arm.layers!r}: what allocate() returned"
    totals = whole_numbers(name, given)
    few = any(total < least for total, least in zip(totals, query.leasts, strict=False))
    if sum(totals) != query.total or len(totals) != query.layers or few:
        alike = len(set(query.leasts)) == 1
        raise UsageError(
            f"{name}, {totals}, must be {query.layers} numbers of at least "
            f"{query.least if alike else list(query.leasts)} that sum to {query.total}"
        )
    return tuple(totals)


def plan_heads(
    config: CompressionConfig,
    query: LayerQuery,
    formats: Formats | None,
    totals: Sequence[int],
    kv_heads: Sequence[int],
) -> tuple[tuple[int, ...], ...] | None:
    """Return the tokens of every KV head, if the arm plans them beforehand; else None.

    Args:
        config: the arm.
        query: the budget, and the layers under it.
        formats: what ``plan_formats`` returned.
        totals: [layers] what ``plan_totals`` returned.
        kv_heads: [layers] of each.

    Raises:
        UsageError: the layer allocator plans none, or wrong ones.
    """
    arm = config.arm
    if not HEAD_ALLOCATORS.create(arm.heads).needs_plan:
        return None
    if formats is not None:
        return tuple(tuple(tokens for tokens, _ in layer) for layer in formats)
    heads = make_layer_allocator(config).plan_heads(query)
    if heads is None:
        raise UsageError(
            f"heads={arm.heads!r} needs budgets per head, which layers="
            f"{arm.layers!r} does not plan: use layers='cost' or another head allocator"
        )
    name = f"layers={arm.layers!r}: what plan_heads() returned"
    rows = tuple(tuple(whole_numbers(name, layer, 0)) for layer in heads)
    for row, total, count in zip(rows, totals, kv_heads, strict=False):
        if len(row) != count or sum(row) != total:
            raise UsageError(
                f"{name} for a layer, {list(row)}, must be {count} numbers that sum to its total "
                f"of {total}"
            )
    if len(rows) != len(totals):
        raise UsageError(f"{name} has {len(rows)} rows for {len(totals)} layers")
    return rows
