"""ReasonAlloc: a fixed KV-cache budget for reasoning models while they decode.

with reasonalloc.attach(model, budget=1024):
    model.generate(**inputs, max_new_tokens=8192)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reasonalloc.errors import (
    CompressionNeverHappened,
    OtherCadence,
    ReasonAllocError,
    UnsupportedError,
    UntestedVersion,
    UsageError,
)
from reasonalloc.version import __version__

if TYPE_CHECKING:
    from reasonalloc.api import (
        HEAD_ALLOCATORS,
        LAYER_ALLOCATORS,
        POLICIES,
        Arm,
        Attachment,
        BudgetCache,
        BudgetPlan,
        Candidates,
        CompressionConfig,
        CostProfile,
        DemandProfile,
        EvaluationResult,
        Event,
        FidelityResult,
        HeadAllocator,
        HeadQuery,
        Interrupted,
        LayerAllocator,
        LayerQuery,
        MemoryPlan,
        ModelFacts,
        Policy,
        Recorder,
        Statistics,
        Trajectory,
        attach,
        calibrate,
        detach,
        evaluate,
        fidelity,
        load_model,
        open_calibrated,
        plan,
    )

__all__ = [
    "HEAD_ALLOCATORS",
    "LAYER_ALLOCATORS",
    "POLICIES",
    "Arm",
    "Attachment",
    "BudgetCache",
    "BudgetPlan",
    "Candidates",
    "CompressionConfig",
    "CompressionNeverHappened",
    "CostProfile",
    "DemandProfile",
    "EvaluationResult",
    "Event",
    "FidelityResult",
    "HeadAllocator",
    "HeadQuery",
    "Interrupted",
    "LayerAllocator",
    "LayerQuery",
    "MemoryPlan",
    "ModelFacts",
    "OtherCadence",
    "Policy",
    "ReasonAllocError",
    "Recorder",
    "Statistics",
    "Trajectory",
    "UnsupportedError",
    "UntestedVersion",
    "UsageError",
    "__version__",
    "attach",
    "calibrate",
    "detach",
    "evaluate",
    "fidelity",
    "load_model",
    "open_calibrated",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in __all__:  # what ``api`` offers loads PyTorch and transformers: on first use
        from reasonalloc import api

        return getattr(api, name)
    raise AttributeError(f"module 'reasonalloc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
