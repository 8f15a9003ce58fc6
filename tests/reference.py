"""Slow, plain references: one head and one token at a time, straight from the definitions."""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Head:
    """One KV head of one sequence at a boundary, tokens in the order of their positions."""

    keys: torch.Tensor  # [n, d]
    values: torch.Tensor  # [n, d]
    positions: list[int]
    queries: torch.Tensor  # [group, window, d], oldest first
    query_positions: list[int]
    received: list[list[tuple[int, float]]]  # per token: (query's position, mean weight), in order
    window: int
    scaling: float
    layer: int = 0
    head: int = 0
    seen: int = 0
    seed: int = 0
    sinks: list[float] | None = None  # of the query heads
    projections: torch.Tensor | None = None  # [group, outputs, d], of the head's query heads

    @property
    def n(self) -> int:
        return len(self.positions)


def softmax(values: list[float], sink: float | None = None) -> list[float]:
    every = values if sink is None else [*values, sink]
    top = max(every)
    total = sum(math.exp(v - top) for v in every)
    return [math.exp(v - top) / total for v in values]


def logits(head: Head, group: int, query: int) -> list[float]:
    q = head.queries[group, query]
    return [float(q @ head.keys[i]) * head.scaling for i in range(head.n)]


def sink(head: Head, group: int) -> float | None:
    return None if head.sinks is None else head.sinks[group]


def score_streaming_llm(head: Head, sinks: int = 4) -> list[float]:
    return [math.inf if p < sinks else float(p - head.seen) for p in head.positions]


def score_knorm(head: Head) -> list[float]:
    scores = []
    for key in head.keys:
        mantissa, exponent = math.frexp(math.sqrt(float((key.float() ** 2).sum())))
        scores.append(-math.ldexp(round(mantissa * 2**14) / 2**14, exponent))
    return scores


def score_tova(head: Head) -> list[float]:
    groups = [softmax(logits(head, g, -1), sink(head, g)) for g in range(head.queries.shape[0])]
    return [sum(g[i] for g in groups) / len(groups) for i in range(head.n)]


def score_h2o(head: Head) -> list[float]:
    return [sum(weight for _, weight in token) for token in head.received]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def score_lazy_eviction(head: Head, threshold: float = 0.0005) -> list[float]:
    scores = []
    for position, token in zip(head.positions, head.received, strict=True):
        last, longest = position, 0
        for at, weight in token:
            if weight >= threshold:
                last, longest = at, max(longest, at - last)
        since = head.seen - 1 - last
        survival = sigmoid(-since / longest) if longest else 0.5 * (since == 0)
        scores.append(2 * survival + (2 * sigmoid(-1 / longest) if longest else 0.0))
    return scores


def score_snapkv(head: Head, kernel: int = 5, pooling: str = "avg") -> list[float]:
    last = head.n - head.window
    sums = [0.0] * last
    groups = head.queries.shape[0]
    for g in range(groups):
        for w, position in enumerate(head.query_positions):
            row = logits(head, g, w)
            visible = [i for i in range(head.n) if head.positions[i] <= position]
            weights = softmax([row[i] for i in visible], sink(head, g))
            for i, weight in zip(visible, weights, strict=True):
                if i < last:
                    sums[i] += weight / groups
    return _pool(sums, kernel, pooling)


def score_tri_attention(head: Head, statistics: Any, horizon: float = 65536) -> list[float]:
    rope, group = statistics.rope, head.queries.shape[0]
    row = statistics.layers.index(head.layer)
    pairs, dim = len(rope.frequencies), rope.head_dim
    rates = [*rope.frequencies, *([0.0] * (dim - 2 * pairs))]
    offsets = [2**i for i in range(40) if 2**i <= horizon]
    keys = []
    for key, p in zip(head.keys.tolist(), head.positions, strict=True):
        k = [complex(key[f], key[f + pairs]) for f in range(pairs)] + key[2 * pairs :]
        keys.append([z * cmath.exp(-1j * w * p) for z, w in zip(k, rates, strict=True)])
    best = [-math.inf] * (head.n - head.window)
    for g in range(group):
        mean = statistics.query_mean[row, head.head * group + g].tolist()
        norm = statistics.query_norm[row, head.head * group + g].tolist()
        scores = []
        for i in range(head.n - head.window):
            score = 0.0
            for q, size, k, w in zip(mean, norm, keys[i], rates, strict=True):
                phase = cmath.phase(q * k.conjugate())
                for o in offsets:
                    d = head.seen - 1 + o - head.positions[i]
                    score += abs(q) * abs(k) * math.cos(w * d + phase) / len(offsets)
                score += (size - abs(q)) * abs(k)
            scores.append(score)
        centre = sum(scores) / len(scores)
        deviation = math.sqrt(sum((s - centre) ** 2 for s in scores) / len(scores))
        best = [max(b, (s - centre) / deviation) for b, s in zip(best, scores, strict=True)]
    return best


