"""Only regular files are read: one would wait for a FIFO, a terminal or a device for ever."""

from __future__ import annotations

import functools
import os
import stat

from .._core import open_checked

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


#: An opener for open() that takes regular files only, and never waits:
#:
#:     open(path, "rb", opener=regular)
#:
#: A file that is to be made need not be there. Raises IsADirectoryError, ValueError as
#: `check_regular`, OSError as os.open() does.
regular = functools.partial(open_checked, check_regular)


def read_bytes(path: str | os.PathLike) -> bytes:
    """The whole content of a regular file. Raises as `regular`."""
    with open(path, "rb", opener=regular) as file:
        return file.read()


def read_text(path: str | os.PathLike, encoding: str = "utf-8", errors: str = "strict") -> str:
    """The whole text of a regular file. Raises as `regular`, and UnicodeDecodeError."""
    with open(path, encoding=encoding, errors=errors, opener=regular) as file:
        return file.read()
