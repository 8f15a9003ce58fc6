"""Calibrated files that come with the package: found by the model's architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, Qwen2Config

import reasonalloc
from made_costs import of_model
from models import prompt, tiny
from reasonalloc.calibrated import CostProfile, DemandProfile, shipped
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import OtherCadence, UsageError
from reasonalloc.ops.codes import row_format
from reasonalloc.planning.budget import BudgetPlan
from reasonalloc.planning.model_plan import plan_config

ROOT = Path(__file__).parents[2]
WHOLE = ROOT / "benchmarks" / "fidelity" / "smollm2-costs-bits.json"
Call = Callable[..., tuple[int, str, str]]
SMALL: dict[str, Any] = {"budget": 16, "interval": 8, "window": 4}


def smollm2() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    )


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of shipped files, with one for the tiny llama."""
    folder = tmp_path / "package" / "shipped"
    folder.mkdir(parents=True)
    made = shipped.condensed(of_model(tiny("llama")), "tiny/llama")
    made.save(folder / shipped.file_name(made))
    monkeypatch.setattr(shipped.resources, "files", lambda package: folder.parent)
    shipped.shipped_files.cache_clear()
    yield folder
    monkeypatch.undo()
    shipped.shipped_files.cache_clear()


def test_what_is_shipped_is_small_and_sound() -> None:
    files = shipped.shipped_files()
    assert files
    for file in files:
        made = file.load()
        assert file.path.name == shipped.file_name(made) and file.path.stat().st_size < 100_000
        assert made.config_hash == file.config_hash
        assert shipped.condensed(made) == made  # in its smallest form, and of a public model


def bytes_of_heads(plan: Any) -> list[int]:
    """Of each head's tokens in its format, 64 numbers a vector, 16 bits at full width."""
    planned = plan.formats or [[(size, "auto") for size in layer] for layer in plan.planned]
    widths = {"auto": 256} | {
        kind: row_format(kind, 64, 64, torch.bfloat16).width
        for kind in ("int8", "int8:int4", "int4h")
    }
    return [size * widths[kind] for layer in planned for size, kind in layer]


@pytest.mark.parametrize("budget", [32, 64, 128, 256])
@pytest.mark.parametrize("arm", ["best", "best-bytes"])
def test_budgets_are_those_of_the_whole_file(arm: str, budget: int) -> None:
    shared: dict[str, Any] = {"arm": arm, "budget": budget, "interval": 64}
    found = reasonalloc.plan(smollm2(), **shared)
    whole = reasonalloc.plan(smollm2(), **shared, profile=WHOLE)
    assert found.shipped == "HuggingFaceTB/SmolLM2-135M-Instruct" and whole.shipped is None
    assert found.report()["shipped_profile"] == found.shipped and found.notes()
    assert "comes with the package" in found.table() and not whole.notes()
    # 6 digits of a cost may tip a token over, and no more; in few bits it is worth several others
    pairs = zip(bytes_of_heads(found), bytes_of_heads(whole), strict=True)
    assert sum(abs(a - b) for a, b in pairs) <= 4 * 256
    assert sum(found.totals) == sum(whole.totals) or arm == "best-bytes"


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", (1536, 8960, 28, 12)),
        ("Qwen/Qwen2.5-0.5B-Instruct", (896, 4864, 24, 14)),
    ],
)
def test_costs_of_qwens_are_found(name: str, sizes: tuple[int, int, int, int]) -> None:
    """By their configurations on the hub, which a GGUF file does not have word by word."""
    width, inner, layers, heads = sizes
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    found = reasonalloc.plan(config, arm="best", budget=64, interval=64)
    assert found.shipped == name
    assert sum(found.totals) == 64 * 2 * layers and len(set(found.totals)) > 10
    wave = reasonalloc.plan(config, arm="reasonalloc", budget=64)
    assert wave.shipped == name and sum(wave.totals) == sum(found.totals)
    assert len(set(wave.totals)) > 10
    half: dict[str, Any] = {"budget": 64, "interval": 64, "dtype": torch.bfloat16}
    coded, plain = (reasonalloc.plan(config, arm=arm, **half) for arm in ("best-bytes", "rkv"))
    assert coded.shipped == found.shipped and sum(coded.totals) > 1.5 * sum(found.totals)
    assert coded.memory().compressed_bytes(700) <= plain.memory().compressed_bytes(700)


def test_costs_of_gemma_are_found() -> None:
    """Three layers without a window, one KV head each."""
    config = Gemma3TextConfig(
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
        vocab_size=262144,
    )
    found = reasonalloc.plan(config, arm="best", budget=64, interval=64)
    assert found.shipped == "google/gemma-3-270m"
    assert sum(found.totals) == 64 * 3 and len(set(found.totals)) == 3
    bits = reasonalloc.plan(config, arm="best-bytes", budget=64, interval=64)
    assert bits.shipped == found.shipped and sum(bits.totals) > 1.5 * sum(found.totals)


