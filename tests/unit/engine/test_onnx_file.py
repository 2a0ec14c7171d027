"""ONNX files are looked over before a runtime sees them: weights inside, operators known, sizes bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from engine.checkpoints.architecture import CheckpointError
from engine.checkpoints.onnx_file import examine, find
from tests.fakes import onnx_models as models

MAX = 1 << 20


def refused(path: Path, max_bytes: int = MAX) -> str:
    with pytest.raises(CheckpointError) as caught:
        examine(path, max_bytes)
    return str(caught.value)


def test_a_sound_file_is_described(tmp_path: Path) -> None:
    """Size and digest; the digest follows the content."""
    first = examine(models.write(tmp_path / "a.onnx", models.convolution()), MAX)
    second = examine(models.write(tmp_path / "b.onnx", models.convolution()), MAX)
    other = examine(models.write(tmp_path / "c.onnx", models.product()), MAX)
    assert first.digest == second.digest != other.digest and first.digest.startswith("sha256:")
    assert first.external == () and first.total_bytes == (tmp_path / "a.onnx").stat().st_size


def test_external_weights_inside_the_directory_are_counted(tmp_path: Path) -> None:
    """They belong to the size and to the digest."""
    path = models.write_external(tmp_path / "m.onnx", models.product(), "m.weights")
    seen = examine(path, MAX)
    assert [other.name for other in seen.external] == ["m.weights"]
    assert seen.total_bytes == path.stat().st_size + (tmp_path / "m.weights").stat().st_size
    data = bytearray((tmp_path / "m.weights").read_bytes())
    data[0] ^= 1
    (tmp_path / "m.weights").write_bytes(data)
    assert examine(path, MAX).digest != seen.digest
    assert "with its external data" in refused(path, path.stat().st_size + 1)


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/hostname",
        "sub/../../secret",
        "a\\b",
        "*/_ORT_MEM_ADDR_/*",
        ".",
        "link",
        "linked/secret",
        "x\0y",
    ],
)
def test_weights_outside_the_directory_are_refused(tmp_path: Path, location: str) -> None:
    """No path, link or trick of the runtime's own leads out of the model's directory."""
    (tmp_path / "secret").write_bytes(b"s" * 4096)
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path / "secret")
    (home / "linked").symlink_to(tmp_path)
    path = models.write_external(home / "m.onnx", models.product(), "m.weights")
    assert "outside the model's directory" in refused(models.rename_external(path, location))


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ({"offset": "-1"}, "offset"),
        ({"offset": "99999999999999999999"}, "offset"),
        ({"length": "1e3"}, "length"),
        ({"offset": "4096"}, "its tensors want"),
        ({"length": "4096"}, "its tensors want"),
    ],
)
def test_external_ranges_must_lie_in_the_file(tmp_path: Path, entries: dict[str, str], text: str) -> None:
    """Offsets and lengths are numbers within the file they speak of."""
    path = models.write_external(tmp_path / "m.onnx", models.product(), "m.weights")
    assert text in refused(models.rename_external(path, "m.weights", **entries))


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    """The message says which file is not there."""
    path = models.write_external(tmp_path / "m.onnx", models.product(), "m.weights")
    (tmp_path / "m.weights").unlink()
    assert "'m.weights': No such file" in refused(path)


def test_external_data_hidden_in_a_subgraph_is_found(tmp_path: Path) -> None:
    """A tensor inside an attribute inside a branch is looked at like any other."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    out = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])
    branch = helper.make_graph([constant], "branch", [], [out])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    made = models.model([node], [("yes", TensorProto.BOOL, [])], [("y", TensorProto.FLOAT, [1])])
    assert "'../secret' lies outside" in refused(models.write(tmp_path / "m.onnx", made))


def test_operators_that_need_a_library_are_refused_by_domain(tmp_path: Path) -> None:
    """Custom-op libraries are code; none is ever loaded."""
    node = helper.make_node("BlingFire", ["x"], ["y"], domain="ai.onnx.contrib")
    made = models.model(
        [node], [("x", TensorProto.STRING, [1])], [("y", TensorProto.STRING, [1])], domains=("ai.onnx.contrib",)
    )
    assert "ai.onnx.contrib" in refused(models.write(tmp_path / "m.onnx", made))


def test_size_depth_and_emptiness_are_bounded(tmp_path: Path) -> None:
    """Too large, empty, a directory, a pipe, nested without end: each a typed error at once."""
    path = models.write(tmp_path / "m.onnx", models.product())
    assert "at most 10 are read" in refused(path, 10)
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert "empty" in refused(tmp_path / "empty.onnx")
    (tmp_path / "dir.onnx").mkdir()
    refused(tmp_path / "dir.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a regular file" in refused(tmp_path / "pipe.onnx")
    refused(tmp_path / "absent.onnx")
    body = b""
    for _ in range(200):  # graph → node → attribute → graph …
        for number in (6, 5, 1):
            body = bytes([number << 3 | 2]) + _varint(len(body)) + body
    (tmp_path / "deep.onnx").write_bytes(b"\x3a" + _varint(len(body)) + body)
    assert "nested deeper" in refused(tmp_path / "deep.onnx")


def test_a_flood_of_fields_is_refused(tmp_path: Path) -> None:
    """Millions of empty fields are not all walked."""
    (tmp_path / "m.onnx").write_bytes(b"\x08\x01" * 5_000_000)
    assert "protobuf fields" in refused(tmp_path / "m.onnx", 1 << 30)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_broken_files_give_typed_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A file that was cut or changed anywhere is read or refused with a CheckpointError, nothing else."""
    raw = bytearray(models.convolution().SerializeToString())
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(0, 255)), max_size=8)
    ):
        raw[position] = value
    path = tmp_path_factory.mktemp("fuzz") / "m.onnx"
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        examine(path, MAX)
    except CheckpointError as error:
        assert str(path) in str(error)


def test_what_a_setting_means(tmp_path: Path) -> None:
    """A file by its name; a directory by its model.onnx, unless it holds another kind of weights."""
    assert find(Path("somewhere/x.onnx")) == Path("somewhere/x.onnx")
    assert find(tmp_path) is None and find(tmp_path / "absent") is None
    models.write(tmp_path / "model.onnx", models.product())
    assert find(tmp_path) == tmp_path / "model.onnx"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find(tmp_path) is None


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
