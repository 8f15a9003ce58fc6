"""What stands for attention modules that compute attention themselves: one class per family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reasonalloc.attention.dense import repeat_heads
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf import attention
from reasonalloc.integrations.hf.inline.alibi import (
    Bias,
    ExactBias,
    RoundedBias,
    slopes_of_powers,
    slopes_up_to,
)
from reasonalloc.integrations.hf.inline.masks import (
    local_mask,
    new_columns,
    new_positions,
    without_need,
)
from reasonalloc.integrations.hf.slab_layer import layer_of

Rotation = tuple[Tensor, Tensor]
_EXACT = 2**16  # positions in two parts of eight bits, see ``ExactBias``


class Stand:
    """Stands for ``forward`` of an attention module; its weights and hooks stay where they are.

    Args:
        module: the attention module.
        config: of the model.
    """

    def __init__(self, module: Any, config: Any) -> None:
        self._module: Any = module
        self._layer = int(module.layer_id if hasattr(module, "layer_id") else module.layer_idx)

    def _heads(self, states: Tensor, heads: int) -> Tensor:
        """[batch, q, heads * width] as [batch, heads, q, width]."""
        apart: Tensor = states.unflatten(-1, (heads, -1)).transpose(1, 2)
        return apart

    def _attend(
        self,
        states: Sequence[Tensor],
        cache: Any,
        mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
    ) -> Tensor:
        """Store keys and values, attend as every other model does.

        Args:
            states: query [batch, query_heads, q, width], key and value [batch, kv_heads, q, ...].
            cache: of the model, or None.
            mask: as the model made it.
            scaling: of the attention logits.
            dropout: of attention weights, in training.

        Returns:
            [batch, q, query_heads * value_dim].
        """
        query, key, value = states
        if cache is not None:
            key, value = cache.update(key, value, self._layer)
        if layer_of(key) is None:  # a plain forward pass, or a layer with a window
            key, value = (repeat_heads(one, query.shape[1]) for one in (key, value))
        out: Tensor = attention.attention_forward(
            self._module,
            query,
            key,
            value,
            mask,
            scaling=scaling,
            dropout=dropout if self._module.training else 0.0,
        )[0]
        return out.flatten(2)


class Falcon(Stand):
    """Falcon: fused projections of any number of KV heads; rotary embedding or ALiBi."""

    def __init__(self, module: Any, config: Any) -> None:
        super().__init__(module, config)
        self._bias: Bias | None = None
        if config.alibi:
            if config._attn_implementation == "eager":
                raise UnsupportedError(
                    "this Falcon was loaded with attn_implementation='eager', with which "
                    "transformers adds the ALiBi biases twice: load it with 'sdpa'"
                )
            slopes = slopes_of_powers(module.num_heads)
            self._bias = RoundedBias(slopes, torch.bfloat16, None)

    def __call__(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        position_embeddings: Rotation | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """See transformers' ``FalconAttention``."""
        module, scaling = self._module, self._module.head_dim**-0.5
        query, key, value = self._states(module.query_key_value(hidden_states))
        dropout = 0.0
        if self._bias is not None:
            places = new_positions(layer_past, attention_mask, query, position_ids)
            query, key = self._bias.folded(query, key, places, scaling)
            dropout = module.attention_dropout.p
        elif position_embeddings is not None:
            query, key = (rotated(one, position_embeddings) for one in (query, key))
        states = (query, key, value)
        out = self._attend(states, layer_past, attention_mask, scaling, dropout)
        return module.dense(out), None

    def _states(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, [batch, heads, q, head_dim], of fused projections."""
        module = self._module
        groups = 1 if module.multi_query else module.num_heads
        if module.new_decoder_architecture:
            groups = module.num_kv_heads  # of query heads, each followed by its key and its value
        each = fused.unflatten(-1, (groups, -1, module.head_dim))  # [batch, q, groups, heads, dim]
        query = each[..., :-2, :].flatten(2, 3).transpose(1, 2)
        return query, each[..., -2, :].transpose(1, 2), each[..., -1, :].transpose(1, 2)


class GPTNeoXJapanese(Stand):
    """GPT-NeoX Japanese: a rotary embedding of the first channels; the bias is added later."""

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        position_embeddings: Rotation | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Tensor | None]:
        """See transformers' ``GPTNeoXJapaneseAttention``."""
        module = self._module
        fused = self._heads(module.query_key_value(hidden_states), module.num_attention_heads)
        query, key, value = fused.chunk(3, dim=-1)
        if position_embeddings is not None:
            query, key = (rotated(one, position_embeddings) for one in (query, key))
        states = (query, key, value.contiguous())
        dropout = module.attention_dropout.p
        scaling = module.head_size**-0.5
        out = self._attend(states, layer_past, attention_mask, scaling, dropout)
        return module.dense(out), None, module.dense_bias


class Decoder(Stand):
    """XGLM and TrOCR: the decoder of BART; positions are added to the embeddings."""

    def __call__(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """See transformers' ``XGLMAttention`` and ``TrOCRAttention``."""
        module = self._module
        if key_value_states is not None:
            raise UnsupportedError(
                f"{type(module).__name__} attends to the states of an encoder, which cannot run "
                "under a KV budget: leave encoder_hidden_states out, or detach ReasonAlloc"
            )
        projections = (module.q_proj, module.k_proj, module.v_proj)
        states = [self._heads(of(hidden_states), module.num_heads) for of in projections]
        cache = past_key_values if cache is None else cache  # its name before 5.24
        out = self._attend(states, cache, attention_mask, module.scaling, module.dropout)
        return module.out_proj(out), None


class GPTNeo(Stand):
    """GPT-Neo: no scaling, and every second layer sees a window."""

    def __init__(self, module: Any, config: Any) -> None:
        super().__init__(module, config)
        self._window = config.window_size if module.attention_type == "local" else None

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """See transformers' ``GPTNeoSelfAttention``."""
        module = self._module
        projections = (module.q_proj, module.k_proj, module.v_proj)
        states = [self._heads(of(hidden_states), module.num_heads) for of in projections]
        if self._window is not None:
            attention_mask = local_mask(
                layer_past, self._layer, attention_mask, states[0], self._window
            )
        dropout = module.attn_dropout.p
        out = self._attend(states, layer_past, attention_mask, 1.0, dropout)
        return module.resid_dropout(module.out_proj(out)), None


class Bloom(Stand):
    """Bloom: ALiBi; the residual is added here."""

    def __init__(self, module: Any, config: Any) -> None:
        super().__init__(module, config)
        self._bias: Bias = RoundedBias(slopes_of_powers(module.num_heads), None, 1.0)

    def __call__(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """See transformers' ``BloomAttention``."""
        module, scaling = self._module, self._module.head_dim**-0.5
        fused = self._heads(module.query_key_value(hidden_states), module.num_heads)
        query, key, value = fused.chunk(3, dim=-1)
        places = new_positions(layer_past, attention_mask, query)
        query, key = self._bias.folded(query, key, places, scaling)
        states = (query, key, value)
        dropout = module.attention_dropout.p
        out = self._attend(states, layer_past, attention_mask, scaling, dropout)
        out = F.dropout(module.dense(out), p=module.hidden_dropout, training=module.training)
        return residual + out, None


class Mpt(Stand):
    """MPT: ALiBi that is not rounded and counts padding as well."""

    def __init__(self, module: Any, config: Any) -> None:
        super().__init__(module, config)
        self._bias: Bias = ExactBias(slopes_up_to(module.n_heads, 8))  # whatever alibi_bias_max

    def __call__(
        self,
        hidden_states: Tensor,
        position_bias: Tensor | None = None,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """See transformers' ``MptAttention``."""
        module = self._module
        cache = past_key_values if cache is None else cache  # its name before 5.24
        fused = module.Wqkv(hidden_states)
        if module.clip_qkv:
            fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        query, key, value = (self._heads(one, module.n_heads) for one in fused.chunk(3, dim=-1))
        if query.shape[2] + (0 if cache is None else cache.get_seq_length()) > _EXACT:
            raise UnsupportedError(
                f"MPT attends to {_EXACT} tokens at most under a KV budget, whose positions half "
                "precision holds exactly: shorten the text"
            )
        columns = new_columns(cache, query)
        query, key = self._bias.folded(query, key, columns, module.softmax_scale)
        states = (query, key, value)
        mask = without_need(attention_mask)
        out = self._attend(states, cache, mask, module.softmax_scale, module.attn_dropout_p)
        return module.out_proj(out), None


def rotated(states: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first channels by halves; the others stay.

    Args:
        states: [batch, heads, q, head_dim].
        rotation: cosines and sines, [batch or 1, q, channels that turn].
    """
    cosines, sines = (part.unsqueeze(1) for part in rotation)
    width = cosines.shape[-1]
    turning, rest = states[..., :width], states[..., width:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosines + torch.cat([-second, first], dim=-1) * sines
    return turned if not rest.shape[-1] else torch.cat([turned, rest], dim=-1)
