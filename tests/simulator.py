"""A whole model under a budget, slowly: every decision by the references, one head at a time.

transformers' own DynamicCache keeps all keys; what a compressed cache would still hold is a list
of positions per (layer, head), and attention is computed over those positions alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from reference import RECENT_FRACTION, SCORES, SHARES, Head, head_budgets, select


class Simulator:
    """Registers itself as the attention of ``model`` and decodes greedily (batch 1, no padding)."""

    def __init__(
        self,
        model: Any,
        totals: tuple[int, ...],
        policy: str,  # a name from SCORES, or name(parameter=number)
        heads: str,
        interval: int,
        window: int,
        n_sink: int = 0,
        protect_prompt: bool = False,
        seed: int = 0,
        statistics: Any = None,
        planned: Sequence[Sequence[int]] | None = None,
        pin: bool = False,
        predictor: Any = None,
    ) -> None:
        self.model = model
        self.policy, _, parameters = policy.rstrip(")").partition("(")
        pairs = (pair.split("=") for pair in parameters.split(",") if pair)
        self.parameters: dict[str, Any] = {
            name.strip(): value if value.isalpha() else float(value) for name, value in pairs
        }
        if statistics is not None:
            self.parameters["statistics"] = statistics
        if predictor is not None:
            self.parameters["predictor"] = predictor
        self.totals, self.heads = totals, heads
        self.planned = planned
        self.interval, self.window = interval, window
        self.n_sink, self.protect_prompt, self.seed = n_sink, protect_prompt, seed
        self.pin = pin
        self.kept: dict[int, list[list[int]]] = {}
        self.received: dict[int, list[dict[int, list[tuple[int, float]]]]] = {}
        self.queries: dict[int, list[torch.Tensor]] = {}
        self.since: dict[int, int] = {}
        self.prompt = 0

    def generate(self, ids: torch.Tensor, new_tokens: int) -> list[int]:
        original = self.model.config._attn_implementation
        AttentionInterface.register("simulator", self.attention)
        AttentionMaskInterface.register("simulator", sdpa_mask)
        self.model.set_attn_implementation("simulator")
        self.prompt = ids.shape[1]
        try:
            with torch.no_grad():
                out = self.model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
        finally:
            self.model.set_attn_implementation(original)
        return [int(t) for t in out[0, ids.shape[1] :]]

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float = 1.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        layer, heads, columns, end = module.layer_idx, key.shape[1], query.shape[2], key.shape[2]
        group = query.shape[1] // heads
        first = layer not in self.kept
        if first:
            self.kept[layer] = [[] for _ in range(heads)]
            self.received[layer] = [{} for _ in range(heads)]
            self.queries[layer], self.since[layer] = [], 0
        out = torch.zeros(1, query.shape[1], columns, value.shape[-1])
        new = list(range(end - columns, end))
        for h in range(heads):
            for p in new:
                self.received[layer][h][p] = []
            for i, p in enumerate(new):
                means: dict[int, float] = {}
                visible = self.kept[layer][h] + [q for q in new if q <= p]
                for g in range(group):
                    row = h * group + g
                    logits = key[0, h, visible] @ query[0, row, i] * scaling
                    if softcap is not None:
                        logits = torch.tanh(logits / softcap) * softcap
                    if s_aux is not None:
                        logits = torch.cat([logits, s_aux[row : row + 1]])
                    weights = logits.float().softmax(0)[: len(visible)]
                    out[0, row, i] = weights @ value[0, h, visible]
                    for q, weight in zip(visible, weights.tolist(), strict=True):
                        means[q] = means.get(q, 0.0) + weight / group
                for q, weight in means.items():
                    self.received[layer][h][q].append((p, weight))
            self.kept[layer][h] += new
        self.queries[layer] += [query[0, :, i] for i in range(columns)]
        self.since[layer] += 1
        if first or columns > 1 or self.since[layer] == self.interval:
            self.since[layer] = 0
            pinned = heads * self.pinned
            if sum(len(row) for row in self.kept[layer]) - pinned > self.totals[layer]:
                self.compress(module, key, value, scaling, end)
        return out.transpose(1, 2).contiguous(), None

    @property
    def pinned(self) -> int:
        """First positions that every head keeps on top of the budget."""
        return self.prompt if self.pin else 0

    def compress(
        self, module: Any, key: torch.Tensor, value: torch.Tensor, scaling: float, end: int
    ) -> None:
        layer, heads, window = module.layer_idx, key.shape[1], self.window
        recent = torch.stack(self.queries[layer][-window:], dim=1)
        group = recent.shape[0] // heads
        first = max(self.n_sink, self.prompt if self.protect_prompt else 0)
        scores, least, forced_sets = [], window, []
        sinks = module.sinks.tolist() if hasattr(module, "sinks") else None
        for h in range(heads):
            kept = self.kept[layer][h]
            head = Head(
                keys=key[0, h, kept],
                values=value[0, h, kept],
                positions=kept,
                queries=recent[h * group : (h + 1) * group],
                query_positions=list(range(end - window, end)),
                received=[self.received[layer][h][p] for p in kept],
                window=window,
                scaling=scaling,
                layer=layer,
                head=h,
                seen=end,
                seed=self.seed,
                sinks=sinks[h * group : (h + 1) * group] if sinks else None,
                projections=module.o_proj.weight.detach()
                .unflatten(1, (heads * group, -1))[:, h * group : (h + 1) * group]
                .transpose(0, 1),
            )
            row = SCORES[self.policy](head, **self.parameters)[self.pinned : len(kept) - window]
            forced = [p < first for p in kept[self.pinned : len(kept) - window]]
            least = max(least, window + sum(forced))
            forced_sets.append({i for i, f in enumerate(forced) if f})
            scores.append([math.inf if f else s for s, f in zip(row, forced, strict=True)])
        lengths = [len(row) - self.pinned for row in self.kept[layer]]
        shares = self.policy in SHARES
        budgets = head_budgets(
            self.heads,
            scores,
            lengths,
            self.totals[layer],
            window,
            least,
            shares=shares,
            planned=() if self.planned is None else self.planned[layer],
            pinned=self.pinned,
        )
        for h in range(heads):
            stay = select(
                scores[h],
                lengths[h],
                budgets[h],
                window,
                RECENT_FRACTION.get(self.policy, 0.0),
                forced_sets[h],
            )
            row, first = self.kept[layer][h], self.pinned
            self.kept[layer][h] = row[:first] + [row[first + i] for i in stay]
