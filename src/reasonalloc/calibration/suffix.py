"""A model run from one of its layers on, with that layer's attention output replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from reasonalloc.core.watched import Seen
from reasonalloc.integrations.hf.model import decoder_of
from reasonalloc.integrations.hf.watched import Watched, watching
from reasonalloc.planning.shapes import layer_shapes, text_config


class SuffixRunner:
    """Runs a model on one text: in full, and from a layer on. Use it as a context manager.

    A run from layer ``k`` on needs what the full pass fed to layer ``k``; the layers before it hand
    that on instead of computing anything. Where a model's layers are not a plain sequence (they
    cannot be found, or return more than the hidden states), every run starts at layer 0.

    Args:
        model: a decoder-only transformers model, not attached to anything.
        layers: indices of the layers whose attention is to be seen and replaced.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.layers = layers
        self.seen: dict[int, Seen] = {}
        self._model = model
        shapes = layer_shapes(text_config(model), type(model).__name__)
        #: Whether layers that read what others hold may run without them: not if caches are shared.
        self.resumes = not any(s.readers or s.again is not None for s in shapes)
        self._hidden: dict[int, Tensor] = {}
        self._capturing = False
        self._blocks = _decoder_layers(model)
        self._watching = watching(model, self._show)
        self._watched: Watched | None = None

    def __enter__(self) -> SuffixRunner:
        self._watched = self._watching.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watching.__exit__(kind, error, trace)

    def _show(self, seen: Seen) -> None:
        if self._capturing and seen.layer in self.layers:
            self.seen[seen.layer] = seen

    def full(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run the full pass, which everything is captured from.

        Args:
            ids: [1, n] int64 token ids.
            positions: [m] int64, where logits are wanted.

        Returns:
            Logits [1, m, vocabulary] in the model's dtype.
        """
        self.seen, self._hidden = {}, {}
        hooks = [
            block.register_forward_hook(self._hook(index), with_kwargs=True)
            for index, block in enumerate(self._blocks)
        ]
        self._capturing = True
        try:
            return self._logits(ids, positions)
        finally:
            self._capturing = False
            for hook in hooks:
                hook.remove()

    def run(self, ids: Tensor, positions: Tensor, layer: int, outputs: Tensor) -> Tensor:
        """Run with the attention of ``layer`` replaced, after ``full`` on the same text.

        Args:
            ids, positions: as for ``full``.
            layer: one of ``layers``.
            outputs: [batch, n, query_heads, value_dim], what the layer's attention gives.

        Returns:
            Logits [batch, m, vocabulary].
        """
        batch = outputs.shape[0]
        skipped = range(layer) if self.resumes and layer in self._hidden else range(0)
        own = {index: self._blocks[index].__dict__.get("forward") for index in skipped}
        try:
            for index in skipped:
                hidden = self._hidden[layer].expand(batch, -1, -1)
                # An instance's own `forward`: the layer keeps its attributes, whatever reads them.
                self._blocks[index].__dict__["forward"] = lambda *_, _hidden=hidden, **__: _hidden
            return self._logits(ids.expand(batch, -1), positions, {layer: outputs})
        finally:
            for index, forward in own.items():
                if forward is None:
                    self._blocks[index].__dict__.pop("forward", None)
                else:
                    self._blocks[index].__dict__["forward"] = forward

    def _logits(
        self, ids: Tensor, positions: Tensor, instead: Mapping[int, Tensor] | None = None
    ) -> Tensor:
        if self._watched is None:
            raise RuntimeError("a runner outside of its context")
        return self._watched.logits(ids, positions, instead)

    def _hook(self, index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.resumes = self.resumes and isinstance(output, Tensor)
            if index in self.layers:
                self._hidden[index] = args[0] if args else kwargs["hidden_states"]

        return hook


def _decoder_layers(model: Any) -> list[nn.Module]:
    """Return the decoder's layers in order, or none where they are not found."""
    layers = getattr(decoder_of(model), "layers", None)
    wanted = text_config(model).num_hidden_layers
    if isinstance(layers, nn.ModuleList) and len(layers) == wanted:
        return list(layers)
    return []
