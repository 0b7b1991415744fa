"""GGUF, the file of llama.cpp: a header of keys, values and the tensors' names, then the tensors.

Writing, names and types are those of the `gguf` package, which is imported here alone. The header
is read here, with every size checked against the file first: `gguf.GGUFReader` takes 68 seconds and
0.8 GB for the vocabulary of a GLM-4. Specification: ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import _core
from .mapped import guarded, in_memory
from .staging import staged
from .tensor import CHUNK, Tensor, short_repr
from .write import map_file

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_KEYS, _MOST_TENSORS, _MOST_DIMS = 1 << 16, 1 << 20, 4
_LONGEST_NAME = 1 << 16
_STRING, _ARRAY = 8, 9
# enum gguf_type: how struct writes one value.
_VALUES = dict(enumerate("B b H h I i f ?".split())) | {10: "Q", 11: "q", 12: "d"}
FLOATS = ("F32", "F16", "BF16")  # are stored as they are in other files


def package() -> Any:
    """The `gguf` package. ImportError saying how to get it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ImportError(
            'GGUF files need the gguf package: pip install "glmlora[gguf]"'
        ) from error
    return gguf


def tensor_name(arch: str, layers: int) -> Callable[[str], str | None]:
    """From a tensor's or module's name in a checkpoint to its name in a GGUF file of an
    architecture; None for one that such a file has not.
    """
    gguf = package()
    number = next((n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), None)
    if number is None:
        raise ValueError(f"general.architecture: the gguf package knows no {arch!r:.80}")
    known = gguf.get_tensor_name_map(number, layers)

    def find(name: str) -> str | None:
        # The published `chatglm` files have all modules below `transformer`, which gguf leaves out.
        for one in (name, name.removeprefix("transformer.")):
            found = known.get_name(one, try_suffixes=(".weight", ".bias"))
            if found is not None:
                return found
        return None

    return find


# Types


