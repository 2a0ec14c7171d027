"""Istio policy: strict models, a loader that reports every mistake, and checks against what really runs."""

from services.mesh.policy.checks import check
from services.mesh.policy.loading import load
from services.mesh.policy.objects import Policy, PolicyObject
from services.mesh.policy.problems import PolicyError, Problem
from services.mesh.policy.reading import DEFAULT_LIMITS, Limits

__all__ = ["DEFAULT_LIMITS", "Limits", "Policy", "PolicyError", "PolicyObject", "Problem", "check", "load"]
