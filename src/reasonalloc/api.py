"""Everything that is called from Python: stable, and the same that the commands call.

``attach(model, budget=1024)`` puts a budget on a model; ``plan`` says beforehand what it takes;
``calibrate`` measures a model; ``fidelity`` and ``evaluate`` compare methods. Own methods derive
from ``Policy``, ``LayerAllocator`` and ``HeadAllocator``.
"""

from __future__ import annotations

from reasonalloc.allocators.head import HEAD_ALLOCATORS, HeadAllocator, HeadQuery
from reasonalloc.allocators.layer import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.calibrated import CostProfile, DemandProfile, open_calibrated
from reasonalloc.calibrated.statistics import Statistics
from reasonalloc.calibration.calibrate import calibrate
from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.core.recorder import Event, Recorder
from reasonalloc.evaluation.evaluate import evaluate
from reasonalloc.evaluation.evaluation_result import EvaluationResult, Interrupted
from reasonalloc.evaluation.fidelity import fidelity
from reasonalloc.evaluation.fidelity_result import FidelityResult
from reasonalloc.integrations.hf import Attachment, BudgetCache, attach, detach
from reasonalloc.loading import load_model
from reasonalloc.planning.budget import BudgetPlan
from reasonalloc.planning.memory import MemoryPlan
from reasonalloc.planning.model_plan import plan
from reasonalloc.policies import POLICIES, Candidates, ModelFacts, Policy
from reasonalloc.texts import Trajectory

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
    "Policy",
    "Recorder",
    "Statistics",
    "Trajectory",
    "attach",
    "calibrate",
    "detach",
    "evaluate",
    "fidelity",
    "load_model",
    "open_calibrated",
    "plan",
]
