"""vLLM with and without a KV budget, side by side: a small pool, and an unpressed one.

    make bench-vllm

Random weights. In the small pool 24 requests of 900 tokens compete for 6 MiB, then requests of
unlike lengths (those of ``serve.py``, all at once); in the large one 8 requests run at once on a
28-layer model and only the overhead counts. Each run is a process of its
own, stock and budget take turns, and the medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_RKV = {"stock": None, "rkv": {"budget": 96, "interval": 64, "arm": "rkv"}}
# name: layers, KV cache bytes, requests, prompt, new tokens, the budget's settings by arm; or the
# kind of traffic instead of lengths
CASES: dict[str, dict[str, Any]] = {
    "6 MiB, 24 requests of 900 tokens": {
        "layers": 4,
        "memory": 6 << 20,
        "requests": 24,
        "prompt": 100,
        "new": 800,
        "arms": {
            "stock": None,
            "streaming_llm": {"budget": 96, "interval": 64, "arm": "streaming_llm"},
            "rkv": {"budget": 96, "interval": 64, "arm": "rkv"},
            "rkv/pyramid/reasonalloc": {
                "budget": 96,
                "interval": 64,
                "arm": "rkv/pyramid/reasonalloc",
            },
            "rkv, int8:int4": {
                "budget": 96,
                "interval": 64,
                "arm": "rkv",
                "kv_dtype": "int8:int4",
            },
        },
    },
    "6 MiB, ShareGPT-like": {
        "layers": 4,
        "memory": 6 << 20,
        "requests": 96,
        "mix": "sharegpt",
        "arms": _RKV,
    },
    "6 MiB, long answers": {
        "layers": 4,
        "memory": 6 << 20,
        "requests": 24,
        "mix": "reasoning",
        "arms": _RKV,
    },
    "unpressed, 28 layers, 8 requests of 400 tokens": {
        "layers": 28,
        "memory": 256 << 20,
        "requests": 8,
        "prompt": 100,
        "new": 300,
        "arms": {
            "stock": None,
            "rkv": {"budget": 128, "interval": 64, "arm": "rkv"},
            "rkv/pyramid/uniform": {"budget": 128, "interval": 64, "arm": "rkv/pyramid/uniform"},
            "rkv/pyramid/reasonalloc": {
                "budget": 128,
                "interval": 64,
                "arm": "rkv/pyramid/reasonalloc",
            },
            # Looks at attention as best does, whose costs are of no use to random weights.
            "value_aware/pyramid/uniform": {
                "budget": 128,
                "interval": 64,
                "arm": "value_aware/pyramid/uniform",
            },
            "value_aware/pyramid/uniform, int8:int4": {
                "budget": 128,
                "interval": 64,
                "arm": "value_aware/pyramid/uniform",
                "kv_dtype": "int8:int4",
            },
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--run", nargs=2, metavar=("CASE", "ARM"), help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print("RESULT", json.dumps(run(CASES[options.run[0]], options.run[1], options.model)))
        return
    for name in options.cases:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), case["layers"])
            found: dict[str, list[dict[str, float]]] = {arm: [] for arm in case["arms"]}
            for turn in range(options.repeats):
                order = list(case["arms"])
                for arm in order if turn % 2 == 0 else order[::-1]:
                    print(f"{name}: {arm}, run {turn + 1}", file=sys.stderr)
                    found[arm].append(child(name, arm, folder))
        show(name, found)


def child(case: str, arm: str, folder: str) -> dict[str, float]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--run", case, arm, "--model", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return result
    raise SystemExit(f"{case}, {arm} failed:\n{done.stderr[-3000:]}")


def save_model(folder: Path, layers: int) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def run(case: dict[str, Any], arm: str, folder: Path) -> dict[str, float]:
    """Steps, seconds, preemptions and most requests running at once."""
    import torch
    from serve_traffic import draw_lengths
    from served import serve
    from vllm import LLM

    settings = case["arms"][arm]
    more = {"additional_config": {"reasonalloc": settings}} if settings else {}
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1728,
        block_size=32,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        kv_cache_memory_bytes=case["memory"],
        **more,
    )
    generator = torch.Generator().manual_seed(0)
    if "mix" in case:
        lengths = draw_lengths(case["mix"], case["requests"], 0.25, 0)
        lengths = [(min(prompt, 1728 - new), new) for prompt, new in lengths]
    else:
        lengths = [(case["prompt"], case["new"])] * case["requests"]
    prompts = [torch.randint(2, 97, (n,), generator=generator).tolist() for n, _ in lengths]
    done = serve(llm, prompts, [new for _, new in lengths])
    return {
        "steps": done.steps,
        "seconds": done.seconds,
        "tokens_per_second": sum(new for _, new in lengths) / done.seconds,
        "preemptions": done.preemptions,
        "running": done.running,
    }


def show(name: str, found: dict[str, list[dict[str, float]]]) -> None:
    def median(arm: str, what: str) -> float:
        return statistics.median(run[what] for run in found[arm])

    print(f"\n{name}, float32, {len(next(iter(found.values())))} runs each\n")
    print("| arm | steps | preemptions | most running | seconds | tok/s | tok/s / stock |")
    print("|---|---|---|---|---|---|---|")
    stock = median("stock", "tokens_per_second")
    for arm in found:
        speed = median(arm, "tokens_per_second")
        print(
            f"| {arm} | {median(arm, 'steps'):.0f} | {median(arm, 'preemptions'):.0f} | "
            f"{median(arm, 'running'):.0f} | {median(arm, 'seconds'):.1f} | {speed:.0f} | "
            f"{speed / stock:.2f} |"
        )


if __name__ == "__main__":
    main()
