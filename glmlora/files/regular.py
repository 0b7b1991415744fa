"""Only regular files are read: one would wait for a FIFO, a terminal or a device for ever."""

from __future__ import annotations

import os
import stat

_KINDS = (
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def check_regular(path: str | os.PathLike, mode: int) -> None:
    """Raise unless `mode` (st_mode) is that of a regular file: IsADirectoryError for a directory,
    ValueError naming `path` and what it is for everything else.
    """
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path}: is a directory, expected a file")
    found = next((name for is_kind, name in _KINDS if is_kind(mode)), "no file")
    raise ValueError(f"{path}: is {found}, expected a regular file")


def regular(path: str, flags: int) -> int:
    """An opener for open() that takes regular files only, and never waits:

        open(path, "rb", opener=regular)

    A file that is to be made need not be there. Raises IsADirectoryError, ValueError as
    `check_regular`, OSError as os.open() does.
    """
    # Before it is opened: opening a device may already act on it.
    if not flags & os.O_CREAT or os.path.exists(path):
        check_regular(path, os.stat(path).st_mode)
    # It may be another file by now. Without O_NONBLOCK, opening a FIFO waits for a writer.
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY, 0o666)
    try:
        check_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_bytes(path: str | os.PathLike) -> bytes:
    """The whole content of a regular file. Raises as `regular`."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


def read_text(path: str | os.PathLike, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The whole text of a regular file. Raises as `regular`, and UnicodeDecodeError."""
    with open(path, encoding=encoding, errors=errors, opener=regular) as file:
        return file.read()
