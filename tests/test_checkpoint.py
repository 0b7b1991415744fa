"""Weight files and model directories: what is written is read back, and damage is named.

Bad files are made by hand here, byte by byte, so that no writer's checks stand in the way.
"""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest

from glmlora.files.checkpoint import (
    Source,
    Tensor,
    atomic_directory,
    atomic_file,
    load_checkpoint,
    load_state_dict,
    read_json,
    read_safetensors,
    read_torch,
    read_weights,
    save_sharded,
    to_bf16,
    write_json,
    write_safetensors,
    write_text,
    write_torch,
)


def samples() -> dict:
    """Every type, and the shapes that go wrong: 0-d, empty, odd, transposed, big-endian."""
    rng = np.random.default_rng(7)
    arrays = {
        f"{t}.{'x'.join(map(str, shape)) or 'scalar'}": (rng.standard_normal(shape) * 50).astype(t)
        for t in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?")
        for shape in ((), (0,), (3, 0, 2), (1,), (7, 3), (2, 1, 5, 3))
    }
    arrays["transposed"] = np.arange(12, dtype=np.float32).reshape(3, 4).T
    arrays["big endian"] = np.arange(5, dtype=">f4")
    arrays["bf16"] = to_bf16(rng.standard_normal((5, 3)))
    arrays["bf16 scalar"] = to_bf16(np.float32(1.5))
    arrays["名字"] = np.zeros(3, np.float16)
    return arrays


def assert_same(read: dict, written: dict) -> None:
    assert read.keys() == written.keys()
    for name, value in written.items():
        value = value if isinstance(value, Tensor) else Tensor(value)
        got = read[name]
        assert (got.dtype, got.shape, got.nbytes) == (value.dtype, value.shape, value.nbytes), name
        assert got.data.tobytes() == value.data.tobytes(), name
        assert got.data.flags.c_contiguous and not got.data.flags.writeable
        assert got.data.flags.aligned


# Tensor


def test_bf16_rounds_to_nearest_even_and_widens_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = Tensor(bits, "BF16").numpy()
    assert wide.dtype == np.float32
    finite = ~np.isnan(wide)
    assert np.array_equal(wide.view(np.uint32)[finite], bits.astype(np.uint32)[finite] << 16)
    assert np.array_equal(to_bf16(wide).data[finite], bits[finite])
    assert np.isnan(to_bf16(wide).numpy()[~finite]).all()
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF], np.uint32).view(np.float32)
    assert to_bf16(ties).data.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]


@pytest.mark.parametrize(
    "data, dtype", [(np.zeros(2, np.uint16), None), (np.zeros(2), "BF16"), (np.zeros(2), "F8")]
)
def test_tensor_refuses_types_that_do_not_fit(data, dtype):
    with pytest.raises(ValueError, match="dtype|data"):
        Tensor(data, dtype)


def test_tensor_leaves_the_callers_array_writable():
    array = np.zeros(3, np.float32)
    tensor = Tensor(array)
    assert array.flags.writeable and np.shares_memory(tensor.data, array)


# Round trips


@pytest.mark.parametrize(
    "write, read", [(write_safetensors, read_safetensors), (write_torch, read_torch)]
)
def test_round_trip(tmp_path, write, read):
    path = tmp_path / "file"
    write(path, samples())
    assert_same(read(path), samples())
    again = read(path)
    write(path, again)  # over the file that is mapped
    assert_same(read(path), samples())
    assert_same(again, samples())
    write(path, {})
    assert read(path) == {}
    assert os.listdir(tmp_path) == ["file"]


def test_values_made_when_due(tmp_path):
    live = []

    def source(i):
        def get():
            live.append(i)
            return np.full((4, i), i, np.uint16)

        return Source(f"t{i}", "BF16", (4, i), get)

    made = [source(i) for i in range(1, 4)]
    write_safetensors(tmp_path / "a", made)
    write_torch(tmp_path / "b", made)
    assert live == [1, 2, 3, 1, 2, 3]
    for read in read_safetensors(tmp_path / "a"), read_torch(tmp_path / "b"):
        assert read["t2"].data.tolist() == [[2, 2]] * 4
    wrong = [Source("t", "F32", (3,), lambda: np.zeros(4, np.float32))]
    with pytest.raises(ValueError, match=r"'t': announced as F32 \(3,\), got F32 \(4,\)"):
        write_safetensors(tmp_path / "c", wrong)
    with pytest.raises(ValueError, match="'x': given twice"):
        write_torch(tmp_path / "c", [Source("x", "U8", (0,), list)] * 2)
    with pytest.raises(ValueError, match="'x': dtype.*complex"):
        write_torch(tmp_path / "c", {"x": np.zeros(2, complex)})
    with pytest.raises(ValueError, match="'x': expected an array, got list"):
        write_torch(tmp_path / "c", {"x": [1.0]})
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_safetensors_layout(tmp_path):
    path = tmp_path / "m.safetensors"
    tensors = {"b": np.zeros(3, np.int8), "a": np.ones(2, np.float16), "c": np.ones(2, np.float16)}
    write_safetensors(path, tensors)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    assert {k: v["data_offsets"] for k, v in header.items()} == {
        "a": [0, 4],
        "c": [4, 8],
        "b": [8, 11],
    }
    with pytest.raises(ValueError, match="reserved"):
        write_safetensors(path, {"__metadata__": np.zeros(1)})


