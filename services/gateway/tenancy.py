"""Who is asking: the tenant that the ingress names, from a verified claim, in a header that no outsider can set.

A gateway without such an ingress serves one tenant, the one in its settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from services.chassis.errors import InvalidRequest

TENANT_HEADER = "x-autoglm-tenant"
_NAME = re.compile(r"[!-~]{1,64}")


def tenant_of(named: Sequence[str], default: str) -> str:
    """The tenant named by all values of the header; `default` when there is none. Fails closed on anything odd."""
    if not named:
        return default
    if len(named) > 1 or not _NAME.fullmatch(named[0]):
        raise InvalidRequest(
            "the tenant must be named once, in 1 to 64 printable ASCII characters without spaces", field=TENANT_HEADER
        )
    return named[0]
