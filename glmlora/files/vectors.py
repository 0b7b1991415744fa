"""Vectors by key in a file that only grows: what took long to compute is computed once.

    b"GLMLORAV", width (uint32), 0 (uint32), then records:
    key (16 bytes), CRC-32 of key and values (uint32), values (float32, width)

Little-endian. A record that is torn or damaged counts for nothing. Several processes may add.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from .._core import Descriptor
from .regular import check_regular

KEY_BYTES = 16
_MAGIC = b"GLMLORAV"
_SUM_BYTES = 4


class VectorFile:
    """The file `path`, made where there is none: key (16 bytes) -> float32 (width). Raises OSError
    as open() does, ValueError naming the file for one that holds something else.
    """

    def __init__(self, path: str | os.PathLike[str], width: int):
        self.path = os.fspath(path)
        self._header = _MAGIC + width.to_bytes(4, "little") + bytes(4)
        self._record = KEY_BYTES + _SUM_BYTES + 4 * width
        self._file = Descriptor(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK)
        check_regular(self.path, os.fstat(self._file.fileno()).st_mode)
        there = os.pread(self._file.fileno(), len(self._header), 0)
        if there != self._header[: len(there)]:
            raise ValueError(
                f"{self.path}: holds something else than vectors of {width} numbers; move it away"
            )
        self._places = {
            os.pread(self._file.fileno(), KEY_BYTES, place): place
            for place in range(len(self._header), self._whole(), self._record)
        }

    def _whole(self) -> int:
        """Bytes of the file up to the end of its last whole record; 0 without a whole header."""
        records = os.fstat(self._file.fileno()).st_size - len(self._header)
        return 0 if records < 0 else len(self._header) + records // self._record * self._record

    def read(self, key: bytes, out: np.ndarray) -> bool:
        """Whether there is a vector of that key; it is put into `out`."""
        if key not in self._places:
            return False
        data = os.pread(self._file.fileno(), self._record, self._places[key])
        begin, values = data[: KEY_BYTES + _SUM_BYTES], data[KEY_BYTES + _SUM_BYTES :]
        if begin != _begin(key, values):
            return False
        out[:] = np.frombuffer(values, "<f4")
        return True

    def add(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Append vectors float32 (keys, width). OSError naming the file, e.g. for a full disk: what
        was added before stays.
        """
        rows = [row.astype("<f4").tobytes() for row in vectors]
        data = b"".join(_begin(key, row) + row for key, row in zip(keys, rows, strict=True))
        file = self._file.fileno()
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            place = self._whole()
            os.ftruncate(file, place)  # what a killed process has left
            left = data if place else self._header + data
            while left:
                left = left[os.write(file, left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
        place = place or len(self._header)
        self._places |= {key: place + i * self._record for i, key in enumerate(keys)}

    def __enter__(self) -> VectorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _begin(key: bytes, values: bytes) -> bytes:
    return key + zlib.crc32(key + values).to_bytes(_SUM_BYTES, "little")
