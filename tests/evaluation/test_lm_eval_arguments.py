"""Model arguments of lm-eval: steps, adapters, deltas, files; refusals that a user can follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("lm_eval")

from test_lm_eval import BUDGET, Call, call, folder, generation, scoring, tasks  # noqa: F401

from reasonalloc import UnsupportedError, UsageError
from reasonalloc.cli.main import main
from reasonalloc.integrations.hf.step import StaticStep
from reasonalloc.integrations.lm_eval import ReasonAllocLM
from tiny_folder import write_gguf


def answers(lm: ReasonAllocLM) -> tuple[list[str], list[float]]:
    """Texts and scores."""
    texts = lm.generate_until(generation(), disable_tqdm=True)
    return texts, [score for score, _ in lm.loglikelihood(scoring(), disable_tqdm=True)]


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A LoRA adapter of the tiny model; beside it, what merging gives."""
    peft = pytest.importorskip("peft")
    path = tmp_path_factory.mktemp("adapters")
    names = ["q_proj", "k_proj", "o_proj", "up_proj"]
    config = peft.LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(path / "lora")
    shutil.copytree(folder, path / "merged")
    model.merge_and_unload().save_pretrained(path / "merged")
    return path


@pytest.mark.parametrize("settings", [{"step": "compile"}, {"step": "static", "attention": "sdpa"}])
def test_steps_change_no_answer(
    settings: dict[str, Any],
    folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = answers(ReasonAllocLM(str(folder), **BUDGET, batch_size=3))
    steps: list[int] = []
    run = StaticStep.__call__

    def spy(self: StaticStep, *args: Any, **kwargs: Any) -> Any:
        steps.append(kwargs["input_ids"].shape[0])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(StaticStep, "__call__", spy)
    lm = ReasonAllocLM(str(folder), **BUDGET, batch_size=3, **settings)
    texts, scores = answers(lm)
    assert texts == plain[0] and scores == pytest.approx(plain[1], abs=1e-3)
    assert steps == [3] * 30  # the prompt and every token but the last, which is not fed
    assert lm.get_model_info()["kv_step"] == settings["step"]


@pytest.mark.parametrize("step", ["eager", "compile"])
def test_an_adapter(step: str, folder: Path, lora: Path) -> None:  # noqa: F811
    options = {**BUDGET, "batch_size": 3, "step": step}
    lm = ReasonAllocLM(str(folder), peft=str(lora / "lora"), **options)
    texts, scores = answers(lm)
    merged = answers(ReasonAllocLM(str(lora / "merged"), **options))
    base = answers(ReasonAllocLM(str(folder), **options))
    assert texts == merged[0] and scores == pytest.approx(merged[1], abs=1e-3)
    assert texts != base[0] and all(abs(a - b) > 1e-2 for a, b in zip(scores, base[1], strict=True))
    assert lm.kv_compressions > 0
    full = {"device": "cpu", "batch_size": 3, "arm": "full"}
    assert answers(ReasonAllocLM(str(folder), peft=str(lora / "lora"), **full))[0] != texts


def test_an_adapter_on_the_command_line(
    call: Call,  # noqa: F811
    folder: Path,  # noqa: F811
    lora: Path,
    tasks: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    found = {}
    for name, model in (
        ("adapter", f"{folder},peft={lora / 'lora'}"),
        ("merged", str(lora / "merged")),
    ):
        run = ["lm-eval", "--model_args", f"pretrained={model},budget=16,interval=8,step=compile"]
        run += ["--tasks", "gsm8k_local", "--include_path", tasks, "--limit", 2, "--batch_size", 2]
        run += ["--device", "cpu", "--gen_kwargs", "max_gen_toks=20", "--log_samples"]
        code, _, err = call(*run, "--output_path", tmp_path / name)
        assert code == 0, err
        (results,) = (tmp_path / name).rglob("results_*.json")
        (samples,) = (tmp_path / name).rglob("samples_*.jsonl")
        found[name] = sorted(
            json.dumps(json.loads(line)["resps"]) for line in samples.read_text().splitlines()
        )
        config = json.loads(results.read_text())["config"]
        assert config["kv_compressions"] > 0 and config["kv_step"] == "compile"
    assert found["adapter"] == found["merged"]  # and not the base's, see above


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_virtual_tokens_are_refused(kind: str, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(
        tmp_path
    )
    with pytest.raises(UnsupportedError, match="virtual tokens before the prompt") as caught:
        ReasonAllocLM(str(folder), peft=str(tmp_path), **BUDGET)
    assert "\n" not in str(caught.value) and "arm=full" in str(caught.value)


def test_a_delta(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Half the weights and as much again are the model."""
    half = AutoModelForCausalLM.from_pretrained(folder)
    for weight in half.parameters():
        weight.data.mul_(0.5)
    shutil.copytree(folder, tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    lm = ReasonAllocLM(str(tmp_path / "half"), delta=str(tmp_path / "half"), **BUDGET)
    assert answers(lm)[0] == answers(ReasonAllocLM(str(folder), **BUDGET))[0]


def test_a_model_in_a_folder_of_a_folder(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    shutil.copytree(folder, tmp_path / "inner")
    lm = ReasonAllocLM(str(tmp_path), subfolder="inner", **BUDGET)
    assert answers(lm)[0] == answers(ReasonAllocLM(str(folder), **BUDGET))[0]


def test_a_gguf_file_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    lm = ReasonAllocLM(str(tmp_path), gguf_file="tiny.gguf", **BUDGET)
    assert lm.pretrained == str(tmp_path / "tiny.gguf")
    for options, message in (
        ({"peft": "lora"}, "peft='lora' has no effect on the GGUF file"),
        ({"revision": "x"}, "revision='x' has no effect on the GGUF file"),
        ({"load_in_8bit": True}, "load_in_8bit=True has no effect on the GGUF file"),
        ({"dtype": "nosuch"}, "unknown dtype 'nosuch'"),
    ):
        with pytest.raises(UsageError, match=message):
            ReasonAllocLM(str(tmp_path / "tiny.gguf"), **BUDGET, **options)
    with pytest.raises(UsageError, match=r"gguf_file='x\.gguf' is not in"):
        ReasonAllocLM(str(tmp_path), gguf_file="x.gguf", **BUDGET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": "graph"}, "step='graph' needs a GPU"),
        ({"step": "compil"}, "did you mean 'compile'"),
        ({"attention": "nosuch"}, "attention='nosuch' is unknown"),
        ({"autogptq": True}, "autogptq=True loads a model that is none of transformers'"),
        ({"gptqmodel": True}, "gptqmodel=True loads a model that is none of transformers'"),
        ({"load_in_8bit": True}, "takes no setting 'load_in_8bit'.* quantised already"),
        ({"nonsense": 3}, "this model takes no setting 'nonsense': leave it out"),
        ({"record": "off"}, "this model takes no setting 'record': leave it out"),
        ({"revision": "v2"}, "revision='v2' has no effect on the folder"),
        ({"subfolder": "none"}, "there is no such folder"),
        ({"dtype": "nosuch"}, "cannot load the model: .*nosuch"),
        ({"peft": "./none"}, "cannot load the model: "),
        ({"delta": "./none"}, "cannot load the model: "),
        ({"tokenizer": "./none"}, "cannot load the model: "),
    ],
)
def test_refusals(settings: dict[str, Any], message: str, folder: Path) -> None:  # noqa: F811
    if "peft" in settings:
        pytest.importorskip("peft")
    with pytest.raises((UsageError, UnsupportedError), match=message) as caught:
        ReasonAllocLM(str(folder), **BUDGET, **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_has_no_model_or_another_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no model: add pretrained=MODEL"):
        ReasonAllocLM(budget=16)

    def evaluate() -> None:
        raise TypeError("LlamaForCausalLM.__init__() got an unexpected keyword argument 'budget'")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    assert main(["lm-eval", "--model", "hf", "--model_args", "pretrained=x,budget=16"]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'budget' (budget, arm and the like are for --model reasonalloc)" in last
