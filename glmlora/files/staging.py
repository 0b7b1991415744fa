"""Temporary names: where files are written before they take their place, and what a killed process
leaves there.

A run makes `.PID-RANDOM.tmp`, a file or a folder, beside what it writes, and holds a lock on it as
long as it lives. So whoever writes into that folder later sees which of these names belong to
nobody, removes them, and undoes what a process was killed in the middle of.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from .._core import Descriptor

_NAME = re.compile(r"\.\d+-[0-9a-f]{12}\.tmp")
#: In a temporary folder: what is to take its place; what stood there; name -> inode of the former.
_NEW, _OLD, _OURS = "new", "old", "new.json"


def lock(file: Descriptor) -> bool:
    """Take the lock of an open file or folder: False where another one has it. It ends with the
    process, however that ends. A file system without locks (errors other than that) gives none,
    and True.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def temporary(folder: Path, directory: bool = False) -> tuple[Path, Descriptor]:
    """A new, locked file or directory in `folder`: its path, and the open file, for writing where
    it is no directory. Raises OSError naming it.
    """
    while True:
        path = folder / f".{os.getpid()}-{os.urandom(6).hex()}.tmp"
        if directory:
            path.mkdir()
        try:
            flags = os.O_DIRECTORY if directory else os.O_RDWR | os.O_CREAT | os.O_EXCL
            file = Descriptor(path, flags)
        except FileNotFoundError:
            if directory and folder.is_dir():  # taken for litter before it was locked
                continue
            raise
        except BaseException:
            with suppress(OSError):
                path.rmdir()
            raise
        if lock(file) and same_file(path, file):
            return path, file
        file.close()


def same_file(path: Path, file: Descriptor) -> bool:
    """Whether an open file is what stands under `path` (still, or by now)."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def remove_tree(folder: str | os.PathLike) -> None:
    """Remove a folder and all below it; links are not followed. Raises OSError naming what stays.

    shutil.rmtree holds folders open by numbers, one of which Ctrl-C may lose: see `Descriptor`.
    """
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(path, name))
        for name in folders:
            below = os.path.join(path, name)
            if os.path.islink(below):
                os.unlink(below)
            else:
                os.rmdir(below)
    os.rmdir(folder)


def remove_litter(folder: str | os.PathLike) -> None:
    """Remove from `folder` the temporary names of processes that no longer live, after putting
    back what they had moved aside. What cannot be read or removed stays.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
    except OSError:
        return
    for name in names:
        path = Path(folder, name)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with suppress(OSError), Descriptor(path, flags) as file:
            # Refused where it is held. Where there are no locks nobody knows whose it is.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not same_file(path, file):
                continue
            if path.is_dir():
                _put_back(path)
                remove_tree(path)
            else:
                path.unlink()


@contextmanager
def staged(folder: Path, stale: re.Pattern[str] | None = None) -> Iterator[Path]:
    """An empty directory beside the files of `folder`; what the block writes there takes its place
    in `folder` at the block's end, all of it or nothing.

    Of several files, a reader meanwhile finds none of those that are replaced; a process that is
    killed then leaves the old ones to `remove_litter`, and an error puts them back. stale: names of
    files that are removed if the block did not write them. Raises OSError naming the file.
    """
    remove_litter(folder)
    try:
        place, held = temporary(folder, directory=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    try:
        new = place / _NEW
        new.mkdir()
        yield new
        _sync(new)
        names = sorted(os.listdir(new))
        aside = [n for n in names if os.path.lexists(folder / n)]
        if stale is not None:
            aside += [n for n in os.listdir(folder) if stale.fullmatch(n) and n not in names]
        try:
            _exchange(folder, place, names, sorted(aside))
        except BaseException:
            _put_back(place)
            raise
        sync_directory(folder)
    except OSError as error:
        if error.errno is None:
            raise
        # Named by its place, not by the one it is written in; a failed write has no name at all.
        named = Path(folder if error.filename is None else error.filename)
        if place in named.parents:
            named = folder.joinpath(*named.relative_to(place).parts[1:])
        raise OSError(error.errno, error.strerror, str(named)) from error
    finally:
        with suppress(OSError):
            remove_tree(place)
        held.close()


def _exchange(folder: Path, place: Path, names: Sequence[str], aside: Sequence[str]) -> None:
    new, old = place / _NEW, place / _OLD
    if len(names) == 1 and aside == names and (new / names[0]).is_file():
        os.replace(new / names[0], folder / names[0])
        return
    if aside:
        ours = {name: os.lstat(new / name).st_ino for name in names}
        (place / _OURS).write_text(json.dumps(ours), encoding="utf-8")
        old.mkdir()
        for name in aside:
            os.rename(folder / name, old / name)
    for name in names:
        os.rename(new / name, folder / name)
    if aside:
        os.rename(old, place / "done")  # from here on nothing is put back


def _put_back(place: Path) -> None:
    """Undo an exchange that did not come to its end: out with the new ones, in with the old. A file
    that somebody else has put there since stays.
    """
    new, old, folder = place / _NEW, place / _OLD, place.parent
    if not old.is_dir():
        return
    for name, number in json.loads((place / _OURS).read_text(encoding="utf-8")).items():
        if os.path.lexists(folder / name) and os.lstat(folder / name).st_ino == number:
            os.rename(folder / name, new / name)
    for name in os.listdir(old):
        if not os.path.lexists(folder / name):
            os.rename(old / name, folder / name)


def _sync(folder: Path) -> None:
    """Make everything below `folder` durable."""
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                with Descriptor(os.path.join(path, name), os.O_RDONLY) as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.path.join(path, name)) from error
        sync_directory(path)


def sync_directory(path: str | os.PathLike) -> None:
    """Make a rename inside `path` durable, where the file system can."""
    with suppress(OSError):
        with Descriptor(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)) as folder:
            os.fsync(folder.fileno())
