"""The lm-eval model on tiny models: what it generates and scores, its command, its refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("accelerate")
pytest.importorskip("lm_eval")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonalloc import attach
from reasonalloc.cli.main import main
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.lm_eval import ReasonAllocLM
from tiny_folder import save_tiny, write_gguf

BUDGET = {"budget": 16, "interval": 8, "device": "cpu"}
WORDS = [f"w{(7 * i + i * i) % 60}" for i in range(120)]
LENGTHS = (40, 23, 31)
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny(tmp_path_factory.mktemp("model"), chat=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    tokenizer.eos_token = "user:"  # lm-eval wants one
    tokenizer.save_pretrained(path)
    return path


def text(start: int, length: int) -> str:
    return " ".join(WORDS[start : start + length])


def generation(**changes: Any) -> list[Instance]:
    options = {"until": ["w999"], "max_gen_toks": 30, "do_sample": False, **changes}
    return [
        Instance("generate_until", {}, (text(i, length), dict(options)), i)
        for i, length in enumerate(LENGTHS)
    ]


def scoring() -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (text(i, length), " " + text(60 + i, 25)), i)
        for i, length in enumerate(LENGTHS)
    ]


def test_a_batch_generates_what_each_prompt_does_alone(folder: Path) -> None:
    lm = ReasonAllocLM(str(folder), **BUDGET, batch_size=3)
    together = lm.generate_until(generation(), disable_tqdm=True)
    events = lm.kv_compressions
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    alone = []
    with attach(model, budget=16, interval=8) as attached:
        for request in generation():
            ids = lm.tokenizer(request.args[0], return_tensors="pt").input_ids
            out = model.generate(ids, max_new_tokens=30, do_sample=False)
            alone.append(lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
            assert attached.recorder is not None and attached.recorder.compressions
    assert together == alone
    assert events == 3 * 4  # layers, and boundaries of 40 + 30 tokens in one batch
    full = HFLM(str(folder), device="cpu", batch_size=3)
    assert full.generate_until(generation(), disable_tqdm=True) != together


def test_scores_are_those_of_decoding_token_by_token(folder: Path) -> None:
    lm = ReasonAllocLM(str(folder), **BUDGET)
    found = lm.loglikelihood(scoring(), disable_tqdm=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    for request, (score, greedy) in zip(scoring(), found, strict=True):
        context, continuation = (lm.tok_encode(part) for part in request.args)
        expected, all_greedy = 0.0, True
        with torch.inference_mode(), attach(model, budget=16, interval=8) as attached:
            cache = attached.new_cache()
            logits = model(torch.tensor([context]), past_key_values=cache).logits[0, -1]
            for token in continuation:
                scores = logits.log_softmax(-1)
                expected += float(scores[token])
                all_greedy = all_greedy and int(scores.argmax()) == token
                logits = model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == all_greedy
    full = HFLM(str(folder), device="cpu").loglikelihood(scoring(), disable_tqdm=True)
    assert all(abs(a[0] - b[0]) > 0.1 for a, b in zip(found, full, strict=True))


def test_a_large_budget_gives_the_full_caches_results(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = ReasonAllocLM(str(folder), budget=500, device="cpu", batch_size=2)
    full = ReasonAllocLM(str(folder), arm="full", device="cpu", batch_size=2)
    ours = lm.generate_until(generation(), disable_tqdm=True)
    assert ours == full.generate_until(generation(), disable_tqdm=True)
    assert "never compressed" in caplog.text
    scores = [s for s, _ in lm.loglikelihood(scoring(), disable_tqdm=True)]
    exact = [s for s, _ in full.loglikelihood(scoring(), disable_tqdm=True)]
    assert scores == pytest.approx(exact, abs=1e-3)


def test_rolling_scores_run_under_the_budget(folder: Path) -> None:
    lm = ReasonAllocLM(str(folder), **BUDGET)
    (score,) = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text(0, 90),), 0)], disable_tqdm=True
    )
    assert score < 0 and lm.kv_compressions > 0


def test_a_gguf_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf")
    lm = ReasonAllocLM(str(tmp_path / "tiny.gguf"), **{**BUDGET, "device": "cuda:0"}, batch_size=2)
    options = {"until": [], "max_gen_toks": 20, "do_sample": False}
    requests = [Instance("generate_until", {}, ("abcd" * 12, options), 0)]
    assert len(lm.generate_until(requests, disable_tqdm=True)) == 1
    assert lm.kv_compressions > 0
    assert lm.get_model_info()["kv_budget"] == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs a budget"),
        ({"arm": "full", "budget": 64}, "budget has no effect"),
        ({"arm": "full", "window": 4}, "window has no effect"),
        ({"arm": "rvk", "budget": 64}, "did you mean 'rkv'"),
        ({"arm": "rvk/uniform/uniform", "budget": 64}, "did you mean 'rkv'"),
        ({"budget": 64, "intervall": 4}, "did you mean 'interval'"),
        ({"budget": 4}, "cannot hold"),
        ({"budget": "many"}, "whole number"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ReasonAllocLM(str(folder), device="cpu", **settings)


def test_beams_and_missing_models_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        ReasonAllocLM("./none", budget=64)
    lm = ReasonAllocLM(str(folder), **BUDGET)
    with pytest.raises(UnsupportedError, match="beam search"):
        lm.generate_until(generation(num_beams=2), disable_tqdm=True)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """lm-eval's own gsm8k, on data in a file."""
    import lm_eval

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tasks"
    path.mkdir()
    rows = [{"question": text(i, 12), "answer": f"{text(i, 5)} #### {i}"} for i in range(8)]
    (path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "local.yaml").write_text(
        f"include: {Path(lm_eval.__file__).parent / 'tasks/gsm8k/gsm8k.yaml'}\n"
        "task: gsm8k_local\n"
        "tag: []\n"
        "dataset_path: json\n"
        "dataset_name: null\n"
        "dataset_kwargs:\n"
        f"  data_files: {{test: {path / 'data.jsonl'}, train: {path / 'data.jsonl'}}}\n"
    )
    return path


@pytest.mark.long
def test_the_command_runs_gsm8k(call: Call, folder: Path, tasks: Path, tmp_path: Path) -> None:
    arguments = ["lm-eval", "--model_args", f"pretrained={folder},budget=16,interval=8"]
    arguments += ["--tasks", "gsm8k_local", "--include_path", str(tasks), "--limit", "3"]
    arguments += ["--batch_size", "2", "--device", "cpu", "--gen_kwargs", "max_gen_toks=20"]
    code, out, err = call(*arguments, "--output_path", tmp_path / "out")
    assert code == 0, err
    assert "exact_match" in out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(path.read_text())["config"]
    assert config["model"] == "reasonalloc" and config["kv_budget"] == 16
    assert config["kv_arm"] == "rkv/uniform/uniform" and config["kv_compressions"] > 0
    assert config["kv_prompt"] == "evict"


@pytest.mark.long
def test_mistakes_on_the_command_line(call: Call, folder: Path, tasks: Path) -> None:
    args = f"pretrained={folder},budget=16"
    for arguments, message in (
        ([], "no arguments"),
        (["--model_args", args, "--tasks", "no_such_task"], "no_such_task"),
        (["--model_args", f"pretrained={folder}", "--tasks", "gsm8k_local"], "needs a budget"),
        (["--model_args", args], "No tasks specified"),
    ):
        extra = ["--include_path", tasks] if arguments else []
        code, _, err = call("lm-eval", *arguments, *extra)
        assert code == 2 and message in err.splitlines()[-1]
    assert call("lm-eval", "--no_such_option", "x")[0] == 2
