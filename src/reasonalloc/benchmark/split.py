"""Where the time of a decode step goes: attention (its cache included), compression, the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.slab_layer import SlabLayer


@dataclass
class Split:
    """Seconds, summed over the steps that were split.

    Attributes:
        total: of the steps.
        attention: storing the new token and attending, compression not included.
        compression: scoring, allocating, selecting and moving at boundaries.
    """

    total: float = 0.0
    attention: float = 0.0
    compression: float = 0.0

    @property
    def rest(self) -> float:
        """Everything else: the products with the weights, above all."""
        return self.total - self.attention - self.compression


@contextmanager
def splitting(model: Any, cache: Any, device: torch.device) -> Iterator[Split]:
    """Inside, the model's attention and the cache's compressions are timed.

    A GPU is waited for at every part, so that the parts are right and their sum is too long.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    split = Split()
    name = model.config.get_text_config(decoder=True)._attn_implementation
    original = ALL_ATTENTION_FUNCTIONS[name]

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start, nested = now(), split.compression
            result = function(*args, **kwargs)
            own = now() - start - (split.compression - nested)
            setattr(split, part, getattr(split, part) + own)
            return result

        return run

    with ExitStack() as stack:
        ALL_ATTENTION_FUNCTIONS[name] = timed(original, "attention")
        stack.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, name)  # what is registered stands again
        cache.update = timed(cache.update, "attention")
        stack.callback(cache.__dict__.pop, "update")
        if isinstance(cache, BudgetCache):
            for layer in cache.layers:
                if isinstance(layer, SlabLayer):
                    own = layer.compressor.__dict__
                    own["_compress"] = timed(layer.compressor._compress, "compression")
                    stack.callback(own.pop, "_compress")
        yield split
