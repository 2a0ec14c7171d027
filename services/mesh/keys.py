"""Public keys that RequestAuthentications name by URL. The control plane fetches them, as istiod does, and never Envoy.

`filled` puts what is known into the policy; what could not be fetched stays out, and the translator then writes keys
that fit no token: an issuer that cannot be reached lets nobody in. `keep` renews what is old and retries what failed.
"""

import asyncio
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http.client import HTTPException, HTTPResponse

from services.mesh.identity import Unusable
from services.mesh.policy import Policy
from services.mesh.policy.security import JwtRule
from services.mesh.policy.security_values import MAX_KEYS_BYTES, why_not_keys

log = logging.getLogger("autoglm.keys")

MAX_URLS = 64
FETCH_TIMEOUT_S = 5.0
"""Istio's, where the rule says nothing."""
REFRESH_S = 20 * 60.0
RETRY_S = 10.0
LOOK_EVERY_S = 1.0

Fetch = Callable[[str, float], str]
"""URL and seconds → the key set's text. May block; raises `Unreachable`."""


class Unreachable(Exception):
    """Why there are no keys."""


@dataclass(frozen=True, slots=True)
class _Known:
    text: str | None
    failure: str
    due: float
    timeout_s: float


class Keys:
    """`local` answers for its URLs without any network."""

    def __init__(
        self,
        local: Mapping[str, Callable[[], str]] | None = None,
        fetch: Fetch | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local, self._fetch, self._clock = local or {}, fetch or fetch_url, clock
        self._known: dict[str, _Known] = {}

    async def filled(self, policy: Policy) -> Policy:
        """The policy with the keys of its URLs. Waits only for those never asked before."""
        wanted = {rule.jwks_uri: _timeout(rule) for rule in _rules(policy) if rule.jwks_uri is not None}
        urls = dict(list(wanted.items())[:MAX_URLS])
        self._known = {url: known for url, known in self._known.items() if url in urls}
        await asyncio.gather(*(self._ask(url, limit) for url, limit in urls.items() if url not in self._known))
        return replace(
            policy,
            request_authentications=tuple(
                item.model_copy(
                    update={
                        "spec": item.spec.model_copy(
                            update={"jwt_rules": tuple(self._with_keys(rule) for rule in item.spec.jwt_rules)}
                        )
                    }
                )
                for item in policy.request_authentications
            ),
        )

    def warnings(self) -> list[str]:
        """A sentence for each URL without an answer."""
        return [
            f"keys at {url}: {known.failure}; "
            + ("every token of the issuer is refused" if known.text is None else "the keys fetched before stay in use")
            for url, known in sorted(self._known.items())
            if known.failure
        ]

    async def keep(self, changed: Callable[[], None]) -> None:
        """Until cancelled: asks again what is due, and says when a key set is another one."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if await self.renew():
                changed()

    async def renew(self) -> bool:
        """Asks again what is due now. True when the keys, or what is wrong with them, changed."""
        before = {url: (known.text, known.failure) for url, known in self._known.items()}
        due = [(url, known.timeout_s) for url, known in self._known.items() if known.due <= self._clock()]
        await asyncio.gather(*(self._ask(url, timeout_s) for url, timeout_s in due))
        return any(before[url] != (self._known[url].text, self._known[url].failure) for url, _ in due)

    async def _ask(self, url: str, timeout_s: float) -> None:
        old = self._known.get(url)
        try:
            if url in self._local:
                text = self._local[url]()
            else:
                text = await asyncio.to_thread(self._fetch, url, timeout_s)
            if (reason := why_not_keys(text)) is not None:
                raise Unreachable(f"the answer is of no use: {reason}")
        except (Unreachable, Unusable) as error:
            log.warning("no keys", extra={"facts": {"url": url, "reason": str(error)}})
            kept = old.text if old is not None else None
            self._known[url] = _Known(kept, str(error), self._clock() + RETRY_S, timeout_s)
        else:
            self._known[url] = _Known(text, "", self._clock() + REFRESH_S, timeout_s)

    def _with_keys(self, rule: JwtRule) -> JwtRule:
        known = self._known.get(rule.jwks_uri) if rule.jwks_uri is not None else None
        return rule.model_copy(update={"jwks": known.text}) if known is not None else rule


def fetch_url(url: str, timeout_s: float) -> str:
    """One GET, of bounded size, that follows no redirect: where keys come from is written in the policy."""
    opener = urllib.request.build_opener(_NoRedirects)
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            body = _all_of(answer, time.monotonic() + timeout_s)
    except (OSError, HTTPException, ValueError) as error:
        raise Unreachable(str(error) or type(error).__name__) from None
    if len(body) > MAX_KEYS_BYTES:
        raise Unreachable(f"the answer is longer than {MAX_KEYS_BYTES} bytes")
    try:
        return body.decode()
    except UnicodeDecodeError:
        raise Unreachable("the answer is not UTF-8") from None


def _all_of(answer: HTTPResponse, deadline: float) -> bytes:
    """The socket's timeout is per packet; a server that drips must not hold us for longer than the whole time."""
    body = b""
    while len(body) <= MAX_KEYS_BYTES and (part := answer.read1(MAX_KEYS_BYTES)):
        body += part
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return body


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def _rules(policy: Policy) -> list[JwtRule]:
    return [rule for item in policy.request_authentications for rule in item.spec.jwt_rules]


def _timeout(rule: JwtRule) -> float:
    return min(rule.timeout.total_seconds(), FETCH_TIMEOUT_S) if rule.timeout is not None else FETCH_TIMEOUT_S
