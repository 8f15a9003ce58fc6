"""What holds of every model: batches with unequal padding, turns, and what caches hold then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import reasonalloc
from models import prompt
from reasonalloc.integrations.hf import own_cache
from reasonalloc.planning.memory import MemoryPlan

SMALL: dict[str, Any] = {"budget": 16, "interval": 8, "window": 4}
PADDED = [0, 9, 4]  # columns of padding in front of each sequence of the batch


def batch() -> tuple[Tensor, Tensor]:
    """Ids and mask of three prompts with unequal left padding."""
    ids = prompt(26, 3, seed=5)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDED):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return ids, mask


def generated(model: Any, ids: Tensor, mask: Tensor, new: int, **settings: Any) -> Tensor:
    """The new tokens, [batch, new]."""
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **settings)
    return out[:, ids.shape[1] :]


def check_rising(cache: Any) -> None:
    """Kept positions rise in every run, and all lie within the text."""
    slabs = [layer.compressor.slab for layer in cache.layers if hasattr(layer, "compressor")]
    assert slabs
    for slab in slabs:
        rows = slab.as_rows()
        kept, lengths = rows.gather(rows.positions), rows.lengths
        for row in range(slab.batch):
            for head, length in enumerate(lengths[row].tolist()):
                own = kept[row, head, :length]
                assert bool((own[1:] > own[:-1]).all())
                assert int(own[-1]) == cache.get_seq_length() - 1 - PADDED[row]


def check_a_budget_for_everything(model: Any, kinds: int = 20, **settings: Any) -> None:
    """It changes nothing, and neither does having had it; texts have more ``kinds`` of tokens."""
    ids, mask = batch()
    full = generated(model, ids, mask, 100)
    assert len(full.unique()) > kinds
    with reasonalloc.attach(model, budget=128, **settings):
        assert torch.equal(generated(model, ids, mask, 100), full)
    assert torch.equal(generated(model, ids, mask, 100), full)


def check_a_small_budget(model: Any, new: int, static: bool = True, **settings: Any) -> None:
    """Tokens change; a sequence alone and static steps give the same; positions rise."""
    ids, mask = batch()
    full = generated(model, ids, mask, new)
    with reasonalloc.attach(model, **SMALL, **settings) as attached:
        cache = attached.new_cache()
        small = generated(model, ids, mask, new, past_key_values=cache)
        assert not torch.equal(small, full)
        check_rising(cache)
        own = ids[1:2, PADDED[1] :]
        assert torch.equal(generated(model, own, torch.ones_like(own), new)[0], small[1])
    if static:
        with reasonalloc.attach(model, **SMALL, **settings, step="static"):
            assert torch.equal(generated(model, ids, mask, new), small)


def check_compiled_steps(model: Any, continues: bool = True) -> None:
    """The tokens of plain steps: in a batch and alone, in a further turn, on a copied cache."""
    ids, mask = batch()
    found: list[list[Tensor]] = []
    for step in ("eager", "compile"):
        with reasonalloc.attach(model, **SMALL, step=step) as attached:
            cache = attached.new_cache()
            out = generated(model, ids, mask, 30, past_key_values=cache)
            own = ids[1:2, PADDED[1] :]
            alone = generated(model, own, torch.ones_like(own), 30)
            assert cache.recorder.compressions and torch.equal(alone[0], out[1])
            found.append([out])
            if continues:
                text = torch.cat([ids, out, prompt(5, 3, seed=8)], dim=1)
                seen = torch.cat([mask, torch.ones_like(text[:, ids.shape[1] :])], dim=1)
                for one in (copy.deepcopy(cache), cache):
                    found[-1].append(generated(model, text, seen, 20, past_key_values=one))
                assert torch.equal(found[-1][1], found[-1][2])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def check_planned_bytes(model: Any, planned: MemoryPlan) -> Any:
    """A cache of two sequences has them after a prompt of 30 tokens and ten more; returns it."""
    with torch.no_grad(), reasonalloc.attach(model, **SMALL) as attached:
        cache = attached.new_cache()
        model(prompt(30, 2), past_key_values=cache)
        for step in range(10):
            assert cache.kv_bytes == planned.kv_bytes(30 + step)
            assert cache.bookkeeping_bytes == planned.bookkeeping_bytes
            model(prompt(1, 2, seed=step), past_key_values=cache)
    return cache


def full_cache(model: Any, more: int) -> Any:
    """transformers' own cache after 30 tokens and ``more`` of two sequences."""
    full = own_cache.full_cache(model)
    with torch.no_grad():
        model(prompt(30, 2), past_key_values=full)
        model(prompt(more, 2), past_key_values=full)
    return full


def check_two_turns(
    model: Any, new: int, after_reset: Callable[[Any], None] = lambda cache: None
) -> None:
    """A turn of ``new`` tokens on a cache is as in a fresh run, also after the cache was reset."""
    first, question = prompt(20, seed=1), prompt(new, seed=2)
    with reasonalloc.attach(model, budget=128) as attached:
        cache = attached.new_cache()
        text = model.generate(first, past_key_values=cache, max_new_tokens=8, do_sample=False)
        text = torch.cat([text, question], dim=1)
        ones = torch.ones_like(text)
        fresh = generated(model, text, ones, 8)
        assert torch.equal(generated(model, text, ones, 8, past_key_values=cache), fresh)
        cache.reset()
        after_reset(cache)
        assert torch.equal(generated(model, text, ones, 8, past_key_values=cache), fresh)