def layer_budgets(
    name: str, statistics: Any, heads: int, budget: int, window: int, n_sink: int
) -> list[int]:
    """Per layer, all heads together; ``tau1 = tau2 = 1``."""
    layers = len(statistics.layers)
    if name == "cake":
        pairs = zip(statistics.entropy.tolist(), statistics.variance.tolist(), strict=True)
        preference = [entropy * variance * 1e6 for entropy, variance in pairs]
    else:
        top = min(max(budget - window, 1), statistics.tops[-1])
        low = max(t for t in statistics.tops if t <= top)
        high = min(t for t in statistics.tops if t >= top)
        part = 0.0 if low == high else math.log(top / low) / math.log(high / low)
        rows = [statistics.top_share[statistics.tops.index(t)].tolist() for t in (low, high)]
        preference = [(1 - part) * a + part * b for a, b in zip(*rows, strict=True)]
    free = heads * (budget - window)
    least = min(heads * (n_sink + 1), free)
    total = layers * free
    rest = robustify(preference, total, [least] * layers, [total] * layers, 1.0)
    return [r + heads * window for r in rest]


def _pool(values: list[float], kernel: int, pooling: str) -> list[float]:
    half = kernel // 2
    out = []
    for i in range(len(values)):
        near = [values[j] for j in range(i - half, i + half + 1) if 0 <= j < len(values)]
        out.append(sum(near) / kernel if pooling == "avg" else max(near))
    return out


def score_rkv(head: Head, lam: float = 0.1, kernel: int = 7, threshold: float = 0.5) -> list[float]:
    last = head.n - head.window
    sums = [0.0] * last
    for w in range(len(head.query_positions)):
        groups = [logits(head, g, w)[:last] for g in range(head.queries.shape[0])]
        largest = [max(column) for column in zip(*groups, strict=True)]
        for i, weight in enumerate(softmax(largest, max(head.sinks) if head.sinks else None)):
            sums[i] += weight / len(head.query_positions)
    importance = _pool(sums, kernel, "max")
    columns = [0.0] * head.n
    unit = [k.float() / (k.float().norm() + 1e-8) for k in head.keys]
    for i in range(head.n):
        row = [0.0 if i == j else float(unit[i] @ unit[j]) for j in range(head.n)]
        similar = [j for j in range(head.n) if row[j] > threshold]
        if similar:
            row[similar[-1]] = 0.0
        columns = [c + r for c, r in zip(columns, row, strict=True)]
    redundancy = softmax([c / head.n for c in columns])[:last]
    return [lam * i - (1 - lam) * r for i, r in zip(importance, redundancy, strict=True)]


def _mix(z: int) -> int:
    mask = (1 << 64) - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def score_random(head: Head) -> list[float]:
    mask = (1 << 64) - 1
    key = _mix((head.seed * 0x9E3779B97F4A7C15 + head.layer) & mask)
    key = _mix((_mix((key + head.seen) & mask) + head.head) & mask)
    return [(_mix((key + p) & mask) & ((1 << 24) - 1)) / (1 << 24) for p in head.positions]


