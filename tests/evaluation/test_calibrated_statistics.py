"""Calibrated statistics: against plain references, as files, and in use."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import made_statistics
import reasonalloc
from made_candidates import ragged
from models import prompt, tiny
from reasonalloc import UnsupportedError, UsageError
from reasonalloc.calibrated.statistics import load_statistics
from reasonalloc.calibration import statistics
from reasonalloc.cli.main import main
from reasonalloc.policies.tri_attention import TriAttention
from tiny_folder import save_tiny

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3", {}),
        ("llama", {"rope_parameters": YARN}),
        ("phi3", {"rope_parameters": HALF}),
        ("gemma3", {}),
    ],
)
def test_statistics_equal_the_definitions(
    name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name, **changes)
    prompts, every, window = [prompt(30), prompt(17, seed=4)], 8, 4
    before = model.config._attn_implementation
    found = statistics(model, prompts, max_new_tokens=30, every=every, window=window)
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    rope = found.rope
    assert rope is not None and found.query_mean is not None and found.query_norm is not None
    queries: list[list[torch.Tensor]] = [[] for _ in range(3)]
    entropy, variance = torch.zeros(2, 3), torch.zeros(2, 3)
    shares: dict[int, list[list[list[float]]]] = {}
    for p, ids in enumerate(prompts):
        out = model.generate(ids, max_new_tokens=30, do_sample=False)
        for layer, query in enumerate(before_rotation(model, out[:, :-1], monkeypatch)):
            queries[layer].append(query * rope.scaling)
        ends = [ids.shape[1] + step for step in range(every, 30, every)]
        weights = [model(out[:, :end], output_attentions=True).attentions for end in ends]
        for layer in range(3):
            for sample in weights:
                earlier = sample[layer][0, :, -window:, :-window]
                entropy[p, layer] += slow_entropy(earlier) / len(ends)
                variance[p, layer] += slow_variance(earlier) / len(ends)
        for sample in weights:
            part = slow_shares([sample[i][0, :, -window:, :-window] for i in found.layers])
            for top, row in part.items():
                shares.setdefault(top, [[], []])[p].append(row)
    rows = found.layers
    assert rows == ([1, 2] if name == "gemma3" else [0, 1, 2])
    torch.testing.assert_close(found.entropy.float(), entropy.mean(0)[rows], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.variance.float(), variance.mean(0)[rows], rtol=1e-3, atol=1e-7)
    assert found.tops == sorted(shares) and found.tops[-1] == 32
    for top, share in zip(found.tops, found.top_share, strict=True):
        means = [torch.tensor(samples).mean(0) for samples in shares[top] if samples]
        # One token either way where attentions are all but equal.
        torch.testing.assert_close(share.float(), torch.stack(means).mean(0), rtol=0, atol=0.02)
    for row, layer in enumerate(rows):
        every_query = torch.cat(queries[layer], dim=1)
        assert every_query.shape[1] == 30 + 17 + 2 * 29
        pairs = [(f, f + rope.pairs) for f in range(rope.pairs)]
        single = range(2 * rope.pairs, rope.head_dim)
        for f, (real, imaginary) in enumerate(pairs):
            z = torch.complex(every_query[..., real], every_query[..., imaginary])
            close(found.query_mean[row, :, f], z.mean(1))
            close(found.query_norm[row, :, f], z.abs().mean(1))
        for f, dim in enumerate(single, len(pairs)):
            close(found.query_mean[row, :, f].real, every_query[..., dim].mean(1))
            close(found.query_norm[row, :, f], every_query[..., dim].abs().mean(1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def before_rotation(
    model: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[torch.Tensor]:
    """Queries of each layer, [query_heads, n, head_dim], as the model's rotation gets them."""
    module: Any = sys.modules[type(model).__module__]
    rotate, found = module.apply_rotary_pos_emb, []

    def note(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found.append(q[0])
        return rotate(q, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "apply_rotary_pos_emb", note)
        model(ids)
    return found


def slow_entropy(weights: torch.Tensor) -> float:
    return -sum(w * math.log(w) for w in weights.flatten().tolist() if w > 0)


def slow_variance(weights: torch.Tensor) -> float:
    total = 0.0
    for head in weights:
        for column in head.T.tolist():
            mean = sum(column) / len(column)
            total += sum((x - mean) ** 2 for x in column) / (len(column) - 1)
    return total


def slow_shares(layers: list[torch.Tensor]) -> dict[int, list[float]]:
    """By number of tokens per (layer, query head)."""
    pool = []
    for layer, weights in enumerate(layers):
        for head in weights.sum(dim=1).tolist():
            padded = [0.0] * 3 + head + [0.0] * 3
            pool += [(sum(padded[i : i + 7]) / 7, layer) for i in range(len(head))]
    pool.sort(key=lambda entry: (-entry[0], entry[1]))
    heads, n = layers[0].shape[0], layers[0].shape[2]
    found, top = {}, 1
    while top <= n:
        best = [layer for _, layer in pool[: top * heads * len(layers)]]
        found[top] = [best.count(layer) / len(best) for layer in range(len(layers))]
        top *= 2
    return found


def test_attention_follows_the_average_query() -> None:
    """The policy's score, times the scaling, is the mean logit of queries drawn as calibrated."""
    model = tiny("llama")
    made = made_statistics.of_model(model, seed=3)
    assert made.rope is not None and made.query_mean is not None
    # Queries that are all alike: nothing is spread, and the score is their logit.
    alike = dataclasses.replace(made, query_norm=made.query_mean.abs())
    bound = TriAttention(horizon=1).with_statistics(alike)
    candidates = dataclasses.replace(ragged(5, [[20, 20, 20]], 2, 4), layer=1)
    found = bound.score(candidates)[0, :, :16]
    rope = made.rope
    angle = torch.tensor([[f * int(candidates.seen[0]) for f in rope.frequencies]])
    mean = made.query_mean[1] * torch.polar(torch.ones_like(angle), angle)
    query = torch.cat([mean.real, mean.imag], dim=-1).view(3, 2, 1, 8)
    logits = (query @ candidates.keys[0][:, None].transpose(-1, -2))[..., :16].squeeze(2)
    centred = logits - logits.mean(-1, keepdim=True)
    expected = (centred / logits.std(-1, keepdim=True, unbiased=False)).amax(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_model_without_rotation_still_gets_its_attention_measured(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny("llama", rope_parameters=dynamic)
    found = statistics(model, [prompt(9)], max_new_tokens=12, every=5)
    assert found.query_mean is None and "'dynamic'" in found.no_queries
    path = tmp_path / "s.safetensors"
    found.save(path)
    with reasonalloc.attach(model, budget=20, layers="cake", profile=path) as attached:
        assert sum(attached.totals) == 3 * 3 * 20
    with pytest.raises(UsageError, match=r"hold no queries: .* 'dynamic'"):
        reasonalloc.attach(model, budget=20, policy="tri_attention", profile=path)


def test_files_go_to_who_reads_them(tmp_path: Path) -> None:
    model = tiny("llama")
    path = tmp_path / "s.safetensors"
    made_statistics.of_model(model).save(path)
    both = {"policy": "tri_attention", "layers": "cake"}
    with reasonalloc.attach(model, budget=20, profile=path, **both) as attached:
        model.generate(prompt(30), max_new_tokens=9, do_sample=False)
        assert attached.recorder is not None and attached.recorder.compressions == 3
    named = {"policy": f"tri_attention(path={path})", "layers": f"cake(path={path})"}
    reasonalloc.attach(model, budget=20, **named).detach()
    with pytest.raises(UsageError, match=r"and policy=.* both name a file"):
        reasonalloc.attach(model, budget=20, profile=path, **named)
    mixed = {"policy": "tri_attention", "layers": "profile"}
    with pytest.raises(UsageError, match="read different kinds of files: name both"):
        reasonalloc.attach(model, budget=20, profile=path, **mixed)
    with pytest.raises(UsageError, match="policy='tri_attention' needs a statistics file"):
        reasonalloc.attach(model, budget=20, policy="tri_attention")
    for name in ("cake", "dynamickv"):
        with pytest.raises(UsageError, match=f"layers='{name}' needs a statistics file"):
            reasonalloc.attach(model, budget=20, layers=name)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    made_statistics.of_model(tiny("llama")).save(path)

    def attach(model: Any, policy: str, layers: str) -> None:
        reasonalloc.attach(model, budget=20, policy=policy, layers=layers, profile=path).detach()

    for arm in (("tri_attention", "uniform"), ("rkv", "cake"), ("rkv", "dynamickv")):
        attach(tiny("llama"), *arm)
        with pytest.raises(UsageError, match="4 compressible layers: calibrate this model"):
            attach(tiny("llama", num_hidden_layers=4), *arm)
        with pytest.raises(UsageError, match=r"not for .* calibrate this model"):
            attach(tiny("llama", intermediate_size=32), *arm)
    other = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    with pytest.raises(UsageError, match="another rotary embedding"):
        attach(other, "tri_attention", "uniform")
    scaled = tiny("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2})
    with pytest.raises(UnsupportedError, match="'dynamic', which changes with the length"):
        attach(scaled, "tri_attention", "uniform")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, t: h.update(version=2), "version=2, expected 1"),
        (lambda h, t: h.update(model_id=3), "model_id must be text"),
        (lambda h, t: h.update(steps=0), "steps=0"),
        (lambda h, t: h.update(layers=[0, 2, 1]), "layers must be a rising list"),
        (lambda h, t: h.update(tops="all"), "tops must be a rising list"),
        (lambda h, t: h.update(prompt_hashes=[]), "prompt_hashes must be a list"),
        (lambda h, t: h["rope"].update(scaling=-1.0), "scaling=-1.0"),
        (lambda h, t: h["rope"].update(head_dim=7), "4 pairs in 7 dimensions"),
        (lambda h, t: t.pop("entropy"), "missing entropy"),
        (lambda h, t: t.update(variance=t["variance"][:2]), r"variance has shape \(2,\)"),
        (lambda h, t: t["variance"].fill_(math.nan), "variance must hold finite numbers"),
        (lambda h, t: t["query_norm"].fill_(-1), "query_norm must not be negative"),
        (lambda h, t: t["top_share"].mul_(2), "rows must sum to 1"),
        (lambda h, t: t.pop("query_mean_imag"), "missing query_mean_imag"),
    ],
)
def test_broken_files(
    change: Callable[[dict[str, Any], dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "s.safetensors"
    made = made_statistics.of_model(tiny("llama"))
    made.save(path)
    loaded = load_statistics(path)
    assert loaded.rope == made.rope and loaded.tops == made.tops
    for name in ("entropy", "top_share", "query_mean", "query_norm"):
        assert torch.equal(getattr(loaded, name), getattr(made, name))
    tensors, header = load_file(path), header_of(path)
    change(header, tensors)
    save_file(tensors, path, metadata={"reasonalloc.statistics": json.dumps(header)})
    with pytest.raises(UsageError, match=message) as caught:
        load_statistics(path)
    assert str(path) in str(caught.value)


def header_of(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    found: dict[str, Any] = json.loads(
        json.loads(raw[8 : 8 + size])["__metadata__"]["reasonalloc.statistics"]
    )
    return found


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(UsageError, match="cannot be read"):
        load_statistics(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_statistics(tmp_path)
    path.write_text('{"version": 1}')
    with pytest.raises(UsageError, match="no safetensors file with statistics: make it with"):
        load_statistics(path)
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(UsageError, match="holds tensors, but no statistics"):
        load_statistics(path)
    save_file({"x": torch.ones(1)}, path, metadata={"reasonalloc.statistics": "{"})
    with pytest.raises(UsageError, match="header is not valid JSON"):
        load_statistics(path)


def test_wrong_arguments() -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match="none given"):
        statistics(model, [])
    with pytest.raises(UsageError, match="window=1"):
        statistics(model, [prompt(5)], window=1)
    with pytest.raises(UsageError, match="nothing was measured"):
        statistics(model, [prompt(5)], max_new_tokens=20)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "model")
    prompts, out = tmp_path / "p.jsonl", tmp_path / "s.safetensors"
    prompts.write_text('{"problem": "w1 w2 w3"}\n{"question": "w4 w5"}\n')
    base = ["calibrate", str(folder), "--prompts", str(prompts), "--objective"]
    sizes = ["--every", "4", "--max-new-tokens", "14"]
    assert main([*base, "statistics", "-o", str(out), *sizes]) == 0
    shown = capsys.readouterr().out
    assert "--arm tri_attention/cake/uniform" in shown and "entropy" in shown
    assert main([*base, "statistics", "-o", str(out), *sizes, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == [0, 1, 2]
    run = ["run", str(folder), "--prompt", "w1 w2 w3 w4", "--max-new-tokens", "8", "--json"]
    small = ["--budget", "9", "--interval", "4"]
    for arm in ("tri_attention/cake/uniform", "rkv/dynamickv/adakv"):
        assert main([*run, *small, "--arm", arm, "--profile", str(out)]) == 0
    plan = ["plan", str(folder), "--budget", "20", "--arm"]
    assert main([*plan, "tri_attention/cake/uniform", "--profile", str(out)]) == 0
    capsys.readouterr()
    for arguments, message in (
        ([*base, "kl2", "-o", str(out)], "unknown objective 'kl2'"),
        ([*base, "statistics", "-o", str(tmp_path / "s.json")], "ends in .safetensors"),
        ([*base, "statistics", "-o", str(out), "--rho", "0.5"], "--rho has no effect"),
        ([*plan, "tri_attention/uniform/uniform"], "needs a statistics file"),
        ([*plan, "rkv/cake/uniform", "--profile", str(prompts)], "no safetensors file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
