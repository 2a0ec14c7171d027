"""Runs where the real Envoy stubs are installed; answers test_third_party_protos.py in JSON on stdout.

`cases` makes the golden cases, `shapes` describes messages, `parse` reads bytes. To renew the golden file:
`.cache/venvs/xds/bin/python tests/contract/third_party_protos/real_stubs.py cases < /dev/null > …/golden.json`.
"""

import base64
import json
import sys

from envoy.config.core.v3 import base_pb2 as core
from envoy.extensions.filters.http.ext_proc.v3 import processing_mode_pb2 as modes
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from envoy.type.v3 import http_status_pb2 as status
from google.protobuf import json_format, unknown_fields
from google.protobuf.descriptor import FieldDescriptor

FILES = (core, modes, ext_proc, status)
SUBSET_OF_CORE = ("HeaderMap", "HeaderValue", "HeaderValueOption", "Metadata")


def kind(name):
    """The message class of a full name."""
    package, short = name.rsplit(".", 1)
    return getattr(next(file for file in FILES if file.DESCRIPTOR.package == package), short)


def filled(message, depth=0, salt=1):
    """Sets every field, oneofs to their last member, so that no number stays untested."""
    for field in message.DESCRIPTOR.fields:
        if field.containing_oneof and field.containing_oneof.fields[-1] is not field:
            continue
        set_field(message, field, depth, salt + field.number)
    return message


def set_field(message, field, depth, salt):
    """Sets one field to a value that no other field has."""
    if field.message_type and field.message_type.GetOptions().map_entry:
        target = getattr(message, field.name)[f"key-{salt}"]
        if target.DESCRIPTOR.full_name == "google.protobuf.Struct":
            target.update({"text": f"v{salt}", "list": ["10.0.0.1:1", "10.0.0.2:2"]})
        elif target.DESCRIPTOR.full_name == "google.protobuf.Any":
            target.Pack(status.HttpStatus(code=429))
    elif field.message_type:
        values = getattr(message, field.name)
        target = values.add() if field.is_repeated else values
        target.SetInParent()
        full_name = target.DESCRIPTOR.full_name
        if full_name == "google.protobuf.Struct":
            target.update({"envoy.lb": {"x-gateway-destination-endpoint": "10.0.0.1:1"}})
        elif full_name == "google.protobuf.Duration":
            target.FromMilliseconds(1500)
        elif full_name == "google.protobuf.BoolValue":
            target.value = True
        elif depth < 8:
            filled(target, depth + 1, salt)
    else:
        value = {
            FieldDescriptor.CPPTYPE_BOOL: True,
            FieldDescriptor.CPPTYPE_STRING: b"\x00\xff" if field.type == FieldDescriptor.TYPE_BYTES else f"text-{salt}",
            FieldDescriptor.CPPTYPE_UINT32: 1000 + salt,
            FieldDescriptor.CPPTYPE_ENUM: field.enum_type and sorted(field.enum_type.values_by_number)[1],
        }[field.cpp_type]
        if field.enum_type and field.enum_type.full_name == "envoy.type.v3.StatusCode":
            value = 503
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)


def case(name, message, **more):
    """One golden case."""
    return {
        "name": name,
        "type": message.DESCRIPTOR.full_name,
        "json": json_format.MessageToDict(message, preserving_proto_field_name=True),
        "bytes": base64.b64encode(message.SerializeToString(deterministic=True)).decode(),
        **more,
    }


def cases():
    """Every message with every field set, every member of every oneof, and one with fields that the subset lacks."""
    made = []
    for file in (ext_proc, modes):
        for name in sorted(file.DESCRIPTOR.message_types_by_name):
            made.append(case(name, filled(getattr(file, name)())))
    made += [case(name, filled(getattr(core, name)())) for name in SUBSET_OF_CORE]
    made.append(case("HttpStatus", status.HttpStatus(code=503)))
    for message_kind in (ext_proc.ProcessingRequest, ext_proc.ProcessingResponse, ext_proc.BodyMutation):
        for oneof in message_kind.DESCRIPTOR.oneofs:
            for field in oneof.fields:
                message = message_kind()
                set_field(message, field, 0, field.number)
                made.append(case(f"{message_kind.__name__}-{field.name}", message))
    made.append(case("ProcessingRequest-empty", ext_proc.ProcessingRequest()))
    newer = filled(ext_proc.HttpBody()).SerializeToString() + b"\xf2\x3e\x05later" + b"\xf8\x3e\x07"
    made.append(case("HttpBody-of-a-newer-Envoy", ext_proc.HttpBody.FromString(newer), unknown=True))
    return made


def shapes(names):
    """Fields and enums of the named messages."""
    fields, enums = {}, {"envoy.type.v3.StatusCode": dict(status.StatusCode.items())}
    for name in names:
        descriptor = kind(name).DESCRIPTOR
        fields[name] = {
            field.name: [
                field.number,
                field.type,
                field.is_repeated,
                (field.message_type or field.enum_type).full_name if field.message_type or field.enum_type else "",
                field.containing_oneof.name if field.containing_oneof else "",
            ]
            for field in descriptor.fields
        }
        for enum in descriptor.enum_types:
            enums[enum.full_name] = {value.name: value.number for value in enum.values}
    return {"fields": fields, "enums": enums}


def parse(entries):
    """What the real stubs read in our bytes."""
    answers = []
    for entry in entries:
        message = kind(entry["type"]).FromString(base64.b64decode(entry["bytes"]))
        answers.append(
            {
                "json": json_format.MessageToDict(message, preserving_proto_field_name=True),
                "unknown": len(unknown_fields.UnknownFieldSet(message)),
            }
        )
    return answers


if __name__ == "__main__":
    payload = json.loads(sys.stdin.read() or "null")
    answer = {"cases": cases, "shapes": lambda: shapes(payload), "parse": lambda: parse(payload)}[sys.argv[1]]()
    json.dump(answer, sys.stdout, indent=1, sort_keys=True)
    print()
