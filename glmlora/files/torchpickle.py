"""The pickles inside torch files, run by a small interpreter that can build data and nothing else.

It knows the opcodes that hold data and a fixed list of names; it imports nothing, calls nothing but
the methods below, and bounds everything it builds: time, nesting, copies, the size of the result.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from .tensor import MAX_BYTES, MAX_RANK, NUMPY_TYPES, Tensor, checked_nbytes, short_repr, view

MAX_PICKLE = 64 << 20  # bytes; a model of thousands of tensors has about a megabyte
MAX_OPS = 4_000_000  # bounds objects, stack and memo
MAX_DEPTH = 64  # nesting of containers
MAX_NODES = 10_000_000  # of the result, counted as if nothing were shared

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
UNTYPED = "torch.storage UntypedStorage"
CALLABLE = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter",
    "torch Size",
}
KNOWN = CALLABLE | {UNTYPED} | {f"torch {name}" for name in (*STORAGES, *DTYPES)}


@dataclass(frozen=True)
class _Symbol:
    """A global that a pickle named: only ever compared, never looked up."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """Raw values of one entry; `data` is None while an old file is only scanned for storages."""

    key: str
    dtype: str | None  # None: untyped
    data: np.ndarray | None  # uint8


_OPS: dict[int, tuple[str, Callable[[Unpickler], None]]] = {}


def _op(code: int | str, name: str):
    """Register a method as the meaning of one opcode."""

    def register(method):
        _OPS[ord(code) if isinstance(code, str) else code] = (name, method)
        return method

    return register


class Unpickler:
    """Interprets one pickle of tensors and plain values (formats of torch.save, protocols 2 to 5).

    find(key, dtype, count) yields the uint8 values of a storage of `count` items, or None while
    scanning.
    """

    def __init__(self, path, data: bytes | memoryview, find: Callable, copy_budget: int):
        self.path = path
        self.data = data
        self.find = find
        self.copy_budget = copy_budget
        self.scanning = False

    def load(self, pos: int = 0) -> tuple[Any, int]:
        """The pickled value that begins at `pos`, and where the next one would begin."""
        self.pos = self.start = pos
        self.end = min(len(self.data), pos + MAX_PICKLE)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        for _ in range(MAX_OPS):
            self.op_pos = self.pos
            code = self._take(1)[0]
            self.op_name, method = _OPS.get(code, (f"opcode 0x{code:02x}", None))
            if method is None:
                self._fail("is not one of the opcodes that hold data")
            if code == 0x2E:  # STOP
                break
            try:
                method(self)
            except IndexError:
                self._fail("needs more values than the stack holds")
        else:
            self._fail(f"exceeds {MAX_OPS} operations")
        if len(self.stack) != 1 or self.marks:
            self._fail("expected exactly one value at the end")
        return self.stack[0], self.pos

    def _fail(self, what: str) -> NoReturn:
        offset = self.op_pos - self.start
        raise ValueError(f"{self.path}: pickle: {self.op_name} at byte {offset} {what}")

    def _take(self, n: int) -> bytes:
        if n > self.end - self.pos:
            raise ValueError(
                f"{self.path}: pickle ends inside an operation: {n} bytes wanted at byte "
                f"{self.pos - self.start}, {self.end - self.pos} left"
            )
        self.pos += n
        return bytes(self.data[self.pos - n : self.pos])

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _text(self, layout: str) -> str:
        try:
            return self._take(self._number(layout)).decode("utf-8")
        except UnicodeDecodeError:
            self._fail("holds text that is not UTF-8")

    def _pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def _symbol(self, module: object, name: object) -> None:
        full = f"{module} {name}"
        if type(module) is not str or type(name) is not str or full not in KNOWN:
            self._fail(
                f"names {short_repr(full.replace(' ', '.'))}, which is not on the list of "
                "tensor types; "
                "only state dictionaries of tensors and plain values are read, and nothing "
                "is executed"
            )
        self.stack.append(_Symbol(full))

    # Values

    @_op(0x80, "PROTO")
    def _proto(self):
        version = self._take(1)[0]
        if not 2 <= version <= 5:
            self._fail(f"has protocol {version}, expected 2 to 5")

    @_op(0x95, "FRAME")
    def _frame(self):
        self._take(8)

    @_op(".", "STOP")
    def _stop(self):
        pass

    @_op("X", "BINUNICODE")
    @_op("T", "BINSTRING")
    def _string(self):
        self.stack.append(self._text("<I"))

    @_op(0x8C, "SHORT_BINUNICODE")
    @_op("U", "SHORT_BINSTRING")
    def _short_string(self):
        self.stack.append(self._text("<B"))

    @_op("J", "BININT")
    def _int(self):
        self.stack.append(self._number("<i"))

    @_op("K", "BININT1")
    def _int1(self):
        self.stack.append(self._number("<B"))

    @_op("M", "BININT2")
    def _int2(self):
        self.stack.append(self._number("<H"))

    @_op(0x8A, "LONG1")
    def _long(self):
        size = self._take(1)[0]
        if size > 16:
            self._fail(f"holds an integer of {size} bytes, expected at most 16")
        self.stack.append(int.from_bytes(self._take(size), "little", signed=True))

    @_op("G", "BINFLOAT")
    def _float(self):
        self.stack.append(self._number(">d"))

    @_op("N", "NONE")
    def _none(self):
        self.stack.append(None)

    @_op(0x88, "NEWTRUE")
    def _true(self):
        self.stack.append(True)

    @_op(0x89, "NEWFALSE")
    def _false(self):
        self.stack.append(False)

    # Containers

    @_op("(", "MARK")
    def _mark(self):
        if len(self.marks) >= MAX_DEPTH:
            self._fail(f"nests deeper than {MAX_DEPTH}")
        self.marks.append(self.stack)
        self.stack = []

    @_op("}", "EMPTY_DICT")
    def _empty_dict(self):
        self.stack.append({})

    @_op("]", "EMPTY_LIST")
    def _empty_list(self):
        self.stack.append([])

    @_op(")", "EMPTY_TUPLE")
    def _empty_tuple(self):
        self.stack.append(())

    @_op("t", "TUPLE")
    def _tuple(self):
        items = self._pop_mark()
        self.stack.append(tuple(items))

    def _last(self, n: int) -> None:
        if len(self.stack) < n:
            raise IndexError
        self.stack[-n:] = [tuple(self.stack[-n:])]

    @_op(0x85, "TUPLE1")
    def _tuple1(self):
        self._last(1)

    @_op(0x86, "TUPLE2")
    def _tuple2(self):
        self._last(2)

    @_op(0x87, "TUPLE3")
    def _tuple3(self):
        self._last(3)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            self._fail(f"sets {len(items)} keys and values in a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only these: the hash of a tuple may take exponential time.
            if type(key) not in (str, int):
                self._fail(f"uses a {type(key).__name__} as a key, expected text or a whole number")
            if key in target:
                self._fail(f"gives the key {short_repr(key)} twice")
            target[key] = value

    @_op("s", "SETITEM")
    def _setitem(self):
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    @_op("u", "SETITEMS")
    def _setitems(self):
        self._set(self._pop_mark())

    def _append_to(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            self._fail(f"appends to a {type(target).__name__}")
        target.extend(items)

    @_op("a", "APPEND")
    def _append(self):
        self._append_to([self.stack.pop()])

    @_op("e", "APPENDS")
    def _appends(self):
        self._append_to(self._pop_mark())

    # Memo

    @_op("q", "BINPUT")
    def _put(self):
        self.memo[self._number("<B")] = self.stack[-1]

    @_op("r", "LONG_BINPUT")
    def _long_put(self):
        self.memo[self._number("<I")] = self.stack[-1]

    @_op(0x94, "MEMOIZE")
    def _memoize(self):
        self.memo[len(self.memo)] = self.stack[-1]

    def _get_memo(self, index: int) -> None:
        if index not in self.memo:
            self._fail(f"refers to value {index}, which was never stored")
        self.stack.append(self.memo[index])

    @_op("h", "BINGET")
    def _get(self):
        self._get_memo(self._number("<B"))

    @_op("j", "LONG_BINGET")
    def _long_get(self):
        self._get_memo(self._number("<I"))

    # Names, storages, tensors

    @_op("c", "GLOBAL")
    def _global(self):
        names = []
        for _ in range(2):
            line = bytes(self.data[self.pos : min(self.pos + 256, self.end)])
            length = line.find(b"\n")
            if length < 0:
                self._fail("has a name without an end")
            self.pos += length + 1
            names.append(line[:length].decode("utf-8", "backslashreplace"))
        self._symbol(*names)

    @_op(0x93, "STACK_GLOBAL")
    def _stack_global(self):
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            self._fail("needs two texts")
        self._symbol(module, name)

    @_op("Q", "BINPERSID")
    def _persistent(self):
        pid = self.stack.pop()
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage":
            self._fail("is not a reference to a storage")
        _, kind, key, _, count = pid[:5]
        if type(kind) is not _Symbol or type(key) is not str or type(count) is not int or count < 0:
            self._fail("is a reference to a storage with fields of the wrong kind")
        if len(pid) == 6 and pid[5] is not None:
            self._fail(
                "refers to a part of a storage, a form that is not read; save the file with "
                "torch >= 1.6"
            )
        dtype = None if kind.name == UNTYPED else STORAGES.get(kind.name.removeprefix("torch "))
        if dtype is None and kind.name != UNTYPED:
            self._fail(f"gives {kind.name} as the type of a storage")
        self.stack.append(_Storage(key, dtype, self.find(key, dtype or "U8", count)))

    @_op("R", "REDUCE")
    def _reduce(self):
        args, function = self.stack.pop(), self.stack.pop()
        if (
            type(function) is not _Symbol
            or function.name not in CALLABLE
            or type(args) is not tuple
        ):
            self._fail("calls something that is not on the list")
        self.stack.append(self._build(function.name.split()[1], args))

    @_op("b", "BUILD")
    def _build_state(self):
        self.stack.pop()  # the `_metadata` of a state dictionary: not needed
        if type(self.stack[-1]) is not dict:
            self._fail(f"sets the state of a {type(self.stack[-1]).__name__}")

    def _build(self, name: str, args: tuple) -> Any:
        if name == "OrderedDict":
            if args:
                self._fail("makes an OrderedDict from arguments, expected none")
            return {}
        if self.scanning:
            return None
        if name == "Size":
            if len(args) != 1 or type(args[0]) is not tuple:
                self._fail("makes a torch.Size from something else than a tuple")
            return args[0]
        if name == "_rebuild_parameter":
            if len(args) != 3 or type(args[0]) is not Tensor:
                self._fail("makes a parameter from something else than a tensor")
            return args[0]
        arity = {
            "_rebuild_tensor": (4, 4),
            "_rebuild_tensor_v2": (6, 7),
            "_rebuild_tensor_v3": (7, 8),
        }
        low, high = arity[name]
        if not low <= len(args) <= high or type(args[0]) is not _Storage:
            self._fail(f"calls {name} with arguments of the wrong kind")
        dtype = args[0].dtype
        if name == "_rebuild_tensor_v3":
            symbol = args[6].name if type(args[6]) is _Symbol else ""
            dtype = DTYPES.get(symbol.removeprefix("torch "))
        if dtype is None:
            self._fail(f"calls {name} without a type of values")
        return self._tensor(args[0], dtype, *args[1:4])

    def _tensor(self, storage: _Storage, dtype: str, offset: Any, size: Any, stride: Any) -> Tensor:
        """The tensor of `size` whose item (i, j, ..) is item offset + i*stride[0] + j*stride[1]..
        of the storage.
        """
        where = f"{self.path}: storage {short_repr(storage.key)}"
        if (
            type(offset) is not int
            or type(size) is not tuple
            or type(stride) is not tuple
            or len(size) != len(stride)
            or len(size) > MAX_RANK
            or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in (offset, *stride))
        ):
            self._fail(
                f"rebuilds a tensor of storage {short_repr(storage.key)} with impossible numbers"
            )
        nbytes = checked_nbytes(where, dtype, size)
        if nbytes == 0:
            return Tensor(np.empty(size, NUMPY_TYPES[dtype]), dtype)
        item = NUMPY_TYPES[dtype].itemsize
        count = storage.data.size // item
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if last >= count:
            raise ValueError(
                f"{where}: a tensor of shape {size}, stride {stride} and offset {offset} "
                f"reaches item {last}, "
                f"the storage has {count}"
            )
        steps, dense = [], 1
        for n in reversed(size):
            steps.append(dense)
            dense *= n
        steps.reverse()
        row_major = all(n == 1 or s == d for n, s, d in zip(size, stride, steps, strict=True))
        address = storage.data.ctypes.data + offset * item
        if not row_major or address % item:
            self.copy_budget -= nbytes
            if self.copy_budget < 0:
                raise ValueError(
                    f"{where}: views of shape {size} and the like expand to more than the "
                    "file holds"
                )
        if row_major:
            return view(storage.data, offset * item, dtype, size)
        values = np.ndarray(
            size,
            NUMPY_TYPES[dtype],
            buffer=storage.data,
            offset=offset * item,
            strides=[s * item if n > 1 else 0 for n, s in zip(size, stride, strict=True)],
        )
        return Tensor(values.copy(order="C"), dtype)


def check_result(path: str | os.PathLike, value: Any) -> None:
    """ValueError unless `value` is made of dict, list, tuple, text, numbers and Tensors, of a
    bounded size.
    """
    # id of a container -> height, nodes; None while inside it
    measured: dict[int, tuple[int, int] | None] = {}

    def measure(value: Any, depth: int) -> tuple[int, int]:
        kind = type(value)
        if kind in (str, int, float, bool, type(None), Tensor):
            return 0, 1
        if kind not in (dict, list, tuple):
            what = value.name if kind is _Symbol else kind.__name__.strip("_").lower()
            raise ValueError(
                f"{path}: holds {short_repr(what)} where a tensor or a plain value is expected"
            )
        height, nodes = 0, 1
        if id(value) in measured:
            if measured[id(value)] is None:
                raise ValueError(f"{path}: pickle: a {kind.__name__} contains itself")
            height, nodes = measured[id(value)]
        elif depth < MAX_DEPTH:
            measured[id(value)] = None
            for item in value.values() if kind is dict else value:
                h, n = measure(item, depth + 1)
                height, nodes = max(height, h + 1), nodes + n
            measured[id(value)] = height, nodes
        if depth + height >= MAX_DEPTH or nodes > MAX_NODES:
            raise ValueError(
                f"{path}: pickle: nested deeper than {MAX_DEPTH} or more than {MAX_NODES} values"
            )
        return height, nodes

    measure(value, 0)
