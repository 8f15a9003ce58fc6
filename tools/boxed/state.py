"""Training state in one safetensors file: tensors, and the rest as JSON in its header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from reasonalloc.files import replacing


def save_state(
    path: Path, model: torch.nn.Module, optimizers: Sequence[Optimizer], meta: dict[str, Any]
) -> None:
    """Write everything that a run needs to go on, replacing ``path`` once it is complete."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    plain: list[dict[str, Any]] = []
    for number, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        plain.append({"groups": saved["param_groups"], "state": {}})
        for index, entries in saved["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{number}.{index}.{name}"] = value
                else:
                    plain[-1]["state"].setdefault(str(index), {})[name] = value
    # Tied weights share memory, which the format does not allow.
    separate = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(separate, partial, metadata={"json": json.dumps({**meta, "optimizers": plain})})


def load_state(
    path: Path, model: torch.nn.Module, optimizers: Sequence[Optimizer], device: str
) -> dict[str, Any]:
    """Put a saved state back into model and optimizers; returns the rest."""
    with safe_open(path, framework="pt", device=device) as file:
        meta: dict[str, Any] = json.loads(file.metadata()["json"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(
        {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
    )
    for number, (optimizer, plain) in enumerate(
        zip(optimizers, meta.pop("optimizers"), strict=True)
    ):
        state = {int(i): dict(entries) for i, entries in plain["state"].items()}
        prefix = f"optimizer.{number}."
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                index, _, key = name.removeprefix(prefix).partition(".")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": plain["groups"]})
    return meta
