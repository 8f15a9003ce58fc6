"""Costs of single heads and layers against a slow reference that decodes token by token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from models import FACTORIES, prompt, tiny
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibration import ablation
from reasonalloc.calibration.ablation import estimate
from reasonalloc.calibration.suffix import SuffixRunner
from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.attention import attention_forward, mask_forward
from reasonalloc.texts import Trajectory
from simulator import Simulator

BUDGETS, INTERVAL, WINDOW = (10, 16), 8, 4


def text(prompt_tokens: int = 25, completion: int = 36, seed: int = 0) -> Trajectory:
    ids = prompt(prompt_tokens + completion, seed=seed)[0].tolist()
    return Trajectory(tuple(ids[:prompt_tokens]), tuple(ids[prompt_tokens:]))


class OneHead(Simulator):
    """Evicts from one head of one layer, or from all its heads; all else is transformers' own."""

    def __init__(self, model: Any, layer: int, head: int | None, budget: int, policy: str) -> None:
        layers = model.config.num_hidden_layers
        super().__init__(model, (3 * budget,) * layers, policy, "uniform", INTERVAL, WINDOW)
        self.layer, self.head = layer, head

    def attention(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **k: Any) -> Any:  # type: ignore[override]
        if module.layer_idx != self.layer:
            return attention_forward(module, query, key, value, mask, **k)
        return super().attention(module, query, key, value, mask, **k)

    def compress(
        self, module: Any, key: torch.Tensor, value: torch.Tensor, scaling: float, end: int
    ) -> None:
        layer = module.layer_idx
        kept = list(self.kept[layer])
        super().compress(module, key, value, scaling, end)
        if self.head is not None:
            kept[self.head] = self.kept[layer][self.head]
            self.kept[layer] = kept

    @torch.no_grad()
    def cost(self, trajectory: Trajectory) -> list[float]:
        """KL per completion token but the first, token by token."""
        ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids])
        full = self.model(ids).logits[0].double().log_softmax(-1)
        original = self.model.config._attn_implementation
        AttentionInterface.register("one-head", self.attention)
        AttentionMaskInterface.register("one-head", mask_forward)
        self.model.set_attn_implementation("one-head")
        start = self.prompt = len(trajectory.prompt_ids)
        try:
            cache = self.model(ids[:, :start], use_cache=True).past_key_values
            found = []
            for place in range(start, ids.shape[1] - 1):
                out = self.model(ids[:, place : place + 1], past_key_values=cache)
                ours = out.logits[0, -1].double().log_softmax(-1)
                found.append(float((full[place].exp() * (full[place] - ours)).sum()))
        finally:
            self.model.set_attn_implementation(original)
        return found


@pytest.mark.parametrize("name", FACTORIES)
def test_equals_token_by_token(name: str) -> None:
    model, trajectory = tiny(name), text()
    profile = ablation(model, [trajectory], budgets=BUDGETS, interval=INTERVAL, window=WINDOW)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    layers = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    assert (profile.layers, profile.kv_heads, profile.tokens) == (len(layers), 3, [35])
    for layer, head, point in ((layers[0], 2, 0), (layers[-1], 1, 1)):
        each = OneHead(model, layer, head, BUDGETS[point], "rkv").cost(trajectory)
        found = profile.costs[0][layers.index(layer)][head][point]
        assert found == pytest.approx(sum(each) / len(each), rel=2e-3, abs=2e-6)
        assert found > 1e-4
    each = OneHead(model, layers[-1], None, BUDGETS[0], "rkv").cost(trajectory)
    found = profile.layer_costs[0][-1][0]
    assert found == pytest.approx(sum(each) / len(each), rel=2e-3, abs=2e-6)
    assert found > max(head[0] for head in profile.costs[0][-1])


@pytest.mark.parametrize(
    ("policy", "prompt_tokens"), [("h2o", 25), ("random", 1), ("lazy_eviction(threshold=0.03)", 9)]
)
def test_other_policies_and_prompts(policy: str, prompt_tokens: int) -> None:
    model, trajectory = tiny("llama"), text(prompt_tokens, 42)
    profile = ablation(
        model, [trajectory], policy=policy, budgets=BUDGETS, interval=INTERVAL, window=WINDOW
    )
    for layer, head, point in ((0, 0, 0), (1, 2, 1), (2, 1, 0)):
        each = OneHead(model, layer, head, BUDGETS[point], policy).cost(trajectory)
        assert profile.costs[0][layer][head][point] == pytest.approx(
            sum(each) / len(each), rel=2e-3, abs=2e-6
        )


