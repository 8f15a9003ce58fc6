"""The solver of an engine."""

from __future__ import annotations

from typing import Any

from reasonalloc.evaluation.batch import Settings
from reasonalloc.evaluation.chunks import ModelSpec
from reasonalloc.evaluation.sampling import Sampling


def make_solver(
    spec: ModelSpec,
    settings: Settings,
    sampling: Sampling,
    max_new_tokens: int,
    loaded: tuple[Any, Any] | None = None,
) -> Any:
    """Return the solver of a model's engine: a ``Solver``, or what stands for one.

    Arguments and errors are those of ``Solver``.
    """
    if spec.engine == "vllm":
        from reasonalloc.evaluation.vllm_solver import VllmSolver

        return VllmSolver(spec, settings, sampling, max_new_tokens)
    from reasonalloc.evaluation.solver import Solver

    return Solver(spec, settings, sampling, max_new_tokens, loaded)
