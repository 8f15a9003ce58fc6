"""Engines for the tests that need vLLM; without it nothing here is collected."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import undoubted
from windowed import save_windowed

import made_costs
import made_statistics
from tiny_folder import save_tiny

HAS_VLLM = importlib.util.find_spec("vllm") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # slow, also to warm up many requests
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]

# In this process, so that tests can look into scheduler and worker.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    HF_HUB_OFFLINE="1",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 whose heads are as wide as vLLM's kernels want them, with a tokenizer."""
    shape = {"hidden_size": 96, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 32}
    return save_tiny(tmp_path_factory.mktemp("qwen3"), name="qwen3", **shape)


@pytest.fixture(scope="session")
def model(folder: Path) -> Any:
    """The same on transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def clear(model: Any) -> Callable[..., tuple[list[list[int]], list[list[int]]]]:
    """Prompts of given lengths that leave no doubt, and the greedy tokens of transformers.

    ``clear(lengths, new, budget=...)``; see ``undoubted``.
    """
    return partial(undoubted, model)


@pytest.fixture(scope="session")
def files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What calibration would have written for an interval, by the arm that reads it."""

    def make(interval: int) -> dict[str, str]:
        where = tmp_path_factory.mktemp("calibrated")
        costs = dataclasses.replace(
            made_costs.of_model(model), policy="predicted_loss", interval=interval, window=8
        )
        costs.save(where / "costs.json")
        made_costs.in_formats(costs).save(where / "formats.json")
        made_statistics.of_model(model).save(where / "statistics.safetensors")
        return {
            "best": str(where / "costs.json"),
            "best-bytes": str(where / "formats.json"),
            "predicted_loss/pyramid/uniform": str(where / "costs.json"),
            "tri_attention/pyramid/uniform": str(where / "statistics.safetensors"),
        }

    return cache(make)


@dataclass(frozen=True)
class Windowed:
    """A model of ``windowed.py``: where it lies, itself, and the same as ``clear`` for it."""

    folder: Path
    model: Any
    clear: Callable[..., tuple[list[list[int]], list[list[int]]]]


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Windowed]:
    """Models whose layers are of several kinds, by name and changes of their configuration."""
    from transformers import AutoModelForCausalLM

    made: dict[str, Windowed] = {}

    def make(name: str, **changes: Any) -> Windowed:
        key = f"{name} {changes}"
        if key not in made:
            folder = save_windowed(tmp_path_factory.mktemp(name), name, **changes)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if name == "gemma2":  # older transformers' sdpa ignores soft-capping
                model.set_attn_implementation("eager")
            made[key] = Windowed(folder, model, partial(undoubted, model))
        return made[key]

    return make


@pytest.fixture
def engine(folder: Path) -> Iterator[Callable[..., Any]]:
    """Makes an ``LLM``; settings of the budget as ``budget=...``, the rest goes to vLLM.

    ``model=``: another folder, which needs no tokenizer.
    """
    from vllm import LLM

    made: list[Any] = []

    def make(settings: dict[str, Any] | None = None, **arguments: Any) -> Any:
        given: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 2048,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "kv_cache_memory_bytes": 64 << 20,
            **({"max_num_seqs": 8} if INTERPRETED else {}),
            **arguments,
        }
        if settings:
            given["additional_config"] = {"reasonalloc": settings}
        if "model" in given:
            given["skip_tokenizer_init"] = True
        made.append(LLM(str(given.pop("model", folder)), **given))
        return made[-1]

    yield make
    for llm in made:
        llm.llm_engine.engine_core.shutdown()
