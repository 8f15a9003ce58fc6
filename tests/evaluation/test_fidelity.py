"""Fidelity: exact against token-by-token decoding, zero where nothing is evicted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import reasonalloc
from models import prompt, tiny
from reasonalloc.config import Arm, CompressionConfig, Prompt
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.completions import complete, complete_all
from reasonalloc.evaluation.fidelity import fidelity
from reasonalloc.evaluation.progress import Observer
from reasonalloc.evaluation.replay import full_logits, measure_fidelity
from reasonalloc.texts import Trajectory, load_prompts, load_trajectories


def trajectory(prompt_tokens: int, completion: int) -> Trajectory:
    ids = prompt(prompt_tokens + completion)[0].tolist()
    return Trajectory(tuple(ids[:prompt_tokens]), tuple(ids[prompt_tokens:]))


@torch.no_grad()
def slow(model: Any, text: Trajectory, config: CompressionConfig) -> list[list[float]]:
    """Token by token, both caches: [tokens] of KL, agreement and added NLL."""
    ids = torch.tensor([text.prompt_ids + text.completion_ids])
    start = len(text.prompt_ids)
    full = model(ids, use_cache=False).logits[0].double().log_softmax(-1)
    with reasonalloc.attach(
        model,
        budget=config.budget,
        arm=str(config.arm),
        interval=config.interval,
        prompt=config.prompt,
    ) as attached:
        cache = attached.new_cache()
        model(ids[:, :start], past_key_values=cache)
        rows = []
        for place in range(start, ids.shape[1] - 1):
            logits = model(ids[:, place : place + 1], past_key_values=cache).logits[0, -1]
            ours, true = logits.double().log_softmax(-1), full[place]
            target = int(ids[0, place + 1])
            rows.append(
                [
                    float((true.exp() * (true - ours)).sum()),
                    float(true.argmax() == ours.argmax()),
                    float(true[target] - ours[target]),
                ]
            )
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("arm", [Arm("rkv"), Arm("h2o", "pyramid", "reasonalloc")])
@pytest.mark.parametrize(("keep", "budget"), [("evict", 18), ("pin", 10)])
def test_equals_token_by_token(name: str, arm: Arm, keep: Prompt, budget: int) -> None:
    model, text = tiny(name), trajectory(25, 43)
    config = CompressionConfig(budget=budget, arm=arm, interval=8, prompt=keep)
    found = measure_fidelity(model, text, full_logits(model, text), config)
    kl, agree, added = slow(model, text, config)
    assert len(found.kl) == 42 and found.compressions >= 3
    assert found.kl == pytest.approx(kl, rel=2e-3, abs=1e-4)
    assert found.agree == [bool(a) for a in agree]
    assert found.added_nll == pytest.approx(added, rel=2e-3, abs=1e-3)
    assert max(found.kl) > 0.05 and found.kv_bytes < found.full_bytes * 2
    pinned = reasonalloc.plan(model, arm=arm, budget=budget, interval=8, prompt=keep)
    assert found.kv_bytes == pinned.memory(prompt_tokens=25).kv_bytes(67)
    assert model.config._attn_implementation != "reasonalloc"


def test_nothing_evicted_changes_nothing() -> None:
    model, text = tiny("llama"), trajectory(25, 43)
    config = CompressionConfig(budget=100, interval=16)
    found = measure_fidelity(model, text, full_logits(model, text), config)
    assert max(found.kl) < 1e-5 and all(found.agree) and found.compressions == 0


def test_completions_are_generated_with_the_full_cache() -> None:
    model = tiny("llama")
    made = complete(model, Trajectory((5, 6, 7), ()), 12)
    expected = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)
    assert made.completion_ids == tuple(expected[0, 3:].tolist())
    assert complete(model, made, 3) is made


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_completions_in_batches_are_those_of_each_prompt_alone(
    name: str, penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    model.generation_config.repetition_penalty = penalty  # looks at the prompt
    lengths = (30, 3, 17, 30, 9, 4, 17, 40, 1, 22, 30)
    texts = [Trajectory(tuple(prompt(n, seed=i)[0].tolist()), ()) for i, n in enumerate(lengths)]
    texts[4] = Trajectory((5, 6), (7, 8, 9))

    def generated(text: Trajectory) -> tuple[int, ...]:
        ids = torch.tensor([text.prompt_ids])
        out = model.generate(ids, max_new_tokens=40, do_sample=False)
        return text.completion_ids or tuple(out[0, ids.shape[1] :].tolist())

    whole = [generated(text) for text in texts]
    firsts = {tokens[0] for tokens in whole}
    model.generation_config.eos_token_id = next(t for t in whole[0] if t not in firsts)
    alone = [generated(text) for text in texts]
    sizes: list[int] = []
    own = model.generate

    def generate(ids: Any, **options: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    assert [text.completion_ids for text in complete_all(model, texts, 40)] == alone
    assert len({len(tokens) for tokens in alone}) > 2  # that of three tokens, and some ended
    assert sizes == ([8, 4, 4, 2] if penalty == 1 else [1, 1, 1, 2, 1, 3, 1])


def test_too_long() -> None:
    short = tiny("llama", max_position_embeddings=32)
    with pytest.raises(UsageError, match="has 32 positions: generate 29 or fewer"):
        complete(short, Trajectory((5, 6, 7), ()), 30)
    assert len(complete(short, Trajectory((5, 6, 7), ()), 29).completion_ids) == 29
    model = tiny("llama", max_position_embeddings=32)
    with pytest.raises(UsageError, match="68 tokens, but the model has 32 positions"):
        full_logits(model, trajectory(25, 43))


def test_the_loss_at_ends_of_turns(tmp_path: Path) -> None:
    """The last token of one text ends its turn, and one in the middle of another."""
    model, end = tiny("llama"), 9
    model.generation_config.eos_token_id = [end]
    first, second, third = (
        Trajectory(text.prompt_ids, tuple(t + (t == end) for t in text.completion_ids))
        for text in (trajectory(20 + i, 40) for i in range(3))
    )
    first = replace(first, completion_ids=(*first.completion_ids, end))
    ids = second.completion_ids
    second = replace(second, completion_ids=(end, *ids[:20], end, *ids[20:]))  # the first: no loss
    options: dict[str, Any] = {"arms": "rkv,random", "budgets": 12, "interval": 8}
    observer = Said()
    texts, out = [first, second, third], tmp_path / "out.jsonl"
    result = fidelity(model, texts, **options, progress=observer, out=out)
    assert observer.said == []
    for own, item in zip((result.rows[:3], result.rows[3:]), result.summary, strict=True):
        assert [row["end_tokens"] for row in own] == [1, 1, 0]
        losses = [own[0]["added_nll"][-1], own[1]["added_nll"][20]]
        assert [row["end_nll"] for row in own] == [*losses, None]
        assert item["end_tokens"] == 2 and item["end_nll"] == pytest.approx(sum(losses) / 2)
        assert item["end_kl"] == pytest.approx((own[0]["kl"][-1] + own[1]["kl"][20]) / 2)
        low, high = item["end_nll_interval"]
        assert low <= item["end_nll"] <= high
    assert "end NLL" in result.table() and "2 end-of-turn tokens" in result.table()
    assert "end_nll" not in out.read_text()  # read from the texts, so that older files have it
    alone = fidelity(model, [third], **options, progress=observer)
    assert [line for line in observer.said if "no text has an end of turn" in line]
    assert alone.summary[0]["end_nll"] is None and "end NLL" not in alone.table()


def test_the_worst_tokens() -> None:
    """1 % of each text's tokens, rounded up: one of 40, two of 150."""
    texts = [trajectory(20, 41), trajectory(21, 151)]
    arms = ["rkv", "random"]
    result = fidelity(tiny("llama"), texts, arms=arms, budgets=12, interval=8, progress=False)
    sums: list[list[float]] = []
    for own, item in zip((result.rows[:2], result.rows[2:]), result.summary, strict=True):
        pairs = zip(own, (1, 2), strict=True)
        worst = [sorted(row["kl"], reverse=True)[:count] for row, count in pairs]
        assert item["kl_worst"] == pytest.approx(sum(map(sum, worst)) / 3)
        low, high = item["kl_worst_interval"]
        assert low <= item["kl_worst"] <= high and item["kl_worst"] > item["kl"]
        sums.append([*map(sum, worst)])
    ratio = result.summary[1]["kl_worst_ratio_to_first"]["value"]
    assert ratio == pytest.approx(sum(sums[1]) / sum(sums[0]))
    assert "worst 1 %" in result.table()
    assert result.frame_rows()[1]["kl_worst"] == pytest.approx(sums[0][1] / 2)


