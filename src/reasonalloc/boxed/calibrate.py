"""Make the boxed reasoner's profile: ``python -m reasonalloc.boxed.calibrate``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonalloc.calibration import attention_mass
from reasonalloc.evaluation.tasks.chain import generate
from reasonalloc.profiles import Profile

CHECKPOINT = Path(__file__).parent / "checkpoint"
# Numbers of the calibration split and their variables: no test problem is among them.
PROBLEMS = ((0, 8), (1, 12), (2, 16), (3, 24), (4, 8), (5, 12), (6, 16), (7, 24))


def calibrate(checkpoint: Path) -> Profile:
    """Attention-mass demand of a checkpoint on calibration problems, sampled every 64 tokens."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": generate(seed, variables, "calibration").prompt}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )["input_ids"]
        for seed, variables in PROBLEMS
    ]
    profile = attention_mass(model, prompts, every=64, max_new_tokens=1500)
    return replace(profile, model_id="the boxed reasoner")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="reasonalloc.boxed.calibrate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=CHECKPOINT / "profile.json")
    options = parser.parse_args()
    calibrate(options.checkpoint).save(options.out)


if __name__ == "__main__":
    main()
