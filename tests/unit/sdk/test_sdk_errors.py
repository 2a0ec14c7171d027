"""gRPC statuses become exceptions that say what to do, with the mesh's own reason before the bare code."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import autoglm
import grpc
import pytest
from autoglm import errors
from autoglm.statuses import error_of

from services.chassis import errors as chassis


@dataclass
class Ended:
    """A call that ended."""

    status: grpc.StatusCode | None
    text: str = ""
    trailers: list[tuple[str, Any]] = field(default_factory=list)

    def code(self) -> Any:
        return self.status

    def details(self) -> str:
        return self.text

    def initial_metadata(self) -> Any:
        return None

    def trailing_metadata(self) -> Any:
        return self.trailers


def mapped(status: grpc.StatusCode | None, text: str = "", has_begun: bool = False, **trailers: str) -> Any:
    pairs = [(key.replace("_", "-"), value) for key, value in trailers.items()]
    return error_of(Ended(status, text, pairs), "here:1", 2.0, has_begun=has_begun)


FROM_THE_MESH = {
    chassis.InvalidRequest: errors.InvalidRequestError,
    chassis.NotFound: errors.NotFoundError,
    chassis.WrongVariant: errors.WrongVariantError,
    chassis.Unavailable: errors.UnavailableError,
    chassis.OutOfTime: errors.DeadlineError,
    chassis.Interrupted: errors.InterruptedStreamError,
    chassis.CorruptData: errors.InternalError,
    chassis.Internal: errors.InternalError,
}


def test_every_error_of_the_mesh_has_its_exception() -> None:
    """The table of the services and ours agree, in both directions."""
    for kind in chassis.TABLE:
        made = chassis.TooBusy("m", retry_after_s=1.5) if kind is chassis.TooBusy else kind("m")
        code, text, trailers = chassis.status_of(made)
        error = error_of(Ended(code, text, list(trailers)), "here:1", None)
        assert type(error) is FROM_THE_MESH.get(kind, errors.TooBusyError), kind
        assert (error.message, error.code, error.reason) == ("m", code.name, chassis.TABLE[kind][1])


def test_the_reason_outweighs_the_code() -> None:
    """A proxy may rewrite a code; the mesh's word stays."""
    assert type(mapped(grpc.StatusCode.UNKNOWN, autoglm_reason="NOT_FOUND")) is errors.NotFoundError


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAUTHENTICATED, errors.AccessDeniedError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.AccessDeniedError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.UnsupportedError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.TooBusyError),
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError),
        (grpc.StatusCode.CANCELLED, errors.CallCancelledError),
        (grpc.StatusCode.DATA_LOSS, errors.InternalError),
        (None, errors.InternalError),
    ],
)
def test_codes_decide_where_no_reason_is_given(code: grpc.StatusCode | None, kind: type[Exception]) -> None:
    """Proxies and gRPC itself only know codes."""
    assert type(mapped(code)) is kind


def test_retry_after_is_read_and_garbage_ignored() -> None:
    """`retry_after_s` is a number or None, whatever the other side sends."""
    busy = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert mapped(busy, retry_after_ms="1500").retry_after_s == 1.5
    for garbage in ("", "-1", "nan", "1.5", "soon", "²"):
        assert mapped(busy, retry_after_ms=garbage).retry_after_s is None


def test_an_oversized_message_is_not_called_busy() -> None:
    """Coming back later would not help; gRPC uses the same code for both."""
    assert type(mapped(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)")) is (
        errors.InvalidRequestError
    )


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED])
def test_a_connection_lost_midway_is_an_interruption(code: grpc.StatusCode) -> None:
    """After text has come, "try again" would be bad advice."""
    assert type(mapped(code, has_begun=True)) is errors.InterruptedStreamError


def test_a_bug_or_a_deadline_midway_keeps_its_name() -> None:
    """Only lost connections become interruptions."""
    assert type(mapped(grpc.StatusCode.INTERNAL, has_begun=True, autoglm_reason="INTERNAL")) is errors.InternalError
    assert type(mapped(grpc.StatusCode.DEADLINE_EXCEEDED, has_begun=True)) is errors.DeadlineError


def test_messages_name_the_remedy() -> None:
    """An unreachable mesh names the target and how to change it; a deadline names the timeout."""
    assert "here:1" in str(mapped(grpc.StatusCode.UNAVAILABLE)) and "AUTOGLM_TARGET" in str(
        mapped(grpc.StatusCode.UNAVAILABLE)
    )
    assert "timeout=2 s" in str(mapped(grpc.StatusCode.DEADLINE_EXCEEDED))


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    """Every exception is drawn, exported, and a child of what it is drawn under."""
    drawn: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        name = next((word for word in line.split() if word.endswith("Error")), None)
        if name is None or not line.startswith("    "):
            continue
        depth = line.index(name)
        while stack and stack[-1][0] >= depth:
            stack.pop()
        drawn[name] = stack[-1][1] if stack else None
        stack.append((depth, name))
    defined = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and name.endswith("Error")}
    assert drawn.keys() == defined.keys()
    assert drawn.keys() <= set(autoglm.__all__)
    for name, parent in drawn.items():
        assert defined[name].__base__ is (defined[parent] if parent else Exception)


def test_errors_survive_pickling() -> None:
    """Process pools send exceptions as pickles; the facts must arrive."""
    error = errors.TooBusyError("m", request_id="r", retry_after_s=2.0)
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
    assert (copy.message, copy.request_id, copy.retry_after_s) == ("m", "r", 2.0)


def test_public_names_are_listed_once_and_documented() -> None:
    """`__all__` is sorted, complete, and every name in it has a docstring of its own or is an alias."""
    names = autoglm.__all__
    assert list(names) == sorted(set(names))
    public = {name for name, value in vars(autoglm).items() if not name.startswith("_") and not _is_module(value)}
    assert public == set(names)
    for name in names:
        value = getattr(autoglm, name)
        assert not isinstance(value, type) or value.__doc__, name
    assert (Path(autoglm.__file__).parent / "py.typed").exists()


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"
