"""torch's `.bin` and `.pt` files: a zip of one pickle and one entry of raw values per storage.

The pickle is read by torchpickle.py, which executes nothing. Values stay in the mapped file.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any

import numpy as np

from .foreign import not_weights
from .mapped import guarded
from .regular import regular
from .tensor import NUMPY_TYPES, Source, Tensors, short_repr, sources
from .torchpickle import MAX_PICKLE, STORAGES, Unpickler, check_result
from .write import atomic_file, map_file

ZIP_MAGIC = b"PK\x03\x04"
STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # first value of a file from before torch 1.6
STREAM_PROTOCOL = 1001
ALIGNMENT = 64  # of the values in a zip, as torch writes them
EXTRA_COPIES = 64 << 20  # bytes beyond the file's size that copies of views may take

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}


def read_torch(path: str | os.PathLike) -> Any:
    """Map a file of torch.save: dict of Tensors, or nested dict, list, tuple, number, text with
    Tensors inside.

    Reads the zip form and the older stream form, little-endian. Nothing in the file is executed or
    imported. Raises ValueError naming the file and what is wrong or refused in it; OSError when it
    cannot be opened.
    """
    raw = map_file(path)
    with guarded(raw):
        return _read(path, raw)


def _read(path: str | os.PathLike, raw: np.ndarray) -> Any:
    head = raw[:16].tobytes()
    if head.startswith(ZIP_MAGIC):
        value = _read_zip(path, raw)
    elif head.startswith(b"\x80") and b"\x8a\n" + STREAM_MAGIC.to_bytes(10, "little") in head:
        value = _read_stream(path, raw)
    elif head.lstrip().startswith((b"{", b"[")):
        raise ValueError(f"{path}: is JSON text, not a file of torch.save")
    else:
        other = not_weights(head)
        raise ValueError(
            f"{path}: {other or 'not a file of torch.save (a zip, or its older form), or damaged'}"
        )
    check_result(path, value)
    return value


def _read_zip(path: str | os.PathLike, raw: np.ndarray) -> Any:
    entries = _zip_entries(path, raw)
    pickles = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{path}: zip with {len(pickles)} entries named data.pkl, expected one")
    top = pickles[0].removesuffix("data.pkl")

    def entry(name: str) -> np.ndarray:
        return _zip_data(path, raw, entries[top + name])

    if top + "byteorder" in entries:
        order = entry("byteorder")[:16].tobytes().strip()
        if order != b"little":
            raise ValueError(
                f"{path}: byteorder is {order.decode('latin-1')!r}, only 'little' is read"
            )
    text = entry("data.pkl")
    if text.size > MAX_PICKLE:
        raise ValueError(f"{path}: data.pkl has {text.size} bytes, expected at most {MAX_PICKLE}")
    text = text.tobytes()
    # torch can be told not to compute checksums; it writes 0 then.
    if entries[top + "data.pkl"].CRC not in (0, zlib.crc32(text)):
        raise ValueError(f"{path}: data.pkl does not match its checksum: the file is damaged")

    def find(key: str, dtype: str, count: int) -> np.ndarray:
        if f"{top}data/{key}" not in entries:
            raise ValueError(
                f"{path}: storage {short_repr(key)} is missing: the file is incomplete"
            )
        data = entry(f"data/{key}")
        return _storage(path, key, dtype, count, data)

    return Unpickler(path, text, find, raw.size + EXTRA_COPIES).load()[0]


def _storage(path, key: str, dtype: str, count: int, data: np.ndarray) -> np.ndarray:
    need = count * NUMPY_TYPES[dtype].itemsize
    if need > data.size:
        raise ValueError(
            f"{path}: storage {short_repr(key)}: {count} items of {dtype} need {need} bytes, "
            f"there are {data.size}"
        )
    return data[:need]


def _zip_entries(path: str | os.PathLike, raw: np.ndarray) -> dict[str, Any]:
    """The central directory: name -> zipfile.ZipInfo."""
    import zipfile

    try:
        with open(path, "rb", opener=regular) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, RuntimeError, OverflowError, EOFError) as error:
        raise _bad_zip(path, raw, error) from None
    except (struct.error, IndexError) as error:  # from damaged extra fields
        raise _bad_zip(path, raw, error) from None
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise ValueError(f"{path}: zip with two entries of the same name")
    return entries


def _bad_zip(path, raw: np.ndarray, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: no readable zip directory ({error}): the {raw.size} bytes are truncated or "
        "damaged"
    )


def _zip_data(path: str | os.PathLike, raw: np.ndarray, info: Any) -> np.ndarray:
    """The bytes of one entry, in place. Its local header has padding of its own, so it is read
    too.
    """
    where = f"{path}: zip entry {short_repr(info.filename)}"
    if info.compress_type != 0 or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ValueError(f"{where} is compressed or encrypted, expected stored bytes")
    at = info.header_offset
    header = raw[at : at + 30].tobytes() if at >= 0 else b""
    if len(header) < 30 or not header.startswith(ZIP_MAGIC):
        raise ValueError(f"{where}: no local header at byte {at}: the file is truncated or damaged")
    begin = at + 30 + sum(struct.unpack("<HH", header[26:30]))
    if begin + info.file_size > raw.size:
        raise ValueError(
            f"{where}: bytes {begin} to {begin + info.file_size} are beyond the file's {raw.size}: "
            "it is truncated or damaged"
        )
    return raw[begin : begin + info.file_size]


def _read_stream(path: str | os.PathLike, raw: np.ndarray) -> Any:
    """The form before torch 1.6: pickles of magic, protocol, machine, object, storage keys; then
    the storages.

    The values come last, so the object is scanned once for its storages and built in a second pass.
    """
    types: dict[str, str] = {}
    found: dict[str, np.ndarray] = {}

    def note(key: str, dtype: str, count: int) -> None:
        types[key] = dtype

    reader = Unpickler(path, raw.data, note, 0)
    reader.scanning = True
    _, pos = reader.load()
    protocol, pos = reader.load(pos)
    machine, begin = reader.load(pos)
    if (
        protocol != STREAM_PROTOCOL
        or type(machine) is not dict
        or machine.get("little_endian") is not True
    ):
        raise ValueError(
            f"{path}: older torch file of another protocol or byte order; save it again with "
            "torch >= 1.6"
        )
    _, pos = reader.load(begin)
    keys, pos = reader.load(pos)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError(f"{path}: older torch file without its list of storages")
    for key in keys:
        count = int.from_bytes(raw[pos : pos + 8].tobytes(), "little")
        nbytes = count * NUMPY_TYPES[types.get(key, "U8")].itemsize
        if pos + 8 + nbytes > raw.size:
            where = f"{path}: storage {short_repr(key)}"
            raise ValueError(
                f"{where}: {nbytes} bytes from {pos + 8} are beyond the file's {raw.size}: "
                "truncated"
            )
        found[key] = raw[pos + 8 : pos + 8 + nbytes]
        pos += 8 + nbytes

    def find(key: str, dtype: str, count: int) -> np.ndarray:
        if key not in found:
            raise ValueError(
                f"{path}: storage {short_repr(key)} is missing: the file is incomplete"
            )
        return _storage(path, key, dtype, count, found[key])

    return Unpickler(path, raw.data, find, raw.size + EXTRA_COPIES).load(begin)[0]


def write_torch(path: str | os.PathLike, tensors: Tensors) -> None:
    """Write a state dictionary as torch.save does (zip form), atomically, one tensor in memory at
    a time.

    `tensors` as for write_safetensors. The file loads under torch.load(weights_only=True), mapped
    too. Raises ValueError naming a tensor that cannot be stored, OSError naming `path`; then no
    new or temporary file is left.
    """
    import zipfile

    listed = sources(tensors)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:

        def add(name: str, chunks, nbytes: int) -> None:
            info = zipfile.ZipInfo(f"archive/{name}")
            zip64 = nbytes >= 1 << 30  # asked for well below the size where zipfile would by itself
            head = file.tell() + 30 + len(info.filename) + 20 * zip64
            pad = (-head - 4) % ALIGNMENT
            info.extra = struct.pack("<2sH", b"FB", pad) + b"Z" * pad
            info.file_size = nbytes
            with archive.open(info, "w", force_zip64=zip64) as entry:
                for chunk in chunks:
                    entry.write(chunk)
            info.extra = b""  # padding is for the local header, not for the directory

        text = _pickle(listed)
        add("data.pkl", [text], len(text))
        add("byteorder", [b"little"], 6)
        for i, source in enumerate(listed):
            add(f"data/{i}", source.chunks(), source.nbytes)
        add("version", [b"3\n"], 2)


def _pickle(listed: list[Source]) -> bytes:
    """An OrderedDict of tensors, one storage each, in protocol 2."""
    out = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for i, source in enumerate(listed):
        strides, dense = [], 1
        for n in reversed(source.shape):
            strides.append(dense)
            dense *= max(n, 1)
        count = source.nbytes // NUMPY_TYPES[source.dtype].itemsize
        storage = _STORAGE_NAMES[source.dtype].encode()
        out += [
            _text(source.name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage"),
            b"ctorch\n" + storage + b"\n",
            _text(str(i)),
            _text("cpu"),
            _integer(count),
            b"tQ" + _integer(0),
            b"(" + b"".join(map(_integer, source.shape)) + b"t",
            b"(" + b"".join(map(_integer, reversed(strides))) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*out, b"u."])


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