@pytest.mark.parametrize("name", FACTORIES)
def test_runs_from_a_layer_on_equal_the_full_pass(name: str) -> None:
    model, ids, positions = tiny(name), prompt(40), torch.tensor([5, 17, 39])
    expected = model(ids).logits[0, positions]
    implementation = model.config._attn_implementation
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * 3
    layers = [i for i, kind in enumerate(kinds) if i and kind == "full_attention"][:2]
    with torch.no_grad(), SuffixRunner(model, layers) as runner:
        full = runner.full(ids, positions)
        assert runner.resumes
        torch.testing.assert_close(full[0], expected, rtol=1e-4, atol=1e-4)
        first = model.get_decoder().layers[0]
        calls: list[int] = []
        handle = first.register_forward_hook(lambda *_: calls.append(len(first.__dict__)))
        ran: list[int] = []
        inner = first.self_attn.register_forward_hook(lambda *_: ran.append(1))
        for layer in layers:
            output = runner.seen[layer].output.repeat(2, 1, 1, 1)
            found = runner.run(ids, positions, layer, output)
            assert found.shape[0] == 2 and not ran
            torch.testing.assert_close(found[1], full[0], rtol=1e-4, atol=1e-4)
        assert len(calls) == len(layers)
        runner.resumes = False
        again = runner.run(ids, positions, layers[0], runner.seen[layers[0]].output)
        assert ran and "forward" not in first.__dict__
        torch.testing.assert_close(again, full, rtol=1e-4, atol=1e-4)
        handle.remove()
        inner.remove()
    assert model.config._attn_implementation == implementation


def test_small_batches_and_whole_runs_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny("gemma3"), [text(), text(seed=3)]
    module = sys.modules["reasonalloc.calibration.ablation"]
    settings: dict[str, Any] = {"budgets": BUDGETS, "interval": INTERVAL, "window": WINDOW}
    steps: list[tuple[int, int]] = []
    expected = ablation(model, texts, **settings, on_progress=lambda *s: steps.append(s))
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    monkeypatch.setattr(module, "_BATCH_BYTES", 1)
    small = ablation(model, texts, **settings)
    monkeypatch.setattr(module, "_resumes", lambda *_: False)
    whole = ablation(model, texts, **settings)
    for found in (small, whole):
        for a, b in zip(expected.costs, found.costs, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-3, atol=1e-6)


def test_a_model_whose_layers_are_no_plain_sequence_is_run_whole() -> None:
    """The last layer sees the embedding too, past all layers in between."""
    model, trajectory = tiny("llama"), text()
    kept: list[torch.Tensor] = []
    layers = model.model.layers
    layers[0].register_forward_pre_hook(lambda _, args: kept.append(args[0].clone()))
    layers[1].register_forward_hook(lambda _, args, out: out + kept[-1] - args[0])
    profile = ablation(model, [trajectory], budgets=BUDGETS, interval=INTERVAL, window=WINDOW)
    each = OneHead(model, 2, 1, BUDGETS[0], "rkv").cost(trajectory)
    assert profile.costs[0][2][1][0] == pytest.approx(sum(each) / len(each), rel=2e-3)


def test_a_stride_measures_every_few_positions(tmp_path: Path) -> None:
    model, trajectory = tiny("llama"), text()
    settings: dict[str, Any] = {"budgets": BUDGETS, "interval": INTERVAL, "window": WINDOW}
    profile = ablation(model, [trajectory], stride=4, **settings)
    each = OneHead(model, 1, 0, BUDGETS[0], "rkv").cost(trajectory)
    found = profile.costs[0][1][0][0]
    candidates = [sum(each[start::4]) / len(each[start::4]) for start in range(4)]
    assert min(abs(found / c - 1) for c in candidates) < 2e-3
    assert profile.tokens[0] in (8, 9)
    profile.save(tmp_path / "c.json")
    assert load_costs(tmp_path / "c.json") == profile
    one = ablation(model, [trajectory], stride=1000, **settings)
    assert one.tokens == [1]


def test_nothing_evicted_costs_nothing() -> None:
    model = tiny("llama")
    profile = ablation(model, [text()], budgets=(10, 100), interval=INTERVAL, window=WINDOW)
    heads = [head for layer in profile.costs[0] for head in layer]
    assert all(few > 0 and many == 0 for few, many in heads)


def test_the_estimate_counts_what_is_run() -> None:
    model = tiny("llama")
    found = estimate(model, [text(), text(10, 21)], budgets=BUDGETS)
    assert found.forward_tokens == 3 * 4 * 2 * (60 + 30) and found.seconds > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "texts: none given"),
        ({"texts": [Trajectory((1, 2), ())]}, "text 0 needs a prompt and at least two"),
        ({"texts": [text(4090, 36)]}, "the model has 4096 positions"),
        ({"budgets": (24,)}, "at least two"),
        ({"budgets": (48, 24)}, "rising"),
        ({"budgets": (4, 24)}, "budget of at least 8"),
        ({"stride": 0}, "stride=0"),
        ({"kinds": ["a", "b"]}, "2 labels for 1 texts"),
        ({"interval": 0}, "interval=0"),
        ({"policy": "rvk"}, "did you mean 'rkv'"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"texts": [text()]} | change
    model = tiny("llama")
    with pytest.raises(UsageError, match=message):
        ablation(model, settings.pop("texts"), **settings)
    with pytest.raises(UsageError, match="training mode"):
        ablation(model.train(), [text()])
    assert model.config._attn_implementation != "reasonalloc-suffix"
