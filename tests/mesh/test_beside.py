"""The mesh of compose.yaml without containers: services at loopback addresses of their own, Envoy beside them."""

from __future__ import annotations

import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from services.mesh import ports
from tests.fakes.processes import Service, running

NETWORK = f"127.{random.randint(1, 254)}.{random.randint(0, 255)}"
"""The ports are those of compose.yaml, so each run has addresses of its own: two of them may run beside each other."""
HOSTS = {name: f"{NETWORK}.{n}" for n, name in enumerate(("gateway", "tokenizer", "scheduler", "cache"), 2)}
WORKER = f"{NETWORK}.6"
ENVOY = f"{NETWORK}.7"
PATIENCE_S = 20.0


class Compose:
    """What `docker compose up` would have started."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        supply = ports.free(ENVOY)
        self.outbound, self.ingress, admin = (next(supply) for _ in range(3))
        self._stack, self._folder = stack, folder
        members = [f"{name}={host}" for name, host in HOSTS.items()] + [f"sparse-inference/v1={WORKER}"]
        self.envoy = stack.enter_context(
            running(
                "services.mesh.beside",
                AUTOGLM_BIND=ENVOY,
                AUTOGLM_RUN_DIR=str(folder / "envoy"),
                AUTOGLM_MEMBERS=",".join(members),
                AUTOGLM_LOOK_MS="100",
                AUTOGLM_OUTBOUND_PORT=str(self.outbound),
                AUTOGLM_INGRESS_PORT=str(self.ingress),
                AUTOGLM_ADMIN_PORT=str(admin),
            )
        )

    def start(self, name: str) -> Service:
        """A service as its container would run it."""
        given = {"AUTOGLM_CACHE_DIRECTORY": str(self._folder / "cache")}
        if name == "sparse-inference":
            given = {"AUTOGLM_THREADS": "1", "AUTOGLM_KV_CAPACITY_MIB": "32"}
        return self._stack.enter_context(
            running(
                f"services.{name.replace('-', '_')}",
                AUTOGLM_BIND=HOSTS.get(name, WORKER),
                AUTOGLM_GRPC_PORT="50051",
                AUTOGLM_MESH_ADDRESS=f"{ENVOY}:{self.outbound}",
                AUTOGLM_DRAIN_GRACE_S="1",
                **given,
            )
        )

    def ask(self) -> tuple[int, str]:
        """Status and text of a completion through the door."""
        body = {"model": "glm-tiny", "prompt": "import os\n", "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://{ENVOY}:{self.ingress}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.load(answer)["choices"][0]["text"]
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def compose(tmp_path: Path) -> Iterator[Compose]:
    """Envoy is up, nobody is behind it yet."""
    with ExitStack() as stack:
        yield Compose(stack, tmp_path)


def routed(worker: Service) -> set[str]:
    """Who chose the worker for its generations."""
    port = worker.wait_for("ready")["metrics_port"]
    with urllib.request.urlopen(f"http://{WORKER}:{port}/metrics", timeout=10) as page:
        return set(re.findall(r'^autoglm_routed_requests_total\{by="(\w+)"\}', page.read().decode(), re.MULTILINE))


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_services_that_come_by_themselves_are_found_and_missed(compose: Compose) -> None:
    """A completion goes through ingress, gateway, tokenizer and a picked worker; without its worker it is refused, and
    served again when one is back. The tokens are the same.
    """
    assert compose.ask()[0] == 503
    for name in HOSTS:
        compose.start(name)
    worker = compose.start("sparse-inference")
    until(lambda: compose.ask()[0] == 200, "the members were not found")
    _, text = compose.ask()
    # The very first may come before the worker's lease; from then on the scheduler chooses.
    until(lambda: compose.ask() == (200, text) and "scheduler" in routed(worker), "the scheduler chose nobody")
    seen = len(compose.envoy.lines)
    worker.terminate()
    compose.envoy.wait_for("went", after=seen)
    assert compose.ask()[0] == 503
    compose.start("sparse-inference")
    until(lambda: compose.ask()[0] == 200, "the worker was not found again")
    assert compose.ask() == (200, text)


def test_a_member_that_nobody_knows_is_refused() -> None:
    """A misspelt service ends the program with status 2 and a line that names what there is."""
    with running("services.mesh.beside", ready=None, AUTOGLM_MEMBERS="gateway,tokeniser") as program:
        assert program.wait(20) == 2
        assert "tokenizer" in program.log()
