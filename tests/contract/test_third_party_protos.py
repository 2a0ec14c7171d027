"""Our subset of Envoy's ext_proc messages is wire-compatible with the real stubs, in both directions.

The real stubs (PyPI `xds-protos`) own the Python package `envoy`, which here belongs to the proxy's wheel, so they live
in a virtual environment of their own under .cache and speak to this test through a process. Committed golden bytes,
made by the real stubs, are checked even where no package index can be reached.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from autoglm.third_party import envoy_core_pb2, envoy_type_pb2, ext_proc_mode_pb2, ext_proc_pb2, ext_proc_pb2_grpc
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor

from tests.fakes.venvs import python_with, run_script

HERE = Path(__file__).parent / "third_party_protos"
GOLDEN = HERE / "golden.json"
REQUIREMENTS = ("xds-protos==1.85.0", "protobuf==7.36.2", "grpcio==1.85.1")

MESSAGES: dict[str, Any] = {
    f"{file.DESCRIPTOR.package}.{name}": getattr(file, name)
    for file in (ext_proc_pb2, envoy_core_pb2, envoy_type_pb2, ext_proc_mode_pb2)
    for name in file.DESCRIPTOR.message_types_by_name
}


def golden() -> list[dict[str, Any]]:
    """Cases made by the real stubs: {type, json, bytes}; `unknown` names fields that our subset leaves out."""
    cases: list[dict[str, Any]] = json.loads(GOLDEN.read_text())
    return cases


@pytest.mark.parametrize("case", golden(), ids=lambda case: case["name"])
def test_golden_bytes_parse_and_come_out_again(case: dict[str, Any]) -> None:
    """Bytes of the real stubs mean the same to ours, and ours write the same bytes, unknown fields included."""
    raw = base64.b64decode(case["bytes"])
    message = MESSAGES[case["type"]].FromString(raw)
    assert message.SerializeToString(deterministic=True) == raw
    if not case.get("unknown"):
        ours = json_format.MessageToDict(message, preserving_proto_field_name=True)
        assert ours == case["json"]
        again = json_format.ParseDict(case["json"], MESSAGES[case["type"]]())
        assert again.SerializeToString(deterministic=True) == raw


def test_every_message_has_a_golden_case() -> None:
    """A message that is added to the subset needs bytes of the real stubs to be compared with."""
    assert {case["type"] for case in golden()} >= set(MESSAGES)


def test_the_service_is_envoys() -> None:
    """Envoy calls /envoy.service.ext_proc.v3.ExternalProcessor/Process; any other name would never be reached."""
    method = ext_proc_pb2.DESCRIPTOR.services_by_name["ExternalProcessor"].methods_by_name["Process"]
    assert method.full_name == "envoy.service.ext_proc.v3.ExternalProcessor.Process"
    assert hasattr(ext_proc_pb2_grpc, "ExternalProcessorServicer")


@pytest.fixture(scope="session")
def real_stubs() -> Path:
    """The Python of an environment that has the real stubs; made once, reused afterwards."""
    return python_with("xds", REQUIREMENTS)


def speak(python: Path, verb: str, payload: Any = None) -> Any:
    """Runs the script that knows the real stubs."""
    return json.loads(run_script(python, HERE / "real_stubs.py", verb, text=json.dumps(payload)))


def shape(descriptor: Descriptor) -> dict[str, list[Any]]:
    """Field name → what decides its bytes."""
    facts = {}
    for field in descriptor.fields:
        kind = field.message_type or field.enum_type
        oneof = field.containing_oneof.name if field.containing_oneof else ""
        facts[field.name] = [field.number, field.type, field.is_repeated, kind.full_name if kind else "", oneof]
    return facts


@pytest.mark.timeout(300)
def test_every_field_has_the_real_number_and_type(real_stubs: Path) -> None:
    """Each of our fields and enum values exists in the real package with the same number, type and oneof."""
    theirs = speak(real_stubs, "shapes", sorted(MESSAGES))
    for name, kind in MESSAGES.items():
        for field, facts in shape(kind.DESCRIPTOR).items():
            assert theirs["fields"][name].get(field) == facts, f"{name}.{field}"
        for enum in kind.DESCRIPTOR.enum_types:
            assert {value.name: value.number for value in enum.values} == theirs["enums"][enum.full_name]
    codes = {value.name: value.number for value in envoy_type_pb2.StatusCode.DESCRIPTOR.values}
    assert codes.items() <= theirs["enums"]["envoy.type.v3.StatusCode"].items()


@pytest.mark.timeout(300)
def test_the_golden_bytes_are_what_the_real_stubs_make(real_stubs: Path) -> None:
    """The committed file is not stale: the real stubs make the same cases today."""
    assert speak(real_stubs, "cases") == golden()


@pytest.mark.timeout(300)
def test_our_bytes_parse_with_the_real_stubs(real_stubs: Path) -> None:
    """What we serialise, the real stubs read as the same message, with nothing unknown to them."""
    cases = [case for case in golden() if not case.get("unknown")]
    ours = [
        {
            "type": case["type"],
            "bytes": base64.b64encode(
                json_format.ParseDict(case["json"], MESSAGES[case["type"]]()).SerializeToString()
            ).decode(),
        }
        for case in cases
    ]
    assert speak(real_stubs, "parse", ours) == [{"json": case["json"], "unknown": 0} for case in cases]
