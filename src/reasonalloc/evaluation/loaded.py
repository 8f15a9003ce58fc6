"""The model of a measurement: by its name, or loaded already."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

from reasonalloc.calibrated.demand import config_hash
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.chunks import ModelSpec
from reasonalloc.integrations.hf.attachment import refuse_attached
from reasonalloc.loading import load_config
from reasonalloc.planning.shapes import model_name, text_config
from reasonalloc.texts import check_tokenizer


def find_model(
    model: Any,
    tokenizer: Any,
    options: ModelSpec,
    workers: int = 1,
    ray_address: str | None = None,
) -> tuple[ModelSpec, tuple[Any, Any] | None]:
    """Return the model's name with the options of loading it; and itself, if it is loaded already.

    Args:
        model: a name, or a transformers model.
        tokenizer: of a loaded model, or None.
        options: how a name is loaded.
        workers, ray_address: who loads it.

    Raises:
        UsageError: a loaded model that has a budget already, options that have no effect on it, or
            a tokenizer that is none.
    """
    check_tokenizer(tokenizer)
    if isinstance(model, str | os.PathLike):
        if tokenizer is not None:
            raise UsageError(
                f"tokenizer= has no effect with model={os.fspath(model)!r}, which brings its own: "
                "leave it out, or pass a loaded model"
            )
        return replace(options, name=os.fspath(model)), None
    refuse_attached(model)
    default = ModelSpec("")
    given = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "name"}
    for name, value in given.items():
        if value != getattr(default, name):
            raise _no_effect(name, value)
    if workers != 1:
        raise _no_effect("workers", workers)
    if ray_address is not None:
        raise _no_effect("ray_address", ray_address)
    return ModelSpec(model_name(model)), (model, tokenizer)


def architecture(source: ModelSpec, loaded: tuple[Any, Any] | None) -> str:
    """Return the fingerprint of a model's architecture; of a name, its configuration is read.

    Args:
        source: as ``find_model`` returned it.
        loaded: likewise.

    Raises:
        UsageError: it cannot be found or read.
    """
    model = load_config(source.name, source.trust_remote_code) if loaded is None else loaded[0]
    return config_hash(text_config(model).to_dict())


def _no_effect(name: str, value: Any) -> UsageError:
    return UsageError(
        f"{name}={value!r} cannot be used with a loaded model: leave it out, or give the model's "
        "name or folder"
    )