def test_attach_reads_it(own: Path) -> None:
    model = tiny("llama")
    (file,) = own.iterdir()
    for profile in (None, file):
        with reasonalloc.attach(model, arm="best", profile=profile, **SMALL) as attached:
            out = model.generate(prompt(30), max_new_tokens=40, do_sample=False)
            assert attached.recorder is not None and attached.recorder.compressions
            kept = attached.planned, out.tolist()
            cadence = attached.config.profile
        if profile is None:
            first = kept
        assert str(cadence) == str(file)
    assert first == kept
    with pytest.warns(OtherCadence, match="interval=8"):
        reasonalloc.attach(model, arm="best", **(SMALL | {"interval": 16})).detach()


def test_another_architecture_needs_its_own(own: Path) -> None:
    with pytest.raises(UsageError, match="needs a cost profile"):
        reasonalloc.attach(tiny("llama", num_hidden_layers=2), arm="best", **SMALL)
    with pytest.raises(UsageError, match="needs a profile"):
        reasonalloc.attach(tiny("llama"), arm="reasonalloc", **SMALL)


def test_commands_read_it(own: Path, folder: Path, call: Call, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    budget = ("--budget", "16", "--interval", "8", "--window", "4")
    code, out, err = call("plan", folder, "--arm", "best", *budget)
    assert code == 0 and "tiny/llama that comes with the package" in " ".join(out.split()), err
    texts = tmp_path / "texts.jsonl"
    texts.write_text(f'{{"prompt_ids": {[*range(5, 25)]}, "completion_ids": {[*range(30, 70)]}}}\n')
    shared = ("--budgets", "16", "--interval", "8", "--window", "4", "--arms", "rkv,best", "--json")
    results = tmp_path / "out.jsonl"
    run = ("fidelity", folder, "--trajectories", texts, *shared, "--out", results)
    code, shipped_out, err = call(*run)
    assert code == 0, err
    (file,) = own.iterdir()
    assert "arms read the cost profile of tiny/llama that comes with the package" in err
    code, given_out, err = call(*run, "--profile", file)  # it goes on: the same file
    assert (code, given_out) == (0, shipped_out) and "Replaying" not in err
    file.unlink()
    shipped.shipped_files.cache_clear()
    code, _, err = call(*run)
    assert code == 2 and "arm 'best' reads a cost profile: add --profile FILE" in err


def test_evaluate_reads_it(own: Path, folder: Path) -> None:
    small: dict[str, Any] = {"budgets": 16, "interval": 8, "window": 4, "protocol": "quick"}
    small |= {"limit": 1, "samples": 1, "max_new_tokens": 30, "progress": False}
    (file,) = own.iterdir()
    rows = [
        reasonalloc.evaluate(folder, "chain(variables=2)", arms="best", profile=p, **small).rows
        for p in (None, file)
    ]
    texts = [[row["completion"] for row in own_rows] for own_rows in rows]
    assert texts[0] == texts[1] and all(row["compressions"] for row in rows[0])


def test_the_list(own: Path, call: Call) -> None:
    pytest.importorskip("typer")
    code, out, _ = call("profiles")
    assert code == 0 and "tiny/llama" in out
    code, out, _ = call("profiles", "--json")
    assert code == 0 and '"arm": "best"' in out


def test_share(call: Call, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    whole, file = of_model(tiny("llama")), tmp_path / "costs.json"
    whole.save(file)
    run = ("profiles", "--share", file, "--out", tmp_path)
    code, out, err = call(*run, "--name", "org/model")
    assert code == 0, err
    shared = load_costs(tmp_path / f"costs-{whole.config_hash}.json")
    assert shared.model_id == "org/model" and str(tmp_path / "costs-") in out
    assert shared.kinds == ["mean of 2 texts: 1 code, 1 prose"] and shared.tokens == [130]
    torch.testing.assert_close(torch.tensor(shared.curves()), torch.tensor(whole.curves()))
    layers = torch.tensor(whole.layer_curves())
    torch.testing.assert_close(torch.tensor(shared.layer_curves()), layers)
    for name in ("/home/somebody/model", "./model", "~/model", " "):
        code, _, err = call(*run, "--name", name)
        assert code == 2 and "--name with the model's public name" in err
    code, _, err = call("profiles", "--share", file, "--out", tmp_path / "no")
    assert code == 2 and "there is no such folder" in err
    code, _, err = call("profiles", "--name", "x")
    assert code == 2 and "--name x has no effect without --share" in err


def test_a_condensed_demand_profile_has_its_wave() -> None:
    demand = DemandProfile("org/m", "0" * 16, 0.9, 5, ["a", "b"], [3, 5], [7, 9], [[2, 4], [4, 6]])
    small = shipped.condensed(demand)
    assert isinstance(small, DemandProfile)
    assert (small.demand_mean, small.demand_max) == ([3, 5], [7, 9])
    assert small.curves == [[3, 5]] and len(small.prompt_hashes) == 1
    assert shipped.condensed(small).curves == small.curves


def test_formats_are_condensed_too() -> None:
    whole = load_costs(WHOLE)
    small = shipped.condensed(whole)
    assert isinstance(small, CostProfile) and small.formats == whole.formats
    for kind in whole.formats:
        found, expected = (torch.tensor(p.curves(kv_dtype=kind)) for p in (small, whole))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert isinstance(plan_config(smollm2(), CompressionConfig(64, arm=_best())), BudgetPlan)


def _best() -> Any:
    return reasonalloc.Arm("calibrated", "cost", "planned")
