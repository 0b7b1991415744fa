"""Files written whole or not at all, JSON with errors that say where, and files mapped read-only.

Every writer goes to a temporary name beside its target, is synced, and is then renamed over it: a
reader sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from .. import _core
from .regular import check_regular, read_bytes, regular
from .staging import remove_litter, staged, sync_directory, temporary

LFS_POINTER = b"version https://git-lfs"
LFS_POINTER_MAX = 1024  # bytes; pointers have about 130


def _named(error: OSError, path: str | os.PathLike, place: Path | None = None) -> OSError:
    """The same error with the path in it: a failed write (disk full) does not know its file, and a
    failed rename only the temporary `place`.
    """
    if error.filename not in (None, str(place)) or error.errno is None:
        return error
    return OSError(error.errno, os.strerror(error.errno), os.fspath(path))


@contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that takes its name only when the block ends without an error.

    `mode` is "wb" or "w" (UTF-8, newlines as given). A symbolic link is followed. On any error,
    Ctrl-C included, the temporary file is removed and what stood under `path` stays. Raises
    OSError naming `path`, ValueError where a device or a FIFO stands there.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode: expected 'wb' or 'w', got {mode!r}")
    target = Path(os.path.realpath(path))
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if target.exists():
        check_regular(path, target.stat().st_mode)  # a rename would replace /dev/null for everybody
    remove_litter(target.parent)
    try:
        place, held = temporary(target.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    file = open(held.fileno(), mode, closefd=False, **text)
    try:
        yield file
        file.flush()
        os.fsync(held.fileno())
        os.replace(place, target)
        file.close()
        held.close()
    except BaseException as error:
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            held.close()
        with suppress(OSError):
            os.unlink(place)
        if isinstance(error, OSError):
            raise _named(error, path, place) from error
        raise
    sync_directory(target.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory to fill that takes the name `path` only when the block ends without an error.

    An existing directory under `path` is replaced as a whole: moved aside, and removed once the new
    one is in place. On an error the new one is removed and what stood under `path` stays; after a
    kill, whoever writes beside it next puts it back. Raises OSError naming the path.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{path}: is a file, expected a directory or nothing")
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged(target.parent) as beside:
        new = beside / target.name
        try:
            new.mkdir()
            yield new
        except OSError as error:
            raise _named(error, path) from error


def check_new_directory(path: str | os.PathLike) -> None:
    """FileExistsError unless nothing is there, or an empty directory."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise FileExistsError(f"{path} is a file, expected a new directory")
    if os.path.exists(path) and os.listdir(path):
        raise FileExistsError(f"{path} exists and is not empty, expected a new directory")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(path, "w") as file:
        file.write(text)


def write_json(
    path: str | os.PathLike, value: Any, indent: int | None = 2, sort_keys: bool = True
) -> None:
    """Write `value` as JSON text in UTF-8 with a newline at its end, atomically.

    Raises TypeError for what JSON cannot hold, before any file is touched.
    """
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    write_text(path, text + "\n")


_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON decoder's pairs. ValueError for a key with two values: one is lost."""
    result = dict(pairs)
    if len(result) < len(pairs):
        for name, value in pairs:
            if result[name] != value:
                raise ValueError(f"key {name!r} stands twice in an object, with different values")
    return result


def read_json(path: str | os.PathLike, expect: type | None = None, unique: bool = False) -> Any:
    """Read one JSON value from a UTF-8 file, with or without a byte order mark.

    `expect` is dict or list: what the outermost value must be. unique: keys may not stand twice
    with different values, as in files that a person writes. Raises ValueError naming the file
    and the byte of text that is not UTF-8, the line and column of text that is not JSON, or the
    kind of value found.
    """
    data = read_bytes(path)
    refuse_lfs_pointer(path, data)
    mark = 3 if data.startswith(b"\xef\xbb\xbf") else 0
    try:
        hook = no_key_twice if unique else None
        value = json.loads(data[mark:].decode("utf-8"), object_pairs_hook=hook)
    except UnicodeDecodeError as error:
        offset = mark + error.start
        byte = data[offset]
        raise ValueError(f"{path}: not UTF-8: byte 0x{byte:02x} at offset {offset}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{path}: not JSON: {error.msg} at {where}") from None
    except RecursionError:
        raise ValueError(f"{path}: JSON nested too deeply") from None
    except ValueError as error:  # a key twice, or a number with thousands of digits
        raise ValueError(f"{path}: not JSON: {error}") from None
    if expect is not None and not isinstance(value, expect):
        found = _JSON_NAMES[type(value)]
        raise ValueError(
            f"{path}: expected {_JSON_NAMES[expect]} as the outermost JSON value, got {found}"
        )
    return value


def refuse_lfs_pointer(path: str | os.PathLike, data: bytes) -> None:
    """Raise ValueError if `data`, the whole small file, is a git-lfs pointer that was never
    downloaded.
    """
    if len(data) > LFS_POINTER_MAX or not data.startswith(LFS_POINTER):
        return
    sizes = [
        line[5:] for line in data.split(b"\n") if line.startswith(b"size ") and line[5:].isdigit()
    ]
    size = f" of {sizes[0].decode()[:20]} bytes" if sizes else ""
    raise ValueError(
        f"{path}: is a git-lfs pointer ({len(data)} bytes), not the file itself{size}; "
        f"run `git lfs install` and `git lfs pull` in {Path(path).parent}, or download the "
        "file again"
    )


def map_file(path: str | os.PathLike) -> np.ndarray:
    """Map a regular file: a read-only uint8 array (bytes,) that keeps the mapping alive. Nothing
    is read yet; what NumPy reads of it stands within `mapped.guarded`. Where Linux has them, huge
    pages are asked for: a file that is not in memory yet is then read in pieces of 2 MB, five times
    as fast, and read from memory a third faster.

    Raises ValueError for an empty file, something that is not a file, or a git-lfs pointer;
    OSError as open() does.
    """
    with open(path, "rb", opener=regular) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError(f"{path}: file is empty")
        if size <= LFS_POINTER_MAX:
            refuse_lfs_pointer(path, file.read())
        return _core.map_file(file.fileno(), path)
