"""The op table of csrc/ops.h from Python: every op as a function of NumPy arrays.

`Ops("ref_f64").rmsnorm_forward(out, rstd, inp, weight, N, C, eps)` takes the parameters of ops.h in
its order; arrays stand for pointers, None for NULL. Nothing is copied or allocated: a wrong dtype
or a strided array is a TypeError here, since in C it would be a crash.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import (
    POINTER,
    byref,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from glmlora import _core

F32, F16, BF16, F64, I8, I4 = range(6)  # enum glm_dtype
STORED = {F32: np.float32, F16: np.float16, BF16: np.uint16, F64: np.float64}
STORED |= {I8: np.int8, I4: np.int8}


class Segment(ctypes.Structure):
    """struct glm_segment."""

    _fields_ = [
        (name, c_int)
        for name in "begin count shared_begin shared_count past_begin past_count context".split()
    ]


class Choice(ctypes.Structure):
    """struct glm_choice."""

    _fields_ = [
        ("top_p", c_double),
        ("seed", c_uint64),
        ("stream", c_uint32),
        ("index", c_uint32),
        ("temperature", c_float),
        ("penalty", c_float),
        ("top_k", c_int32),
        ("first", c_int32),
        ("penalised", c_int32),
        ("banned", c_int32),
    ]


class _Mat(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int),
        ("rows", c_int),
        ("cols", c_int),
        ("scale", c_void_p),
        ("group", c_int),
    ]


class _KV(ctypes.Structure):
    _fields_ = [("k", c_void_p), ("v", c_void_p)]


class Heads(ctypes.Structure):
    """struct glm_heads."""

    _fields_ = [
        (name, c_int)
        for name in ("NH", "KVH", "HD", "longest", "tokens", "rows", "before", "shortest")
    ]


class _Dropout(ctypes.Structure):
    _fields_ = [
        ("seed", c_uint64),
        ("step", c_uint32),
        ("site", c_uint32),
        ("p", c_double),
        ("stream", POINTER(c_int32)),
        ("position", POINTER(c_int32)),
    ]


class _SelfAttention(ctypes.Structure):
    _fields_ = [
        ("norm", c_void_p),
        ("eps", c_double),
        *[(name, POINTER(_Mat)) for name in ("qkv", "dense")],
        *[(name, c_void_p) for name in ("qkv_bias", "dense_bias")],
        *[(name, POINTER(_Mat)) for name in ("A", "B")],
        ("scale", c_double),
        ("dropout", _Dropout),
        *[(name, c_void_p) for name in ("dropped", "table", "position", "slot")],
        ("rotary_dim", c_int),
        ("n_segments", c_int),
        ("segments", POINTER(Segment)),
        ("cache", _KV),
        ("dcache", _KV),
        ("heads", Heads),
    ]


@dataclass
class SelfAttention:
    """struct glm_self_attention, but for the numbers that follow from others."""

    norm: np.ndarray
    eps: float
    qkv: Mat
    dense: Mat
    table: np.ndarray
    position: np.ndarray
    rotary_dim: int
    segments: list[Segment]
    heads: Heads
    qkv_bias: np.ndarray | None = None
    dense_bias: np.ndarray | None = None
    A: Mat | None = None
    B: Mat | None = None
    scale: float = 1.0
    dropout: Dropout | None = None
    dropped: np.ndarray | None = None
    slot: np.ndarray | None = None
    cache: tuple[np.ndarray, np.ndarray] | None = None
    dcache: tuple[np.ndarray, np.ndarray] | None = None


def _address(array: np.ndarray | None, dtype: Any, what: str) -> int | None:
    if array is None:
        return None
    if not isinstance(array, np.ndarray) or not array.flags.c_contiguous:
        raise TypeError(f"{what}: expected a C-contiguous array or None, got {type(array)}")
    if dtype is not None and array.dtype != dtype:
        raise TypeError(f"{what}: expected {np.dtype(dtype)}, got {array.dtype}")
    return array.ctypes.data


class Mat:
    """struct glm_mat over a 2-d array; bfloat16 is uint16, which is why the dtype is given."""

    def __init__(
        self, array: np.ndarray, dtype: int, scale: np.ndarray | None = None, group: int = 0
    ) -> None:
        self.array, self.scale = array, scale
        rows, cols = array.shape
        data, scales = (
            _address(array, STORED[dtype], "weight"),
            _address(scale, np.float16, "scale"),
        )
        self.struct = _Mat(data, dtype, rows, 2 * cols if dtype == I4 else cols, scales, group)


class Dropout:
    """struct glm_dropout; keeps its arrays alive."""

    def __init__(
        self,
        p: float,
        stream: Any,
        position: Any,
        seed: int = 0,
        step: int = 0,
        site: int = 0,
    ) -> None:
        self.stream = np.ascontiguousarray(stream, np.int32)
        self.position = np.ascontiguousarray(position, np.int32)
        pointer = POINTER(c_int32)
        self.struct = _Dropout(
            seed,
            step,
            site,
            p,
            self.stream.ctypes.data_as(pointer),
            self.position.ctypes.data_as(pointer),
        )


def bf16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, NaN kept; independent of the C core."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def stored(x: np.ndarray, dtype: int) -> np.ndarray:
    """x in a stored dtype (bfloat16 as uint16)."""
    return float_to_bf16(x) if dtype == BF16 else np.ascontiguousarray(x, STORED[dtype])


def unpacked(array: np.ndarray, dtype: int) -> np.ndarray:
    """The integers of an I8 or I4 array (rows, cols), float64; independent of the C core."""
    if dtype == I8:
        return array.astype(np.float64)
    both = array.astype(np.int64)  # two's complement in each nibble, the even column high
    nibbles = np.stack([both >> 4 & 15, both & 15], axis=-1).reshape(len(array), -1)
    return np.where(nibbles < 8, nibbles, nibbles - 16).astype(np.float64)


def dequantized(array: np.ndarray, dtype: int, scale: np.ndarray, group: int) -> np.ndarray:
    """Integers times scales, float64."""
    integers = unpacked(array, dtype)
    if not group:
        return integers * scale.astype(np.float64)[:, None]
    return integers * np.repeat(scale.astype(np.float64), group, 1)[:, : integers.shape[1]]


def unstored(x: np.ndarray, dtype: int) -> np.ndarray:
    """The float64 values of an array of a stored dtype."""
    return (bf16_to_float(x) if dtype == BF16 else x).astype(np.float64)


def _types_of(parameters: str) -> tuple[str, ...]:
    """("void *", "int") of "void *out, int N"; whether it is const makes no difference here."""
    words = [p.replace("const ", "").replace("*", "* ").split() for p in parameters.split(",")]
    return tuple(" ".join(each[:-1]) for each in words)


# {op: the types of its parameters}
SIGNATURES = {op: _types_of(text) for op, text in _core.op_signatures().items()}
# What stands for a pointer: an array of this dtype (None: of any), of the backend's own for void *.
_ARRAYS = {"void *": None, "glm_stored *": None, "int32_t *": np.int32}
_ARRAYS |= {"uint16_t *": np.float16, "double *": np.float64}
_TYPES = {
    **dict.fromkeys(_ARRAYS, c_void_p),
    "int": c_int,
    "size_t": c_size_t,
    "double": c_double,
    "enum glm_dtype": c_int,
    "int *": POINTER(c_int),
    "struct glm_mat *": POINTER(_Mat),
    "struct glm_kv": _KV,
    "struct glm_segment *": POINTER(Segment),
    "struct glm_choice *": POINTER(Choice),
    "struct glm_heads": Heads,
    "struct glm_dropout *": POINTER(_Dropout),
    "struct glm_self_attention *": POINTER(_SelfAttention),
}


def sized(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """An op's arguments; attention's heads with the numbers of tokens and cache rows, and the
    shortest segment."""
    if not op.startswith("attention"):
        return args
    *_, qkv, cache, segments, _, h = args
    return *args[:-1], _sized_heads(h, len(qkv), cache, segments)


def _sized_heads(h: Heads, tokens: int, cache: Any, segments: Sequence[Segment]) -> Heads:
    rows = len(cache[0]) if cache else 0
    before = max((s.shared_count + s.past_count for s in segments), default=0)
    shortest = min((s.count for s in segments), default=0)
    return Heads(h.NH, h.KVH, h.HD, h.longest, tokens, rows, before, shortest)


class Ops:
    """The ops of one backend as methods; `real` is the NumPy type of its element."""

    def __init__(self, name: str) -> None:
        table = _core.op_table(name)
        self.name = name
        self.real = np.float32 if table["real_size"] == 4 else np.float64
        self._cx = table["cx"]
        self._functions = {}
        for op, signature in SIGNATURES.items():
            types = [_TYPES[type_] for type_ in signature]
            self._functions[op] = ctypes.CFUNCTYPE(None, c_void_p, *types)(table[op])

    def __repr__(self) -> str:
        return self.name

    def __getattr__(self, op: str) -> Callable[..., Any]:
        if op not in SIGNATURES:
            raise AttributeError(op)
        return lambda *args: self._call(op, args)

    def _call(self, op: str, args: tuple[Any, ...]) -> None:
        signature = SIGNATURES[op]
        if len(args) != len(signature):
            raise TypeError(f"{op}: expected {len(signature)} arguments, got {len(args)}")
        passed = []
        for at, (type_, value) in enumerate(zip(signature, sized(op, args), strict=True)):
            passed.append(self._pass(type_, value, f"{op}, argument {at}"))
        self._functions[op](self._cx, *passed)

    def _pass(self, type_: str, value: Any, what: str) -> Any:
        """The C value of an argument."""
        if type_ in _ARRAYS:
            dtype = self.real if type_ == "void *" else _ARRAYS[type_]
            return self._pointer(value, dtype, what)
        if type_ == "struct glm_kv":
            return self._kv(value, what)
        if type_ == "struct glm_mat *":
            return byref(self._mat(value))
        if type_ == "int *":
            return byref(value)
        if value is None or "*" not in type_:
            return value
        if type_ == "struct glm_dropout *":
            return byref(self._dropout(value))
        if type_ == "struct glm_self_attention *":
            return byref(self._self_attention(value, what))
        kind = Segment if type_ == "struct glm_segment *" else Choice
        return self._structures((kind * max(1, len(value)))(*value), kind)

    def _kv(self, value: Any, what: str) -> _KV:
        k, v = value or (None, None)
        return _KV(self._pointer(k, self.real, what), self._pointer(v, self.real, what))

    def _self_attention(self, of: SelfAttention, what: str) -> _SelfAttention:
        def real(array: np.ndarray | None) -> int | None:
            return self._pointer(array, self.real, what)

        def mat(value: Mat | None) -> Any:
            return None if value is None else ctypes.pointer(self._mat(value))

        n, tokens = len(of.segments), len(of.position)
        segments = self._structures((Segment * max(1, n))(*of.segments), Segment)
        return _SelfAttention(
            real(of.norm),
            of.eps,
            mat(of.qkv),
            mat(of.dense),
            real(of.qkv_bias),
            real(of.dense_bias),
            mat(of.A),
            mat(of.B),
            of.scale,
            _Dropout() if of.dropout is None else self._dropout(of.dropout),
            real(of.dropped),
            real(of.table),
            self._pointer(of.position, np.int32, what),
            self._pointer(of.slot, np.int32, what),
            of.rotary_dim,
            n,
            segments,
            self._kv(of.cache, what),
            self._kv(of.dcache, what),
            _sized_heads(of.heads, tokens, of.cache, of.segments),
        )

    # Where an argument lies for the op; DeviceOps puts it on the device.

    def _pointer(self, array: np.ndarray | None, dtype: Any, what: str) -> int | None:
        return _address(array, dtype, what)

    def _mat(self, mat: Mat) -> _Mat:
        return mat.struct

    def _dropout(self, dropout: Dropout) -> _Dropout:
        return dropout.struct

    def _structures(self, array: Any, kind: Any) -> Any:
        return array


class DeviceOps(Ops):
    """The ops of a backend with memory of its own: every array goes there before a call and comes
    back after it, between sentinels that must survive. Every other call has its arrays off the
    16-byte grid; matrices always lie on it, as the model's do."""

    GUARD = 256

    def __init__(self, name: str) -> None:
        super().__init__(name)
        table = _core.op_table(name)
        self._be = table["be"]
        function, p, n = ctypes.CFUNCTYPE, c_void_p, c_size_t
        self._alloc = function(p, p, n)(table["alloc"])
        self._free = function(None, p, p)(table["free"])
        self._upload = function(None, p, p, p, n)(table["upload"])
        self._download = function(None, p, p, p, n)(table["download"])
        self._error = function(ctypes.c_char_p, p)(table["error"])
        self._held: dict[int, tuple[int, int, np.ndarray]] = {}
        self._calls = 0

    def _call(self, op: str, args: tuple[Any, ...]) -> None:
        self._calls += 1
        try:
            super()._call(op, args)
            error = self._error(self._be)
            if error:
                raise RuntimeError(error.decode())
            for base, offset, array in self._held.values():
                back = np.empty(offset + array.nbytes + self.GUARD, np.uint8)
                self._download(self._be, back.ctypes.data, base, back.nbytes)
                end = offset + array.nbytes
                outside = np.concatenate((back[:offset], back[end:]))
                assert (outside == 0xA5).all(), f"{op}: wrote outside an array"
                if array.flags.writeable and array.nbytes:
                    flat = back[offset:end].view(array.dtype) if offset % 8 == 0 else None
                    flat = back[offset:end].copy().view(array.dtype) if flat is None else flat
                    array[...] = flat.reshape(array.shape)
        finally:
            for base, _, _ in self._held.values():
                self._free(self._be, base)
            self._held = {}

    def _put(self, array: np.ndarray, shift: int) -> int:
        """The device address of an array's copy; the same array is put once."""
        key = array.ctypes.data if array.nbytes else id(array)
        if key not in self._held:
            offset = self.GUARD + shift
            room = np.full(offset + array.nbytes + self.GUARD, 0xA5, np.uint8)
            room[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
            base = self._alloc(self._be, room.nbytes)
            if not base:
                raise MemoryError(f"{self.name}: {room.nbytes} bytes")
            self._upload(self._be, base, room.ctypes.data, room.nbytes)
            self._held[key] = base, offset, array
        base, offset, held = self._held[key]
        if held.nbytes != array.nbytes:
            raise TypeError("two arguments overlap in part")
        return base + offset

    def _pointer(self, array: np.ndarray | None, dtype: Any, what: str) -> int | None:
        if _address(array, dtype, what) is None or array is None:
            return None
        return self._put(array, array.itemsize * (self._calls % 2))

    def _mat(self, mat: Mat) -> _Mat:
        s = mat.struct
        scale = None if mat.scale is None else self._put(mat.scale, 0)
        return _Mat(self._put(mat.array, 0), s.dtype, s.rows, s.cols, scale, s.group)

    def _dropout(self, dropout: Dropout) -> _Dropout:
        s, pointer = dropout.struct, POINTER(c_int32)
        at = [self._put(a, 0) for a in (dropout.stream, dropout.position)]
        return _Dropout(s.seed, s.step, s.site, s.p, *(ctypes.cast(a, pointer) for a in at))

    def _structures(self, array: Any, kind: Any) -> Any:
        return ctypes.cast(self._put(np.frombuffer(array, np.uint8), 0), POINTER(kind))


@lru_cache
def ops_of(name: str) -> Ops:
    """The ops of a backend, wherever its memory is."""
    return DeviceOps(name) if _core.op_table(name)["device_memory"] else Ops(name)


def backends() -> list[str]:
    """Names of the cpu backends that this processor runs, and of the CUDA library's in float32."""
    found = [f"cpu:{variant}" for variant in _core.cpu_variants().split(",") if variant]
    for name in ("emu", "cuda") if os.environ.get("GLMLORA_CUDA_LIBRARY") else ():
        try:
            _core.op_table(name)
        except ValueError:
            continue
        found.append(name)
    return found