def score_value_aware(
    head: Head, half_life: float = 32.0, metric: str = "value", sinks: int = 4
) -> list[float]:
    scores = []
    mean = sum(head.values[i] for i in range(head.n)) / head.n
    for i, token in enumerate(head.received):
        attention = sum(w * 0.5 ** ((head.seen - 1 - at) / half_life) for at, w in token)
        weight = sum(0.5 ** (k / half_life) for k in range(head.seen - head.positions[i]))
        away = head.values[i] - mean
        distance = math.sqrt(sum(float(x) ** 2 for x in away))
        if metric == "output":
            assert head.projections is not None
            moved = [sum(float(x) ** 2 for x in part @ away) for part in head.projections]
            distance = math.sqrt(sum(moved) / len(moved))
        first = head.positions[i] < sinks
        scores.append(math.inf if first else attention / weight * distance)
    return scores


def score_predicted_loss(head: Head, predictor: Any, sinks: int = 4) -> list[float]:
    weights = predictor.weights[predictor.layers.index(head.layer)][head.head]
    scores = []
    mean = sum(head.values[i] for i in range(head.n)) / head.n
    for i, token in enumerate(head.received):
        known = []
        for half_life in (8.0, 128.0):
            attention = sum(w * 0.5 ** ((head.seen - 1 - at) / half_life) for at, w in token)
            queries = sum(0.5 ** (k / half_life) for k in range(head.seen - head.positions[i]))
            known.append(math.log(attention / queries + 1e-6))
        distance = math.sqrt(sum(float(x) ** 2 for x in head.values[i] - mean))
        known += [math.log(head.seen - head.positions[i]), math.log(max(distance, 1e-6)), 1.0]
        score = sum(w * x for w, x in zip(weights, known, strict=True))
        scores.append(math.inf if head.positions[i] < sinks else score)
    return scores


SCORES: dict[str, Any] = {
    "streaming_llm": score_streaming_llm,
    "knorm": score_knorm,
    "tova": score_tova,
    "h2o": score_h2o,
    "lazy_eviction": score_lazy_eviction,
    "snapkv": score_snapkv,
    "rkv": score_rkv,
    "tri_attention": score_tri_attention,
    "value_aware": score_value_aware,
    "predicted_loss": score_predicted_loss,
    "random": score_random,
}
# Policies that stand for another one, which has a reference.
NAMED_BY_A_FILE = {"calibrated"}
RECENT_FRACTION = {"h2o": 0.5}
SHARES = ("rkv", "snapkv", "tova")  # policies whose scores are shares of a head's tokens


def robustify(
    demand: list[float], total: int, lower: list[int], upper: list[int], exponent: float
) -> list[int]:
    """Bisection on the scale, then largest-remainder rounding."""
    weights = [max(d, 1e-12) ** exponent for d in demand]

    def clipped(scale: float) -> list[float]:
        return [
            min(max(scale * w, lo), hi) for w, lo, hi in zip(weights, lower, upper, strict=True)
        ]

    low, high = 0.0, 1.0
    while sum(clipped(high)) < total and high < 1e30:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle)) < total else (low, middle)
    return round_to_total(clipped(high), total, upper)


def round_to_total(values: list[float], total: int, upper: list[int]) -> list[int]:
    base = [min(math.floor(v + 5e-7), hi) for v, hi in zip(values, upper, strict=True)]
    remainder = [round((v - b) * 1e6) for v, b in zip(values, base, strict=True)]
    open_ = [i for i in range(len(base)) if base[i] < upper[i]]
    for i in sorted(open_, key=lambda i: (-remainder[i], i))[: total - sum(base)]:
        base[i] += 1
    return base


def standardised(row: list[float]) -> list[float]:
    """Mean 0 and variance 1 of finite scores, rounded to float32; zeros if these are equal."""
    finite = [s for s in row if math.isfinite(s)]
    if len(set(finite)) <= 1:
        return [0.0 if math.isfinite(s) else s for s in row]
    mean = math.fsum(finite) / len(finite)
    spread = math.sqrt(math.fsum((s - mean) ** 2 for s in finite) / len(finite))
    return torch.tensor([(s - mean) / spread for s in row]).tolist()


