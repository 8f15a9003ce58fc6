"""A model run from one of its layers on, with that layer's attention output replaced."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from reasonalloc.calibration.layer_replay import Seen
from reasonalloc.integrations.hf.attention import attention_forward, mask_forward
from reasonalloc.integrations.hf.model import check_followed, decoder_of
from reasonalloc.planning.shapes import text_config

_IMPLEMENTATION = "reasonalloc-suffix"


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
        self.resumes = True
        self._model = model
        self._hidden: dict[int, Tensor] = {}
        self._replaced: tuple[int, Tensor] | None = None
        self._capturing = False
        self._blocks = _decoder_layers(model)
        self._original = model.config._attn_implementation

    def __enter__(self) -> SuffixRunner:
        AttentionInterface.register(_IMPLEMENTATION, self._attention)
        AttentionMaskInterface.register(_IMPLEMENTATION, mask_forward)
        self._model.set_attn_implementation(_IMPLEMENTATION)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._model.set_attn_implementation(self._original)
        # The registry keeps the attention function, and this object with it.
        self.seen, self._hidden, self._replaced = {}, {}, None

    def full(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Run the full pass, which everything is captured from.

        Args:
            ids: [1, n] int64 token ids.
            positions: [m] int64, where logits are wanted.

        Returns:
            Logits [1, m, vocabulary] in the model's dtype.
        """
        self.seen, self._hidden, self._replaced = {}, {}, None
        hooks = [
            block.register_forward_hook(self._hook(index), with_kwargs=True)
            for index, block in enumerate(self._blocks)
        ]
        self._capturing = True
        try:
            logits = self._forward(ids, positions)
            check_followed(self._model, self.layers, self.seen)
            return logits
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
        self._replaced = (layer, outputs)
        try:
            for index in skipped:
                hidden = self._hidden[layer].expand(batch, -1, -1)
                # An instance's own `forward`: the layer keeps its attributes, whatever reads them.
                self._blocks[index].__dict__["forward"] = lambda *_, _hidden=hidden, **__: _hidden
            return self._forward(ids.expand(batch, -1), positions)
        finally:
            self._replaced = None
            for index, forward in own.items():
                if forward is None:
                    self._blocks[index].__dict__.pop("forward", None)
                else:
                    self._blocks[index].__dict__["forward"] = forward

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        logits: Tensor = self._model(ids, use_cache=False, logits_to_keep=positions).logits
        return logits

    def _hook(self, index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.resumes = self.resumes and isinstance(output, Tensor)
            if index in self.layers:
                self._hidden[index] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        layer = module.layer_idx
        if self._replaced is not None and self._replaced[0] == layer:
            return self._replaced[1], None
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        how: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, **kwargs}
        output, _ = attention_forward(module, query, key, value, attention_mask, **how)
        if self._capturing and layer in self.layers:
            self.seen[layer] = Seen(layer, query, key, value, output, scaling, softcap, s_aux)
        return output, None


def _decoder_layers(model: Any) -> list[nn.Module]:
    """Return the decoder's layers in order, or none where they are not found."""
    layers = getattr(decoder_of(model), "layers", None)
    wanted = text_config(model).num_hidden_layers
    if isinstance(layers, nn.ModuleList) and len(layers) == wanted:
        return list(layers)
    return []
