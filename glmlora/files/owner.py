"""A folder has one owner at a time: two runs in one folder would each overwrite the other's files.

The owner holds a lock on a small file that says who it is. The lock ends with the process, however
that ends, so nobody has to clean up before the next run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .regular import check_regular
from .staging import remove_litter, same_file

NAME = ".glmlora-owner"
_held: dict[int, Path] = {}  # descriptors of this process, and their files


@contextmanager
def owned(folder: str | os.PathLike, shared: bool = False) -> Iterator[None]:
    """While the block runs, `folder`, which exists, is this run's alone.

    shared: also where this process owns it already, for what is saved in the middle of a run. What
    killed processes left in the folder is removed, and told. Raises OSError (EBUSY) naming the
    folder, and the process and machine that work in it.
    """
    file = Path(folder, NAME)
    if shared and any(same_file(file, descriptor) for descriptor in list(_held)):
        yield
        return
    descriptor, process = _take(file, folder), os.getpid()
    _held[descriptor] = file
    try:
        remove_litter(folder)
        yield
    finally:
        if os.getpid() == process:  # not a child that was forked in the block
            del _held[descriptor]
            with suppress(OSError):
                if same_file(file, descriptor):
                    file.unlink()
            os.close(descriptor)


def _take(file: Path, folder: str | os.PathLike) -> int:
    """A descriptor that holds the lock of `file`, in which this process is named."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            check_regular(file, os.fstat(descriptor).st_mode)
            taken = _lock(descriptor, file, folder)
            if same_file(file, descriptor):  # not removed in between by an owner that ended
                if taken is not None:
                    warnings.warn(
                        f"{os.fspath(folder)}: {_named(taken)} ended without leaving it; it is "
                        "taken over",
                        stacklevel=5,
                    )
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.filename is None and error.errno is not None:
                raise OSError(error.errno, error.strerror, str(file)) from error
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, file: Path, folder: str | os.PathLike) -> dict[str, Any] | None:
    """Take the lock; who held it before and did not leave."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _read(descriptor)
    except OSError as error:
        owner = _read(descriptor)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            advice = "wait until it ends, or give another folder"
        elif owner is not None and _may_live(owner):  # a file system without locks
            advice = f"give another folder, or remove {file} if that process has ended"
        else:
            return owner
        raise OSError(
            errno.EBUSY, f"{_named(owner)} works in this folder: {advice}", os.fspath(folder)
        ) from None


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _started(os.getpid()),
    }


def _read(descriptor: int) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # nothing yet, or somebody else's
        return None
    return owner if isinstance(owner, dict) else None


def _named(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


def _may_live(owner: dict[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:
        pass
    except (ProcessLookupError, ValueError, TypeError, KeyError, OverflowError):
        return False
    return owner.get("started") == _started(owner["pid"])


def _started(pid: int) -> str | None:
    """When a process began, in the system's own count: its number alone may be another's by now."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _forget() -> None:
    """In a forked child: the folder is its parent's, and free when that one ends."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
