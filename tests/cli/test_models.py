from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import transformers

from models import ABLE
from reasonalloc.cli.main import main
from reasonalloc.diagnose import families
from reasonalloc.diagnose.families import Family, as_page, share, try_family
from reasonalloc.diagnose.toys import few_layers

WORK = (
    "dbrx",
    "llama",
    "modernbert-decoder",
    "qwen3",
    "gemma3_text",
    "gpt_oss",
    "granite_swa",
    "qwen3_next",
    "qwen3_5_text",
    "granitemoehybrid",
    "bamba",
    "jamba",
    "zamba",
    "falcon_h1",
    "lfm2",
    "nemotron_h",
    "minimax",
    "zaya",
    "inkling_text",
    "inkling2_text",
    "mimo_v2_flash",
    "llama4_text",
    "laguna",
    "gemma3n_text",
    "gemma4_text",
    "deepseek_v3",
    "glm4_moe_lite",
    "jetmoe",
    "dory",
    "mllama",
    "falcon",
    "gpt_neox_japanese",
    "xglm",
    "gpt_neo",
    "bloom",
    "mpt",
    "trocr",
    "diffllama",
)
# Layers without keys, or with another layer's: from transformers 5.23 on, which wants Python 3.11.
LAYERS = {"qwen3_next", "qwen3_5_text", "granitemoehybrid", "bamba", "jamba", "falcon_h1", "lfm2"}
LAYERS |= {"zamba", "nemotron_h", "minimax", "zaya", "inkling_text", "inkling2_text"}
LAYERS |= {"gemma3n_text", "gemma4_text", "mllama"}
REFUSED = {"deepseek_v32": "indexer chooses", "deepseek_v4": "indexer chooses"}
REFUSED |= {"doge": "by the values of all KV heads", "git": "AttentionInterface"}
REFUSED |= {"cpmant": "a learned number for every distance"}
REFUSED |= {"inkling2_loop_text": "some of its layers in loops"}
REFUSED |= {"blt": "made of several models (decoder, encoder, global, patcher)"}
NOTHING = {"mamba": "no attention heads", "bert": "not causal: set is_decoder=True"}
NOTHING |= {"recurrent_gemma": "every layer with attention keeps 24 tokens at most"}
NOTHING |= dict.fromkeys(("openai-gpt", "xlnet", "reformer"), "no cache of keys and values")
NOTHING |= {"xlm": "its attention is not causal"}
if hasattr(transformers, "Gemma4AssistantForCausalLM"):
    NOTHING["gemma4_assistant"] = "the cache of another model"


@pytest.mark.parametrize("name", [name for name in WORK if ABLE or name not in LAYERS])
def test_works(name: str) -> None:
    family = try_family(name)
    assert (family.verdict, family.reason) == ("works", "")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    family = try_family(name)
    assert family.verdict == "refused"
    assert REFUSED[name] in family.reason


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_budget(name: str) -> None:
    family = try_family(name)
    assert family.verdict == "nothing to budget"
    assert NOTHING[name] in family.reason


def test_other_tokens_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that reads less than its cache holds is found out."""
    from reasonalloc.integrations.hf import attention

    def forgets(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        out, weights = whole(module, query, key, value, *args, **kwargs)
        return out * 0.5, weights

    whole = attention.attention_forward
    monkeypatch.setattr(attention, "attention_forward", forgets)
    assert try_family("llama").verdict == "fails"


def test_a_family_without_a_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(name: str) -> Any:
        raise ValueError("hidden_size must be even")

    monkeypatch.setattr(families, "toy_config", breaks)
    family = try_family("llama")
    assert (family.verdict, family.reason) == ("not tried", "ValueError: hidden_size must be even")


def test_layers_are_named_as_everywhere() -> None:
    assert try_family("gpt_neo").kinds == ("full_attention", "sliding_attention")


def test_few_layers_have_every_kind() -> None:
    assert few_layers(["a", "a", "b"], 4) == ["a", "b", "b", "a"]
    assert few_layers(["a", "b", "c", "d", "e"], 4) == ["a", "b", "c", "d", "e"]


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    assert main(["models", "llama", "mamba", "--json", "--page", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["works"], printed["with_something_to_budget"]) == (1, 1)
    assert [f["verdict"] for f in printed["families"]] == ["works", "nothing to budget"]
    text = page.read_text()
    assert "| `llama` | `LlamaForCausalLM` | full_attention |" in text
    assert "## Nothing to budget" in text
    assert main(["models", "llama"]) == 0
    assert "1 of 1 families" in capsys.readouterr().out


def test_wrong_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["models", "lama"]) == 2
    assert "did you mean 'llama'?" in capsys.readouterr().err
    assert main(["models", "gemma3"]) == 2
    assert "give 'gemma3_text'" in capsys.readouterr().err
    assert main(["models", "llama", "--page", str(tmp_path / "no" / "m.md")]) == 2
    assert "make it first" in capsys.readouterr().err


def test_share_counts_what_has_something_to_budget() -> None:
    made = [
        Family("a", "A", "works"),
        Family("b", "B", "refused", "x | y"),
        Family("c", "C", "nothing to budget", "no attention"),
        Family("d", "D", "not tried", "?"),
    ]
    assert share(made) == (1, 3)
    page = as_page(made, "5.23.0")
    assert "1 of 3" in page
    assert "x \\| y" in page
