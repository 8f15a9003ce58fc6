"""Times kvpress's DecodingPress; run by compare.py with the python of kvpress's environment."""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import AdaKVPress, DecodingPress, SnapKVPress
from transformers import AutoModelForCausalLM, DynamicCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--press", choices=("snapkv", "adakv"), required=True)
    for name in ("batch", "prompt", "new-tokens", "budget", "interval", "window"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=torch.float32).eval()
    base = SnapKVPress(window_size=options.window)
    press = DecodingPress(
        base_press=AdaKVPress(base) if options.press == "adakv" else base,
        compression_interval=options.interval,
        target_size=options.budget,
        hidden_states_buffer_size=options.interval,
    )
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.prompt)
    prompt = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    decode(model, press, prompt, 2)  # warm-up
    steps, held = decode(model, press, prompt, options.new_tokens)
    found = {
        "steps": steps,
        "kv_bytes": held,
        "versions": {name: version(name) for name in ("kvpress", "torch", "transformers")},
    }
    options.out.write_text(json.dumps(found))


def decode(
    model: torch.nn.Module, press: DecodingPress, prompt: torch.Tensor, new_tokens: int
) -> tuple[list[float], int]:
    """Seconds of every greedy decode step, and the bytes of keys and values at the end."""
    cache, steps = DynamicCache(), []
    with torch.inference_mode(), press(model):
        out = model(input_ids=prompt, past_key_values=cache, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(dim=-1)
        for step in range(new_tokens):
            start = time.perf_counter()
            position = torch.full((1, 1), prompt.shape[1] + step)  # as kvpress's own pipeline does
            out = model(input_ids=token, past_key_values=cache, position_ids=position)
            token = out.logits[:, -1:].argmax(dim=-1)
            steps.append(time.perf_counter() - start)
    return steps, sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


if __name__ == "__main__":
    main()