def pooled_counts(
    scores: list[list[float]], total: int, window: int, lengths: list[int], score_norm: str
) -> list[int]:
    """``scores``: of the candidates alone, per head."""
    if score_norm == "length":
        scores = [
            [s * max(n - window, 1) for s in row] for row, n in zip(scores, lengths, strict=True)
        ]
    if score_norm == "standard":
        scores = [standardised(row) for row in scores]
    k = max(total - len(scores) * window, 0)
    pool = sorted((s for row in scores for s in row), reverse=True)
    if k == 0 or not pool:
        return [0] * len(scores)
    tau = pool[min(k, len(pool)) - 1]
    return [sum(s >= tau for s in row) for row in scores]


def head_budgets(
    name: str,
    scores: list[list[float]],
    lengths: list[int],
    layer_total: int,
    window: int,
    least: int,
    score_norm: str = "length",
    shares: bool = True,
    planned: Sequence[int] = (),
    pinned: int = 0,
) -> list[int]:
    heads = len(lengths)
    total = min(layer_total, sum(lengths))
    if name == "planned":
        floor = min(max(least, min(window, layer_total // heads)), total // heads)
        return robustify(list(planned), total, [min(floor, n) for n in lengths], lengths, 1.0)
    if name == "uniform":
        return robustify([1.0] * heads, total, [0] * heads, lengths, 1.0)
    scored = [n + pinned for n in lengths]  # the scores are shares of these
    counts = pooled_counts(
        scores, total, window, scored, score_norm if shares or score_norm == "standard" else "paper"
    )
    mean = layer_total // heads
    share, margin = (0.25, 8) if name == "reasonalloc" else (0.0, 0)
    floor = min(max(int(share * mean), window + margin), mean)
    floor = min(max(least, floor), total // heads)
    lower = [min(floor, n) for n in lengths]
    if name == "reasonalloc":
        return robustify([c + window for c in counts], total, lower, lengths, 0.5)
    mixed = [0.8 * (c + window) + 0.2 * total / heads for c in counts]
    return robustify(mixed, total, lower, lengths, 1.0)


def least_cost(
    curves: list[list[float]], points: list[int], total: int, lower: int, upper: int
) -> float:
    """The cost of the best budgets of all, by dynamic programming."""

    def cost(curve: list[float], size: int) -> float:
        falling = [max(min(curve[: i + 1]), 1e-9) for i in range(len(curve))]
        i = max([k for k in range(len(points) - 1) if points[k] <= size], default=0)
        part = math.log(size / points[i]) / math.log(points[i + 1] / points[i])
        return math.exp((1 - part) * math.log(falling[i]) + part * math.log(falling[i + 1]))

    best = {0: 0.0}
    for curve in curves:
        following: dict[int, float] = {}
        for used, so_far in best.items():
            for size in range(lower, min(upper, total - used) + 1):
                now = so_far + cost(curve, size)
                following[used + size] = min(now, following.get(used + size, math.inf))
        best = following
    return best[total]


def select(
    scores: list[float],
    length: int,
    budget: int,
    window: int,
    recent_fraction: float,
    forced: set[int] | None = None,
) -> list[int]:
    """Indices that stay, ascending. ``scores``: at least those of the candidates.

    In the order of their claims: the window, what is forced, the share of recent tokens (newest
    first), then the best scores.
    """
    claims = list(range(length - 1, max(length - window, 0) - 1, -1))
    claims += sorted((forced or set()) - set(claims))
    recent = min(math.floor(recent_fraction * budget), max(budget - len(forced or ()), window))
    claims += [i for i in range(length - 1, max(length - recent, 0) - 1, -1) if i not in claims]
    rest = [i for i in range(length) if i not in claims]
    claims += sorted(rest, key=lambda i: (-scores[i], i))
    return sorted(claims[:budget])


def compression_points(
    total: int, kv_heads: int, interval: int, prompt: int, steps: int
) -> list[int]:
    """Tokens at each compression of one sequence, boundary by boundary.

    Args:
        total: tokens that the layer keeps after a compression, all KV heads together.
        kv_heads: KV heads of the layer.
        interval: decode steps between two boundaries.
        prompt: tokens of the prompt.
        steps: decode steps after it; the last generated token is not among them.

    Returns:
        Tokens of the sequence at each compression, rising.
    """
    points, held = [], 0
    for seen in range(prompt, prompt + steps + 1, interval):
        held += kv_heads * (prompt if seen == prompt else interval)
        if held > total:
            points.append(seen)
            held = total
    return points
