"""The attention-mass profile against a plain reference over eager attention weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import reasonalloc
from models import CALIBRATED, prompt, tiny
from reasonalloc.calibrated.demand import load_profile
from reasonalloc.calibration import attention_mass
from reasonalloc.cli.main import main
from reasonalloc.errors import UsageError
from tiny_folder import save_tiny


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt_oss", *CALIBRATED])
def test_demand_equals_the_definition(name: str, tmp_path: Path) -> None:
    check_demand(tiny(name), tmp_path / "p.json", "all")
    model = tiny(name)
    profile = load_profile(tmp_path / "p.json")
    with reasonalloc.attach(model, budget=24, arm="reasonalloc", profile=tmp_path / "p.json") as a:
        assert sum(a.totals) == len(profile.demand_mean) * 3 * 24


def test_demand_of_generated_tokens_alone(tmp_path: Path) -> None:
    check_demand(tiny("llama"), tmp_path / "p.json", "generated")
    saved = load_profile(tmp_path / "p.json")
    assert (saved.keys, saved.window) == ("generated", 5)


def check_demand(model: Any, path: Path, keys: str) -> None:
    """Compare a model's demand with the attention that transformers itself tells."""
    prompts, every, window, rho = [prompt(30), prompt(17, seed=4)], 8, 5, 0.8
    before = model.config._attn_implementation
    profile = attention_mass(
        model, prompts, rho=rho, max_new_tokens=30, every=every, window=window, keys=keys
    )
    assert model.config._attn_implementation == before
    budgeted = [
        i
        for i, kind in enumerate(getattr(model.config, "layer_types", ["full_attention"] * 3))
        if kind in ("full_attention", "hybrid")
    ]
    model.set_attn_implementation("eager")
    means: list[list[float]] = []
    maxima: list[list[float]] = []
    for ids in prompts:
        out = model.generate(ids, max_new_tokens=30, do_sample=False)
        # Step t feeds token prompt + t - 1; it is the last of the queries at that sample.
        ends = [ids.shape[1] + step for step in range(every, 30, every)]
        weights = [model(out[:, :end], output_attentions=True).attentions for end in ends]
        rows = []
        for place, layer in enumerate(budgeted):
            # Hybrid models give the attention of their attention layers alone.
            at = layer if len(weights[0]) == model.config.num_hidden_layers else place
            skip = ids.shape[1] if keys == "generated" else 0
            rows.append([needed(w[at][0][..., skip:], window, rho) for w in weights])
        means.append([sum(map(sum, row)) / (3 * len(row)) for row in rows])
        maxima.append([sum(map(max, row)) / len(row) for row in rows])
    for curve, expected in zip(profile.curves, means, strict=True):
        assert curve == pytest.approx(expected)
    assert profile.demand_mean == pytest.approx([sum(c) / 2 for c in zip(*means, strict=True)])
    assert profile.demand_max == pytest.approx([sum(c) / 2 for c in zip(*maxima, strict=True)])
    profile.save(path)
    assert load_profile(path) == profile


def needed(weights: torch.Tensor, window: int, rho: float) -> list[int]:
    """Per KV head: keys needed, from [query_heads, n, n] attention weights."""
    counts = []
    group = weights.shape[0] // 3
    for head in range(3):
        rows = weights[head * group : (head + 1) * group, -window:].flatten(0, 1)
        mass = sorted(rows.mean(0).tolist(), reverse=True)
        total, count = 0.0, 0
        while total < rho * sum(mass):  # what a learned sink takes is no key's
            total += mass[count]
            count += 1
        counts.append(count)
    return counts


def test_wrong_arguments() -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match="rho=1"):
        attention_mass(model, [prompt(5)], rho=1.0)
    with pytest.raises(UsageError, match="unknown keys 'prompt'"):
        attention_mass(model, [prompt(5)], keys="prompt")
    with pytest.raises(UsageError, match="none given"):
        attention_mass(model, [])
    with pytest.raises(UsageError, match="every=128 leaves no sample of max_new_tokens=20"):
        attention_mass(model, [prompt(5)], max_new_tokens=20)
    with pytest.raises(UsageError, match=r"window=64: prompt 0 and .* lower window"):
        attention_mass(model, [prompt(5)], every=4, window=64, max_new_tokens=20)
    with pytest.raises(UsageError, match="every=0"):
        attention_mass(model, [prompt(5)], every=0)
    assert model.config._attn_implementation != "reasonalloc"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "model")
    prompts, out = tmp_path / "p.jsonl", tmp_path / "profile.json"
    prompts.write_text('{"problem": "w1 w2 w3"}\n\n{"question": "w4 w5"}\n')
    base = ["calibrate", str(folder), "--prompts", str(prompts), "-o", str(out)]
    assert main([*base, "--every", "4", "--max-new-tokens", "12", "--rho", "0.9"]) == 0
    profile = load_profile(out)
    assert profile.rho == 0.9 and len(profile.curves) == 2
    assert "Written to" in capsys.readouterr().out
    run = ["run", str(folder), "--prompt", "w1 w2 w3 w4", "--max-new-tokens", "8", "--json"]
    arm = ["--arm", "reasonalloc", "--profile", str(out), "--budget", "9", "--interval", "4"]
    assert main([*run, *arm]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("{", "line 1 is not valid JSON"),
        ('{"text": "x"}', "line 1 has none of prompt"),
    ],
)
def test_command_with_bad_prompts(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(text)
    arguments = ["calibrate", "no/model", "--prompts", str(prompts), "-o", str(tmp_path / "o")]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert main([*arguments[:-1], str(tmp_path / "none" / "o")]) == 2
