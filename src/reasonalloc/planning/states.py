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
_MAMBA1 = ("mamba_expand", "hidden_size", "mamba_d_state", "mamba_d_conv", "mamba_dt_rank")


@dataclass(frozen=True)
class StateShape:
    """What a linear, Mamba or convolution layer keeps of a sequence, after any number of tokens.

    Attributes:
        conv: numbers of the convolution's state, in the cache's dtype.
        recurrent: numbers of the recurrent state, in float32.
        continues: whether a call with several tokens goes on from the state; else it starts anew.
    """

    conv: int
    recurrent: int
    continues: bool = True

    def nbytes(self, batch: int, itemsize: int) -> int:
        """Return the bytes of ``batch`` sequences; ``itemsize``: of one number of the cache."""
        return batch * (self.conv * itemsize + self.recurrent * 4)


def state_shape(config: Any, kind: str) -> StateShape | None:
    """Return the state of a layer, read from a model's (text) configuration.

    Args:
        config: transformers' configuration of the decoder.
        kind: type of the layer: ``conv``, or another whose state is a matrix per head or channel.

    Returns:
        Its sizes, or None if the configuration has none of the known sets of fields.
    """
    if kind == "conv":
        short = _fields(config, ("hidden_size", "conv_L_cache"))
        return None if short is None else StateShape(short[0] * short[1], 0)
    if (delta := _fields(config, _DELTA)) is not None:
        key_heads, key_dim, value_heads, value_dim, kernel = delta
        channels = 2 * key_heads * key_dim + value_heads * value_dim
        return StateShape(channels * kernel, value_heads * key_dim * value_dim)
    if (delta := _fields(config, _KIMI_DELTA)) is not None:
        heads, width, kernel = delta
        return StateShape(3 * heads * width * kernel, heads * width * width)
    for names in _MAMBA2:
        if (mamba := _fields(config, names)) is not None:
            heads, width, state, groups, kernel = mamba
            channels = heads * width + 2 * groups * state
            return StateShape(channels * kernel, heads * width * state)
    if (first := _fields(config, _MAMBA1)) is not None:
        expand, hidden, state, kernel, _ = first
        # transformers' scan over several tokens takes no state to start from.
        return StateShape(expand * hidden * kernel, expand * hidden * state, continues=False)
    return None


def _fields(config: Any, names: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return the fields of a configuration if it has all of them as whole numbers."""
    values = tuple(getattr(config, name, None) for name in names)
    known = [int(v) for v in values if isinstance(v, int | float) and v == int(v)]
    return tuple(known) if len(known) == len(names) else None
