"""The error table is complete and survives the wire; wrong settings are reported all at once."""

from __future__ import annotations

import inspect
import subprocess
import sys

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from services.chassis import errors
from tests.fakes.processes import REPOSITORY

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.ServiceError)]


def make(kind: type[errors.ServiceError]) -> errors.ServiceError:
    return errors.TooBusy("text", retry_after_s=1.5) if kind is errors.TooBusy else kind("text", limit=7)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not errors.ServiceError])
def test_every_error_has_its_own_reason_and_a_status(kind: type[errors.ServiceError]) -> None:
    """One row in the table each, with the facts as ErrorInfo for programs and the text for people."""
    assert kind in errors.TABLE
    code, text, trailers = errors.status_of(make(kind))
    values = dict(trailers)
    status = status_pb2.Status.FromString(values["grpc-status-details-bin"])  # type: ignore[arg-type]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info) and info.reason == values["autoglm-reason"] == errors.TABLE[kind][1]
    assert (code, text, status.code) == (errors.TABLE[kind][0], "text", errors.TABLE[kind][0].value[0])
    assert info.metadata.get("limit", info.metadata.get("retry_after_s")) in ("7", "1.5")


def test_reasons_are_distinct() -> None:
    """A client can tell any two errors apart."""
    assert len({reason for _, reason in errors.TABLE.values()}) == len(errors.TABLE)


class FailedCall(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, trailers: dict[str, str]) -> None:
        self._code, self._trailers = code, tuple(trailers.items())

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "text"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._trailers


@pytest.mark.parametrize("kind", list(errors.TABLE))
def test_an_error_passed_on_keeps_its_kind(kind: type[errors.ServiceError]) -> None:
    """The next service raises what this one raised."""
    code, _, trailers = errors.status_of(make(kind))
    words = {key: str(value) for key, value in trailers if not key.endswith("-bin")}
    again = errors.from_rpc(FailedCall(code, words))
    assert type(again) is kind and again.message == "text"
    if isinstance(again, errors.TooBusy):
        assert again.retry_after_s == 1.5


def test_a_strange_status_is_unavailable_not_a_crash() -> None:
    """Statuses that only a proxy or another server makes are mapped too."""
    assert type(errors.from_rpc(FailedCall(grpc.StatusCode.UNKNOWN, {}))) is errors.Unavailable


def test_all_wrong_settings_are_named_together() -> None:
    """One start shows every mistake, by the variable's name, and ends with status 2."""
    wrong = {"AUTOGLM_GRPC_PORT": "70000", "AUTOGLM_LOG_LEVEL": "LOUD", "AUTOGLM_HOP_MARGIN_MS": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", "from services.chassis.settings import *; read(ServiceSettings)"],
        env={**wrong, "PATH": ""}, cwd=REPOSITORY, capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert all(name in done.stderr for name in wrong), done.stderr
