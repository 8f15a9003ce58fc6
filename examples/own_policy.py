"""A policy of your own: which tokens stay, decided by 20 lines that the package does not know.

    python examples/own_policy.py --model Qwen/Qwen3-0.6B --budget 256

`reasonalloc.Arm(LoudAttention(power=0.5))` is the same for `fidelity` and `evaluate`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import reasonalloc
from reasonalloc.policies import Candidates, Policy
from reasonalloc.policies.base import causal, window_logits


@dataclass(frozen=True)
class LoudAttention(Policy):
    """Tokens that the last queries attend to, times the size of their values to a power."""

    power: float = 1.0
    needs_queries: ClassVar[bool] = True  # the queries of the last `window` tokens

    def score(self, candidates: Candidates) -> torch.Tensor:
        """Return [batch, kv_heads, n] float32; higher is kept."""
        logits = window_logits(candidates)  # [batch, kv_heads, group, window, n]
        logits = logits.masked_fill(~causal(candidates), torch.finfo(logits.dtype).min)
        attention = logits.softmax(dim=-1).mean(dim=2).sum(dim=2)
        return attention * candidates.values.float().norm(dim=-1) ** self.power


def main() -> None:
    """Generate with this policy and with R-KV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--prompt", default="Prove that the square root of 2 is irrational.")
    parser.add_argument("--budget", type=int, default=256, help="tokens kept per layer and KV head")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    inputs = tokenizer(options.prompt, return_tensors="pt")
    for policy in ("rkv", LoudAttention(power=0.5)):
        with reasonalloc.attach(model, budget=options.budget, policy=policy) as handle:
            out = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
            print(f"--- {handle.config.arm}: {handle.recorder.compressions} compressions")
            print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
