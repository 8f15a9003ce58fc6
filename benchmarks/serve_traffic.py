"""Requests of ``benchmarks/serve.py``: lengths of two kinds of traffic, prompts, a tiny model.

Nothing is downloaded. Lengths are lognormal, drawn from a seed:

    sharegpt    prompts of median 100 (mean about 160), answers of median 200 (mean about 310):
                the means of ShareGPT in vLLM's paper are 161 and 338 (arXiv 2309.06180, figure 11)
    reasoning   prompts of median 150, answers of median 2,000 (mean about 2,350) and up to 8,192:
                a long chain of thought after a short question; a choice, no fit of a data set
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEAST = 4  # tokens of a prompt or an answer, whatever the scale


@dataclass(frozen=True)
class Lengths:
    """A lognormal distribution of token counts, cut at ``high``."""

    median: int
    sigma: float
    high: int

    def draw(self, source: random.Random, scale: float) -> int:
        tokens = min(source.lognormvariate(math.log(self.median), self.sigma), self.high)
        return max(LEAST, round(tokens * scale))


@dataclass(frozen=True)
class Mix:
    prompt: Lengths
    answer: Lengths
    requests: int  # of one run, where none are given


MIXES = {
    "sharegpt": Mix(Lengths(100, 1.0, 1024), Lengths(200, 1.0, 1024), requests=96),
    "reasoning": Mix(Lengths(150, 0.5, 1024), Lengths(2000, 0.6, 8192), requests=24),
}


def draw_lengths(mix: str, requests: int, scale: float, run: int) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of each request; the same for the same arguments."""
    source = random.Random(f"{mix} {run}")
    kind = MIXES[mix]
    return [
        (kind.prompt.draw(source, scale), kind.answer.draw(source, scale)) for _ in range(requests)
    ]


def find_words(tokenizer: Any, most: int = 512) -> list[str]:
    """Words that are one token each wherever they stand in a text of such words."""
    ids = list(range(len(tokenizer)))
    random.Random(0).shuffle(ids)
    words: list[str] = []
    for token in ids:
        word = tokenizer.decode([token]).strip()
        pair = tokenizer(f"{word} {word}", add_special_tokens=False).input_ids if word else []
        if word.isalnum() and word not in words and len(pair) == 2:
            words.append(word)
            if len(words) == most:
                break
    if not words:
        raise ValueError("the tokenizer has no word that is one token")
    return words


def write_dataset(path: Path, lengths: list[tuple[int, int]], words: list[str], run: int) -> None:
    """Write vLLM's ``custom`` data set: random words, so that no two prompts share a prefix."""
    source = random.Random(f"words {run}")
    lines = [
        json.dumps({"prompt": " ".join(source.choices(words, k=prompt)), "output_tokens": answer})
        for prompt, answer in lengths
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def save_tiny_model(folder: Path) -> None:
    """Save a Qwen3 of 4 layers with random weights and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    names = ["<pad>", "<s>", "<unk>", *(f"w{index}" for index in range(94))]
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(names),
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=16384,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
