"""A client's arguments and environment become checked settings."""

from __future__ import annotations

import math
from typing import Any

import pytest
from autoglm import Client, InvalidRequestError, Tls
from autoglm.connection import Connection, connection


def settings(target: str | None = None, environ: dict[str, str] | None = None, **changes: Any) -> Connection:
    given: dict[str, Any] = {"tls": False, "token": None, "metadata": None, "timeout": 5.0, "model": None}
    return connection(target, **(given | changes), max_answer_bytes=1, environ=environ or {})


def test_argument_before_environment_before_default() -> None:
    """What the caller writes wins."""
    environ = {"AUTOGLM_TARGET": "env:1", "AUTOGLM_MODEL": "m"}
    assert settings("arg:1", environ).target == "arg:1"
    assert (settings(None, environ).target, settings(None, environ).model) == ("env:1", "m")
    assert settings().target == "127.0.0.1:8080"


@pytest.mark.parametrize(
    ("target", "address", "has_tls"),
    [
        ("https://mesh.example", "mesh.example:443", True),
        ("https://mesh.example:8443/", "mesh.example:8443", True),
        ("http://127.0.0.1:8080", "127.0.0.1:8080", False),
        ("http://[::1]", "[::1]:80", False),
        ("http://mesh.example", "mesh.example:80", False),
        ("dns:///mesh:80", "dns:///mesh:80", False),
        ("unix:/run/mesh.sock", "unix:/run/mesh.sock", False),
    ],
)
def test_urls_are_accepted(target: str, address: str, has_tls: bool) -> None:
    """People paste URLs; gRPC names pass through."""
    made = settings(target)
    assert (made.target, made.tls is not None) == (address, has_tls)


@pytest.mark.parametrize(
    "arguments",
    [
        {"target": "http://a", "tls": True},
        {"target": "https://a/path"},
        {"target": "https://"},
        {"target": "mesh.example"},
        {"timeout": 0.0},
        {"timeout": -1.0},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"timeout": 1e12},
        {"metadata": {"bad key": "x"}},
        {"metadata": {"grpc-timeout": "x"}},
        {"metadata": {"x-bin": "x"}},
        {"metadata": {"x": "ü"}},
        {"metadata": {"x": "a\nb"}},
        {"token": "a\r\nb"},
    ],
)
def test_mistakes_are_refused(arguments: dict[str, Any]) -> None:
    """Contradictions and what gRPC would choke on fail at construction."""
    with pytest.raises(InvalidRequestError):
        settings(**arguments)


def test_a_host_without_a_port_is_asked_for_one() -> None:
    """gRPC would try port 443 in plain text, where nobody can answer; with TLS that port is what is meant."""
    with pytest.raises(InvalidRequestError, match="give host:port"):
        settings("mesh.example")
    assert settings("mesh.example", tls=True).target == "mesh.example"


def test_secrets_stay_out_of_representations() -> None:
    """Neither token nor key shows up in a log of a client."""
    made = settings(token="s3cret", tls=Tls(key_pem=b"k3y"))
    assert ("authorization", "Bearer s3cret") in made.metadata
    assert "s3cret" not in repr(made) and "k3y" not in repr(made)
    with Client("localhost:1", token="s3cret") as client:
        assert repr(client) == "Client('localhost:1')"


def test_a_proxy_variable_never_captures_loopback() -> None:
    """`http_proxy` in the environment is for the world outside."""
    for local in ("127.0.0.1:8080", "localhost:1", "[::1]:1", "dns:///127.0.0.1:80"):
        assert ("grpc.enable_http_proxy", 0) in settings(local).options()
    assert ("grpc.enable_http_proxy", 0) not in settings("mesh.example:443").options()
