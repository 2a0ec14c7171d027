"""What Envoy would do with one request, and which line of which YAML file decides it."""

from services.mesh.explain.door import NoToken, claims_of, issuers
from services.mesh.explain.request import Request
from services.mesh.explain.story import CannotExplain, Explanation, explain

__all__ = ["CannotExplain", "Explanation", "NoToken", "Request", "claims_of", "explain", "issuers"]
