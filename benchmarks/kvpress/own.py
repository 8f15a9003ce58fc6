"""Times one of our arms; run by compare.py, the counterpart of peer.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from reasonalloc.benchmark.decode import Contender, decode
from reasonalloc.config import CompressionConfig, parse_arm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--step", required=True)
    for name in ("batch", "prompt", "new-tokens", "budget", "interval", "window"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    arm = parse_arm(options.arm)
    if arm is None:
        parser.error("--arm: an arm that compresses")
    config = CompressionConfig(
        budget=options.budget,
        arm=arm,
        interval=options.interval,
        window=options.window,
        step=options.step,
    )
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.prompt)
    prompt = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    decode(model, Contender(options.arm, config), prompt, 2, 1)  # warm-up
    timing = decode(model, Contender(options.arm, config), prompt, options.new_tokens, 1)
    options.out.write_text(json.dumps({"steps": timing.steps, "kv_bytes": timing.kv_bytes}))


if __name__ == "__main__":
    main()
