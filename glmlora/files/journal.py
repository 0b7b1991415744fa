"""A journal of a job over the rows of a table: each row's result is on disk as soon as it is there,
and the same job goes on where it was stopped, however that was.

A line is an object of JSON whose last key is the CRC-32 of what stands before it:

    {"journal": 1, "job": {..}, "seed": 7, "crc32": "0123abcd"}     what the job is
    {"process": {"pid": 1, ..}, "crc32": ".."}                      who wrote what follows
    {"row": 3, "result": {..}, "crc32": ".."}                       a row that is done

A line that is torn or damaged counts for nothing: its row is missing, and done again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._core import Descriptor
from .owner import may_live, named_process, this_process
from .regular import check_regular, regular
from .staging import same_file, sync_directory

FORMAT = 1
SYNC_SECONDS = 1.0  # what a power failure may cost; a killed process loses nothing
_BEGIN = b'{"journal": '
_LINE = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)


class Journal:
    """Results of the rows 0, 1, .. of a job, in the file `path`; while it is open, no other process
    has it. Without a path they are in memory alone.

    job: what the results depend on, as JSON: a part's name -> text, or an object of text and
    numbers. seed: of the job's random numbers; a journal that is there keeps its own. `results` is
    row -> what `add` was given. anew: a file of another job, or of none, is begun anew. `replaced`
    is then what was wrong with it.

    Raises ValueError naming the parts of the job that differ, or the file that is no journal;
    OSError (EBUSY) naming the process that writes it; OSError as open() does.
    """

    def __init__(
        self,
        path: str | os.PathLike | None,
        job: Mapping[str, Any],
        seed: int,
        anew: bool = False,
    ):
        self.path = None if path is None else os.fspath(path)
        self.seed = seed
        self.results: dict[int, Any] = {}
        self.replaced = ""
        self._synced = time.monotonic()
        self._removed = False
        if self.path is None:
            return
        # As it is read back: tuples are lists there.
        job = json.loads(json.dumps(dict(job)))
        self._file, data = _take(self.path)
        try:
            found = self._go_on(data, job, anew)
            if not found:
                os.ftruncate(self._file.fileno(), 0)
                self._write({"journal": FORMAT, "job": job, "seed": seed})
            self._write({"process": this_process()})
            self._sync()
            sync_directory(os.path.dirname(os.path.abspath(self.path)))
        except BaseException:
            self._file.close()
            raise

    def _go_on(self, data: bytes, job: Mapping[str, Any], anew: bool) -> bool:
        """Take the results of a journal of this job; False where there is none."""
        whole = data[: data.rfind(b"\n") + 1]
        if not whole and data.startswith(_BEGIN[: len(data)]):  # killed in its first line
            return False
        lines = list(_lines(whole))
        wrong = _what_differs(lines[0] if lines else None, job)
        if wrong and anew:
            self.replaced = wrong
            return False
        if wrong:
            raise ValueError(
                f"{self.path}: {wrong}; move it away, or pass --overwrite to begin anew"
            )
        self.seed = lines[0]["seed"]  # type: ignore[index]
        for line in lines[1:]:
            if line is not None and type(line.get("row")) is int and "result" in line:
                self.results[line["row"]] = line["result"]
        os.ftruncate(self._file.fileno(), len(whole))
        return True

    def missing(self, rows: int) -> list[int]:
        """The numbers below `rows` without a result, rising."""
        return [row for row in range(rows) if row not in self.results]

    def add(self, row: int, result: Any) -> None:
        """Keep a row's result, which JSON can hold. OSError naming the file, e.g. for a full disk:
        what was added before stays.
        """
        if self.path is not None:
            self._write({"row": row, "result": result})
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()
        self.results[row] = result

    def _write(self, line: Mapping[str, Any]) -> None:
        body = json.dumps(line, ensure_ascii=False)[:-1].encode("utf-8", "surrogatepass")
        left = body + b', "crc32": "%08x"}\n' % zlib.crc32(body)
        try:
            while left:
                left = left[os.write(self._file.fileno(), left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error

    def _sync(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from error
        self._synced = time.monotonic()

    def remove(self) -> None:
        """Remove the file: its results are elsewhere by now."""
        if self.path is not None and same_file(Path(self.path), self._file):
            os.unlink(self.path)
            self._removed = True

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path is None:
            return
        try:
            if not self.results:  # nothing is lost with it
                self.remove()
            if not self._removed:
                with suppress(OSError):  # a full disk
                    self._write({"process": None})
                self._sync()
        finally:
            self._file.close()


def _take(path: str) -> tuple[Descriptor, bytes]:
    """The open, locked file `path`, made where there is none, and what is in it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        file = Descriptor(path, flags)
        try:
            check_regular(path, os.fstat(file.fileno()).st_mode)
            taken = _lock(file)
            with open(file.fileno(), "rb", closefd=False) as reader:
                reader.seek(0)
                data = reader.read()
            writer = None if taken else _last_process(data)
            if taken is False or writer is not None and may_live(writer):
                raise OSError(
                    errno.EBUSY,
                    f"{named_process(writer)} writes this journal: wait until it ends, or give "
                    "another output",
                    path,
                )
            if same_file(Path(path), file):  # not removed in between by a job that ended
                return file, data
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: Descriptor) -> bool | None:
    """Whether the lock was free; None on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _last_process(data: bytes) -> dict[str, Any] | None:
    """Who wrote the last lines; None where that is not known, or it has ended in peace."""
    found = [line["process"] for line in _lines(data) if line is not None and "process" in line]
    return found[-1] if found and isinstance(found[-1], dict) else None


def _lines(data: bytes) -> Iterator[dict[str, Any] | None]:
    """The objects of whole lines, without their sums; None for a damaged one."""
    for line in data.split(b"\n")[:-1]:
        found = _LINE.fullmatch(line)
        if found is None or zlib.crc32(found[1]) != int(found[2], 16):
            yield None
        else:
            yield json.loads(found[1] + b"}")


def _what_differs(first: Mapping[str, Any] | None, job: Mapping[str, Any]) -> str:
    """What keeps a job from going on in a journal with this first line; "" for nothing."""
    if first is None or "journal" not in first:
        return "its first line is damaged, or it is no journal of a job"
    if first["journal"] != FORMAT:
        return f"is a journal of format {first['journal']!r}, expected {FORMAT}"
    if not isinstance(first.get("job"), dict) or type(first.get("seed")) is not int:
        return "its first line does not say what the job is"
    parts = [
        _difference(name, first["job"].get(name), job.get(name))
        for name in dict.fromkeys([*job, *first["job"]])
        if first["job"].get(name) != job.get(name)
    ]
    if not parts:
        return ""
    return f"is the journal of another job: {'; '.join(parts)}"


def _difference(name: str, there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [k for k in dict.fromkeys([*there, *here]) if there.get(k) != here.get(k)]
        return f"{name} differs ({', '.join(_pair(k, there.get(k), here.get(k)) for k in keys)})"
    if isinstance(there, dict) or isinstance(here, dict):
        return f"{name} differs ({'none' if there is None else 'one'} there, " + (
            "none here)" if here is None else "one here)"
        )
    return f"{name} differs ({there!r} there, {here!r} here)"


def _pair(key: str, there: Any, here: Any) -> str:
    digests = any(isinstance(v, str) and v.startswith(_SUM) for v in (there, here))
    return key if digests else f"{key}: {there!r} there, {here!r} here"


# What a job is: sums of what it reads

_SUM = "sha256:"
_WHOLE = 64 << 20  # bytes; of a larger file ..
_BLOCK, _BLOCKS = 4096, 1024  # .. so many blocks, spread evenly, are read


def digest(data: bytes) -> str:
    """The SHA-256 of data, cut to 128 bits."""
    return _SUM + hashlib.sha256(data).hexdigest()[:32]


def digests(folder: str | os.PathLike, names: re.Pattern[str]) -> dict[str, str]:
    """name -> digest of the files in `folder` whose whole names the pattern matches. Of a file of
    more than 64 MiB it is that of its size and 1,024 blocks, which other weights differ in.
    """
    found = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not names.fullmatch(name) or not os.path.isfile(path):
            continue
        with open(path, "rb", opener=regular) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _WHOLE:
                found[name] = digest(file.read())
                continue
            step = (size - _BLOCK) / (_BLOCKS - 1)
            blocks = (os.pread(file.fileno(), _BLOCK, int(i * step)) for i in range(_BLOCKS))
            found[name] = digest(b"%d " % size + b"".join(blocks))
    return found
