"""What tests of engines share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

import reasonalloc
import reasonalloc.core.compressor
from models import VOCAB

# What rounding may change, generously: logits (absolute), scores (relative to the largest one).
LOGIT, SCORE = 2e-4, 2e-6


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


def decided(
    model: Any, prompts: Sequence[Sequence[int]], new: int, settings: dict[str, Any]
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of transformers, and how far each prompt's closest decision was from a tie.

    Returns:
        The tokens, and [prompts] float32: gaps between the first and the second choice, of tokens
        and of candidates for eviction, in units of what rounding may change.
    """
    width = max(len(prompt) for prompt in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    room = torch.full((len(prompts),), torch.inf)
    original = reasonalloc.core.compressor.decide

    signature = inspect.signature(original)

    def watched(candidates: Any, config: Any, policy: Any, *rest: Any, **more: Any) -> Any:
        keep, budgets = original(candidates, config, policy, *rest, **more)
        # Whole numbers, or rounded by the policy itself.
        if config.arm.policy in ("streaming_llm", "random", "knorm", "lazy_eviction"):
            return keep, budgets
        scores = policy.score(candidates).float()
        sinks = candidates.evictable & ((candidates.positions < config.n_sink) | scores.isinf())
        given = signature.bind(candidates, config, policy, *rest, **more).arguments
        if pinned := given.get("pinned"):
            sinks |= pinned.mask(candidates.positions)
        recent = (budgets.double() * policy.recent_fraction).long()
        late = candidates.index >= (candidates.lengths - recent)[..., None]
        open_ = candidates.evictable & ~sinks & ~late  # the others stay, whatever their scores
        size = scores.where(open_, 0.0).abs().amax(dim=-1).clamp_min(1e-30)
        stays = scores.masked_fill(~(open_ & keep), torch.inf).amin(dim=-1)
        goes = scores.masked_fill(~open_ | keep, -torch.inf).amax(dim=-1)
        gaps = [((stays - goes) / size).amin(dim=1)]
        if config.arm.heads.startswith(("adakv", "reasonalloc")):
            # Heads that share a layer's total: its last place, by raw scores and by scores that
            # are comparable between heads of different lengths.
            wanted = budgets.sum(dim=1) - keep.shape[1] * candidates.window
            wanted = (wanted - sinks.sum(dim=(1, 2))).clamp_min(1)[:, None]
            for pooled in (scores, scores * (candidates.lengths - candidates.window)[..., None]):
                flat = pooled.masked_fill(~open_, -torch.inf).flatten(1)
                flat = torch.nn.functional.pad(flat, (0, 1), value=-torch.inf)
                flat = flat.sort(descending=True).values
                gap = (flat.gather(1, wanted - 1) - flat.gather(1, wanted)).squeeze(1)
                gaps.append(gap / flat[:, 0].abs().clamp_min(1e-30))
        full = budgets.sum(dim=1) == candidates.lengths.sum(dim=1)
        for gap in gaps:
            gap = gap.nan_to_num(nan=torch.inf).masked_fill(full, torch.inf)
            room.copy_(torch.minimum(room, gap / SCORE))
        return keep, budgets

    reasonalloc.core.compressor.decide = watched
    try:
        with reasonalloc.attach(model, **settings) if settings else nullcontext():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        reasonalloc.core.compressor.decide = original
    for logits in out.logits:
        first, second = logits.float().topk(2, dim=-1).values.unbind(dim=-1)
        room = torch.minimum(room, (first - second) / LOGIT)
    return out.sequences[:, width:].tolist(), room


def undoubted(
    model: Any, lengths: Sequence[int], new: int, tries: int = 4, **settings: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of given lengths that leave no doubt, and the greedy tokens of transformers.

    Engines round differently, and so do processors: where two tokens or two candidates for eviction
    lie as close as that, any of them is right. Of several random prompts of each length the one is
    taken whose closest decision is the least close.
    """
    candidates = [p for seed in range(tries) for p in random_prompts(lengths, seed)]
    tokens, room = decided(model, candidates, new, settings)
    best = room.view(tries, len(lengths)).argmax(dim=0)
    chosen = [int(turn) * len(lengths) + i for i, turn in enumerate(best)]
    assert min(room[chosen]) > 1, "no prompt leaves no doubt: give more tries"
    return [candidates[i] for i in chosen], [tokens[i] for i in chosen]


def pool(llm: Any) -> Any:
    """The scheduler's block pool."""
    return scheduler(llm).kv_cache_manager.block_pool


def scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def manager(llm: Any) -> Any:
    """The block manager of the layers under a budget."""
    managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
    return next(each for each in managers if hasattr(each, "admission"))


def builder(llm: Any) -> Any:
    """The worker's metadata builder of the layers under a budget."""
    groups = [group for groups in worker(llm).model_runner.attn_groups for group in groups]
    builders = [group.get_metadata_builder(0) for group in groups]
    return next(each for each in builders if hasattr(each, "runs"))


def worker(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def prefilled(llm: Any, run: Callable[[], Any]) -> int:
    """Tokens of prompts that are computed while something runs."""
    total, original = 0, scheduler(llm).schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal total
        output = original(*args, **kwargs)
        for name, tokens in output.num_scheduled_tokens.items():
            request = scheduler(llm).requests[name]
            before = request.num_computed_tokens - tokens
            total += max(min(request.num_computed_tokens, request.num_prompt_tokens) - before, 0)
        return output

    scheduler(llm).schedule = watched
    try:
        run()
    finally:
        scheduler(llm).schedule = original
    return total


def mostly(found: Sequence[list[int]], expected: Sequence[list[int]]) -> bool:
    """Whether three quarters of the requests have the same tokens to their end."""
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    return same >= 0.75 * len(expected)
