"""Twenty rotations of every certificate while streams and single calls run: does anybody notice, how soon is it in use?

The clock of a rotation starts when the supervisor is asked and stops when a new connection to the gateway's sidecar is
shown the new serial.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections import Counter
from typing import Any

import autoglm
from cryptography import x509

from benchmarks.canary import long_stream
from benchmarks.harness import Bar, Load, Mesh, client, load
from services.mesh.local import ROTATE_SIGNAL

ROTATIONS = 20
WANTED_S = 1.0
PAUSE_S = 0.005
SERVICE = "gateway"


def shown(mesh: Mesh) -> str:
    """The serial that the gateway's sidecar shows to a new connection, asked as the ingress would."""
    port = mesh.processes(SERVICE)[0].inbound["grpc"]
    home = mesh.directory.identity
    context = ssl.create_default_context(cafile=str(home / "root" / "root.pem"))
    context.check_hostname = False  # a SPIFFE id is no host name; whose certificate it is does not matter here
    context.set_alpn_protocols(["istio", "h2"])
    own = (home / "ingress" / "current").resolve()  # once: the link may move between two files
    context.load_cert_chain(own / "chain.pem", own / "key.pem")
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain, context.wrap_socket(plain) as secure:
        certificate = secure.getpeercert(binary_form=True)
    assert certificate is not None
    return f"{x509.load_der_x509_certificate(certificate).serial_number:x}"


async def rotated(mesh: Mesh, old: str) -> tuple[str, float]:
    """Rotates; the new serial, and the seconds until a new connection was shown it."""
    began = time.monotonic()
    os.kill(mesh.state.pid, ROTATE_SIGNAL)
    while (serial := await asyncio.to_thread(shown, mesh)) == old:  # noqa: ASYNC110  # another program's state
        await asyncio.sleep(PAUSE_S)
    return serial, time.monotonic() - began


async def single_calls(mesh: Mesh, stop: asyncio.Event) -> Counter[str]:
    """Unary calls, each on a connection of its own, until `stop`."""
    outcomes: Counter[str] = Counter()
    while not stop.is_set():
        try:
            async with client(mesh) as caller:
                await caller.models(timeout=10)
            outcomes["ok"] += 1
        except autoglm.AutoglmError as error:
            outcomes[type(error).__name__] += 1
    return outcomes


async def streams(mesh: Mesh, stop: asyncio.Event, concurrency: int) -> Load:
    """Generations, some at a time, until `stop`."""
    total = Load()
    while not stop.is_set():
        some = await load(mesh, 2 * concurrency, concurrency)
        total.outcomes += some.outcomes
        total.tokens += some.tokens
        total.errors += some.errors
    return total


async def drill(mesh: Mesh, concurrency: int = 4) -> tuple[list[Bar], dict[str, Any]]:
    """A long stream, generations and unary calls; twenty rotations, one generation of streams apart."""
    begun, stop = asyncio.Event(), asyncio.Event()
    watcher = asyncio.create_task(long_stream(mesh, begun, stop))
    await asyncio.wait_for(begun.wait(), 30)
    generations = asyncio.create_task(streams(mesh, stop, concurrency))
    calls = asyncio.create_task(single_calls(mesh, stop))
    serial = await asyncio.to_thread(shown, mesh)
    serials, seconds = [serial], []
    for _ in range(ROTATIONS):
        serial, took_s = await rotated(mesh, serial)
        serials.append(serial)
        seconds.append(took_s)
        await asyncio.sleep(0.25)  # so that calls begin and end between two rotations, too
    stop.set()
    done, unary, (events, error) = await generations, await calls, await watcher
    failed = done.failures + sum(count for outcome, count in unary.items() if outcome != "ok") + bool(error)
    asked = sum(done.outcomes.values()) + sum(unary.values()) + 1
    mixed = mesh.envoy_stat("key_rotation_failed")
    bars = [
        Bar(
            "rotations seen by new connections",
            f"{len(set(serials)) - 1}",
            str(ROTATIONS),
            len(set(serials)) > ROTATIONS,
        ),
        Bar("rotation: failed calls", f"{failed}/{asked}", "0", failed == 0),
        Bar(
            "rotation: new serial after (slowest)",
            f"{max(seconds):.3f} s",
            f"≤{WANTED_S:g} s",
            max(seconds) <= WANTED_S,
        ),
        Bar("rotation: the long stream", f"{events} events, {error or 'no error'}", "no error", not error),
        Bar("rotation: mixed pairs of key and chain", str(mixed), "0", mixed == 0),
    ]
    details = {
        "rotations": ROTATIONS,
        "concurrency": concurrency,
        "seconds": [round(value, 4) for value in seconds],
        "generations": dict(done.outcomes),
        "tokens": done.tokens,
        "unary": dict(unary),
        "errors": done.errors,
    }
    return bars, details
