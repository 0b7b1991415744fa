"""Changed, cut and joined files: a reader may refuse them with ValueError or OSError and nothing
else.
"""

import json
import struct
import zipfile

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_checkpoint import entry, safetensors_bytes, state, stream, tensor, torch_zip

from glmlora.files.checkpoint import (
    load_checkpoint,
    read_json,
    read_safetensors,
    read_torch,
    read_weights,
    save_sharded,
    to_bf16,
    write_safetensors,
    write_torch,
)

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
VALUES = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": to_bf16(np.ones((2, 5))),
    "c": np.array(3, np.int64),
    "d": np.zeros((0, 2), np.int8),
}
# Where to strike, as a fraction of the file, and what with.
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["set", "cut", "insert", "remove", "copy"]),
        st.binary(min_size=1, max_size=9)
        | st.sampled_from([b"\xff" * 8, b"\0" * 8, b"(", b".", b"R"]),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits) -> bytes:
    for where, action, value in edits:
        at = int(where * len(data))
        if action == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif action == "cut":
            data = data[:at]
        elif action == "insert":
            data = data[:at] + value + data[at:]
        elif action == "remove":
            data = data[:at] + data[at + len(value) :]
        else:
            data = data[:at] + data[at // 2 : at // 2 + 40] + data[at:]
    return data


def survives(read, path) -> None:
    """Read every value of what is accepted: a wrong mapping would show here."""
    try:
        value = read(path)
    except (ValueError, OSError):
        return
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif hasattr(item, "numpy"):
            item.numpy().tobytes()


@FUZZ
@given(EDITS)
def test_safetensors(tmp_path, edits):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, VALUES)
    path.write_bytes(edited(path.read_bytes(), edits))
    survives(read_safetensors, path)
    survives(read_weights, path)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-(1 << 70), 1 << 70)
    | st.sampled_from(["F32", "BF16", "U8", "", "\ud800", "shape", 0, 8, 1 << 63]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["t", "u", "__metadata__", "", "\ud800"]),
        JSON_VALUES
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "BOOL", "X"]) | JSON_VALUES,
                "shape": st.lists(st.integers(-1, 4) | st.integers(0, 1 << 65), max_size=3)
                | JSON_VALUES,
                "data_offsets": st.lists(st.integers(0, 16), min_size=2, max_size=2) | JSON_VALUES,
            }
        ),
    ),
    st.binary(max_size=32),
)
def test_safetensors_headers(tmp_path, header, data):
    path = tmp_path / "m.safetensors"
    path.write_bytes(safetensors_bytes(header, data))
    survives(read_safetensors, path)


@FUZZ
@given(EDITS)
def test_torch(tmp_path, edits):
    path = tmp_path / "m.bin"
    write_torch(path, VALUES)
    path.write_bytes(edited(path.read_bytes(), edits))
    survives(read_torch, path)
    survives(read_weights, path)


PICKLES = [
    state(tensor()),
    state(tensor((3, 2), (1, 3))),
    b"\x80\x02](K\1K\2\x8a\1\5G@\x09\x21\xfb\x54\x44\x2d\x18N\x88e.",
    b"\x80\x02ccollections\nOrderedDict\n)Rq\0}h\0b\x8c\1kh\0\x85s.",
]


@FUZZ
@given(st.sampled_from(PICKLES), EDITS)
def test_pickles_with_a_right_checksum(tmp_path, pkl, edits):
    path = tmp_path / "m.bin"
    torch_zip(path, edited(pkl, edits))
    survives(read_torch, path)


CODES = b"\x80\x95.X\x8cUTJKM\x8aGN\x88\x89(}])t\x85\x86\x87suaeqrhj\x94c\x93QRb"
STEPS = st.sampled_from(CODES).map(lambda c: bytes([c])) | st.sampled_from(
    [
        b"K\1", b"q\0", b"h\0", b"h\1", b"\x8c\1k", b"ctorch\nSize\n", b"ctorch\nFloatStorage\n",
        b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"\x8c\x07storage", b"\x8c\1" + b"0", b"ctorch\nfloat32\n", b"K\2\x85", b"\x89}tR",
    ]
)  # fmt: skip


@FUZZ
@given(st.lists(STEPS, max_size=40))
def test_any_sequence_of_operations(tmp_path, steps):
    path = tmp_path / "m.bin"
    torch_zip(path, b"\x80\x02" + b"".join(steps) + b".")
    survives(read_torch, path)


@FUZZ
@given(EDITS)
def test_older_torch(tmp_path, edits):
    path = tmp_path / "m.bin"
    path.write_bytes(edited(stream(state(tensor())), edits))
    survives(read_torch, path)


@FUZZ
@given(
    st.sampled_from(["PK\x01\x02", "PK\x05\x06", "PK\x03\x04"]),
    st.integers(0, 45),
    st.binary(min_size=1, max_size=8),
)
def test_zip_fields(tmp_path, magic, offset, value):
    """Struck where zip headers keep sizes and offsets."""
    path = tmp_path / "m.bin"
    torch_zip(path, state(tensor()))
    data = path.read_bytes()
    at = data.rindex(magic.encode("latin-1")) + offset
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    survives(read_torch, path)


@FUZZ
@given(EDITS)
def test_index(tmp_path, edits):
    save_sharded(tmp_path, VALUES, max_shard_size=40)
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(edited(path.read_bytes(), edits))
    survives(load_checkpoint, tmp_path)
    survives(read_json, path)


@FUZZ
@given(st.binary(max_size=60))
def test_any_bytes(tmp_path, data):
    path = tmp_path / "m"
    for start in b"", b"PK\x03\x04", b"\x80\x02", struct.pack("<Q", 20) + b"{":
        path.write_bytes(start + data)
        for read in read_weights, read_torch, read_safetensors, read_json:
            survives(read, path)


def test_every_truncation(tmp_path):
    """A cut file is never taken for a whole one."""
    path = tmp_path / "m"
    torch_zip(path, state(tensor()))
    zipped = path.read_bytes()
    whole = {
        "safetensors": safetensors_bytes({"t": entry()}, bytes(8)),
        "zip": zipped,
        "stream": stream(state(tensor())),
    }
    for name, data in whole.items():
        path.write_bytes(data)
        assert read_weights(path), name
        for length in range(len(data)):
            path.write_bytes(data[:length])
            try:
                read_weights(path)
            except ValueError:
                continue
            raise AssertionError(f"{name}: {length} of {len(data)} bytes were accepted")


def test_json_module_and_zip_module_agree_with_the_helpers(tmp_path):
    """The bytes that the other tests strike are themselves sound."""
    data = safetensors_bytes({"t": entry()}, bytes(8))
    assert json.loads(data[8:-8])
    torch_zip(tmp_path / "m", state(tensor()))
    assert zipfile.ZipFile(tmp_path / "m").testzip() is None
