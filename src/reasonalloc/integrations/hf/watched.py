"""A model whose layers with a budget keep everything and show what their attention sees."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.watched import Seen, WatchedLayer
from reasonalloc.errors import CompressionNeverHappened
from reasonalloc.integrations.hf.attachment import Attachment, attach_config
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.model import inner_model
from reasonalloc.integrations.hf.versions import with_cache

_NEVER_REACHED = 1 << 20  # tokens: nothing is evicted whatever the budget is


class Watched:
    """A model that runs as with its full cache, watched; see ``watching``.

    Args:
        model: a transformers model.
        attachment: of the model.
        show: gets what each layer under a budget has seen, in every call.
    """

    def __init__(self, model: Any, attachment: Attachment, show: Callable[[Seen], None]) -> None:
        self._model, self._attachment, self._show = model, attachment, show
        known = inspect.signature(type(model).forward).parameters
        self._keeps = "logits_to_keep" in known

    def logits(
        self,
        ids: Tensor,
        positions: Tensor,
        instead: Mapping[int, Tensor] | None = None,
        first: int = 0,
        own: bool = False,
    ) -> Tensor:
        """Run texts without padding.

        Args:
            ids: [batch, n] int64 token ids.
            positions: [m] int64, where logits are wanted.
            instead, own: what attention gives instead, see ``WatchedLayer``: by layer; everywhere.
            first: position of the first token.

        Returns:
            Logits [batch, m, vocabulary] in the model's dtype.
        """
        cache = self._cache({} if instead is None else instead, own)
        given = {"logits_to_keep": positions} if self._keeps else {}
        if first:
            places = torch.arange(first, first + ids.shape[1], device=ids.device)
            given["position_ids"] = places.expand_as(ids)
        out: Tensor = self._model(ids, **with_cache(given, cache), use_cache=True).logits
        return out if self._keeps else out[:, positions]

    def generate(self, ids: Tensor, max_new_tokens: int) -> None:
        """Continue a prompt, token ids [1, n], greedily."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompressionNeverHappened)
            self._attachment.generate(
                ids,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **with_cache({}, self._cache({}, own=False)),
            )

    def _cache(self, instead: Mapping[int, Tensor], own: bool) -> BudgetCache:
        def layer(index: int, *settings: Any, readers: int) -> LayerCompressor:
            given = instead.get(index)
            return WatchedLayer(
                index, *settings, readers=readers, show=self._show, instead=given, own=own
            )

        return self._attachment.cache_of(layer)


@contextmanager
def watching(model: Any, show: Callable[[Seen], None]) -> Iterator[Watched]:
    """Inside, a model can be watched while it runs as with its full cache.

    It is attached to a budget that nothing reaches: layers are seen as those under a budget are,
    whatever the model hands to its cache and however its modules attend.

    Args:
        model: a decoder-only transformers model, not attached to anything.
        show: gets what each layer under a budget has seen, in every call.

    Raises:
        UsageError: the model has a budget already.
        UnsupportedError: a model that cannot run under a budget.
    """
    config = CompressionConfig(_NEVER_REACHED, Arm("random"), record="off", attention="eager")
    with attach_config(model, config) as attachment:
        yield Watched(inner_model(model), attachment, show)
