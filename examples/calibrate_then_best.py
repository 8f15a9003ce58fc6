"""Measure what each KV head needs, once per model; then run the arm `best`, which uses it.

    python examples/calibrate_then_best.py --model Qwen/Qwen3-0.6B --out costs.json

The prompts should be of the kind that the model will get, and of no test set.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import reasonalloc

PROMPTS = [
    "Prove that there are infinitely many primes.",
    "Write a Python function that merges two sorted lists, and explain each line.",
    "A train leaves at noon at 80 km/h, another one an hour later at 120 km/h. When do they meet?",
    "Summarise how photosynthesis works for a twelve-year-old.",
]


def main() -> None:
    """Calibrate, plan, generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B")
    parser.add_argument("--out", default="costs.json")
    parser.add_argument("--prompt", default="Prove that the square root of 2 is irrational.")
    parser.add_argument("--budget", type=int, default=256, help="tokens kept per layer and KV head")
    parser.add_argument("--interval", type=int, default=128, help="tokens between compressions")
    parser.add_argument("--tokens", type=int, default=512, help="length of calibration texts")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").eval()
    costs = reasonalloc.calibrate(
        model,
        tokenizer,
        [{"prompt": prompt} for prompt in PROMPTS],
        objective="fisher",
        generate=options.tokens,  # completed by the model itself, with its full cache
        interval=options.interval,  # costs are measured for one cadence
        out=options.out,
    )
    costs.show()
    settings = {"budget": options.budget, "interval": options.interval}
    settings |= {"arm": "best", "profile": options.out}
    reasonalloc.plan(model, **settings).show()
    inputs = tokenizer(options.prompt, return_tensors="pt")
    with reasonalloc.attach(model, **settings):
        out = model.generate(**inputs, max_new_tokens=options.max_new_tokens, do_sample=False)
    print(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]))


if __name__ == "__main__":
    main()
