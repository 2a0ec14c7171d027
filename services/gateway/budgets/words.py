"""A tenant's standing as OpenAI's clients read it: the same names as HTTP headers and as gRPC metadata."""

from __future__ import annotations

from services.gateway.budgets.bucket import Standing


def spoken(standing: Standing | None) -> dict[str, str]:
    """x-ratelimit-…-tokens; nothing for a tenant without a budget."""
    if standing is None:
        return {}
    return {
        "x-ratelimit-limit-tokens": str(standing.limit),
        "x-ratelimit-remaining-tokens": str(standing.remaining),
        "x-ratelimit-reset-tokens": f"{standing.reset_s:.3f}".rstrip("0").rstrip(".") + "s",
    }
