"""Which tokens: a policy scores the candidates of every KV head; the highest stay."""

from reasonalloc.policies.base import POLICIES, Candidates, ModelFacts, Policy

__all__ = ["POLICIES", "Candidates", "ModelFacts", "Policy"]