def test_torch_layout(tmp_path):
    path = tmp_path / "m.bin"
    arrays = {f"t{n}": np.full(n, 65 + n, np.int8) for n in (11, 22, 33)}
    write_torch(path, arrays)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
    data = path.read_bytes()
    for array in arrays.values():
        assert data.count(array.tobytes()) == 1
        assert data.index(array.tobytes()) % 64 == 0


# Golden files and other programs


@pytest.mark.parametrize(
    "folder, count",
    [
        ("chatglm2-tiny", None),
        ("chatglm2-tiny-bin", None),
        ("chatglm3-tiny", None),
        ("glm4-9b-tiny", None),
        ("chatglm-v1-tiny", None),
        ("ptuning-tiny", 1),
        ("ptuning-projection-tiny", 5),
    ],
)
def test_golden_directories(shared, folder, count):
    tensors = load_checkpoint(shared / "golden" / folder)
    assert count in (None, len(tensors))
    assert all(np.isfinite(t.numpy().astype(np.float32)).all() for t in tensors.values())
    weights = load_state_dict(shared / "golden" / folder)
    assert {k: v.shape for k, v in weights.items()} == {k: t.shape for k, t in tensors.items()}


def test_golden_model_has_the_names_of_its_family(shared):
    tensors = load_checkpoint(shared / "golden" / "chatglm2-tiny")
    config = read_json(shared / "golden" / "chatglm2-tiny" / "config.json", expect=dict)
    embedding = tensors["transformer.embedding.word_embeddings.weight"]
    assert embedding.shape == (config["padded_vocab_size"], config["hidden_size"])
    assert embedding.dtype == "F32"


def test_golden_adapter_is_equal_in_both_forms(shared):
    new = load_state_dict(shared / "golden" / "peft-adapter")
    old = load_state_dict(shared / "golden" / "peft-adapter-bin")
    assert new and new.keys() == old.keys()
    assert all(np.array_equal(new[name], old[name]) for name in new)


def test_golden_shards_survive_a_change_of_form(shared, tmp_path):
    tensors = load_checkpoint(shared / "golden" / "chatglm2-tiny-bin")
    names = save_sharded(tmp_path / "new", tensors, max_shard_size=100_000)
    assert names[-1] == "model.safetensors.index.json" and len(names) > 3
    assert_same(load_checkpoint(tmp_path / "new"), tensors)


def torch_tensors(torch) -> dict:
    generator = torch.Generator().manual_seed(1)
    made = {
        name: (torch.randn(5, 3, generator=generator) * 9).to(getattr(torch, name))
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16")
    }
    made["int8"] = torch.arange(-3, 4, dtype=torch.int8)
    made["uint8"] = torch.arange(5, dtype=torch.uint8)
    made["bool"] = torch.tensor([True, False])
    made["scalar"] = torch.tensor(2.5)
    made["empty"] = torch.zeros(0, 4)
    made["transposed"] = made["float32"].t()
    made["shared row"] = made["float32"][2]
    made["strided"] = made["int64"][1::2, ::2]
    made["expanded"] = torch.tensor([1.0, 2.0]).expand(3, 2)
    made["parameter"] = torch.nn.Parameter(made["float32"].clone())
    return made


def assert_equals_torch(torch, read: dict, made: dict) -> None:
    assert list(read) == list(made)
    for name, value in made.items():
        value = value.detach()
        wide = value.float() if value.dtype == torch.bfloat16 else value
        assert read[name].shape == tuple(value.shape), name
        assert np.array_equal(read[name].numpy(), wide.numpy()), name


@pytest.mark.parametrize("zip_form", [True, False])
def test_reads_what_torch_writes(tmp_path, zip_form):
    torch = pytest.importorskip("torch")
    made = torch_tensors(torch)
    torch.save(made, tmp_path / "a.bin", _use_new_zipfile_serialization=zip_form)
    read = read_torch(tmp_path / "a.bin")
    assert_equals_torch(torch, read, made)
    assert all(t.data.flags.c_contiguous and t.data.flags.aligned for t in read.values())


@pytest.mark.parametrize("zip_form", [True, False])
def test_reads_optimizer_and_module_state_of_torch(tmp_path, zip_form):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125)
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    path = tmp_path / "x.pt"
    for state in model.state_dict(), optimizer.state_dict(), schedule.state_dict():
        torch.save(state, path, _use_new_zipfile_serialization=zip_form)
        read = read_torch(path)
        assert list(read) == list(state)
    torch.save(optimizer.state_dict(), path)
    read = read_torch(path)
    assert read["param_groups"][0]["lr"] == 0.125 and read["param_groups"][0]["betas"] == (
        0.9,
        0.999,
    )
    moment = optimizer.state_dict()["state"][0]["exp_avg"]
    assert np.array_equal(read["state"][0]["exp_avg"].numpy(), moment.numpy())
    with pytest.raises(ValueError, match="'state' is a dict, expected only names and tensors"):
        load_state_dict(path)
    torch.save({"t": torch.zeros(3, dtype=torch.uint16)}, path)
    with pytest.raises(ValueError, match="torch.uint16"):
        read_torch(path)


