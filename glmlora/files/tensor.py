"""Named arrays on their way from and to weight files. Type names are those of safetensors.

NumPy has no bfloat16: BF16 values stay the uint16 patterns they are in the file, and only
`numpy()` widens them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from .. import _core
from .mapped import in_memory

NUMPY_TYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_TYPE_NAMES = {dtype: name for name, dtype in NUMPY_TYPES.items() if name != "BF16"}

MAX_RANK = 8
MAX_BYTES = 1 << 62  # of one tensor: sums of two such sizes still fit in 64 bits
CHUNK = 16 << 20  # bytes handed to one write, so that Ctrl-C is never far


def type_name(dtype: np.dtype) -> str:
    """The file's name of a NumPy dtype: float32 -> "F32". ValueError for a dtype that no weight
    file holds.
    """
    name = _TYPE_NAMES.get(np.dtype(dtype).newbyteorder("<"))
    if name is None:
        hint = "; for bfloat16 patterns use Tensor(array, 'BF16')" if dtype == np.uint16 else ""
        raise ValueError(f"dtype: expected one of {' '.join(NUMPY_TYPES)}, got {dtype}{hint}")
    return name


class Tensor:
    """One array of a weight file: read-only, C-contiguous, usually a view of the mapped file.

    data   ndarray of the stored type; uint16 patterns for BF16. For the core, and within
           `mapped.guarded`: `numpy()` is safe from what happens to the file
    dtype  its name in the file: "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL"
    """

    __slots__ = ("data", "dtype")

    def __init__(self, data: np.ndarray, dtype: str | None = None):
        """Wrap `data`, copying only if it is not C-contiguous, aligned and little-endian.

        `dtype` is needed only for "BF16" (uint16 `data`). Raises ValueError if the two do not go
        together.
        """
        data = np.asarray(data)
        if dtype is None:
            dtype = type_name(data.dtype)
        elif dtype not in NUMPY_TYPES:
            raise ValueError(f"dtype: expected one of {' '.join(NUMPY_TYPES)}, got {dtype!r}")
        stored = NUMPY_TYPES[dtype]
        if data.dtype.newbyteorder("<") != stored:
            raise ValueError(f"data: expected an array of {stored} for {dtype}, got {data.dtype}")
        if data.dtype != stored or not (data.flags.c_contiguous and data.flags.aligned):
            data = in_memory(data).astype(stored, order="C")
        self.data = data.view()
        self.data.flags.writeable = False
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions; () for a single number."""
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes the values take in the file."""
        return self.data.nbytes

    def numpy(self) -> np.ndarray:
        """An array to compute with: BF16 widened to float32 exactly; anything else read-only, and
        copied where it lies in a mapped file. OSError naming the file where that changed.
        """
        data = in_memory(self.data)
        if self.dtype == "BF16":
            wide = data.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        if self.dtype == "BOOL":
            return data.view(np.uint8) != 0  # a byte that is neither 0 nor 1 would confuse NumPy
        data.flags.writeable = False
        return data

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape})"


def to_arrays(tensors: Mapping[str, Tensor], what: str) -> dict[str, np.ndarray]:
    """`numpy()` of each. Where the copies of what lies in mapped files would take more than half of
    the memory that is free, those stay views of the files, and a warning that begins with `what`
    says so.
    """
    asked = sum(
        t.nbytes for t in tensors.values() if t.dtype != "BF16" and _core.check_mapped(t.data)
    )
    free = _core.memory_available()
    if asked <= free // 2:
        return {name: tensor.numpy() for name, tensor in tensors.items()}
    warnings.warn(
        f"{what}: a copy takes {asked / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: the arrays "
        "are views of the weight files, which must not change while they are in use",
        stacklevel=3,
    )
    widened = ("BF16", "BOOL")
    return {n: t.numpy() if t.dtype in widened else t.data for n, t in tensors.items()}


def to_bf16(values: np.ndarray) -> Tensor:
    """Round to bfloat16, nearest even; infinities stay, NaN becomes a quiet NaN. `values` is any
    real array.
    """
    values = np.asarray(values, dtype=np.float32)
    bits = np.array(values, order="C").view(np.uint32)
    bits += 0x7FFF + ((bits >> 16) & 1)
    bits >>= 16
    short = bits.astype(np.uint16)
    short[np.isnan(values)] = 0x7FC0
    return Tensor(short, "BF16")


def checked_nbytes(where: str, dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor whose `shape` came from a file. ValueError, beginning with `where`, if it
    cannot be real.
    """
    shape = list(shape)
    if len(shape) > MAX_RANK:
        raise ValueError(f"{where}: {len(shape)} dimensions, expected at most {MAX_RANK}")
    size = extent = NUMPY_TYPES[dtype].itemsize
    for n in shape:
        if type(n) is not int or n < 0:
            raise ValueError(f"{where}: shape {short_repr(shape)} must hold whole numbers from 0")
        size *= n
        extent *= max(n, 1)  # NumPy wants (0, 2^70) to be addressable too
        if extent > MAX_BYTES:
            raise ValueError(f"{where}: shape {short_repr(shape)} of {dtype} overflows")
    return size


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same type, shape and bytes; the first difference ends the
    comparison.
    """
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.data.reshape(-1).view(np.uint8) for t in (a, b))
    if x.ctypes.data == y.ctypes.data:
        return True
    parts = (slice(start, start + CHUNK) for start in range(0, x.size, CHUNK))
    return all(np.array_equal(x[part], y[part]) for part in parts)


def short_repr(value: object, limit: int = 80) -> str:
    """repr for an error message: lists and strings of a hostile file are not printed whole."""
    if isinstance(value, str):
        value = value if len(value) <= limit else value[:limit] + "..."
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return "(a number of very many digits)"
    return text if len(text) <= limit + 20 else text[:limit] + "..."


def view(raw: np.ndarray, begin: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor at byte `begin` of a mapped file; range and shape are the caller's to check.

    In place, unless the file holds it at an address that is no multiple of its item size.
    """
    stored = NUMPY_TYPES[dtype]
    nbytes = checked_nbytes("tensor", dtype, shape)
    if nbytes == 0:
        return Tensor(np.empty(shape, stored), dtype)
    return Tensor(raw[begin : begin + nbytes].view(stored).reshape(shape), dtype)


