"""Sizes of the states of linear, Mamba and convolution layers, from a configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Names of a Mamba-2 layer's heads, head width, state width, groups and convolution, by family.
_MAMBA2 = (
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"),
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"),
    ("n_mamba_heads", "mamba_headdim", "mamba_d_state", "mamba_ngroups", "mamba_d_conv"),
)
_DELTA = (
    "linear_num_key_heads",
    "linear_key_head_dim",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_KIMI_DELTA = ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim")
#: Lightning attention (MiniMax): as many heads as attention has, and no convolution.
_LIGHTNING = ("linear_attn_alpha_factor", "linear_attn_beta_factor", "block_size")
#: Short convolutions at four places of a layer (Inkling).
_FOUR_CONVS = ("hidden_size", "conv_kernel_size", "number_of_conv_states")
#: Compressed convolutional attention (ZAYA).
_COMPRESSED_CONV = ("cca_time0", "cca_time1")
_MAMBA1 = ("mamba_expand", "hidden_size", "mamba_d_state", "mamba_d_conv", "mamba_dt_rank")


@dataclass(frozen=True)
class StateShape:
    """What a linear, Mamba or convolution layer keeps of a sequence, after any number of tokens.

    Attributes:
        convs: numbers of each convolution's state.
        recurrent: numbers of the recurrent state; 0 if there is none.
        continues: whether a call with several tokens goes on from the state; else it starts anew.
        wide, wide_convs: whether the recurrent state, and those of convolutions, are in float32;
            else they are in the cache's dtype.
    """

    convs: tuple[int, ...]
    recurrent: int
    continues: bool = True
    wide: bool = True
    wide_convs: bool = False

    def nbytes(self, batch: int, itemsize: int) -> int:
        """Return the bytes of ``batch`` sequences; ``itemsize``: of one number of the cache."""
        recurrent = self.recurrent * (4 if self.wide else itemsize)
        return batch * (sum(self.convs) * (4 if self.wide_convs else itemsize) + recurrent)


def state_shape(config: Any, kind: str, kv_width: int = 0) -> StateShape | None:
    """Return the state of a layer, read from a model's (text) configuration.

    Args:
        config: transformers' configuration of the decoder.
        kind: type of the layer: ``conv``, or another whose state is a matrix per head or channel.
        kv_width: numbers of a key, all KV heads together; 0 in a layer without.

    Returns:
        Its sizes, or None if the configuration has none of the known sets of fields.
    """
    if kind == "conv":
        short = _fields(config, ("hidden_size", "conv_L_cache"))
        return None if short is None else StateShape((short[0] * short[1],), 0)
    if kv_width and (four := _fields(config, _FOUR_CONVS)) is not None and four[2] == 4:
        # Of keys, of values, of what attention gives and of what the MLP gives.
        hidden, kernel, _ = four
        widths = (kv_width, kv_width, hidden, hidden)
        return StateShape(tuple(width * kernel for width in widths), 0, wide_convs=True)
    return _delta(config) or _mamba(config) or _of_heads(config, kind)


def _delta(config: Any) -> StateShape | None:
    """Return the state of gated delta rules: a matrix per head, and a convolution."""
    if (delta := _fields(config, _DELTA)) is not None:
        key_heads, key_dim, value_heads, value_dim, kernel = delta
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        return StateShape((channels * kernel,), value_heads * key_dim * value_dim)
    if (delta := _fields(config, _KIMI_DELTA)) is not None:
        heads, width, kernel = delta
        return StateShape((3 * heads * width * kernel,), heads * width * width)
    return None


def _mamba(config: Any) -> StateShape | None:
    """Return the state of Mamba: a vector per channel, and a convolution."""
    for names in _MAMBA2:
        if (mamba := _fields(config, names)) is not None:
            heads, width, state, groups, kernel = mamba
            channels = heads * width + 2 * groups * state
            return StateShape((channels * kernel,), heads * width * state)
    if (first := _fields(config, _MAMBA1)) is not None:
        expand, hidden, state, kernel, _ = first
        # transformers' scan over several tokens takes no state to start from.
        return StateShape((expand * hidden * kernel,), expand * hidden * state, continues=False)
    return None


def _of_heads(config: Any, kind: str) -> StateShape | None:
    """Return a state whose sizes are those of the attention heads."""
    sizes = _fields(config, ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if sizes is None:
        return None
    hidden, query_heads, kv_heads = sizes
    width = getattr(config, "head_dim", None) or hidden // query_heads
    if kind == "linear_attention" and all(hasattr(config, name) for name in _LIGHTNING):
        return StateShape((), query_heads * width * width, wide=False)
    if (kernels := _fields(config, _COMPRESSED_CONV)) is not None:
        # Queries and keys are convolved twice; half of a value is that of the token before.
        channels = (query_heads + kv_heads) * width
        return StateShape((channels * (sum(kernels) - 2),), kv_heads * width // 2, wide=False)
    return None


def _fields(config: Any, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return the fields of a configuration if it has all of them as whole numbers."""
    values = tuple(getattr(config, name, None) for name in names)
    known = [int(v) for v in values if isinstance(v, int | float) and v == int(v)]
    return tuple(known) if len(known) == len(names) else None
