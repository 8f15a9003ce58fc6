"""Tests of the boxed reasoner's training: batches, attention, and resuming after a kill."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tools.boxed.attention import ChunkedCausalAttention
from tools.boxed.data import IGNORED, LEVELS, largest_level, make_batch
from tools.boxed.model import TOKENS, build_config, build_model, build_tokenizer
from tools.boxed.train import STATE, TrainOptions, main, rate_factor, train
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from patience import PATIENCE
from reasonalloc.evaluation.tasks.chain import generate

ROOT = Path(__file__).parents[2]


def _options(out: Path, **changes: int) -> TrainOptions:
    return TrainOptions(out, steps=6, batch_tokens=256, save_every=2, quiet=True, **changes)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(model.state_dict())


@pytest.mark.long
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    train(_options(tmp_path / "whole"))
    train(_options(tmp_path / "parts", stop_after=3))
    train(_options(tmp_path / "parts"))
    whole, parts = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def rows(name: str) -> list[list[str]]:
        lines = (tmp_path / name / "curve.csv").read_text().splitlines()
        return [line.split(",")[:-1] for line in lines]

    assert rows("whole") == rows("parts") and len(rows("whole")) == 7


def test_other_options_do_not_resume(tmp_path: Path) -> None:
    train(_options(tmp_path, stop_after=1))
    with pytest.raises(SystemExit, match="other options"):
        train(_options(tmp_path, seed=1))


def test_the_command_writes_a_checkpoint_that_transformers_loads(tmp_path: Path) -> None:
    out = str(tmp_path)
    main(["--steps", "1", "--batch-tokens", "128", "--out", out, "--quiet"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": generate(0, 8).prompt}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=3)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("length", [5, 64, 150])
def test_chunked_attention_equals_the_reference(length: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 8, length, 16, requires_grad=True)
    k, v = (torch.randn(2, 4, length, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 8, length, 16)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    output = ChunkedCausalAttention.apply(q, k, v, 16**-0.5)
    grads = torch.autograd.grad((output * weight).sum(), (q, k, v))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grads, wanted)


def test_the_tokenizer_splits_the_text_into_words() -> None:
    tokenizer = build_tokenizer()
    problem = generate(3, 8)
    ids = tokenizer(problem.solution)["input_ids"]
    assert len(ids) == problem.solution_tokens
    assert tokenizer.decode(ids) == problem.solution
    chat = [
        {"role": "user", "content": problem.prompt},
        {"role": "assistant", "content": problem.solution},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == f"<bos> {problem.prompt} {problem.solution} <eos>"


def test_batches_mask_the_prompt_and_depend_on_the_index_alone() -> None:
    batch = make_batch(0, 5, 600, 8)
    again = make_batch(0, 5, 600, 8)
    assert torch.equal(batch.ids, again.ids) and torch.equal(batch.labels, again.labels)
    think = TOKENS.index("<think>")
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        end = ids.tolist().index(think) + 1
        assert (labels[:end] == IGNORED).all() and torch.equal(labels[end:], ids[end:])
    assert not torch.equal(batch.ids[0], make_batch(1, 5, 600, 8).ids[0])


def test_the_curriculum_and_the_rate_end_where_they_should() -> None:
    assert largest_level(0.0, 64) == 6 and largest_level(1.0, 64) == max(LEVELS) == 64
    assert largest_level(1.0, 24) == 24
    options = TrainOptions(Path("unused"), steps=100, warmup=10)
    assert rate_factor(0, options) == pytest.approx(0.1)
    assert rate_factor(50, options) == 1.0
    assert rate_factor(99, options) == pytest.approx(1 / 25)


def test_the_model_is_built_from_its_seed() -> None:
    config = build_config()
    first, second, other = (build_model(config, seed) for seed in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert sum(item.numel() for item in first.parameters()) * 4 < 8 * 2**20


@pytest.mark.long
def test_sixty_steps_with_a_kill_in_between(tmp_path: Path) -> None:
    """The command as a user starts it: killed once it has saved, started again, and it learns."""
    command = [sys.executable, "-m", "tools.boxed.train", "--steps", "60", "--quiet"]
    command += ["--batch-tokens", "256", "--max-variables", "4", "--warmup", "20"]
    command += ["--save-every", "15", "--out", str(tmp_path)]
    running = subprocess.Popen(command, cwd=ROOT)
    try:
        end = time.monotonic() + PATIENCE
        while not (tmp_path / STATE).exists() and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        running.kill()
        running.wait()
    assert (tmp_path / STATE).exists()
    subprocess.run(command, check=True, cwd=ROOT)
    with (tmp_path / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(60))
    first, last = ([float(r["loss"]) for r in part] for part in (rows[:10], rows[-10:]))
    assert sum(last) < 0.8 * sum(first)
