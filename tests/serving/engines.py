"""What tests of engines share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from models import VOCAB


def greedy(llm: Any, prompts: Sequence[Sequence[int]], new: int | Sequence[int]) -> list[list[int]]:
    """Token ids, without end tokens."""
    from vllm import SamplingParams

    limits = [new] * len(prompts) if isinstance(new, int) else list(new)
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in limits],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompts(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def pool(llm: Any) -> Any:
    """The scheduler's block pool."""
    return scheduler(llm).kv_cache_manager.block_pool


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler
