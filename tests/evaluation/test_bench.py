"""The bench command: structure, counts and bytes; no time is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

import models
import reasonalloc
from reasonalloc.benchmark import shapes
from reasonalloc.benchmark.decode import Contender, decode, weight_products
from reasonalloc.benchmark.summary import summarise
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.errors import UsageError

Call = Callable[..., tuple[int, str, str]]


def contender(name: str) -> Contender:
    arm = parse_arm(name)
    assert arm is not None
    return Contender(name, CompressionConfig(budget=16, arm=arm, interval=8))


def test_a_run_of_every_kind_of_cache() -> None:
    model = models.tiny("llama")
    prompt = models.prompt(20, batch=2)
    kept = model.config.num_key_value_heads, model.config.num_hidden_layers
    width = 2 * 2 * kept[0] * kept[1] * model.config.head_dim * 4
    for runner in (Contender("full"), Contender("full-static"), contender("rkv")):
        timing = decode(model, runner, prompt, 12, 8)
        assert len(timing.steps) == 12 and min(timing.steps) > 0 and timing.prefill_seconds > 0
        split = timing.split
        assert 0 < split.attention < split.total and 0 < split.rest < split.total
        assert split.attention + split.compression + split.rest == pytest.approx(split.total)
        assert (split.compression > 0) == (runner.config is not None)
        assert timing.peak_bytes is None
        if runner.config is None:
            room = 20 + 12 + (8 if runner.name == "full-static" else 0)
            assert timing.kv_bytes == width * room
        else:
            with reasonalloc.attach(model, budget=16, interval=8) as attachment:
                assert timing.kv_bytes == attachment.plan(2).slab_bytes
    assert not hasattr(model, "_reasonalloc")


def test_arms_write_what_generate_writes() -> None:
    """The benchmark's own loop is the loop that users have."""
    model = models.tiny("llama")
    prompt = models.prompt(20, batch=2)
    seen = []
    forward = model.forward

    def watched(**kwargs: object) -> object:
        seen.append(kwargs["input_ids"])
        return forward(**kwargs)

    model.forward = watched
    decode(model, contender("snapkv"), prompt, 12, 1)
    model.forward = forward
    with reasonalloc.attach(model, budget=16, interval=8, arm="snapkv"):
        text = model.generate(prompt, max_new_tokens=13, do_sample=False)
    assert torch.equal(torch.cat(seen[1:14], dim=1), text[:, 20:33])


def test_products_count_every_weight() -> None:
    model = models.tiny("llama")
    assert len(weight_products(model, 2, repeats=3)) == 3


def test_summary() -> None:
    run = {"attention": 0.2, "compression": 0.1, "rest": 0.7, "kv_bytes": 8, "peak_bytes": None}
    runs = [
        {"arm": "rkv", "prefill_seconds": 1.0, "steps": [1.0, 1.0, 2.0, 4.0], **run},
        {"arm": "rkv", "prefill_seconds": 3.0, "steps": [1.0, 1.0, 2.0, 6.0], **run},
        {"arm": "full", "out_of_memory": True},
    ]
    data = {"interval": 2, "batches": [{"batch": 3, "runs": runs, "weight_products": [0.5, 0.7]}]}
    (entry,) = summarise(data, [2, 4])
    assert entry["weight_products"] == pytest.approx(0.6)
    rkv, full = entry["arms"]
    assert full == {"arm": "full", "out_of_memory": True}
    assert rkv["step_seconds"] == {"2": 1.0, "4": 3.5}
    assert rkv["tokens_per_second"] == pytest.approx((12 / 8 + 12 / 10) / 2)
    assert rkv["prefill_seconds"] == 2.0 and rkv["quartiles"][1] == 1.5


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 128,
    }
    monkeypatch.setitem(shapes.SHAPES, "tiny", sizes)


RUN = ("bench", "--shape", "tiny", "--budget", 16, "--interval", 8, "--prompt", 20)


