from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibrated.reader import ReadsCalibrated
from reasonalloc.errors import UsageError
from reasonalloc.policies.base import POLICIES, Candidates, ModelFacts, Policy


@POLICIES.register("calibrated", source="ours: the policy that a cost profile was made with")
@dataclass(frozen=True)
class Calibrated(ReadsCalibrated, Policy):
    """The policy that calibration found cheapest for this model, as its cost profile says."""

    reads = "cost profile"

    def resolve(self) -> Policy:
        if not self.path:
            raise UsageError(
                "policy='calibrated' needs a cost profile: pass profile='FILE.json' "
                "(--profile FILE.json), made for this model with "
                "'reasonalloc calibrate --objective fisher'"
            )
        policy = POLICIES.create(load_costs(self.path).policy)
        if isinstance(policy, Calibrated):
            raise UsageError(f"cost profile {self.path!r}: its policy must be a real one")
        if isinstance(policy, ReadsCalibrated) and policy.reads == self.reads:
            policy = policy.with_file(self.path)
        return policy.resolve()

    def bind(self, model: ModelFacts) -> Policy:
        policy, costs = self.resolve(), load_costs(self.path)
        costs.check_model(model.model_id, model.config_hash, model.kv_heads)
        return policy.bind(model)

    def score(self, candidates: Candidates) -> Tensor:
        raise RuntimeError("a calibrated policy must be resolved before it scores")
