"""Our text of the Open Inference Protocol is wire-compatible with NVIDIA's client's stubs, in both directions.

The client wants an older protobuf than the mesh, so it has a virtual environment of its own (tests/fakes/venvs.py).
Committed golden bytes, made by its stubs, are checked even where no package index can be reached.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from autoglm.third_party import oip_pb2, oip_pb2_grpc
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor

from tests.fakes.venvs import TRITON, python_with, run_script

HERE = Path(__file__).parent / "third_party_protos"
MESSAGES: dict[str, Any] = {
    f"inference.{name}": getattr(oip_pb2, name) for name in oip_pb2.DESCRIPTOR.message_types_by_name
}


def golden() -> list[dict[str, Any]]:
    """Cases made by the real stubs: {name, type, json, bytes}."""
    cases: list[dict[str, Any]] = json.loads((HERE / "golden_oip.json").read_text())
    return cases


@pytest.mark.parametrize("case", golden(), ids=lambda case: case["name"])
def test_golden_bytes_parse_and_come_out_again(case: dict[str, Any]) -> None:
    """Bytes of the real stubs mean the same to ours, and ours write the same bytes."""
    raw = base64.b64decode(case["bytes"])
    message = MESSAGES[case["type"]].FromString(raw)
    assert json_format.MessageToDict(message, preserving_proto_field_name=True) == case["json"]
    assert message.SerializeToString(deterministic=True) == raw
    again = json_format.ParseDict(case["json"], MESSAGES[case["type"]]())
    assert again.SerializeToString(deterministic=True) == raw


def test_every_message_has_a_golden_case() -> None:
    """A message that is added needs bytes of the real stubs to be compared with."""
    assert {case["type"] for case in golden()} >= set(MESSAGES)


def test_the_service_has_the_protocols_name() -> None:
    """Clients call /inference.GRPCInferenceService/…; any other name would never be reached."""
    assert oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name == "inference.GRPCInferenceService"
    assert hasattr(oip_pb2_grpc, "GRPCInferenceServiceServicer")


@pytest.fixture(scope="session")
def triton() -> Path:
    """A Python that has the real client."""
    return python_with("triton", TRITON)


def speak(python: Path, verb: str, payload: Any = None) -> Any:
    """Runs the script that knows the real stubs."""
    return json.loads(run_script(python, HERE / "real_oip.py", verb, text=json.dumps(payload)))


def described(descriptor: Descriptor) -> dict[str, dict[str, list[Any]]]:
    """Field → what decides its bytes, nested messages included."""
    fields: dict[str, dict[str, list[Any]]] = {descriptor.full_name: {}}
    for field in descriptor.fields:
        kind, oneof = field.message_type, field.containing_oneof
        fields[descriptor.full_name][field.name] = [
            field.number,
            field.type,
            field.is_repeated,
            kind.full_name if kind else "",
            oneof.name if oneof else "",
        ]
    for nested in descriptor.nested_types:
        fields |= described(nested)
    return fields


@pytest.mark.timeout(300)
def test_every_field_and_method_is_the_real_one(triton: Path) -> None:
    """Fields, numbers, types, oneofs and methods are those of the real package, none missing and none added."""
    theirs = speak(triton, "shapes")
    ours: dict[str, Any] = {}
    for kind in MESSAGES.values():
        ours |= described(kind.DESCRIPTOR)
    assert ours == theirs["fields"]
    methods = oip_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    assert {m.full_name: [m.input_type.full_name, m.output_type.full_name] for m in methods} == theirs["methods"]


@pytest.mark.timeout(300)
def test_the_golden_bytes_are_what_the_real_stubs_make(triton: Path) -> None:
    """The committed file is not stale: the real stubs make the same cases today."""
    assert speak(triton, "cases") == golden()


@pytest.mark.timeout(300)
def test_our_bytes_parse_with_the_real_stubs(triton: Path) -> None:
    """What we serialise, the real stubs read as the same message, with nothing unknown to them."""
    ours = [
        {
            "type": case["type"],
            "bytes": base64.b64encode(
                json_format.ParseDict(case["json"], MESSAGES[case["type"]]()).SerializeToString()
            ).decode(),
        }
        for case in golden()
    ]
    assert speak(triton, "parse", ours) == [{"json": case["json"], "unknown": 0} for case in golden()]
