"""What ``--model_args`` of ``reasonalloc lm-eval`` say, checked before a model is loaded."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.loading import Source, available_devices, find_source

SETTINGS = tuple(
    name
    for name in CompressionConfig.__dataclass_fields__
    if name not in ("budget", "arm", "record", "size")
)

# What lm-eval's model looks at if it is given a loaded model.
_OF_LOADED = frozenset(
    (
        *("backend", "tokenizer", "truncation", "logits_cache", "max_length", "device", "dtype"),
        *("softmax_dtype", "mixed_precision_dtype", "batch_size", "max_batch_size"),
        *("trust_remote_code", "use_fast_tokenizer", "add_bos_token", "prefix_token_id"),
        *("think_end_token", "enable_thinking", "chat_template_args"),
    )
)


def read_config(arm: str, budget: int | None, settings: dict[str, Any]) -> CompressionConfig | None:
    """Validated settings; None for the full cache."""
    parsed = parse_arm(arm)
    if parsed is None:
        extra = [*(("budget",) if budget is not None else ()), *settings]
        if extra:
            raise UsageError(
                f"model_args: {extra[0]} has no effect with arm=full: leave it out, or choose an "
                "arm that compresses"
            )
        return None
    if budget is None:
        raise UsageError(
            f"model_args: arm={arm} needs a budget: add budget=512 (tokens per layer and KV head), "
            "or give arm=full"
        )
    return CompressionConfig(budget=budget, arm=parsed, **settings)


def check_names(options: dict[str, Any]) -> None:
    """Refuse a misspelt setting, which would go on to the model's constructor."""
    known = inspect.signature(HFLM.__init__).parameters
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, ("budget", "arm", *SETTINGS), 1, 0.75)
            if close:
                raise UsageError(
                    f"model_args: unknown setting {name!r}: did you mean {close[0]!r}?"
                )


def check_loaders(options: dict[str, Any]) -> None:
    """Refuse loaders whose models are none of transformers'."""
    for name in ("autogptq", "gptqmodel"):
        if options.get(name):
            raise UnsupportedError(
                f"model_args: {name}={options[name]!r} loads a model that is none of "
                "transformers' and cannot run under a KV budget: leave it out, transformers loads "
                "GPTQ checkpoints by itself"
            )


def model_source(pretrained: str, options: dict[str, Any]) -> Source:
    """Where the model lies; takes a GGUF file in a folder here out of the options.

    Raises:
        UsageError: it is not there, or an option has no effect on it.
    """
    folder, file, sub = Path(pretrained).expanduser(), options.get("gguf_file"), "subfolder"
    if not folder.is_dir():
        return find_source(pretrained)
    if options.get(sub):
        folder = folder / options[sub]
    if file is not None:
        if not (folder / file).is_file():
            raise UsageError(f"model_args: gguf_file={file!r} is not in {str(folder)!r}")
        for name in ("gguf_file", sub):
            options.pop(name, None)
        return find_source(str(folder / file))
    own = options.get("revision") not in (None, "main")
    if own and not (options.get("peft") or options.get("delta")):
        raise UsageError(
            f"model_args: revision={options['revision']!r} has no effect on the folder "
            f"{pretrained!r}: leave it out, or give a hub name"
        )
    return find_source(str(folder))


def check_gguf(name: str, options: dict[str, Any]) -> None:
    """Refuse what has no effect on a model that comes from a GGUF file."""
    for option, value in options.items():
        if value and option not in _OF_LOADED:
            raise UsageError(
                f"model_args: {option}={value!r} has no effect on the GGUF file {name!r}: leave it "
                "out, or give a hub name or a folder"
            )


def check_adapter(model: Any, name: str | None) -> None:
    """Refuse adapters that are no weights of layers but tokens before the prompt."""
    config: Any = getattr(model, "active_peft_config", None)
    if getattr(config, "is_prompt_learning", False):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedError(
            f"model_args: peft={name!r} is of the type {kind}, which puts virtual tokens before "
            "the prompt and cannot run under a KV budget: give an adapter of weights (such as "
            "LoRA), or arm=full"
        )


@contextmanager
def explained() -> Iterator[None]:
    """Inside, what goes wrong in lm-eval while a model is loaded becomes one sentence."""
    try:
        yield
    except (UsageError, UnsupportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of all kinds: packages, checkpoints and models have their own
        text = " ".join(str(part) for part in error.args) or type(error).__name__
        reason = " ".join(text.split())
        _, found, name = reason.partition("unexpected keyword argument ")
        if isinstance(error, TypeError) and found:
            raise UsageError(
                f"model_args: this model takes no setting {name}: leave it out"
                + (", or give a checkpoint that is quantised already" if "load_in_" in name else "")
            ) from error
        raise UsageError(f"lm-eval cannot load the model: {reason[:300]}") from error


def gguf_device(wanted: str | None) -> str:
    """lm-eval asks for a GPU by default and takes the CPU where there is none."""
    if wanted is None or (wanted.startswith("cuda") and available_devices() == ["cpu"]):
        return "auto"
    return wanted
