"""Batches with unequal padding, what models write after them, and what caches hold then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models import prompt

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