def test_the_command(call: Call, small: None, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    options = ("--arms", "full,rkv,snapkv/uniform/adakv", "--batch", "1,3", "--repeats", 2)
    code, text, err = call(*RUN, *options, "--new-tokens", 16, "--at", 8, "--out", out, "--json")
    assert code == 0, err
    printed, data = json.loads(text), json.loads(out.read_text())
    assert printed["summary"] == data["summary"] and printed["machine"]["dtype"] == "float32"
    assert [entry["batch"] for entry in data["summary"]] == [1, 3]
    for batch in data["batches"]:
        assert [run["arm"] for run in batch["runs"]] == [
            *("full", "rkv", "snapkv/uniform/adakv"),
            *("rkv", "snapkv/uniform/adakv", "full"),  # they take turns
        ]
        assert all(len(run["steps"]) == 16 for run in batch["runs"])
    for entry in data["summary"]:
        assert all(set(arm["step_seconds"]) == {"8", "16"} for arm in entry["arms"])
    code, text, _ = call(*RUN, "--new-tokens", 8, "--batch", 1, "--step", "eager,static")
    assert code == 0 and "weight products alone" in text and "rkv, static" in text


def test_each_arm_at_each_budget(call: Call, small: None) -> None:
    """The full cache has none; a larger budget holds more bytes."""
    several = ("--budget", "16,24,16,90%@100", "--step", "eager,static", "--arms", "rkv,full")
    code, text, err = call(*RUN, *several, "--batch", 2, "--new-tokens", 10, "--json")
    assert code == 0, err
    found = json.loads(text)
    held = {arm["arm"]: arm["kv_bytes"] for arm in found["summary"][0]["arms"]}
    assert list(held) == [
        *("rkv at 16, eager", "rkv at 16, static", "rkv at 24, eager", "rkv at 24, static"),
        *("rkv at 90%@100, eager", "rkv at 90%@100, static", "full"),
    ]
    assert held["rkv at 16, eager"] == held["rkv at 16, static"] < held["rkv at 24, static"]
    assert held["rkv at 24, static"] < held["rkv at 90%@100, static"]  # 26 tokens and the interval
    assert found["budgets"] == [16, 24, "90%@100"]


def test_a_pinned_prompt_is_on_top(call: Call, small: None) -> None:
    held = []
    for mode in ("evict", "pin"):
        options = ("--arms", "full,rkv", "--prompt-mode", mode, "--new-tokens", 10, "--batch", 2)
        code, text, err = call(*RUN, *options, "--json")
        assert code == 0, err
        made = json.loads(text)
        held.append({arm["arm"]: arm["kv_bytes"] for arm in made["summary"][0]["arms"]})
    assert held[0]["full"] == held[1]["full"] and held[0]["rkv"] < held[1]["rkv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt-mode", "keep"), "unknown prompt 'keep'"),
        (("--arms", "rvk"), "rvk"),
        (("--arms", ","), "arms is empty"),
        (("--batch", "0"), "batch='0'"),
        (("--batch", "x"), "batch='x' must be whole numbers"),
        (("--at", "99", "--new-tokens", "8"), "at='99' is not within new_tokens=8"),
        (("--new-tokens", "200"), "128 positions"),
        (("--dtype", "float8"), "dtype='float8'"),
        (("--out", "/no/such/folder/x.json"), "there is no folder '/no/such/folder'"),
        (("--out", "."), "--out '.' is a folder: name a file"),
        (("--out", ""), "--out '' is a folder: name a file"),
        (("MODEL",), "give one of the two"),
        (("--budget", "4"), "budget"),
        (("--budget", "16,many"), "budget='many' must be a whole number of tokens"),
        (("--step", "graphs"), "unknown step 'graphs': did you mean 'graph'?"),
        (("--attention", "triton"), "needs a GPU"),
        (("--attention", "nosuch"), "attention='nosuch' is unknown"),
        (("--arms", "full,full-static"), "--budget has no effect with --arms full,full-static"),
        (("--profile", "none.json"), "profile 'none.json' cannot be read"),
        (("--arms", "rkv,best"), "arm 'best' reads a cost profile: add --profile FILE"),
        (("--n-sink", "9"), "cannot hold the observation window (8) and the sinks (9)"),
        (("--protect-prompt", "--new-tokens", "8"), "protect_prompt"),
    ],
)
def test_refusals(call: Call, small: None, options: tuple[str, ...], message: str) -> None:
    code, _, err = call(*RUN, *options)
    assert code == 2 and message in " ".join(err.split()), err


def test_shapes(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="smollm2-135m"):
        shapes.build_shape("smollm2", torch.float32, torch.device("cpu"))
    monkeypatch.setattr(shapes, "free_memory", lambda device: 1000)
    with pytest.raises(UsageError, match="GiB of weights in"):
        shapes.build_shape("tiny", torch.float32, torch.device("cpu"))
