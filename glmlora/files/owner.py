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
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._core import Descriptor
from .regular import check_regular
from .staging import remove_litter, same_file

NAME = ".glmlora-owner"
_held: weakref.WeakKeyDictionary[Descriptor, Path] = weakref.WeakKeyDictionary()  # of this process


@contextmanager
def owned(folder: str | os.PathLike, shared: bool = False) -> Iterator[None]:
    """While the block runs, `folder`, which exists, is this run's alone.

    shared: also where this process owns it already, for what is saved in the middle of a run. What
    killed processes left in the folder is removed, and told. Raises OSError (EBUSY) naming the
    folder, and the process and machine that work in it.
    """
    file = Path(folder, NAME)
    if shared and any(same_file(file, held) for held in list(_held)):
        yield
        return
    held, process = _take(file, folder), os.getpid()
    try:
        _held[held] = file
        remove_litter(folder)
        yield
    finally:
        if os.getpid() == process:  # not a child that was forked in the block
            _held.pop(held, None)
            with suppress(OSError):
                if same_file(file, held):
                    file.unlink()
            held.close()


def _take(file: Path, folder: str | os.PathLike) -> Descriptor:
    """The open `file`, whose lock this process holds and in which it is named."""
    while True:
        held = Descriptor(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            check_regular(file, os.fstat(held.fileno()).st_mode)
            taken = _lock(held, file, folder)
            if same_file(file, held):  # not removed in between by an owner that ended
                if taken is not None:
                    warnings.warn(
                        f"{os.fspath(folder)}: {named_process(taken)} ended without leaving it; "
                        "it is taken over",
                        stacklevel=5,
                    )
                os.ftruncate(held.fileno(), 0)
                os.pwrite(held.fileno(), json.dumps(this_process()).encode(), 0)
                return held
        except OSError as error:
            held.close()
            if error.filename is None and error.errno is not None:
                raise OSError(error.errno, error.strerror, str(file)) from error
            raise
        except BaseException:
            held.close()  # now, not with the traceback
            raise
        held.close()


def _lock(held: Descriptor, file: Path, folder: str | os.PathLike) -> dict[str, Any] | None:
    """Take the lock; who held it before and did not leave."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _read(held)
    except OSError as error:
        owner = _read(held)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            advice = "wait until it ends, or give another folder"
        elif owner is not None and may_live(owner):  # a file system without locks
            advice = f"give another folder, or remove {file} if that process has ended"
        else:
            return owner
        raise OSError(
            errno.EBUSY, f"{named_process(owner)} works in this folder: {advice}", os.fspath(folder)
        ) from None


def this_process() -> dict[str, Any]:
    """Which process this is, as JSON."""
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "started": _started(os.getpid()),
    }


def _read(held: Descriptor) -> dict[str, Any] | None:
    try:
        owner = json.loads(os.pread(held.fileno(), 4096, 0))
    except ValueError:  # nothing yet, or somebody else's
        return None
    return owner if isinstance(owner, dict) else None


def named_process(owner: dict[str, Any] | None) -> str:
    """What `this_process` gave, for a message."""
    if owner is None:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} (since {owner.get('since')})"


def may_live(owner: dict[str, Any]) -> bool:
    """Whether what `this_process` gave may still run; True for one on another machine."""
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
    for held in list(_held):
        with suppress(OSError):
            held.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
