"""Calibration of models that attend, cache or share in ways of their own, against references."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reasonalloc
from models import (
    ABLE,
    HYBRIDS,
    INLINE,
    LATENTS,
    RUNNING,
    UNEQUAL,
    hybrid,
    inline,
    latent,
    prompt,
    tiny,
    unequal,
    unequal_heads,
)
from reasonalloc.allocators.layer import LayerAllocator, LayerQuery
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibration import ablation, attention_mass, fisher, statistics
from reasonalloc.calibration.attention_mass import demand
from reasonalloc.calibration.predictor import known_at
from reasonalloc.calibration.suffix import SuffixRunner
from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.core.watched import Seen
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.evaluation.replay import full_logits, measure_fidelity
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.integrations.hf.watched import watching
from reasonalloc.policies import Candidates
from reasonalloc.policies.predicted_loss import PredictedLoss
from reasonalloc.texts import Trajectory

CADENCE: dict[str, Any] = {"interval": 8, "window": 4}
#: Latents, alone and in a hybrid; shared caches; unequal shapes; other ways to attend.
NAMES = ["deepseek_v2", "minicpm3", "kimi_linear", "gemma3n_full", "gemma4", "gemma4_full_shared"]
NAMES += ["laguna", "mimo_v2_flash", "llama4", "mllama", "diffllama", "jetmoe", "dory"]
NAMES += ["falcon", "falcon_alibi", "bloom", "mpt", "gpt_neo", "trocr"]
NAMES += ["zamba", "inkling", "inkling2", "zaya"]
#: Those of whose attention transformers itself tells.
TOLD = ["deepseek_v2", "minicpm3", "gemma3n_full", "gemma4_full_shared", "laguna", "mimo_v2_flash"]
TOLD += ["bloom", "mpt", "inkling", "inkling2"]
#: Those whose caches several layers read.
SHARED = {"gemma3n_full", "gemma4_full_shared"}
#: Those that transformers before 5.23 computes or configures in another way.
NEWER = {"gemma3n_full", "gemma4_full_shared", "mllama", "diffllama", "unequal_heads"}
#: One of each kind.
KINDS = ["deepseek_v2", "kimi_linear", "gemma3n_full", "laguna", "diffllama", "jetmoe", "dory"]
KINDS += ["falcon_alibi", "inkling2", "unequal_heads"]
#: Those in which small changes have small effects: no experts that are chosen anew.
SMOOTH = ["minicpm3", "gemma3n_full", "diffllama", "falcon_alibi", "bloom", "mpt", "dory", "trocr"]


def made(name: str, **changes: Any) -> Any:
    if name in NEWER and not ABLE:
        pytest.skip("refused with this transformers")
    if name == "unequal_heads":
        return unequal_heads()
    for table, build in (
        (LATENTS, latent),
        (UNEQUAL, unequal),
        (INLINE, inline),
        (HYBRIDS, hybrid),
    ):
        if name in table:
            missing = not hasattr(sys.modules["transformers"], table[name][1])
            if missing or (table is HYBRIDS and name not in RUNNING):
                pytest.skip("not in this transformers")
            if build is latent and not cached_latents(name):
                pytest.skip("latents are not cached by this transformers")
            return build(name, **changes)
    raise KeyError(name)


def cached_latents(name: str) -> bool:
    shapes = check_model(latent(name))
    return any(shape.latent is not None and shape.latent.cached for shape in shapes)


def budgeted(model: Any) -> list[int]:
    return [i for i, shape in enumerate(check_model(model)) if shape.compressible]


def text(tokens: int = 25, completion: int = 45, seed: int = 0) -> Trajectory:
    ids = prompt(tokens + completion, seed=seed)[0].tolist()
    return Trajectory(tuple(ids[:tokens]), tuple(ids[tokens:]))


def watch(model: Any, ids: Tensor) -> tuple[dict[int, Seen], Tensor]:
    seen: dict[int, Seen] = {}
    with torch.no_grad(), watching(model, lambda one: seen.__setitem__(one.layer, one)) as watched:
        logits = watched.logits(ids, torch.arange(ids.shape[1]))
    return seen, logits


@pytest.mark.parametrize("name", NAMES)
def test_a_watched_model_is_the_model(name: str) -> None:
    model, ids = made(name), prompt(30)
    seen, logits = watch(model, ids)
    assert sorted(seen) == budgeted(model)
    if name != "trocr":  # counts a padding token of its own where it has a cache
        expected = model(ids, use_cache=True).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    for layer, one in seen.items():
        shape = check_model(model)[layer]
        assert (one.kv_heads, one.query.shape[1]) == (shape.kv_heads, shape.query_heads)
        rows = torch.stack([one.attention(head) for head in range(one.kv_heads)])
        assert bool((rows.sum(dim=-1) < 1 + 1e-5).all()) and not bool(rows.triu(1).any())
        read = torch.stack([rows[head] @ one.read(head)[1] for head in range(one.kv_heads)])
        output = one.output[0].transpose(0, 1)
        torch.testing.assert_close(read.flatten(0, 1), output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", TOLD)
def test_attention_is_what_transformers_tells(name: str) -> None:
    model, ids = made(name), prompt(30)
    seen, _ = watch(model, ids)
    model.set_attn_implementation("eager")
    told = model(ids, output_attentions=True, use_cache=True).attentions
    shapes = check_model(model)
    for layer, one in seen.items():
        parts = [told[reader] for reader in (layer, *shapes[layer].readers)]
        grouped = [part[0].unflatten(0, (one.kv_heads, -1)) for part in parts]
        expected = torch.cat(grouped, dim=1)[..., :30]
        found = torch.stack([one.attention(head) for head in range(one.kv_heads)])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@dataclass(frozen=True)
class OneLayer(LayerAllocator):
    """A layer holds so many tokens per head, the others share the rest."""

    layer: int
    tokens: int

    def allocate(self, query: LayerQuery) -> list[int]:
        totals = [heads * self.tokens for heads in query.heads]
        rest = query.total - totals[self.layer]
        others = sum(query.heads) - query.heads[self.layer]
        for index, heads in enumerate(query.heads):
            if index != self.layer:
                totals[index], rest, others = rest * heads // others, rest, others
        totals[-1 if self.layer != len(totals) - 1 else 0] += query.total - sum(totals)
        return totals


@pytest.mark.parametrize("name", [*NAMES, "unequal_heads"])
def test_costs_of_a_layer_are_those_of_a_model_that_compresses_it(name: str) -> None:
    model, trajectory = made(name), text()
    found = ablation(model, [trajectory], budgets=(12, 20), **CADENCE)
    shapes = [check_model(model)[layer] for layer in budgeted(model)]
    assert found.heads == [shape.kv_heads for shape in shapes]
    full = full_logits(model, trajectory)
    for index in range(len(shapes)):
        mean = 12 if len(shapes) == 1 else 400
        layers = OneLayer(index, 12)
        config = CompressionConfig(budget=mean, arm=Arm("rkv", layers), **CADENCE)
        kl = measure_fidelity(model, trajectory, full, config).kl
        # Later readers of a shared cache have other queries than in the full pass.
        near = 0.2 if name in SHARED else 5e-3
        assert found.layer_costs[0][index][0] == pytest.approx(
            sum(kl) / len(kl), rel=near, abs=5e-6
        )


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_foretell_what_small_changes_cost(name: str) -> None:
    model, trajectory = made(name), text(10, 21)
    module, samples = sys.modules["reasonalloc.calibration.fisher"], 200
    layers, generator = budgeted(model), torch.Generator().manual_seed(3)
    with module._taping(model, layers) as tape:
        roots = module._gradients(tape, trajectory, samples, generator, lambda: None)
    ids = torch.tensor([trajectory.prompt_ids + trajectory.completion_ids[:-1]])
    with torch.no_grad(), SuffixRunner(model, layers) as runner:
        full = runner.full(ids, torch.arange(10, 30))[0].double().log_softmax(-1)
        for layer, root in zip(layers, roots, strict=True):
            output = runner.seen[layer].output
            change = torch.randn(output.shape, generator=generator, dtype=output.dtype)
            change *= 2e-3 * output.abs().mean()
            moved = runner.run(ids, torch.arange(10, 30), layer, output + change)[0]
            kl = float((full.exp() * (full - moved.double().log_softmax(-1))).sum())
            products = torch.einsum("thd,sthd->s", change[0].double(), root.double())
            # The mean of 200 squares of normal numbers has a relative error of 0.1.
            assert float(products.square().mean()) / 2 == pytest.approx(kl, rel=0.35)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_fitted_is_what_the_policy_sees(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of tokens at a boundary, from a watched pass and in a run under a budget."""
    model, trajectory = made(name), text()
    (costs,) = fisher(
        model,
        [trajectory],
        policies=["predicted_loss"],
        budgets=(10, 16),
        samples=1,
        **CADENCE,
    )
    costs.save(tmp_path / "costs.json")
    assert load_costs(tmp_path / "costs.json") == costs and costs.predictor is not None
    scores: dict[int, Tensor] = {}
    score = PredictedLoss.score

    def noted(self: PredictedLoss, candidates: Candidates) -> Tensor:
        scores[candidates.layer] = found = score(self, candidates)
        return found

    monkeypatch.setattr(PredictedLoss, "score", noted)
    ids = torch.tensor([trajectory.prompt_ids])
    seen, _ = watch(model, ids)
    arm = "calibrated/uniform/uniform"
    settings: dict[str, Any] = {"budget": 12, "profile": tmp_path / "costs.json", **CADENCE}
    with torch.no_grad(), reasonalloc.attach(model, arm=arm, **settings) as attached:
        attached.prefill(ids, attached.new_cache())
    assert sorted(scores) == sorted(seen)
    for layer, one in seen.items():
        attention = torch.stack([one.attention(h).mean(dim=0) for h in range(one.kv_heads)])
        known = known_at(attention, one.scored_values[0].float())
        expected = torch.einsum("hnf,hf->hn", known, costs.predictor.of_layer(layer))
        torch.testing.assert_close(scores[layer][0, :, 4:], expected[:, 4:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_calibrated_files_are_used(name: str, tmp_path: Path) -> None:
    model, trajectory, ids = made(name), text(seed=4), prompt(25)
    rkv, best = fisher(
        model,
        [trajectory],
        policies=["rkv", "predicted_loss"],
        budgets=(8, 12, 20),
        samples=2,
        **CADENCE,
    )
    wave = attention_mass(model, [ids], max_new_tokens=20, every=8, window=4)
    spread = statistics(model, [ids], max_new_tokens=20, every=8, window=4)
    rkv.save(tmp_path / "rkv.json")
    best.save(tmp_path / "best.json")
    wave.save(tmp_path / "wave.json")
    spread.save(tmp_path / "spread.safetensors")
    shapes = [check_model(model)[layer] for layer in budgeted(model)]
    heads = [shape.kv_heads for shape in shapes]
    sees = {(shape.query_heads, shape.query_dim) for shape in shapes}
    assert spread.no_queries or len(sees) == 1
    for arm, file in (
        ("best", "best.json"),
        ("rkv/cost/planned", "rkv.json"),
        ("reasonalloc", "wave.json"),
        ("rkv/cake/uniform", "spread.safetensors"),
        ("rkv/dynamickv/uniform", "spread.safetensors"),
    ):
        settings: dict[str, Any] = {"budget": 16, "profile": tmp_path / file, **CADENCE}
        with reasonalloc.attach(model, arm=arm, **settings) as attached:
            model.generate(ids, max_new_tokens=20, do_sample=False)
            assert attached.recorder is not None and attached.recorder.compressions
            assert sum(attached.totals) == 16 * sum(heads)
            if attached.planned is not None:
                assert [len(layer) for layer in attached.planned] == heads
                assert [sum(layer) for layer in attached.planned] == list(attached.totals)


@pytest.mark.parametrize("name", ["deepseek_v2", "minicpm3"])
def test_demand_of_latents_is_that_of_all_heads_together(name: str) -> None:
    model, ids = made(name), prompt(25)
    found = attention_mass(model, [ids], max_new_tokens=20, every=16, window=4, rho=0.8)
    out = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=-1)
    model.set_attn_implementation("eager")
    told = model(out, output_attentions=True).attentions
    expected = [float(demand(layer[:, :, -4:].double().float(), 0.8)) for layer in told]
    assert found.demand_mean == pytest.approx(expected, abs=1)


def test_layers_of_unequal_heads(tmp_path: Path) -> None:
    model, trajectory = made("unequal_heads"), text()
    (costs,) = fisher(
        model, [trajectory], policies=["rkv"], budgets=(8, 12, 20), samples=2, **CADENCE
    )
    costs.save(tmp_path / "costs.json")
    wave = attention_mass(model, [prompt(25)], max_new_tokens=20, every=8, window=4)
    wave.save(tmp_path / "wave.json")
    shown = costs.table()
    assert costs.heads == [3, 1, 2] and "layer" in shown
    settings: dict[str, Any] = {"budget": 16, "profile": tmp_path / "costs.json", **CADENCE}
    with pytest.raises(UsageError, match=r"by='layers' .* have 1 to 3 of them: leave it out"):
        reasonalloc.attach(model, arm="rkv/cost(by=layers)/uniform", **settings)
    with pytest.raises(UsageError, match=r"bits='planned' counts bytes, .* differ in shape"):
        reasonalloc.attach(model, arm="rkv/cost(bits=planned)/planned", **settings)
    settings["profile"] = tmp_path / "wave.json"
    with pytest.raises(UsageError, match="have 1 to 3 KV heads: use 'profile'"):
        reasonalloc.attach(model, arm="rkv/shuffled/uniform", **settings)
    settings["profile"] = tmp_path / "costs.json"
    with pytest.raises(UsageError, match=r"3 layers of 1 or 2 or 3 KV heads, but .* of 3 KV heads"):
        reasonalloc.attach(tiny("llama"), arm="rkv/cost/planned", **settings)


@pytest.mark.parametrize(
    ("name", "why"),
    [("minicpm3", "caches latents"), ("inkling", "by distance"), ("bloom", "ALiBi")],
)
def test_formats_that_do_not_go_are_refused_before_anything_runs(name: str, why: str) -> None:
    model = made(name)
    with pytest.raises(UnsupportedError, match=f"kv_dtype='int8': .*{why}"):
        fisher(model, [text()], budgets=(10, 16), kv_dtypes=("auto", "int8"), **CADENCE)


@pytest.mark.once
def test_a_model_that_records_no_gradients() -> None:
    config = getattr(sys.modules["transformers"], "HrmTextConfig", None)
    if config is None:
        pytest.skip("not in this transformers")
    from reasonalloc.diagnose.families import try_family  # noqa: F401
    from reasonalloc.diagnose.toys import toy_config

    torch.manual_seed(0)
    model = sys.modules["transformers"].HrmTextForCausalLM(toy_config("hrm_text")).eval()
    with pytest.raises(UnsupportedError, match=r"gradients, which layer 0 .* objective='kl'"):
        fisher(model, [text()], budgets=(10, 16), samples=1, **CADENCE)
    costs = ablation(model, [text(20, 12)], budgets=(8, 10), **CADENCE)
    assert all(cost > 0 for layer in costs.layer_costs[0] for cost in layer)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", [0, 1, 7], r"losses of layers \[0, 1, 7\], but .* layers \[0, 1, 2\]"),
        ("weights", 1e300, "weights must be finite numbers up to 1e\\+30"),
        ("weights", 10**400, "weights must be finite numbers up to"),
        ("costs", 10**400, "every head needs 2 numbers"),
        ("interval", 10**400, r"interval=10000000000000000000\.\.\. must be a whole number"),
        ("budgets", [8, 10**30], "budgets must be"),
    ],
)
def test_edited_files_are_refused_where_they_are_read(
    tmp_path: Path, field: str, value: Any, message: str
) -> None:
    model, path = tiny("llama"), tmp_path / "costs.json"
    (costs,) = fisher(
        model, [text()], policies=["predicted_loss"], budgets=(8, 12), samples=1, **CADENCE
    )
    costs.save(path)
    data = json.loads(path.read_text())
    if field == "layers":
        data["foretells"]["layers"] = value
    elif field == "weights":
        data["foretells"]["weights"][1][0][2] = value
    elif field == "costs":
        data["costs"][0][1][0][0] = value
    else:
        data[field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(UsageError, match=message):
        reasonalloc.attach(model, arm="best", budget=16, profile=path, **CADENCE)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma3n_full", {"num_kv_shared_layers": 1}),
        ("laguna", {"num_attention_heads_per_layer": [3, 9, 6, 6]}),
        ("deepseek_v2", {"kv_lora_rank": 16}),
        ("dory_full", {"n_recurrent_loops": 2}),
        ("bloom", {"n_head": 12}),
    ],
)
def test_a_file_of_another_model_is_refused(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    wave = attention_mass(made(name), [prompt(12)], max_new_tokens=10, every=4, window=4)
    wave.save(tmp_path / "wave.json")
    settings: dict[str, Any] = {"budget": 16, "profile": tmp_path / "wave.json", **CADENCE}
    reasonalloc.plan(made(name), arm="reasonalloc", **settings)
    with pytest.raises(UsageError, match="calibrate this model"):
        reasonalloc.plan(made(name, **changes), arm="reasonalloc", **settings)


def test_a_file_of_unequal_heads_is_of_no_other_model(tmp_path: Path) -> None:
    wave = attention_mass(made("unequal_heads"), [prompt(12)], max_new_tokens=10, every=4, window=4)
    wave.save(tmp_path / "wave.json")
    settings: dict[str, Any] = {"budget": 16, "profile": tmp_path / "wave.json", **CADENCE}
    with pytest.raises(UsageError, match="calibrate this model"):
        reasonalloc.plan(tiny("llama"), arm="reasonalloc", **settings)


@pytest.mark.parametrize("measure", [attention_mass, statistics])
@pytest.mark.parametrize(
    "wrong",
    [prompt(10, 2), prompt(10)[0], prompt(10)[0].tolist(), prompt(10)[:, :0], prompt(10).float()],
)
def test_wrong_prompts(measure: Any, wrong: Any) -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match=r"prompts\[1\] is .*: give the token ids of one prompt"):
        measure(model, [prompt(9), wrong], max_new_tokens=9, every=4)
    with pytest.raises(UsageError, match="training mode"):
        measure(model.train(), [prompt(9)], max_new_tokens=9, every=4)


def test_inference_mode_and_adapters_change_nothing() -> None:
    peft = pytest.importorskip("peft")
    settings: dict[str, Any] = {"policies": ["rkv"], "budgets": (8, 12), "samples": 2, **CADENCE}
    model = tiny("llama")
    expected = fisher(model, [text()], **settings)
    with torch.inference_mode():
        assert fisher(model, [text()], **settings) == expected
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"])).eval()
    for measured in (
        fisher(adapted, [text()], **settings)[0],
        ablation(adapted, [text()], budgets=(8, 12), **CADENCE),
    ):
        assert measured.config_hash == expected[0].config_hash
    assert attention_mass(adapted, [prompt(9)], max_new_tokens=9, every=4, window=4).layers == 3
