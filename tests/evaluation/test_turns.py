"""Worked solutions get the end of their turn, whatever the chat template does to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from models import tiny
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.completions import complete, turn_ends
from reasonalloc.texts import Trajectory, as_trajectory, load_trajectories
from reasonalloc.turns import end_of_turn
from tiny_folder import save_tiny

SPECIAL = ["<unk>", "<s>", "<end>", "<|user|>", "<|bot|>", "<think>", "</think>", "\n", "|"]
WORDS = ["w1", "w2", "w3", "w4", "w5", "empty"]
HEAD = "{% for m in messages %}{% if m['role'] == 'user' %}<|user|> {{ m['content'] }} {% else %}"
TAIL = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|> %s{% endif %}"
PLAIN = HEAD + "<|bot|> {{ m['content'] }} <end> | " + TAIL.replace("%s", "")
# Drops thoughts, and lets the model begin with one, as DeepSeek-R1's.
DROPS = HEAD + "<|bot|> {{ m['content'].split('</think>')[-1] }} <end> " + TAIL
DROPS = DROPS.replace("%s", "<think> \n ")
# Adds a thought without words, as Qwen3's.
ADDS = HEAD + "<|bot|> <think> </think> {{ m['content'] | trim }} <end> | " + TAIL
ADDS = ADDS.replace("%s", "")
UNENDED = HEAD + "<|bot|> {{ m['content'] }} " + TAIL.replace("%s", "")
REFUSES = "{{ raise_exception('no such roles') }}"
ASK = {"role": "user", "content": "w1 w2"}
PROMPT = "<|user|> w1 w2 <|bot|>"


def make(template: str | None) -> Any:
    words = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<end>"
    )
    fast.chat_template = template
    return fast


def read(tokenizer: Any, data: Any) -> tuple[str, str]:
    """Prompt and completion of a text, as words."""
    found, _ = as_trajectory(data, tokenizer, "text")
    prompt, completion = (
        " ".join(tokenizer.convert_ids_to_tokens(list(ids)))
        for ids in (found.prompt_ids, found.completion_ids)
    )
    return prompt, completion


def answer(content: str, **more: str) -> dict[str, str]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("template", "text", "prompt", "completion"),
    [
        (PLAIN, "w3 w4", PROMPT, "w3 w4 <end>"),  # not what the template puts behind the end
        (PLAIN, "w3 w4 <end> \n", PROMPT, "w3 w4 <end>"),  # it brought its end along
        (PLAIN, "w1 w2", PROMPT, "w1 w2 <end>"),  # it repeats the question
        (ADDS, "w3 w4", PROMPT, "<think> </think> w3 w4 <end>"),
        (DROPS, "w5 </think> w3 w4", f"{PROMPT} <think> \n", "w5 </think> w3 w4 <end>"),
        (DROPS, "<think> \n w5 </think> w3", f"{PROMPT} <think> \n", "w5 </think> w3 <end>"),
        (DROPS, "w3 w4", f"{PROMPT} <think> \n", "w3 w4 <end>"),
        (UNENDED, "w3 w4", PROMPT, "w3 w4"),
    ],
)
def test_a_chats_answer_ends_its_turn(
    template: str, text: str, prompt: str, completion: str
) -> None:
    tokenizer = make(template)
    expected = prompt, completion
    assert read(tokenizer, {"messages": [ASK, answer(text)]}) == expected
    assert read(tokenizer, {"messages": [ASK], "completion": text}) == expected


def test_earlier_turns_stay_in_the_prompt() -> None:
    chat = [ASK, answer("w3"), ASK, answer("w4 w5")]
    prompt, completion = read(make(PLAIN), {"messages": chat})
    assert prompt == f"{PROMPT} w3 <end> | {PROMPT}" and completion == "w4 w5 <end>"


def test_plain_texts_get_the_end_and_ids_stay_as_they_are() -> None:
    tokenizer = make(PLAIN)
    text = {"prompt": "w1 w2", "completion": "w3 w4"}
    assert read(tokenizer, text) == ("w1 w2", "w3 w4 <end>")
    assert read(make(None), text) == ("w1 w2", "w3 w4")
    given, _ = as_trajectory({"messages": [ASK], "completion_ids": [8, 9]}, tokenizer, "text")
    assert given.completion_ids == (8, 9)
    assert read(tokenizer, {"prompt_ids": [9], "completion": "w3 w4"}) == ("w1", "w3 w4 <end>")
    assert read(tokenizer, {"messages": [ASK]}) == (PROMPT, "")


def test_what_a_template_drops_or_refuses_is_said() -> None:
    thoughts = answer("w3 w4", reasoning_content="w5")
    with pytest.raises(UsageError, match="drops reasoning_content of the last message: write all"):
        read(make(PLAIN), {"messages": [ASK, thoughts]})
    with pytest.raises(UsageError, match="template refuses this chat: no such roles"):
        read(make(REFUSES), {"messages": [ASK]})


def test_which_token_ends_a_turn(tmp_path: Path) -> None:
    assert end_of_turn(make(PLAIN)) == SPECIAL.index("<end>") == end_of_turn(make(DROPS))
    assert [end_of_turn(make(t)) for t in (UNENDED, REFUSES, None)] == [None, None, None]
    tokenizer = AutoTokenizer.from_pretrained(save_tiny(tmp_path / "m"))
    assert end_of_turn(tokenizer) is None and end_of_turn(None) is None
    model = tiny("llama")
    model.generation_config.eos_token_id = [7, 9]
    assert turn_ends(model, make(PLAIN)) == {2, 7, 9}


def test_generated_completions_keep_their_end() -> None:
    model = tiny("llama")
    ids = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12, do_sample=False)[0, 3:]
    tokens = ids.tolist()
    end = next(token for token in tokens[1:] if token != tokens[0])
    model.generation_config.eos_token_id = end
    made = complete(model, Trajectory((5, 6, 7), ()), 12)
    assert made.completion_ids == tuple(tokens[: tokens.index(end) + 1])


def test_a_file_of_chats(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [ASK, answer("w3")]}))
    (found,) = load_trajectories(str(path), make(PLAIN))
    assert found.completion_ids[-1] == 2 and len(found.completion_ids) == 2
