"""The fidelity command: results, resuming, refusals."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("typer")

import torch
from transformers import AutoConfig

from reasonalloc.calibrated.demand import DemandProfile, config_hash
from reasonalloc.config import split_arms
from reasonalloc.evaluation.fidelity_result import kind
from reasonalloc.evaluation.intervals import bootstrap_ratio

ARMS = "rkv,rkv(lam=0.5, kernel=3)/pyramid/reasonalloc,streaming_llm"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    words = [f"w{(7 * i) % 60}" for i in range(90)]
    rows = [
        {"prompt": " ".join(words[:20]), "completion": " ".join(words[20:70])},
        {"prompt_ids": list(range(10, 35)), "completion_ids": list(range(40, 75))},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_other_weights_and_other_runs(
    call: Call, folder: Path, texts: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reasonalloc.files import lock

    model = AutoModelForCausalLM.from_pretrained(folder)
    own, out = tmp_path / "model", tmp_path / "results.jsonl"

    def save() -> None:
        model.save_pretrained(own)
        AutoTokenizer.from_pretrained(folder).save_pretrained(own)

    arguments = ["fidelity", own, "--trajectories", texts, "--interval", "8", "--budgets", "12"]
    arguments += ["--arms", "rkv", "--out", out]
    save()
    assert call(*arguments)[0] == 0
    whole = out.read_text()
    held = lock(out, "taken")  # by another process, as it were
    code, _, err = call(*arguments)
    assert code == 2 and "is being written by another run" in err
    os.close(held)
    assert call(*arguments)[0] == 0 and out.read_text() == whole
    first, *rest = whole.splitlines(keepends=True)
    old = json.loads(first)
    del old["manifest"]["weights_hash"]  # as older versions wrote it
    out.write_text(json.dumps(old) + "\n" + "".join(rest))
    assert call(*arguments)[0] == 0 and len(out.read_text().splitlines()) == 1 + len(rest)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    save()
    code, _, err = call(*arguments)
    assert code == 2 and "was made with weights_hash=" in err


def test_results_and_resuming(call: Call, folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    base = ["fidelity", folder, "--trajectories", texts, "--interval", "8", "--out", out]
    arguments = [*base, "--budgets", "12,20", "--arms", ARMS, "--json"]
    code, text, err = call(*arguments)
    assert code == 0, err
    data = json.loads(text)
    assert data["trajectories"] == 2 and len(data["results"]) == 6
    for item in data["results"]:
        assert item["compressions"] > 0 and item["kl"] > 0 and item["tokens"] == 49 + 34
        low, high = item["kl_interval"]
        assert low <= item["kl"] <= high and 0 <= item["top1"] <= 1
        assert sum(k["tokens"] for k in item["kl_by_kind"].values()) == 83
        assert len(item["kl_by_position"]) == 8
        assert item["kl_ratio_to_first"]["value"] == 1.0 or not item["arm"].startswith("rkv/")
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 6
    out.write_text("".join(lines[:5]) + lines[5][:30])  # a kill in the middle of a line
    code, again, _ = call(*arguments)
    assert code == 0 and json.loads(again) == data and out.read_text() == whole
    code, table, _ = call(*arguments[:-1])
    assert code == 0 and "little with so few" in " ".join(table.split())
    assert out.read_text() == whole  # nothing was computed again
    code, _, err = call(*arguments, "--window", "4")
    assert code == 2 and "made with window=8, now it is 4" in err
    out.write_text("hello\n")
    code, _, err = call(*arguments)
    assert code == 2 and "no file of such results" in err
    assert out.read_text() == "hello\n"


def test_another_profile_under_the_same_name_is_another_arm(
    call: Call, folder: Path, texts: Path, tmp_path: Path
) -> None:
    model = AutoConfig.from_pretrained(folder)
    path, out = tmp_path / "profile.json", tmp_path / "results.jsonl"
    layers = model.num_hidden_layers
    arguments = ["fidelity", folder, "--trajectories", texts, "--interval", "8", "--out", out]
    arguments += ["--budgets", "20", "--arms", "reasonalloc", "--profile", path, "--json"]
    arguments[arguments.index("reasonalloc")] = "rkv,reasonalloc"
    rows, results = [], []
    for demand in ([1.0] * layers, [1.0] * layers, [float(i + 1) for i in range(layers)]):
        DemandProfile(
            model_id="tiny",
            config_hash=config_hash(model.to_dict()),
            rho=0.9,
            steps=1,
            prompt_hashes=["a"],
            demand_mean=demand,
            demand_max=demand,
            curves=[demand],
        ).save(path)
        code, printed, _ = call(*arguments)
        assert code == 0
        rows.append(len(out.read_text().splitlines()))
        results.append({item["arm"]: item["kl"] for item in json.loads(printed)["results"]})
    # The same content is not computed again; another content is, and rkv, which reads none, is not.
    assert rows[0] == rows[1] and rows[2] == rows[1] + (rows[0] - 1) // 2
    assert results[0] == results[1] != results[2]
    assert results[2]["rkv/uniform/uniform"] == results[0]["rkv/uniform/uniform"]


def test_mistakes_are_found_before_anything_runs(
    call: Call, folder: Path, texts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    base = ["fidelity", folder, "--budgets", "20", "--out", out]
    code, _, err = call(*base, "--trajectories", texts, "--arms", "best")
    assert (
        code == 2
        and "arm 'best' reads a cost profile: add --profile FILE" in err
        and "Traceback" not in err
    )
    foreign = tmp_path / "foreign.jsonl"
    row = {"prompt_ids": [1, 2], "completion_ids": [3, 10**6]}
    foreign.write_text(f"{texts.read_text()}\n{json.dumps(row)}")
    code, _, err = call(*base, "--trajectories", foreign, "--arms", "rkv")
    assert code == 2 and "token id 1000000" in err and "another tokenizer" in err
    assert not out.exists()


def test_generated_completions(call: Call, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "w1 w2 w3 w4"}\n')
    base = ["fidelity", folder, "--trajectories", path, "--interval", "8", "--budgets", "10"]
    code, _, err = call(*base)
    assert code == 2 and "--generate N" in err
    path.write_text("".join(f'{{"prompt": "{" ".join(["w1"] * n)}"}}\n' for n in (4, 9, 2)))
    code, text, _ = call(*base, "--generate", "40", "--arms", "random", "--json")
    assert code == 0 and json.loads(text)["results"][0]["tokens"] == 3 * 39
    code, text, _ = call(*base[:-1], "100", "--generate", "40", "--arms", "random")
    assert code == 0 and "never compressed" in " ".join(text.split())


def test_attention_is_free_to_change(call: Call, folder: Path, texts: Path, tmp_path: Path) -> None:
    """Also in a file of a version that did not note it."""
    out = tmp_path / "results.jsonl"
    base = ["fidelity", folder, "--trajectories", texts, "--interval", "8", "--budgets", "12,12"]
    base += ["--arms", "rkv,rkv/uniform/uniform", "--device", "cpu", "--json"]
    code, plain, _ = call(*base, "--out", out)
    assert code == 0 and len(json.loads(plain)["results"]) == 1  # nothing twice
    first, *rest = out.read_text().splitlines(keepends=True)
    old = json.loads(first)
    assert old["manifest"].pop("attention") == "auto"
    out.write_text("".join((json.dumps(old) + "\n", *rest)))
    code, again, err = call(*base, "--out", out, "--attention", "cpp")
    assert code == 0 and json.loads(again) == json.loads(plain), err
    assert json.loads(out.read_text().splitlines()[0])["manifest"]["attention"] == "cpp"
    code, native, _ = call(*base, "--attention", "cpp")
    ours, theirs = (json.loads(found)["results"][0] for found in (native, plain))
    assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
    code, _, err = call(*base, "--generate", "30")
    assert code == 0 and "generate=30 has no effect" in " ".join(err.split())


def test_files_of_several_kinds(call: Call, texts: Path, tmp_path: Path) -> None:
    from tiny_boxed import save_tiny

    model = save_tiny(tmp_path / "boxed")
    costs, profile = model / "costs.json", model / "profile.json"
    base = ["fidelity", model, "--trajectories", texts, "--interval", "8", "--window", "4"]
    base += ["--budgets", "24", "--json", "--profile", profile]
    code, text, err = call(*base, "--profile", costs, "--arms", "reasonalloc,best")
    assert code == 0 and len(json.loads(text)["results"]) == 2, err
    code, _, err = call(*base, "--arms", "rkv")
    assert code == 2 and "is a profile and has no effect with arms='rkv'" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--budgets", "12,x"], "budget='x' must be a whole number of tokens, a size as"),
        (["--arms", "rkv,full"], "leave it out"),
        (["--arms", ","], "arms is empty"),
        (["--arms", "rvk"], "did you mean 'rkv'"),
        (["--budgets", "3"], "budget of at least 8"),
        (["--interval", "0"], "interval=0"),
        (["--attention", "nosuch"], "attention='nosuch' is unknown: choose one of auto"),
        (["--device", "cuda:9"], "is not available here"),
        (["--profile", "none.json"], "profile 'none.json' cannot be read"),
        (["--arms", "rkv/uniform/unifrom"], "did you mean 'uniform'"),
        (["--out", "/no/such/folder/file"], "cannot be used"),
    ],
)
def test_wrong_arguments(
    change: list[str], message: str, call: Call, folder: Path, texts: Path
) -> None:
    code, out, err = call("fidelity", folder, "--trajectories", texts, *change)
    assert (code, out) == (2, "") and message in err and err.count("error:") == 1


def test_helpers() -> None:
    assert split_arms(" a(x=1, y=2)/b , c,") == ["a(x=1, y=2)/b", "c"]
    assert [kind(t) for t in (" 12", "the", " \n", "+=")] == ["number", "word", "space", "symbol"]
    assert bootstrap_ratio([3.0], [2.0]) == (1.5, 1.5)
    low, high = bootstrap_ratio([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0])
    assert 1.0 <= low < 2.5 < high <= 4.0
