"""Make the boxed reasoner's profiles: ``python -m tools.boxed.calibrate``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tools.boxed.data import encode
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.demand import DemandProfile
from reasonalloc.calibration import attention_mass
from reasonalloc.calibration.fisher import fisher
from reasonalloc.config import Prompt
from reasonalloc.evaluation.tasks.chain import generate
from reasonalloc.texts import Trajectory

CHECKPOINT = Path(__file__).parents[2] / "src" / "reasonalloc" / "boxed" / "checkpoint"
# Solutions of 12 variables, 385 tokens after a prompt of 145; the demo's cadence.
COST_PROBLEMS, COST_VARIABLES, COST_INTERVAL = 16, 12, 32
COST_BUDGETS = (16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512)
PINNED_BUDGETS = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320)
# Numbers of the calibration split and their variables: no test problem is among them.
PROBLEMS = ((0, 8), (1, 12), (2, 16), (3, 24), (4, 8), (5, 12), (6, 16), (7, 24))


def calibrate(checkpoint: Path) -> DemandProfile:
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


def costs(checkpoint: Path, prompt: Prompt = "evict") -> CostProfile:
    """Costs of every head on written solutions of calibration problems, with R-KV.

    With ``prompt="pin"`` budgets are those of the solution alone.
    """
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    texts = []
    for seed in range(COST_PROBLEMS):
        ids, start = encode(generate(seed, COST_VARIABLES, "calibration"))
        texts.append(Trajectory(tuple(ids[:start]), tuple(ids[start:])))
    profiles = fisher(
        model,
        texts,
        policies=["rkv"],
        budgets=PINNED_BUDGETS if prompt == "pin" else COST_BUDGETS,
        interval=COST_INTERVAL,
        prompt=prompt,
    )
    return replace(profiles[0], model_id="the boxed reasoner")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tools.boxed.calibrate", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder of both files")
    parser.add_argument("--pinned", type=Path, help="only costs with pinned prompts, to this file")
    options = parser.parse_args()
    if options.pinned is not None:
        costs(options.checkpoint, "pin").save(options.pinned)
        return
    calibrate(options.checkpoint).save(options.out / "profile.json")
    costs(options.checkpoint).save(options.out / "costs.json")


if __name__ == "__main__":
    main()