class Said(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


class Letters:
    """A tokenizer: one id per character."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(c) for c in text]}

    def apply_chat_template(self, messages: Any, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for m in messages for c in m["content"]]}


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {"prompt_ids": [3, 4], "completion_ids": [5, 6]},
        {"prompt": "a", "completion": "bc"},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    found = load_trajectories(str(path), Letters())
    assert [(t.prompt_ids, t.completion_ids) for t in found] == [
        ((3, 4), (5, 6)),
        ((1, 97), (98, 99)),
        ((120,), ()),
    ]
    assert len({t.key for t in found}) == 3


def test_half_a_character_in_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(r'{"prompt": "a\ud800b"}')
    with pytest.raises(UsageError, match=r"line 1: it holds '\\ud800', half of"):
        load_prompts(str(path), 1)


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85"])
def test_lines_end_where_json_lines_do(tmp_path: Path, end: str) -> None:
    path = tmp_path / "t.jsonl"
    row = {"prompt": f"a{end}", "completion": "bc"}
    text = json.dumps(row, ensure_ascii=False)
    path.write_text(f"{text}\r\n{text}\n", "utf-8")
    assert [t.prompt_ids[1:] for t in load_trajectories(str(path), Letters())] == [
        tuple(map(ord, row["prompt"]))
    ] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: Expecting"),
        ("[]", "must be a JSON object"),
        ('{"completion": "ab"}', "needs prompt_ids, prompt or messages"),
        ('{"prompt_ids": [1.5]}', "list of token ids"),
        ('{"prompt": 3}', "prompt must be text"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        (r'{"prompt": "a\ud800b", "completion": "bc"}', r"line 1: it holds '\\ud800', half of"),
        ('{"prompt": "a", "completion": "b"}', "at least two tokens"),
        ("", "holds none"),
    ],
)
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(line)
    with pytest.raises(UsageError, match=message):
        load_trajectories(str(path), Letters())
