"""What vLLM does on this device: tokens, graphs, memory, throughput; parts of gpu_check.py.

    python benchmarks/gpu_engine.py throughput --mix long --share 0.25 --budget 1024 --out row.json
    python benchmarks/gpu_engine.py near-ties

Random weights, so only what does not depend on the text is measured. ``throughput``: answers of
Llama-8B's shape in bfloat16, in a pool that holds ``--share`` of what all requests of the mix would
want without a budget. Exit code 1 where the device does otherwise than it should.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# In this process: scheduler and worker are looked at.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")

SHAPES: dict[str, dict[str, int]] = {
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}


@dataclass(frozen=True)
class Mix:
    """Requests: how many, tokens that prompts share, and means of their own and of answers."""

    requests: int
    shared: int
    prompt: int
    answer: int

    def lengths(self, scale: float) -> list[tuple[int, int]]:
        """Own tokens and answer of each request: between half and three halves of the mean."""
        steps = [0.5 + i / max(1, self.requests - 1) for i in range(self.requests)]
        mixed = steps[1::2] + steps[::2][::-1]  # neither long nor short ones first
        return [
            (max(1, round(scale * self.prompt * a)), max(2, round(scale * self.answer * b)))
            for a, b in zip(steps, mixed, strict=True)
        ]


MIXES = {
    "short": Mix(512, 256, 256, 256),
    "long": Mix(64, 64, 192, 4096),
    "mixed": Mix(128, 128, 256, 1536),
}
BUDGET = {"budget": 64, "interval": 32, "arm": "rkv/uniform/adakv"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["near-ties", "graphs", "plateau", "throughput"])
    parser.add_argument(
        "--shape", choices=SHAPES, help="default: llama-8b for throughput, else tiny"
    )
    parser.add_argument("--dtype", help="default: float32 for graphs, else bfloat16")
    parser.add_argument("--mix", choices=MIXES, default="long")
    parser.add_argument("--share", type=float, default=1.0, help="of the pool that stock wants")
    parser.add_argument("--budget", type=int, default=0, help="0: stock")
    parser.add_argument("--arm", default="rkv")
    parser.add_argument("--prompt", choices=["evict", "pin"], default="pin")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths of the mix")
    parser.add_argument("--requests", type=int, help="instead of the mix's")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.share <= 0 or options.scale <= 0:
        parser.error("--share and --scale are above 0")
    options.shape = options.shape or ("llama-8b" if options.what == "throughput" else "tiny")
    options.dtype = options.dtype or ("float32" if options.what == "graphs" else "bfloat16")
    todo = {
        "near-ties": near_ties,
        "graphs": graphs,
        "plateau": plateau,
        "throughput": throughput,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder), options.shape)
        found = todo[options.what](Path(folder), options)
    problems = found.pop("problems", [])
    text = json.dumps(found)
    print(text)
    if options.out is not None:
        options.out.write_text(text, encoding="utf-8")
    if problems:
        raise SystemExit("\n".join(problems))


def save_config(folder: Path, shape: str) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)


def save_weights(folder: Path, dtype: Any) -> Any:
    """A model with random weights in the folder."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).to(dtype)
    model.save_pretrained(folder)
    return model.eval()


def engine(
    folder: Path, settings: dict[str, Any] | None, options: argparse.Namespace, **more: Any
) -> Any:
    from vllm import LLM

    if settings:
        more["additional_config"] = {"reasonalloc": settings}
    given = {
        "dtype": options.dtype,
        "enforce_eager": options.eager,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni",
        "max_model_len": 8192,
        "kv_cache_memory_bytes": 256 << 20,
        "disable_log_stats": True,
    }
    return LLM(str(folder), **{**given, **more})