def nbytes(kind: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor of ggml's type of this name. ValueError for a type that there is not, and
    for rows that are no whole number of its blocks.
    """
    gguf, shape = package(), tuple(shape)
    block, size = gguf.GGML_QUANT_SIZES[_type(kind)]
    if shape and shape[-1] % block:
        raise ValueError(f"{kind}: expected rows of a multiple of {block}, got {shape}")
    return math.prod(shape) // block * size


def _type(kind: str) -> Any:
    types = package().GGMLQuantizationType.__members__
    if kind not in types:
        raise ValueError(f"type {kind!r:.80} is none of ggml's")
    return types[kind]


def quantized(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows (n, columns) float32 as bytes uint8 (n, ..) of F16, Q8_0 or Q4_0, bit for bit as ggml's
    reference writes them. ValueError where a value is not finite, or none of float16's.
    """
    if kind in ("Q8_0", "Q4_0"):
        return _core.ggml_blocks(rows, int(kind[1]))
    half = _core.convert(rows, "F32", "F16")
    if not np.isfinite(half).all():
        raise ValueError("array: has a value that is not finite or too large for float16")
    return half.view(np.uint8)


class GGUFTensor(NamedTuple):
    """A tensor of a file: its type's name in ggml ("F16", "Q4_0"), its shape with the columns last,
    and its bytes (uint8), which stay in the mapped file.
    """

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray

    def stored(self) -> Tensor:
        """One of FLOATS as other files have it, in place."""
        kind = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[self.kind]
        return Tensor(self.data.view(kind).reshape(self.shape), self.kind)

    def rows(self) -> np.ndarray:
        """The bytes of each row of a matrix (rows, bytes)."""
        return self.data.reshape(self.shape[0], -1)

    def float_rows(self, begin: int, end: int) -> np.ndarray:
        """Some rows of a matrix as float32 (end - begin, columns). ValueError for a type that the
        gguf package does not read.
        """
        part = in_memory(self.rows()[begin:end])
        if self.kind == "BF16":
            return Tensor(part.view(np.uint16), "BF16").numpy()
        try:
            return package().quants.dequantize(part, _type(self.kind))
        except NotImplementedError:
            raise ValueError(f"type {self.kind} is not read by the gguf package") from None


class GGUFSource(NamedTuple):
    """A tensor to be written: as `GGUFTensor`, and a call that yields its rows as bytes, a few at a
    time.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]


# Reading


class _Header:
    """The bytes of a file from its beginning on, taken one value after the other."""

    def __init__(self, path: str | os.PathLike[str], raw: np.ndarray):
        self.path, self.view, self.at = path, memoryview(raw), 0

    def take(self, size: int, what: str) -> memoryview:
        """The next `size` bytes. ValueError where the file ends before."""
        left = len(self.view) - self.at
        if size > left:
            raise ValueError(
                f"{self.path}: truncated: {what} needs {size} bytes at byte {self.at}, {left} "
                "follow"
            )
        self.at += size
        return self.view[self.at - size : self.at]

    def number(self, form: str, what: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize(form), what))[0]

    def text(self, what: str, longest: int | None = None) -> str:
        size = self.number("Q", what)
        if longest is not None and size > longest:
            raise ValueError(f"{self.path}: {what}: {size} bytes, expected at most {longest}")
        return bytes(self.take(size, what)).decode("utf-8", "replace")

    def value(self, kind: int, what: str) -> Any:
        """A value of one of the format's types."""
        if kind == _STRING:
            return self.text(what)
        if kind in _VALUES:
            return self.number(_VALUES[kind], what)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: {what}: type {kind} is none of the format's")
        kind, count = self.number("I", what), self.number("Q", what)
        if kind == _STRING:
            if count > (len(self.view) - self.at) // 8:
                raise ValueError(f"{self.path}: truncated: {what} announces {count} texts")
            return [self.text(what) for _ in range(count)]
        if kind not in _VALUES:
            raise ValueError(f"{self.path}: {what}: an array of type {kind} is not read")
        form = _VALUES[kind]
        size = struct.calcsize(form)
        if count > len(self.view) // size:
            raise ValueError(f"{self.path}: truncated: {what} announces {count} values")
        return list(struct.unpack(f"<{count}{form}", self.take(count * size, what)))


def read_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Map a GGUF file: (keys and values, name -> tensor), in the order of the file.

    Raises ValueError naming the file, the key or tensor and the numbers for anything but a whole,
    consistent file; OSError where it cannot be opened, ImportError without the gguf package.
    """
    package()
    raw = map_file(path)
    with guarded(raw):
        return _read(path, raw)


def _read(
    path: str | os.PathLike[str], raw: np.ndarray
) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    header = _Header(path, raw)
    if bytes(header.take(4, "the first word")) != MAGIC:
        raise ValueError(f"{path}: does not begin with GGUF: is no GGUF file")
    version = header.number("I", "version")
    if version not in _VERSIONS:
        raise ValueError(f"{path}: version {version}, expected one of {_VERSIONS}")
    n_tensors, n_keys = header.number("Q", "tensor count"), header.number("Q", "key count")
    for what, count, most in (("tensors", n_tensors, _MOST_TENSORS), ("keys", n_keys, _MOST_KEYS)):
        if count > most:
            raise ValueError(f"{path}: {count} {what}, expected at most {most}")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = header.text("a key", _LONGEST_NAME)
        metadata[key] = header.value(header.number("I", key), f"key {short_repr(key)}")
    listed = [_entry(header) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment: expected a power of 2, got {alignment!r:.80}")
    start = -(-header.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, number, offset in listed:
        where = f"{path}: tensor {short_repr(name)}"
        try:
            kind = package().GGMLQuantizationType(number).name
            size = nbytes(kind, shape)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if offset % alignment or offset + size > raw.size - start:
            raise ValueError(
                f"{where}: {size} bytes at {offset} of the {max(raw.size - start, 0)} behind the "
                f"header, expected them inside, at a multiple of {alignment}"
            )
        if name in tensors:
            raise ValueError(f"{where}: stands twice in the file")
        begin = start + offset
        tensors[name] = GGUFTensor(kind, shape, raw[begin : begin + size])
    return metadata, tensors


def _entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape with the columns last, number of the type, offset) of one tensor."""
    name = header.text("a tensor's name", _LONGEST_NAME)
    what = f"tensor {short_repr(name)}"
    dims = header.number("I", what)
    if dims > _MOST_DIMS:
        raise ValueError(f"{header.path}: {what}: {dims} dimensions, expected at most {_MOST_DIMS}")
    shape = tuple(header.number("Q", what) for _ in range(dims))[::-1]
    if math.prod(shape) > 1 << 48:
        raise ValueError(f"{header.path}: {what}: shape {shape} cannot be real")
    return name, shape, header.number("I", what), header.number("Q", what)


# Writing


def write_gguf(
    path: str | os.PathLike[str],
    arch: str,
    metadata: Mapping[str, Any],
    tensors: Iterable[GGUFSource],
    counted: Callable[[int], Any] = lambda size: None,
) -> int:
    """Write a GGUF file, all of it or nothing, and a few MiB of it in memory at a time. Returns the
    bytes of the tensors.

    metadata: texts, bools, whole numbers, floats and lists of texts, whole numbers or floats.
    counted: is told how many bytes were written. Raises OSError naming the path.
    """
    gguf, target = package(), Path(os.path.abspath(path))
    listed = list(tensors)
    with staged(target.parent) as new:
        writer = gguf.GGUFWriter(new / target.name, arch)
        for key, value in metadata.items():
            _add(writer, key, value)
        for source in listed:
            kind, size = _type(source.kind), nbytes(source.kind, source.shape)
            writer.add_tensor_info(source.name, source.shape, np.dtype(np.float32), size, kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            writer.write_padding(file, file.tell())
            for source in listed:
                begin, size = file.tell(), nbytes(source.kind, source.shape)
                for chunk in _chunks(source.pieces()):
                    file.write(chunk)
                    counted(len(chunk))
                if file.tell() - begin != size:
                    raise ValueError(
                        f"tensor {source.name}: announced {size} bytes, got {file.tell() - begin}"
                    )
                writer.write_padding(file, size)
            writer.flush()
        finally:
            writer.close()
    return sum(nbytes(source.kind, source.shape) for source in listed)


def _chunks(pieces: Iterable[np.ndarray]) -> Iterator[memoryview]:
    for piece in pieces:
        raw = piece.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, CHUNK):
            yield in_memory(raw[start : start + CHUNK]).data


def _add(writer: Any, key: str, value: Any) -> None:
    kinds = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    add = {**kinds, float: writer.add_float32, list: writer.add_array}[type(value)]
    add(key, value)