@pytest.mark.parametrize("mapped", [True, False])
def test_torch_reads_what_we_write(tmp_path, mapped):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.bin"
    written = samples()
    write_torch(path, written)
    read = torch.load(path, weights_only=True, mmap=mapped)
    assert list(read) == list(written)
    for name, value in written.items():
        value = value if isinstance(value, Tensor) else Tensor(value)
        tensor = read[name].float() if value.dtype == "BF16" else read[name]
        assert tuple(tensor.shape) == value.shape and tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), value.numpy()), name


def test_exchange_with_safetensors(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "a.safetensors"
    written = {k: v for k, v in samples().items() if not isinstance(v, Tensor)}
    write_safetensors(path, written)
    for name, array in library.load_file(path).items():
        assert np.array_equal(array, written[name]) and array.shape == written[name].shape
    plain = {k: np.array(v, v.dtype.newbyteorder("="), order="C") for k, v in written.items()}
    library.save_file(plain, tmp_path / "b.safetensors", metadata={"format": "np"})
    assert_same(read_safetensors(tmp_path / "b.safetensors"), plain)


def test_torch_reads_our_bf16_safetensors(tmp_path):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("safetensors.torch")
    values = to_bf16(np.linspace(-3, 3, 10).reshape(2, 5))
    write_safetensors(tmp_path / "a", {"x": values})
    read = library.load_file(tmp_path / "a")["x"]
    assert read.dtype == torch.bfloat16
    assert np.array_equal(read.float().numpy(), values.numpy())


# Bad safetensors


def safetensors_bytes(header, data=b"", length=None, pad=True) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if pad:
        text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EIGHT = bytes(8)
BAD_SAFETENSORS = {
    "empty": (b"", "file is empty"),
    "short": (b"\1\0\0", "truncated: 3 bytes"),
    "header of 2^63": (safetensors_bytes({}, length=1 << 63), "header length 9223372036854775808"),
    "header over 100 MB": (safetensors_bytes({}, length=100_000_001), "expected at most 100000000"),
    "header cut": (safetensors_bytes({}, length=900), "header of 900 bytes announced, 8 follow"),
    "header no JSON": (safetensors_bytes(b'{"a": }'), "not valid JSON.*column"),
    "header not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "not valid JSON.*utf-8"),
    "header a list": (safetensors_bytes([1]), "does not begin with"),
    "header deep": (safetensors_bytes(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "digits": (safetensors_bytes(b'{"a":{"shape":[' + b"9" * 9000 + b"]}}"), "JSON|dtype"),
    "entry no object": (safetensors_bytes({"t": 3}), "tensor 't': expected an object"),
    "unknown dtype": (safetensors_bytes({"t": entry("F8_E4M3")}, EIGHT), "'t': dtype 'F8_E4M3'"),
    "dtype a list": (safetensors_bytes({"t": entry(["F32"])}, EIGHT), "'t': dtype"),
    "shape missing": (safetensors_bytes({"t": {"dtype": "F32"}}, EIGHT), "'t': shape None"),
    "negative": (safetensors_bytes({"t": entry(shape=[-2])}, EIGHT), "whole numbers from 0"),
    "fractional": (safetensors_bytes({"t": entry(shape=[2.0])}, EIGHT), "whole numbers from 0"),
    "boolean": (
        safetensors_bytes({"t": entry("U8", [True], [0, 1])}, b"1"),
        "whole numbers from 0",
    ),
    "rank": (safetensors_bytes({"t": entry(shape=[1] * 9)}, EIGHT), "9 dimensions"),
    "overflow": (safetensors_bytes({"t": entry(shape=[1 << 32, 1 << 32])}, EIGHT), "overflows"),
    "overflow to zero": (safetensors_bytes({"t": entry(shape=[1 << 62, 4])}, EIGHT), "overflows"),
    "empty, huge": (
        safetensors_bytes({"t": entry(shape=[0, 1 << 62], offsets=[0, 0])}),
        "overflows",
    ),
    "offset 2^63": (
        safetensors_bytes({"t": entry(offsets=[1 << 63, (1 << 63) + 8])}, EIGHT),
        r"data_offsets \[9223372036854775808",
    ),
    "offsets reversed": (safetensors_bytes({"t": entry(offsets=[8, 0])}, EIGHT), "begin <= end"),
    "offset negative": (safetensors_bytes({"t": entry(offsets=[-8, 0])}, EIGHT), "begin <= end"),
    "one offset": (safetensors_bytes({"t": entry(offsets=[0])}, EIGHT), r"expected \[begin, end\]"),
    "size": (
        safetensors_bytes({"t": entry(shape=[3])}, EIGHT),
        r"span 8 bytes, F32 \[3\] needs 12",
    ),
    "truncated": (safetensors_bytes({"t": entry()}, EIGHT[:7]), "beyond the 7 bytes of data"),
    "surplus": (safetensors_bytes({"t": entry()}, EIGHT + b"x"), "1 bytes after the last tensor"),
    "overlap": (
        safetensors_bytes({"t": entry(), "u": entry(offsets=[4, 12])}, bytes(12)),
        r"'u': data_offsets \[4, 12\] overlap",
    ),
    "hole": (
        safetensors_bytes({"t": entry(), "u": entry(offsets=[12, 20])}, bytes(20)),
        r"'u': data_offsets \[12, 20\] leave a hole after byte 8",
    ),
    "duplicate": (
        safetensors_bytes(
            b'{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"12",
        ),
        "'t' appears twice",
    ),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__: expected an object"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1815217640\n",
        "git-lfs pointer.*1815217640 bytes.*git lfs pull",
    ),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_bad_safetensors(tmp_path, case):
    data, message = BAD_SAFETENSORS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_safetensors_at_an_odd_address(tmp_path):
    path = tmp_path / "m"
    text = json.dumps({"t": entry()}).encode()
    text += b" " * ((3 - len(text)) % 8)
    path.write_bytes(safetensors_bytes(text, np.array([1, 2], "<f4").tobytes(), pad=False))
    tensor = read_safetensors(path)["t"]
    assert tensor.data.tolist() == [1, 2] and tensor.data.flags.aligned


def test_not_a_file(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a directory"):
        read_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a regular file"):
        read_safetensors(tmp_path / "pipe")


# Bad torch files


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(kind="torch\nFloatStorage", key="0", count=6) -> bytes:
    return (
        b"("
        + text("storage")
        + b"c"
        + kind.encode()
        + b"\n"
        + text(key)
        + text("cpu")
        + number(count)
        + b"tQ"
    )


def tensor(size=(2, 3), stride=(3, 1), offset=0, raw=None, function="_rebuild_tensor_v2") -> bytes:
    call = b"ctorch._utils\n" + function.encode() + b"\n("
    shape = numbers(*size) + numbers(*stride)
    return call + (raw or storage()) + number(offset) + shape + b"\x89}tR"


def state(value: bytes, name="w") -> bytes:
    return b"\x80\x02}" + text(name) + value + b"s."


def torch_zip(
    path, pkl: bytes, data: dict | None = None, method=zipfile.ZIP_STORED, **extra
) -> None:
    if data is None:
        data = {"0": np.arange(6, dtype="<f4").tobytes()}
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/data.pkl", pkl)
        for key, value in data.items():
            archive.writestr(f"a/data/{key}", value)
        for name, value in extra.items():
            archive.writestr(f"a/{name}", value)


def test_torch_file_made_by_hand(tmp_path):
    path = tmp_path / "m.bin"
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    torch_zip(path, state(tensor()), byteorder="little")
    assert np.array_equal(read_torch(path)["w"].data, expected)
    torch_zip(path, state(tensor((3, 2), (1, 3))))
    assert np.array_equal(read_torch(path)["w"].data, expected.T)
    torch_zip(path, state(tensor((2, 2), (3, 1), offset=1)))
    assert np.array_equal(read_torch(path)["w"].data, expected[:, 1:])
    torch_zip(path, state(tensor((1, 3), (1 << 60, 1))))  # the stride of one row is never used
    assert np.array_equal(read_torch(path)["w"].data, expected[:1])
    torch_zip(path, state(tensor((0, 1 << 40), (1, 1), offset=999)))
    assert read_torch(path)["w"].shape == (0, 1 << 40)
    v3 = storage("torch.storage\nUntypedStorage", count=24) + number(0) + numbers(2) + numbers(1)
    call = b"ctorch._utils\n_rebuild_tensor_v3\n(" + v3 + b"\x89}ctorch\nfloat32\ntR"
    torch_zip(path, state(call))
    assert read_torch(path)["w"].data.tolist() == [0, 1]
    size = state(b"ctorch\nSize\n" + numbers(4, 5) + b"\x85R")
    torch_zip(path, size)
    assert read_torch(path) == {"w": (4, 5)}
    ordered = (
        b"\x80\x02ccollections\nOrderedDict\n)R"
        + text("w")
        + tensor()
        + b"s}"
        + text("_metadata")
        + b"}sb."
    )
    torch_zip(path, ordered)
    assert list(read_torch(path)) == ["w"]


def test_torch_zip_data_at_an_odd_address(tmp_path):
    path = tmp_path / "m.bin"
    for pad in range(4):
        torch_zip(
            path,
            b"\x80\x02}("
            + text("p" * pad)
            + b"K\1"
            + text("w")
            + tensor((3, 2), (1, 3))
            + text("v")
            + tensor()
            + b"u.",
        )
        read = read_torch(path)
        assert read["w"].data.tolist() == [[0, 3], [1, 4], [2, 5]]
        assert read["v"].data.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert read["v"].data.flags.aligned


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


DOUBLING = b"\x80\x02]" + b"q\0h\0\x86" * 70 + b"."
CYCLE = b"\x80\x02]q\0h\0a."
BAD_PICKLES = {
    "os.system": (pickle.dumps({"a": Evil(os.system, "true")}, 2), "posix.system.*not on the list"),
    "os.system, protocol 4": (pickle.dumps(Evil(os.system, "true"), 4), "posix.system"),
    "eval": (pickle.dumps(Evil(eval, "1"), 2), "eval"),
    "numpy": (pickle.dumps(np.zeros(2), 2), "numpy.*_reconstruct"),
    "bytes": (pickle.dumps({"a": b"x"}, 2), "_codecs.encode"),
    "codecs via torch": (b"\x80\x02ctorch.os\nsystem\n.", "torch.os.system"),
    "two names in one": (b"\x80\x02ctorch\nSize\nos\n.", "opcode 0x6f"),
    "name without end": (b"\x80\x02c" + b"a" * 999, "without an end"),
    "global as value": (state(b"ctorch\nfloat32\n"), "holds 'torch float32'"),
    "opcode": (b"\x80\x02(i.", "opcode 0x69 at byte 3"),
    "inst": (b"\x80\x02(S'x'\nios\nsystem\n.", "opcode 0x53"),
    "extension": (b"\x80\x02\x82\x01.", "opcode 0x82"),
    "big integer": (b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".", "opcode 0x8b"),
    "long integer": (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "integer of 255 bytes"),
    "giant string": (b"\x80\x02X\xff\xff\xff\xffabc.", "4294967295 bytes wanted"),
    "bad string": (b"\x80\x02X\1\0\0\0\xff.", "not UTF-8"),
    "protocol": (b"\x80\x09N.", "protocol 9"),
    "no end": (b"\x80\x02}", "ends inside"),
    "empty": (b"", "ends inside"),
    "empty stack": (b"\x80\x02s.", "SETITEM at byte 2 needs more values"),
    "no mark": (b"\x80\x02t.", "TUPLE at byte 2 needs more"),
    "tuple of nothing": (b"\x80\x02\x87.", "TUPLE3 at byte 2 needs more"),
    "two values": (b"\x80\x02NN.", "exactly one value"),
    "open mark": (b"\x80\x02(N.", "exactly one value"),
    "memo": (b"\x80\x02h\7.", "value 7, which was never stored"),
    "deep lists": (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "nested deeper"),
    "deep tuples": (b"\x80\x02)" + b"\x85" * 200_000 + b".", "nested deeper"),
    "deep marks": (b"\x80\x02" + b"(" * 1000 + b"t" * 1000 + b".", "nests deeper"),
    "doubling": (DOUBLING, "nested deeper than|more than"),
    "doubling, 40": (b"\x80\x02]" + b"q\0h\0\x86" * 40 + b".", "more than 10000000 values"),
    "cycle": (CYCLE, "contains itself"),
    "tuple as key": (b"\x80\x02})Ns.", "tuple as a key"),
    "twice": (b"\x80\x02}(" + text("k") + b"N" + text("k") + b"Nu.", "'k' twice"),
    "odd items": (b"\x80\x02}(" + text("k") + b"u.", "sets 1 keys"),
    "set in list": (b"\x80\x02]" + text("k") + b"Ns.", "in a list"),
    "append to dict": (b"\x80\x02}Na.", "appends to a dict"),
    "call text": (b"\x80\x02" + text("os") + b")R.", "not on the list"),
    "call a storage type": (b"\x80\x02ctorch\nFloatStorage\n)R.", "not on the list"),
    "state of a list": (b"\x80\x02]}b.", "state of a list"),
    "ordered with arguments": (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "from arguments"),
    "size of a list": (b"\x80\x02ctorch\nSize\n]\x85R.", "torch.Size"),
    "parameter": (b"\x80\x02ctorch._utils\n_rebuild_parameter\n(N\x89}tR.", "parameter"),
    "persistent": (b"\x80\x02NQ.", "not a reference to a storage"),
    "persistent fields": (b"\x80\x02(" + text("storage") + b"NNNNtQ.", "fields of the wrong kind"),
    "no arguments": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "wrong kind"),
    "storage of a dtype": (
        state(tensor(raw=storage("torch\nfloat32"))),
        "torch float32 as the type",
    ),
    "key missing": (state(tensor(raw=storage(key="9"))), "storage '9' is missing"),
    "key outside": (state(tensor(raw=storage(key="../data.pkl"))), "is missing"),
    "count": (state(tensor(raw=storage(count=7))), "7 items of F32 need 28 bytes, there are 24"),
    "count of 2^62": (state(tensor(raw=storage(count=1 << 62))), "there are 24"),
    "count negative": (state(tensor(raw=storage(count=-1))), "wrong kind"),
    "offset": (state(tensor(offset=1)), "reaches item 6, the storage has 6"),
    "offset negative": (state(tensor(offset=-1)), "impossible numbers"),
    "stride": (state(tensor(stride=(4, 1))), "reaches item 6"),
    "stride negative": (state(tensor(stride=(-3, 1))), "impossible numbers"),
    "stride of 2^63": (state(tensor(stride=(1 << 63, 1))), "impossible numbers"),
    "size overflow": (state(tensor(size=(1 << 32, 1 << 32), stride=(0, 0))), "overflows"),
    "size negative": (state(tensor(size=(-1, 3))), "whole numbers"),
    "rank": (state(tensor((1,) * 9, (1,) * 9)), "impossible numbers"),
    "ranks differ": (state(tensor((2, 3), (1,))), "impossible numbers"),
    "expanded": (state(tensor((1 << 20, 1 << 20), (0, 0))), "expand to more than the file"),
    "untyped": (
        state(tensor(raw=storage("torch.storage\nUntypedStorage", count=24))),
        "without a type",
    ),
}


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickle(tmp_path, case):
    pkl, message = BAD_PICKLES[case]
    path = tmp_path / "m.bin"
    torch_zip(path, pkl)
    with pytest.raises(ValueError, match=message) as caught:
        read_torch(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 700


def test_nothing_is_executed(tmp_path):
    path = tmp_path / "m.bin"
    mark = tmp_path / "mark"
    torch_zip(path, pickle.dumps({"a": Evil(os.mkdir, str(mark))}, 2))
    with pytest.raises(ValueError, match="mkdir"):
        load_state_dict(path)
    path.write_bytes(pickle.dumps(Evil(os.mkdir, str(mark)), 2))
    with pytest.raises(ValueError, match="not a file of torch.save"):
        load_state_dict(path)
    assert not mark.exists()


def test_bad_zip(tmp_path):
    path = tmp_path / "m.bin"
    good = state(tensor())
    torch_zip(path, good, byteorder="big")
    with pytest.raises(ValueError, match="byteorder is 'big'"):
        read_torch(path)
    torch_zip(path, good, method=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed or encrypted"):
        read_torch(path)
    torch_zip(path, good, {})
    with pytest.raises(ValueError, match="storage '0' is missing"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/other", b"")
    with pytest.raises(ValueError, match="0 entries named data.pkl"):
        read_torch(path)
    torch_zip(path, good)
    data = path.read_bytes()
    path.write_bytes(data[:-30])
    with pytest.raises(ValueError, match="no readable zip directory"):
        read_torch(path)
    path.write_bytes(data.replace(b"cpu", b"CPU", 1))
    with pytest.raises(ValueError, match="checksum"):
        read_torch(path)
    local = data.index(b"a/data/0") - 30
    path.write_bytes(data[:local] + b"XX" + data[local + 2 :])
    with pytest.raises(ValueError, match="'a/data/0': no local header"):
        read_torch(path)
    extra = local + 28
    path.write_bytes(data[:extra] + b"\xff\xff" + data[extra + 2 :])
    with pytest.raises(ValueError, match="beyond the file's"):
        read_torch(path)
    path.write_bytes(data.replace(b"a/data/0", b"a/data.pkl"[:8]))
    with pytest.raises(ValueError):
        read_torch(path)
    path.write_bytes(b'{"learning_rate": 0.1}')
    with pytest.raises(ValueError, match="is JSON text"):
        read_torch(path)
    path.write_bytes(BAD_SAFETENSORS["lfs"][0])
    with pytest.raises(ValueError, match="git lfs pull"):
        load_state_dict(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_a_name_twice(tmp_path):
    path = tmp_path / "m.bin"
    torch_zip(path, state(tensor()), **{"data/0": bytes(24)})
    with pytest.raises(ValueError, match="two entries of the same name"):
        read_torch(path)


def test_zip64(tmp_path):
    path = tmp_path / "m.bin"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (
            ("data.pkl", state(tensor())),
            ("data/0", np.arange(6, dtype="<f4").tobytes()),
        ):
            with archive.open(zipfile.ZipInfo(f"a/{name}"), "w", force_zip64=True) as out:
                out.write(data)
    assert read_torch(path)["w"].data[1, 2] == 5


def test_zip_without_checksums(tmp_path):
    """As torch writes it with `torch.utils.serialization.config.save.compute_crc32 = False`."""
    path = tmp_path / "m.bin"
    torch_zip(path, state(tensor()))
    data = bytearray(path.read_bytes())
    for magic, at in (b"PK\x03\x04", 14), (b"PK\x01\x02", 16):
        for header in re.finditer(re.escape(magic), bytes(data)):
            data[header.start() + at : header.start() + at + 4] = bytes(4)
    path.write_bytes(data)
    assert all(info.CRC == 0 for info in zipfile.ZipFile(path).infolist())
    assert read_torch(path)["w"].data[1, 2] == 5


# Older torch files


def stream(obj: bytes, keys=("0",), little=True, protocol=1001, values=None) -> bytes:
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    machine = b"\x80\x02}" + text("little_endian") + (b"\x88" if little else b"\x89") + b"s."
    listed = b"\x80\x02](" + b"".join(map(text, keys)) + b"e."
    values = np.arange(6, dtype="<f4").tobytes() if values is None else values
    data = b"".join(struct.pack("<Q", 6) + values for _ in keys)
    return magic + b"\x80\x02M" + struct.pack("<H", protocol) + b"." + machine + obj + listed + data


def test_older_torch_files(tmp_path):
    path = tmp_path / "m.bin"
    path.write_bytes(stream(state(tensor())))
    assert read_torch(path)["w"].data.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert load_state_dict(path)["w"][1, 2] == 5
    for data, message in {
        stream(state(tensor()), little=False): "byte order",
        stream(state(tensor()), protocol=1000): "another protocol",
        stream(state(tensor()), keys=()): "storage '0' is missing",
        stream(state(tensor()), values=bytes(20)): "truncated",
        stream(state(tensor(offset=1))): "reaches item 6",
        stream(pickle.dumps(Evil(os.system, "true"), 2)): "posix.system",
    }.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read_torch(path)


# Directories


def small(n=6) -> dict:
    return {f"t{i}": np.full((4, 4), i, np.float32) for i in range(n)}


@pytest.mark.parametrize("safetensors", [True, False])
def test_save_sharded(tmp_path, safetensors):
    name = "model.safetensors" if safetensors else "pytorch_model.bin"
    stem, suffix = os.path.splitext(name)
    whole = save_sharded(tmp_path, small(), safetensors=safetensors)
    assert whole == [name] and os.listdir(tmp_path) == [name]
    assert_same(load_checkpoint(tmp_path), small())
    shards = save_sharded(tmp_path, small(), max_shard_size=130, safetensors=safetensors)
    expected = [f"{stem}-{i:05d}-of-00003{suffix}" for i in (1, 2, 3)] + [f"{name}.index.json"]
    assert shards == expected and sorted(os.listdir(tmp_path)) == sorted(expected)
    index = read_json(tmp_path / shards[-1])
    assert index["metadata"] == {"total_size": 6 * 64}
    assert index["weight_map"]["t2"] == expected[1]
    seen = []
    read = load_checkpoint(tmp_path, wrap=lambda names: seen.extend(names) or names)
    assert_same(read, small())
    assert seen == expected[:3]
    (tmp_path / "config.json").write_text("{}")
    save_sharded(tmp_path, small(3), max_shard_size="1KB", safetensors=safetensors)
    assert sorted(os.listdir(tmp_path)) == ["config.json", name]
    assert_same(load_checkpoint(tmp_path), small(3))


def test_save_sharded_keeps_the_old_files_on_an_error(tmp_path):
    save_sharded(tmp_path, small(), max_shard_size=130)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail():
        raise RuntimeError("no values")

    bad = [
        Source(f"t{i}", "F32", (4, 4), fail if i == 5 else lambda: np.ones((4, 4), "f4"))
        for i in range(6)
    ]
    with pytest.raises(RuntimeError):
        save_sharded(tmp_path, bad, max_shard_size=130)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_save_sharded_refuses(tmp_path):
    for size in (0, -5, "10 apples", "", None):
        with pytest.raises(ValueError, match="max_shard_size"):
            save_sharded(tmp_path, small(), max_shard_size=size)
    save_sharded(tmp_path, small())
    with pytest.raises(FileExistsError, match="readers prefer it"):
        save_sharded(tmp_path, small(), safetensors=False)


def test_safetensors_are_preferred(tmp_path):
    write_torch(tmp_path / "pytorch_model.bin", {"old": np.zeros(1)})
    write_safetensors(tmp_path / "model.safetensors", {"new": np.zeros(1)})
    assert list(load_checkpoint(tmp_path)) == ["new"]
    assert list(load_checkpoint(tmp_path, prefer="bin")) == ["old"]
    with pytest.raises(ValueError, match="prefer: expected"):
        load_checkpoint(tmp_path, prefer="gguf")


def test_directories_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="found none of model.safetensors.*index.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        3,
        "c:x.safetensors",
        "x.pt",
        "a\0.safetensors",
    ],
)
def test_index_may_name_only_files_of_its_folder(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "x.safetensors", small())
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"t0": file}})
    with pytest.raises(ValueError, match="index.json: .*'t0'.*plain name"):
        load_checkpoint(folder)


def test_index_and_shards_must_agree(tmp_path):
    save_sharded(tmp_path, small(), max_shard_size=130)
    index = tmp_path / "model.safetensors.index.json"
    good = read_json(index)

    def load(**changes):
        weight_map = {**good["weight_map"], **changes}
        write_json(index, {"weight_map": {k: v for k, v in weight_map.items() if v}})
        return load_checkpoint(tmp_path)

    shard = good["weight_map"]["t5"]
    with pytest.raises(ValueError, match="00003-of-00003.safetensors: tensor 'extra' missing"):
        load(extra=shard)
    assert_same(load(t5=None), small())  # a shard may hold more than the index says
    write_safetensors(tmp_path / good["weight_map"]["t0"], {**small(2), "t5": np.ones(3)})
    with pytest.raises(ValueError, match="00003-of-00003.safetensors: tensor 't5' is in another"):
        load()
    write_safetensors(tmp_path / good["weight_map"]["t0"], small(2))
    with pytest.raises(ValueError, match="00001-of-00003.safetensors: tensor 't5' missing"):
        load(t5=good["weight_map"]["t0"])
    (tmp_path / shard).unlink()
    with pytest.raises(FileNotFoundError, match="00003-of-00003.safetensors: missing"):
        load()
    for bad, message in {
        "[]": "an array",
        '{"weight_map": []}': "weight_map",
        "{": "not JSON",
    }.items():
        index.write_text(bad)
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path)


def test_shards_may_be_links(tmp_path):
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    save_sharded(blobs, small(), max_shard_size=130)
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(file)
    assert_same(load_checkpoint(folder), small())


def test_load_state_dict(tmp_path):
    values = {"a": to_bf16(np.array([1.0, 2.5])), "b": np.array([True, False])}
    write_torch(tmp_path / "p.bin", values)
    write_safetensors(tmp_path / "p.any", values)
    write_torch(tmp_path / "wrong.safetensors", values)
    (tmp_path / "adapter").mkdir()
    write_torch(tmp_path / "adapter" / "adapter_model.bin", values)
    for path in "p.bin", "p.any", "adapter":
        read = load_state_dict(tmp_path / path)
        assert read["a"].dtype == np.float32 and read["a"].tolist() == [1.0, 2.5]
        assert read["b"].dtype == bool and read["b"].tolist() == [True, False]
    with pytest.raises(ValueError, match="is a torch file under a safetensors name"):
        read_weights(tmp_path / "wrong.safetensors")


# JSON and text


def test_json_round_trip(tmp_path):
    path = tmp_path / "c.json"
    write_json(path, {"b": 1, "a": "论文"})
    assert path.read_bytes() == '{\n  "a": "论文",\n  "b": 1\n}\n'.encode()
    assert read_json(path, expect=dict) == {"b": 1, "a": "论文"}
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(path, expect=list) == [1]
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == [1]


@pytest.mark.parametrize(
    "data, expect, message",
    [
        (b'{"a": "\xb2\xe2"}', None, "not UTF-8: byte 0xb2 at offset 7"),
        (b'\xef\xbb\xbf{"a": "\xff"}', None, "byte 0xff at offset 10"),
        ('{"a": 1}'.encode("utf-16"), None, "not UTF-8: byte 0xff at offset 0"),
        (b'{"a": 1,\n "b": }', None, "not JSON: .* at line 2 column 7"),
        (b"", None, "not JSON: .* at line 1 column 1"),
        (b"[" * 100_000, None, "c.json: .*JSON"),
        (b"{}", list, "expected an array as the outermost JSON value, got an object"),
        (b"[]", dict, "expected an object as the outermost JSON value, got an array"),
        (b"null", dict, "got null"),
        (b"version https://git-lfs.github.com/spec/v1\n", None, "git-lfs pointer"),
    ],
)
def test_bad_json(tmp_path, data, expect, message):
    path = tmp_path / "c.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path, expect=expect)
    assert str(path) in str(caught.value)


# Writing


def test_atomic_file_keeps_the_old_one_on_an_error(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old\r\n")
    assert path.read_bytes() == b"old\r\n"
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    for error in ValueError, KeyboardInterrupt:
        with pytest.raises(error), atomic_file(path, "w") as file:
            file.write("new")
            raise error
    assert path.read_text() == "old\n" and os.listdir(tmp_path) == ["a.txt"]
    (tmp_path / "link").symlink_to(path)
    write_text(tmp_path / "link", "through")
    assert path.read_text() == "through" and (tmp_path / "link").is_symlink()
    with pytest.raises(FileNotFoundError, match="none/a"):
        write_text(tmp_path / "none" / "a", "")
    with pytest.raises(ValueError, match="mode"), atomic_file(path, "a"):
        pass
    write_text(tmp_path / ("n" * 255), "long names fit")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_failing_sync_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_text(path, "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: write_text(path, "new"),
        lambda: write_safetensors(path, small()),
        lambda: write_torch(path, small()),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert caught.value.filename == str(path) and caught.value.errno == 28
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


DISK_FULL = """
import resource, sys
import numpy as np
from glmlora.files.checkpoint import save_sharded, write_safetensors, write_torch
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
folder, big = sys.argv[1], {"a": np.zeros(1000), "b": np.zeros(1_000_000)}
for write, path in [
    (write_safetensors, folder + "/m.safetensors"),
    (write_torch, folder + "/m.bin"),
    (save_sharded, folder),
]:
    try:
        write(path, big)
    except OSError as error:
        assert error.filename.startswith(folder), error
        print(type(error).__name__, error.errno)
"""


def test_disk_full(tmp_path):
    """A limit on file sizes stands for the full disk: writes fail half-way in the same manner."""
    for name in "m.safetensors", "m.bin", "model.safetensors":
        (tmp_path / name).write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    )
    assert done.stdout.split() == ["OSError", "27"] * 3, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["m.bin", "m.safetensors", "model.safetensors"]
    assert {p.read_bytes() for p in tmp_path.iterdir()} == {b"old"}


def test_atomic_directory(tmp_path):
    path = tmp_path / "checkpoint-10"
    with atomic_directory(path) as folder:
        (folder / "a").write_text("1")
        assert not path.exists()
    with atomic_directory(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert (path / "a").exists()
    assert os.listdir(tmp_path) == ["checkpoint-10"] and os.listdir(path) == ["sub"]
    for error in OSError(28, "No space left on device"), KeyboardInterrupt():
        with pytest.raises(type(error)) as caught, atomic_directory(path) as folder:
            (folder / "c").write_text("3")
            raise error
        assert os.listdir(tmp_path) == ["checkpoint-10"] and os.listdir(path) == ["sub"]
        assert getattr(caught.value, "filename", str(path)) == str(path)
    write_text(tmp_path / "file", "")
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_directory(tmp_path / "file"):
        pass


def test_a_large_file_opens_without_being_read(tmp_path):
    """Three GB, sparse: only the header is touched, and offsets pass 2^31."""
    path = tmp_path / "big.safetensors"
    size = 3 << 30
    header = {"big": entry("U8", [size], [0, size]), "z": entry("U8", [4], [size, size + 4])}
    head = safetensors_bytes(header)
    with open(path, "wb") as file:
        file.write(head)
        file.seek(len(head) + size)
        file.write(b"tail")
    tensors = read_safetensors(path)
    assert bytes(tensors["z"].data) == b"tail" and tensors["big"].nbytes == size
    assert np.shares_memory(tensors["big"].data[-1:], tensors["big"].data)


def test_checksums_and_crc_of_written_zip(tmp_path):
    path = tmp_path / "m.bin"
    values = np.arange(1000, dtype=np.float32)
    write_torch(path, {"a": values})
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("archive/data/0").CRC == zlib.crc32(values.tobytes())


def test_huge_pages_are_asked_for(tmp_path):
    """A weights file that is read from the disk then comes in pieces of 2 MB."""
    if not os.path.exists("/sys/kernel/mm/transparent_hugepage/enabled"):
        pytest.skip("this system has no huge pages")
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": np.zeros(1 << 20, np.float32)})
    tensors = read_safetensors(path)
    with open("/proc/self/smaps") as file:
        flags, here = [], False
        for line in file:
            here = here or line.rstrip().endswith(str(path))
            if here and line.startswith("VmFlags"):
                flags, here = flags + [line.split()], False
    assert flags and all("hg" in f for f in flags) and len(tensors) == 1
