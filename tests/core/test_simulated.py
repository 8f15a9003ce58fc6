"""Whole generations equal a slow simulation that decides by plain references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import made_costs
import made_statistics
import reasonalloc
from models import prompt, tiny
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.policies import POLICIES
from reference import NAMED_BY_A_FILE, SCORES
from simulator import Simulator

HEADS = ("uniform", "adakv", "planned", "reasonalloc")


def test_every_policy_and_head_allocator_has_a_reference() -> None:
    assert set(POLICIES.entries()) - NAMED_BY_A_FILE == set(SCORES)
    assert set(HEAD_ALLOCATORS.entries()) == set(HEADS)


def compare(name: str, length: int, tokens: int, **settings: object) -> None:
    model = tiny(name)
    ids = prompt(length, seed=length)
    statistics = made_statistics.of_model(model) if "statistics" in settings else None
    made = {"statistics": statistics, "costs": made_costs.of_model(model)}
    paths = {kind: settings.pop(kind) for kind in made if kind in settings}
    for kind, path in paths.items():
        made[kind].save(path)  # type: ignore[union-attr, arg-type]
        settings["profile"] = path
    if len(paths) == 2:
        settings["profile"] = None
        settings["policy"] = f"{settings['policy']}(path={paths['statistics']})"
        layers, _, options = str(settings["layers"]).rstrip(")").partition("(")
        settings["layers"] = f"{layers}({options}, path={paths['costs']})"
    full = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    with reasonalloc.attach(model, record="tokens", **settings) as attached:  # type: ignore[arg-type]
        fast = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        recorder = attached.recorder
        config, totals, planned = attached.config, attached.totals, attached.planned
    assert recorder is not None and recorder.compressions >= 6
    policy = made["costs"].policy if config.arm.policy == "calibrated" else config.arm.policy
    policy = policy.partition("(path=")[0]
    slow = Simulator(
        model,
        totals,
        policy,
        config.arm.heads,
        config.interval,
        config.window,
        config.n_sink,
        config.protect_prompt,
        config.seed,
        statistics if policy.startswith("tri_attention") else None,
        planned,
        config.prompt == "pin",
        made["costs"].predictor if policy.startswith("predicted_loss") else None,
    )
    assert slow.generate(ids, tokens) == fast[0, length:].tolist()
    for layer in range(len(totals)):
        event = [e for e in recorder.events if e.layer == layer][-1]
        after = event.step  # tokens appended since then are in the simulation's lists as well
        kept = [[p for p in row if p < after] for row in slow.kept[layer]]
        assert [event.kept(0, h) for h in range(len(kept))] == kept
        assert sum(map(len, kept)) == totals[layer] + len(kept) * slow.pinned
    assert not torch.equal(full, fast) or config.budget > 30, "compression changed nothing"


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("policy", sorted(SCORES))
def test_policy_and_heads(policy: str, heads: str, tmp_path: Path) -> None:
    settings = with_file(policy, "cost" if heads == "planned" else "uniform", tmp_path)
    compare("llama", 45, 50, budget=20, heads=heads, interval=8, window=4, **settings)


def with_file(policy: str, layers: str, folder: Path) -> dict[str, object]:
    """Settings of an arm, and where the statistics go if it reads some."""
    settings: dict[str, object] = {"policy": policy, "layers": layers}
    if policy == "tri_attention" or layers in ("cake", "dynamickv"):
        settings["statistics"] = folder / "statistics.safetensors"
    if layers.startswith("cost") or policy == "predicted_loss":
        settings["costs"] = folder / "costs.json"
    return settings


@pytest.mark.parametrize("name", ["olmo2", "phi3"])
def test_expected_attention_of_other_models(name: str, tmp_path: Path) -> None:
    for layers in ("cake", "dynamickv"):
        settings = with_file("tri_attention", layers, tmp_path)
        compare(name, 45, 50, budget=20, heads="reasonalloc", interval=8, window=4, **settings)


@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_values_behind_the_output_projection(name: str) -> None:
    policy = "value_aware(half_life=9, metric=output)"
    for heads in ("uniform", "reasonalloc"):
        compare(name, 45, 50, budget=20, policy=policy, heads=heads, interval=8, window=4)


@pytest.mark.parametrize("policy", sorted(set(SCORES) - {"tri_attention", "predicted_loss"}))
def test_learned_sinks(policy: str) -> None:
    heads = ("adakv", "reasonalloc")[len(policy) % 2]
    compare("gpt_oss_full", 45, 50, budget=20, policy=policy, heads=heads, interval=8, window=4)


@pytest.mark.parametrize("threshold", [0.02, 0.2])
def test_recurrence_with_tokens_that_are_not_attended_to(threshold: float) -> None:
    policy = f"lazy_eviction(threshold={threshold})"
    for heads in ("uniform", "adakv", "reasonalloc"):
        compare("llama", 45, 50, budget=20, policy=policy, heads=heads, interval=8, window=4)


@pytest.mark.parametrize("layers", ["pyramid", "pyramid(beta=3)", "cake", "dynamickv", "cost"])
def test_layer_budgets(layers: str, tmp_path: Path) -> None:
    settings = with_file("snapkv", layers, tmp_path)
    compare("qwen3", 30, 40, budget=24, interval=8, window=4, **settings)


@pytest.mark.parametrize("policy", sorted(SCORES))
@pytest.mark.parametrize("options", [{"n_sink": 15}, {"protect_prompt": True}])
def test_forced_tokens(policy: str, options: dict[str, int], tmp_path: Path) -> None:
    planned = ("planned", "cost(least=22)")  # the forced tokens need room in every layer
    for heads, layers in (("uniform", "uniform"), ("reasonalloc", "uniform"), planned):
        settings = with_file(policy, layers, tmp_path) | options
        compare("qwen2", 22, 50, budget=30, heads=heads, interval=8, window=4, **settings)


@pytest.mark.parametrize("policy", sorted(SCORES))
def test_pinned_prompts(policy: str, tmp_path: Path) -> None:
    for heads, layers in (("uniform", "uniform"), ("reasonalloc", "pyramid"), ("planned", "cost")):
        settings = with_file(policy, layers, tmp_path)
        compare(
            "qwen2", 37, 50, budget=20, heads=heads, interval=8, window=4, prompt="pin", **settings
        )


def test_the_policy_of_a_cost_profile(tmp_path: Path) -> None:
    settings = with_file("calibrated", "cost", tmp_path)
    compare("llama", 45, 50, budget=20, heads="planned", interval=8, window=4, **settings)


def test_total_that_does_not_divide_and_short_prompt() -> None:
    compare("llama", 3, 60, budget=19, layers="pyramid(beta=2.5)", interval=7, window=3)
