"""Runs where the real tritonclient is installed; answers test_oip_proto.py in JSON on stdout.

`cases` makes the golden cases, `shapes` describes messages, `parse` reads bytes. To renew the golden file:
`.cache/venvs/triton/bin/python tests/contract/third_party_protos/real_oip.py cases < /dev/null > …/golden_oip.json`.
"""

import base64
import json
import sys

from google.protobuf import json_format, unknown_fields
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import service_pb2 as pb

SUBSET = (
    "InferParameter",
    "InferTensorContents",
    "ModelInferRequest",
    "ModelInferResponse",
    "ModelMetadataRequest",
    "ModelMetadataResponse",
    "ModelReadyRequest",
    "ModelReadyResponse",
    "ModelStreamInferResponse",
    "ServerLiveRequest",
    "ServerLiveResponse",
    "ServerMetadataRequest",
    "ServerMetadataResponse",
    "ServerReadyRequest",
    "ServerReadyResponse",
)
METHODS = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
)
VALUES = {
    FieldDescriptor.CPPTYPE_BOOL: lambda salt: True,
    FieldDescriptor.CPPTYPE_INT32: lambda salt: -salt,
    FieldDescriptor.CPPTYPE_INT64: lambda salt: -(1 << 40) - salt,
    FieldDescriptor.CPPTYPE_UINT32: lambda salt: 1000 + salt,
    FieldDescriptor.CPPTYPE_UINT64: lambda salt: (1 << 63) + salt,
    FieldDescriptor.CPPTYPE_FLOAT: lambda salt: salt + 0.5,
    FieldDescriptor.CPPTYPE_DOUBLE: lambda salt: salt + 0.25,
}


def filled(message, salt=1):
    """Sets every field, oneofs to their last member."""
    for field in message.DESCRIPTOR.fields:
        if not field.containing_oneof or field.containing_oneof.fields[-1] is field:
            set_field(message, field, salt + field.number)
    return message


def set_field(message, field, salt):
    """Sets one field to a value that no other field of its kind has."""
    if field.message_type and field.message_type.GetOptions().map_entry:
        filled(getattr(message, field.name)[f"key-{salt}"], salt)
    elif field.message_type:
        values = getattr(message, field.name)
        filled(values.add() if field.is_repeated else values, salt)
    else:
        if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
            value = b"\x00\xff" if field.type == FieldDescriptor.TYPE_BYTES else f"text-{salt}"
        else:
            value = VALUES[field.cpp_type](salt)
        if field.is_repeated:
            getattr(message, field.name).extend([value, value])
        else:
            setattr(message, field.name, value)


def case(name, message):
    """One golden case."""
    return {
        "name": name,
        "type": message.DESCRIPTOR.full_name,
        "json": json_format.MessageToDict(message, preserving_proto_field_name=True),
        "bytes": base64.b64encode(message.SerializeToString(deterministic=True)).decode(),
    }


def cases():
    """Every message with every field set, and every member of the one oneof."""
    made = [case(name, filled(getattr(pb, name)())) for name in SUBSET]
    for field in pb.InferParameter.DESCRIPTOR.fields:
        message = pb.InferParameter()
        set_field(message, field, field.number)
        made.append(case(f"InferParameter-{field.name}", message))
    return made


def described(descriptor):
    """Field → what decides its bytes, nested messages included under their full names."""
    fields = {
        descriptor.full_name: {
            field.name: [
                field.number,
                field.type,
                field.is_repeated,
                field.message_type.full_name if field.message_type else "",
                field.containing_oneof.name if field.containing_oneof else "",
            ]
            for field in descriptor.fields
        }
    }
    for nested in descriptor.nested_types:
        fields |= described(nested)
    return fields


def shapes():
    """Messages and methods."""
    fields = {}
    for name in SUBSET:
        fields |= described(getattr(pb, name).DESCRIPTOR)
    service = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    methods = {}
    for name in METHODS:
        method = service.methods_by_name[name]
        methods[method.full_name] = [method.input_type.full_name, method.output_type.full_name]
    return {"fields": fields, "methods": methods}


def parse(entries):
    """What the real stubs read in our bytes."""
    answers = []
    for entry in entries:
        kind = getattr(pb, entry["type"].rsplit(".", 1)[1])
        message = kind.FromString(base64.b64decode(entry["bytes"]))
        answers.append(
            {
                "json": json_format.MessageToDict(message, preserving_proto_field_name=True),
                "unknown": len(unknown_fields.UnknownFieldSet(message)),
            }
        )
    return answers


if __name__ == "__main__":
    payload = json.loads(sys.stdin.read() or "null")
    answer = {"cases": cases, "shapes": shapes, "parse": lambda: parse(payload)}[sys.argv[1]]()
    json.dump(answer, sys.stdout, indent=1, sort_keys=True)
    print()
