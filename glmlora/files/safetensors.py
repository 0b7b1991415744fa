"""The safetensors format: 8 bytes of header length, a JSON header, then the values, row-major and
little-endian.

Reading parses the header only; values stay in the mapped file. Every size and offset is checked
against the file first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import numpy as np

from .foreign import not_weights
from .mapped import guarded
from .tensor import NUMPY_TYPES, Tensor, Tensors, checked_nbytes, short_repr, sources, view
from .write import atomic_file, map_file

MAX_HEADER = 100_000_000  # bytes, the limit of the format's own library
METADATA = "__metadata__"


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Map a safetensors file: name -> Tensor, in the order of its header.

    Raises ValueError naming the file, the tensor and the numbers for anything but a whole,
    consistent file; OSError when it cannot be opened.
    """
    raw = map_file(path)
    with guarded(raw):
        return _read(path, raw)


def _read(path: str | os.PathLike, raw: np.ndarray) -> dict[str, Tensor]:
    if raw.size < 8:
        raise ValueError(f"{path}: truncated: {raw.size} bytes, a safetensors file has at least 8")
    head = raw[:16].tobytes()
    if head[8:9] != b"{" and (other := not_weights(head)):
        raise ValueError(f"{path}: {other}")
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if length > MAX_HEADER:
        what = f"header length {length}, expected at most {MAX_HEADER}"
        raise ValueError(f"{path}: {what}: not a safetensors file, or a damaged one")
    if length > raw.size - 8:
        raise ValueError(
            f"{path}: truncated: header of {length} bytes announced, {raw.size - 8} follow"
        )
    header, metadata = _parse_header(path, raw[8 : 8 + length].tobytes())
    spans = {name: _check_entry(path, name, entry) for name, entry in header.items()}
    _check_cover(path, spans, raw.size - 8 - length)
    tensors = {
        name: view(raw, 8 + length + spans[name][0], entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
    }
    # The format's own library stores a shared tensor once and says its other names here.
    second = {name: kept for name, kept in metadata.items() if kept in tensors}
    return tensors | {n: tensors[kept] for n, kept in second.items() if n not in tensors}


def _parse_header(path: str | os.PathLike, text: bytes) -> tuple[dict[str, dict], dict[str, str]]:
    def no_duplicates(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"name {short_repr(twice)} appears twice")
        return found

    if not text.startswith(b"{"):
        raise ValueError(f"{path}: header does not begin with '{{': not a safetensors file")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path}: header is not valid JSON: {reason}") from None
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path}: {METADATA}: expected an object of strings")
    return header, metadata


def _check_entry(path: str | os.PathLike, name: str, entry: object) -> tuple[int, int]:
    """Check one tensor's fields alone; return (begin, end) in bytes from the first value."""
    where = f"{path}: tensor {short_repr(name)}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with dtype, shape, data_offsets")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in NUMPY_TYPES:
        expected = " ".join(NUMPY_TYPES)
        raise ValueError(f"{where}: dtype {short_repr(dtype)}, expected one of {expected}")
    if not isinstance(shape, list):
        raise ValueError(f"{where}: shape {short_repr(shape)}, expected an array of numbers")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int for n in offsets)
        or not 0 <= offsets[0] <= offsets[1] < 1 << 63
    ):
        got = short_repr(offsets)
        raise ValueError(
            f"{where}: data_offsets {got}, expected [begin, end], 0 <= begin <= end < 2^63"
        )
    nbytes = checked_nbytes(where, dtype, shape)
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"{where}: data_offsets {offsets} span {offsets[1] - offsets[0]} bytes, "
            f"{dtype} {short_repr(shape)} needs {nbytes}"
        )
    return offsets[0], offsets[1]


def _check_cover(path: str | os.PathLike, spans: dict[str, tuple[int, int]], size: int) -> None:
    """The tensors must cover the `size` bytes after the header exactly once."""
    at = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        where = f"{path}: tensor {short_repr(name)}: data_offsets [{begin}, {end}]"
        if begin < at:
            raise ValueError(f"{where} overlap the tensor before, which ends at {at}")
        if begin > at:
            raise ValueError(f"{where} leave a hole after byte {at}")
        if end > size:
            raise ValueError(
                f"{where} reach beyond the {size} bytes of data: the file is truncated or damaged"
            )
        at = end
    if at != size:
        raise ValueError(
            f"{path}: {size - at} bytes after the last tensor, which ends at {at} of {size}"
        )


def write_safetensors(
    path: str | os.PathLike, tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically, one tensor in memory at a time.

    `tensors` maps names to arrays or Tensors, or lists (name, dtype, shape, get) whose values
    `get()` makes when they are due, in the order of the list. `metadata` maps strings to strings,
    {"format": "pt"} by default. Raises ValueError naming a tensor that cannot be stored, OSError
    naming `path`; then neither a new nor a temporary file is left.
    """
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    # Largest items first keeps every tensor aligned, since the header is padded to 8 bytes.
    listed = sources(tensors)
    ordered = sorted(listed, key=lambda s: (-NUMPY_TYPES[s.dtype].itemsize, s.name))
    header: dict[str, object] = {METADATA: metadata} if metadata else {}
    places: dict[str, int] = {}
    end = 0
    for source in ordered:
        if source.name == METADATA:
            raise ValueError(f"tensor name {METADATA!r} is reserved by the format")
        begin, end = end, end + source.nbytes
        places[source.name] = begin
        header[source.name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"{path}: header of {len(text)} bytes, the format allows {MAX_HEADER}")
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for source in listed:
            file.seek(8 + len(text) + places[source.name])
            for chunk in source.chunks():
                file.write(chunk)