class Source(NamedTuple):
    """A tensor to be written: what the header must say, and a call that yields its values when
    they are due.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    get: Callable[[], Tensor | np.ndarray]

    @property
    def nbytes(self) -> int:
        return checked_nbytes(f"tensor {short_repr(self.name)}", self.dtype, self.shape)

    def chunks(self) -> Iterator[memoryview]:
        """The values as bytes, a few MiB at a time. ValueError if `get` yields other than
        announced.
        """
        value = self.get()
        if not isinstance(value, Tensor):
            value = Tensor(value, self.dtype)
        if value.dtype != self.dtype or value.shape != self.shape:
            got = f"{value.dtype} {value.shape}"
            raise ValueError(
                f"tensor {self.name!r}: announced as {self.dtype} {self.shape}, got {got}"
            )
        raw = value.data.reshape(-1).view(np.uint8)
        for start in range(0, raw.size, CHUNK):
            yield in_memory(raw[start : start + CHUNK]).data


Tensors = Mapping[str, "Tensor | np.ndarray"] | Iterable[Source]


def sources(tensors: Tensors) -> list[Source]:
    """Normalise what the writers take: a mapping of arrays, or (name, dtype, shape, get) for
    values made when due.

    Raises ValueError naming a tensor with an unknown type, an impossible shape or a name given
    twice.
    """
    if isinstance(tensors, Mapping):
        listed = [_source(name, value) for name, value in tensors.items()]
    else:
        listed = [Source(name, dtype, tuple(shape), get) for name, dtype, shape, get in tensors]
    seen = set()
    for source in listed:
        if not isinstance(source.name, str):
            raise ValueError(f"tensor name: expected a string, got {source.name!r}")
        if source.name in seen:
            raise ValueError(f"tensor {source.name!r}: given twice")
        seen.add(source.name)
        if source.dtype not in NUMPY_TYPES:
            raise ValueError(f"tensor {source.name!r}: unknown type {source.dtype!r}")
        checked_nbytes(f"tensor {source.name!r}", source.dtype, source.shape)
    return listed


def _source(name: str, value: Tensor | np.ndarray) -> Source:
    if isinstance(value, Tensor):
        return Source(name, value.dtype, value.shape, lambda: value)
    if not isinstance(value, np.ndarray | np.generic):
        raise ValueError(f"tensor {name!r}: expected an array, got {type(value).__name__}")
    try:
        dtype = type_name(value.dtype)
    except ValueError as error:
        raise ValueError(f"tensor {name!r}: {error}") from None
    return Source(name, dtype, value.shape, lambda: Tensor(value))