def random_prompts(lengths: Sequence[int], vocabulary: int, seed: int = 1) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def greedy(llm: Any, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    from vllm import SamplingParams

    limits = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    outputs = llm.generate(asked, limits, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def close(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()


def near_ties(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """vLLM's tokens are transformers' until two choices lie within rounding of each other.

    Rounding moves logits by some units of the dtype, and, where it moves a token, everything after
    it. So the first difference of each request must be a near-tie of transformers' logits, and
    under a budget it may not come much earlier than without one.
    """
    import torch

    import reasonalloc

    dtype = getattr(torch, options.dtype)
    model = save_weights(folder, dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, new = model.to(device), 200
    prompts = random_prompts([40, 150, 90, 300] * 4, model.config.vocab_size)
    found: dict[str, Any] = {"requests": len(prompts), "new_tokens": new}
    problems = []
    for name, settings in (("stock", None), ("budget", BUDGET)):
        llm = engine(folder, settings, options)
        tokens = greedy(llm, prompts, new)
        close(llm)
        equal, worst = [], 0.0
        for prompt, own in zip(prompts, tokens, strict=True):
            ids = torch.tensor([prompt], device=device)
            given = {"max_new_tokens": new, "do_sample": False, "output_logits": True}
            given |= {"return_dict_in_generate": True, "eos_token_id": None}
            attached = reasonalloc.attach(model, **settings) if settings else None
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
            if attached is not None:
                attached.detach()
            theirs = out.sequences[0, len(prompt) :].tolist()
            first = next((i for i in range(new) if own[i] != theirs[i]), new)
            equal.append(first)
            if first < new:
                logits = out.logits[first][0].float()
                gap = float(logits[theirs[first]] - logits[own[first]])
                worst = max(worst, gap / float(logits.abs().max()))
        found[f"{name}_tokens_equal"] = statistics.mean(equal)
        found[f"{name}_worst_gap"] = worst
        limit = 4 * torch.finfo(dtype).eps
        if worst > limit:
            problems.append(f"{name}: a difference is no near-tie, {worst:.3g} > {limit:.3g}")
    if found["budget_tokens_equal"] < 0.5 * found["stock_tokens_equal"]:
        problems.append("with a budget tokens differ much earlier than without one")
    return {**found, "problems": problems}


def graphs(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens with CUDA graphs are those without."""
    import torch

    save_weights(folder, getattr(torch, options.dtype))
    prompts = random_prompts([40, 150, 7, 300], SHAPES[options.shape]["vocab_size"])
    found, modes = [], []
    for eager in (True, False):
        options.eager = eager
        llm = engine(folder, BUDGET, options)
        modes.append(str(llm.llm_engine.vllm_config.compilation_config.cudagraph_mode))
        found.append(greedy(llm, prompts, 200))
        close(llm)
    same = found[0] == found[1]
    return {
        "mode": modes[1],
        "equal": same,
        "problems": [] if same else [f"tokens with graphs ({modes[1]}) differ from eager ones"],
    }


def plateau(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Blocks and memory of a device stay what they are from the first compression on."""
    import torch
    from vllm import SamplingParams

    save_weights(folder, getattr(torch, options.dtype))
    llm = engine(folder, BUDGET, options)
    core = llm.llm_engine.engine_core.engine_core
    blocks = core.scheduler.kv_cache_manager.block_pool
    new = 4096 if torch.cuda.is_available() else 600
    limits = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for i, prompt in enumerate(random_prompts([40, 150], SHAPES[options.shape]["vocab_size"])):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, limits)
    held, memory, step = [], [], 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        step += 1
        if step % 128 == 0 and llm.llm_engine.has_unfinished_requests():
            held.append(blocks.num_gpu_blocks - 1 - blocks.get_num_free_blocks())
            memory.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    close(llm)
    late, early = memory[-1], memory[1]
    problems = []
    if len(set(held[1:])) != 1:
        problems.append(f"blocks held change: {held}")
    if late > early + (8 << 20):
        problems.append(f"memory grew from {early} to {late} bytes")
    return {"blocks": held[-1], "early_bytes": early, "late_bytes": late, "problems": problems}


def throughput(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, steps, preemptions, and times to and between tokens, of one mix."""
    from served import serve

    shape, mix = SHAPES[options.shape], MIXES[options.mix]
    if options.requests:
        mix = Mix(options.requests, mix.shared, mix.prompt, mix.answer)
    lengths, shared = mix.lengths(options.scale), max(1, round(options.scale * mix.shared))
    itemsize = 4 if options.dtype == "float32" else 2
    entry = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    wanted = sum(shared + own + answer for own, answer in lengths) * entry * itemsize
    longest = max(shared + own + answer for own, answer in lengths)
    pool = max(round(options.share * wanted), (longest + 256) * entry * itemsize)
    settings = None
    if options.budget:
        settings = {
            "budget": options.budget,
            "arm": options.arm,
            "prompt": options.prompt,
            "interval": min(128, options.budget),
        }
    llm = engine(
        folder,
        settings,
        options,
        load_format="dummy",
        max_model_len=longest + 16,
        kv_cache_memory_bytes=pool,
        max_num_seqs=len(lengths),
        enable_prefix_caching=True,
    )
    greedy(llm, random_prompts([8, 9], shape["vocab_size"], seed=3), 4)  # warm
    system = random_prompts([shared], shape["vocab_size"], seed=2)[0]
    own = random_prompts([own for own, _ in lengths], shape["vocab_size"])
    answers = [answer for _, answer in lengths]
    done = serve(llm, [system + prompt for prompt in own], answers)
    close(llm)
    times = zip(done.first, done.last, answers, strict=True)
    return {
        "requests": len(lengths),
        "pool_bytes": pool,
        "tokens_per_second": sum(answers) / done.seconds,
        "seconds": done.seconds,
        "steps": done.steps,
        "preemptions": done.preemptions,
        "most_running": done.running,
        **quartiles("ttft", done.first),
        **quartiles("tpot", [(last - first) / (answer - 1) for first, last, answer in times]),
    }


def quartiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {f"{name}_q1": low, f"{name}_median": middle, f"{name}_q3": high}


if __name__ == "__main__":
    main()
