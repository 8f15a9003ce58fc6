"""Costs from gradients: exact on what can be computed exactly, near to the measured ones else."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from models import CALIBRATED, prompt, tiny
from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibration import ablation, fisher, joint_costs
from reasonalloc.calibration.checks import checked
from reasonalloc.calibration.fisher import estimate
from reasonalloc.calibration.joint import budgets_to_check, cheapest, steps
from reasonalloc.calibration.layer_replay import outputs_under_budgets
from reasonalloc.calibration.suffix import SuffixRunner
from reasonalloc.config import Arm, CompressionConfig, Prompt
from reasonalloc.core.watched import Seen
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.replay import full_logits, measure_fidelity
from reasonalloc.integrations.hf import attach_config
from reasonalloc.integrations.hf.replay import replay_logits
from reasonalloc.texts import Trajectory

INTERVAL, WINDOW = 8, 4
CADENCE: dict[str, Any] = {"interval": INTERVAL, "window": WINDOW}


def text(prompt_tokens: int = 25, completion: int = 60, seed: int = 0) -> Trajectory:
    ids = prompt(prompt_tokens + completion, seed=seed)[0].tolist()
    return Trajectory(tuple(ids[:prompt_tokens]), tuple(ids[prompt_tokens:]))


def test_random_gradients_have_the_fisher_matrix_as_second_moment() -> None:
    model = tiny("llama", vocab_size=11, num_hidden_layers=2, initializer_range=0.2)
    trajectory = Trajectory((3, 5), (7, 2, 9, 4))
    module, samples = sys.modules["reasonalloc.calibration.fisher"], 1000
    generator = torch.Generator().manual_seed(0)
    with module._taping(model, [0, 1]) as tape:
        found = module._gradients(tape, trajectory, samples, generator, lambda: None)
        ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids[:-1]])
        logits = tape.watched.logits(ids, torch.arange(2, 5))[0]
        for layer, directions in enumerate(found):
            (output,) = tape.seen[layer].parts
            rows = [
                torch.autograd.grad(entry, output, retain_graph=True)[0].flatten()
                for entry in logits.flatten()
            ]
            jacobian = torch.stack(rows).unflatten(0, logits.shape).double()
            p = logits.detach().double().softmax(-1)
            spread = torch.diag_embed(p) - p[:, :, None] * p[:, None]
            exact = torch.einsum("tvx,tvw,twy->xy", jacobian, spread, jacobian)
            g = directions.flatten(1).double()
            error = float(torch.linalg.matrix_norm(g.T @ g / samples - exact))
            # The mean of n products of normal vectors has this root-mean-square error.
            norm = float(torch.linalg.matrix_norm(exact))
            expected = float(((exact.trace() ** 2 + norm**2) / samples) ** 0.5)
            assert expected < 0.2 * norm
            assert error < 2 * expected


def seen_by(model: Any, layer: int, trajectory: Trajectory) -> Seen:
    ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids[:-1]])
    with torch.no_grad(), SuffixRunner(model, [layer]) as runner:
        runner.full(ids, torch.tensor([0]))
        return runner.seen[layer]


@pytest.mark.parametrize("prompt", ["evict", "pin"])
@pytest.mark.parametrize("policy", ["rkv", "h2o", "value_aware"])
@pytest.mark.parametrize(("name", "layer"), [("llama", 0), ("gemma2", 1), ("gpt_oss", 1)])
def test_a_replayed_layer_is_that_of_a_compressed_model(
    name: str, layer: int, policy: str, prompt: Prompt
) -> None:
    """Up to the first layer under a budget nothing differs from the full pass."""
    model, trajectory = tiny(name), text(25, 40)
    seen = seen_by(model, layer, trajectory)
    settings = checked(
        model, [trajectory], None, [policy], (10, 16), INTERVAL, WINDOW, prompt=prompt
    )
    assert settings.layers[0] == layer
    budgets = (10, 16, 200)
    *found, nothing = outputs_under_budgets(
        seen, 25, settings.configs[0], settings.policies[0], budgets
    )
    assert nothing is None
    for budget, ours in zip(budgets, found, strict=False):
        assert ours is not None
        pieces: list[torch.Tensor] = []
        projection = model.model.layers[layer].self_attn.o_proj
        hook = projection.register_forward_pre_hook(lambda _, a, kept=pieces: kept.append(a[0][0]))
        config = CompressionConfig(budget=budget, arm=Arm(policy), prompt=prompt, **CADENCE)
        with torch.no_grad(), attach_config(model, config) as attached:
            cache = attached.new_cache()
            with cache.replaying():
                list(replay_logits(model, trajectory, cache))
            assert cache.recorder.compressions > (3 if prompt == "evict" else 1)
        hook.remove()
        torch.testing.assert_close(ours.flatten(1), torch.cat(pieces), rtol=1e-4, atol=3e-5)
        assert not torch.allclose(ours, seen.output[0], atol=1e-3)
        torch.testing.assert_close(ours[:25], seen.output[0, :25], rtol=1e-4, atol=1e-5)


def test_a_budget_that_holds_all_but_the_last_boundary_is_not_replayed() -> None:
    """Boundaries come after 25, 33, 41 and 49 tokens; nothing follows the last."""
    model, trajectory = tiny("llama"), text(25, 25)
    seen = seen_by(model, 0, trajectory)
    settings = checked(model, [trajectory], None, ["rkv"], (10, 16), INTERVAL, WINDOW)
    found = outputs_under_budgets(
        seen, 25, settings.configs[0], settings.policies[0], (40, 41, 48, 49)
    )
    assert [row is None for row in found] == [False, True, True, True]
    assert found[0] is not None and not torch.allclose(found[0][41:], seen.output[0, 41:])
    torch.testing.assert_close(found[0][:41], seen.output[0, :41], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", *CALIBRATED])
def test_costs_rank_heads_as_measured_ones_and_equal_small_ones(name: str) -> None:
    model, texts = tiny(name, initializer_range=0.1), [text(), text(10, 41, seed=3)]
    budgets = (10, 16, 24, 60)
    reports: list[tuple[int, int]] = []
    found, other = fisher(
        model,
        texts,
        kinds=["a", "b"],
        policies=["rkv", "h2o"],
        budgets=budgets,
        samples=48,
        **CADENCE,
        on_progress=lambda *step: reports.append(step),
    )
    layers = found.layers
    assert reports == [(i + 1, 2 * (48 + 2 * layers)) for i in range(2 * (48 + 2 * layers))]
    assert (found.policy, other.policy, found.kinds, found.samples) == (
        "rkv",
        "h2o",
        ["a", "b"],
        48,
    )
    for profile in (found, other):
        exact = ablation(model, texts, policy=profile.policy, budgets=budgets, **CADENCE)
        assert profile.text_hashes == exact.text_hashes and profile.tokens == exact.tokens
        assert profile.config_hash == exact.config_hash and profile.model_id == exact.model_id
        ours, true = (torch.tensor(p.curves())[..., :3].flatten() for p in (profile, exact))
        ranks = torch.stack([costs.argsort().argsort().double() for costs in (ours, true)])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.94  # Spearman
        small = true <= true.median()
        assert 0.75 < float(ours[small].sum() / true[small].sum()) < 1.25
        ours, true = (torch.tensor(p.layer_curves())[..., :3].flatten() for p in (profile, exact))
        ranks = torch.stack([costs.argsort().argsort().double() for costs in (ours, true)])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.9
        short = [head[3] for layer in profile.costs[1] for head in layer]
        assert short == [0.0] * len(short)  # the second text fits


def test_one_seed_gives_one_result() -> None:
    model = tiny("llama")
    settings: dict[str, Any] = {"policies": ["rkv"], "budgets": (10, 16), **CADENCE}
    first, again = (fisher(model, [text()], samples=2, seed=4, **settings) for _ in range(2))
    assert first == again != fisher(model, [text()], samples=2, seed=5, **settings)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing: bool) -> None:
    model = tiny("llama")
    model.lm_head.weight.requires_grad_(False)
    learning = [parameter.requires_grad for parameter in model.parameters()]
    implementation = model.config._attn_implementation
    before = model(prompt(9)).logits

    def stop(done: int, total: int) -> None:
        if failing and done == 3:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"policies": ["rkv"], "budgets": (10, 16), "samples": 2, **CADENCE}
    if failing:
        with pytest.raises(KeyboardInterrupt):
            fisher(model, [text()], **settings, on_progress=stop)
    else:
        with torch.no_grad():
            fisher(model, [text()], **settings, on_progress=stop)
            assert not torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in model.parameters()] == learning
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == implementation
    assert not any(module._forward_hooks for module in model.modules())
    after = model(prompt(9)).logits
    assert torch.equal(before, after) and after.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": []}, "texts: none given"),
        ({"texts": [Trajectory((1, 2), ())]}, "text 0 needs a prompt and at least two"),
        ({"texts": [text(4090, 36)]}, "the model has 4096 positions"),
        ({"budgets": (24,)}, "at least two"),
        ({"budgets": (48, 24)}, "rising"),
        ({"budgets": (4, 24)}, "budget of at least 8"),
        ({"budgets": (61, 90)}, "even the smallest holds every text"),
        ({"samples": 0}, "samples=0"),
        ({"kinds": ["a", "b"]}, "2 labels for 1 texts"),
        ({"interval": 0}, "interval=0"),
        ({"policies": []}, "policies: none given"),
        ({"policies": ["rkv", "rvk"]}, "did you mean 'rkv'"),
        ({"policies": ["rkv", "rkv"]}, "given twice"),
        ({"policies": ["calibrated"]}, "name a policy of its own"),
        ({"prompt": "protect"}, "prompt='protect': .*evict or pin"),
        ({"prompt": "pinned"}, "did you mean 'pin'"),
        ({"prompt": "pin", "budgets": (36, 60)}, "even the smallest holds every text"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"texts": [text()]} | change
    model, texts = tiny("llama"), settings.pop("texts")
    for function in (fisher, estimate):
        if "kinds" not in settings or function is fisher:
            with pytest.raises(UsageError, match=message):
                function(model, texts, **settings)
    with pytest.raises(UsageError, match="training mode"):
        fisher(model.train(), [text()])
    assert model.config._attn_implementation != "reasonalloc"


def test_the_estimate_counts_passes() -> None:
    texts = [text(25, 36), text(10, 21)]
    for policies, passes in ((["rkv", "h2o"], 1), (["predicted_loss"], 2)):
        found = estimate(
            tiny("llama"), texts, policies=policies, samples=3, budgets=(10, 16), **CADENCE
        )
        assert found.forward_tokens == passes * (60 + 30) * 4 and found.seconds > 0


def test_all_heads_at_once() -> None:
    model = tiny("llama", initializer_range=0.1)
    texts = [text(), text(10, 41, seed=3), text(5, 20, seed=5), text(seed=7)]
    profiles = fisher(
        model, texts, policies=["rkv", "random"], budgets=(8, 16, 32), samples=4, **CADENCE
    )
    reports: list[tuple[int, int]] = []
    found = joint_costs(model, texts, profiles, [16, 24], lambda *step: reports.append(step))
    assert reports == [(i + 1, 27) for i in range(27)] and steps(texts, 2, [16, 24]) == 27
    for profile, before in zip(found, profiles, strict=True):
        assert replace(profile, joint=[]) == before
        for entry, budget in zip(profile.joint, (16, 24), strict=True):
            config = CompressionConfig(budget=budget, arm=Arm(profile.policy), **CADENCE)
            each: list[float] = []
            for one in texts[:3]:
                each += measure_fidelity(model, one, full_logits(model, one), config).kl
            assert entry["budget"] == budget
            assert entry["uniform"] == pytest.approx(sum(each) / len(each), rel=1e-3)
            # Single costs need not add, but they are of this order.
            assert 0.3 < entry["measured"] / entry["predicted"] < 3
            assert entry["measured"] != entry["uniform"]
    assert cheapest(found).policy == "rkv"
    assert cheapest(found[::-1]).policy == "rkv"


def test_the_prediction_sums_the_costs_of_what_is_given() -> None:
    """Heads that are all alike get equal budgets."""
    model, texts = tiny("llama"), [text()]
    (profile,) = fisher(model, texts, policies=["rkv"], budgets=(8, 16, 32), samples=1, **CADENCE)
    alike = replace(profile, costs=[[[[0.4, 0.1, 0.025]] * 3] * 3])
    ((entry,),) = [p.joint for p in joint_costs(model, texts, [alike], [16])]
    assert entry["predicted"] == pytest.approx(9 * 0.1)
    assert entry["measured"] == pytest.approx(entry["uniform"], rel=1e-3)


def test_budgets_of_the_check() -> None:
    long, short = text(25, 276), text(25, 36)
    assert budgets_to_check([short, long], None, 8, 8) == [64, 128]
    assert budgets_to_check([text(25, 176)], None, 8, 8) == [64]
    assert budgets_to_check([short], None, 8, 8) == [15]
    assert budgets_to_check([short], None, 8, 20) == [20]
    # Boundaries after 5 and 69 tokens of 60: never compressed.
    assert budgets_to_check([text(5, 56)], None, 64, 8) == []
    # Texts that are not replayed do not count.
    assert budgets_to_check([short, short, short, long], None, 8, 8) == [15]
    assert budgets_to_check([short], [56, 8], 8, 8) == [56, 8]
    for wrong in ([57], [7], [16, 16]):
        with pytest.raises(UsageError, match=f"check={','.join(map(str, wrong))}: .* 60 tokens"):
            budgets_to_check([short], wrong, 8, 8)


def test_profiles_of_one_cadence() -> None:
    made = CostProfile(
        "fisher", "tiny", "", "rkv", 8, 4, 1, [8, 16], ["a"], [""], [9], [[[[1.0, 0.5]]]]
    )
    with pytest.raises(UsageError, match="several cadences"):
        joint_costs(tiny("llama"), [text()], [made, replace(made, window=5)], [16])
