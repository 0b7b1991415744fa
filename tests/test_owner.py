"""A folder has one owner: temporary names belong to a living process, or the next removes them."""

import os
import signal

import numpy as np
import pytest

from glmlora.files import staging
from glmlora.files.checkpoint import (
    atomic_directory,
    atomic_file,
    load_checkpoint,
    save_sharded,
    write_json,
    write_text,
)
from glmlora.files.staging import remove_litter


def in_child(function):
    """Run in a forked process: its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(name, call):
    """The process kills itself instead of call number `call` (from 1) of os.name."""
    seen, real = [0], getattr(os, name)

    def counted(*args, **options):
        seen[0] += 1
        if seen[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(os, name, counted)


def content(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def tensors(value, n=6):
    return {f"t{i}": np.full((4, 4), value, np.float32) for i in range(n)}


def directory(folder, value):
    with atomic_directory(folder / "checkpoint-1") as new:
        write_text(new / "a", value)
        write_text(new / "b", value)


def shards(folder, value):
    save_sharded(folder, tensors(len(value), 4 + len(value)), max_shard_size=130)


def file(folder, value):
    write_json(folder / "a.json", value)


@pytest.mark.parametrize("write", [file, directory, shards])
@pytest.mark.parametrize("name", ["rename", "replace", "fsync", "unlink", "rmdir"])
def test_killed_in_the_middle_of_a_write(tmp_path, write, name):
    """At every call: the next writer finds the old state or the new one, whole, and cleans up."""
    write(tmp_path, "old")
    old, seen = content(tmp_path), set()
    for call in range(1, 40):

        def die(call=call):
            kill_at(name, call)
            write(tmp_path, "newer")

        ended = in_child(die)
        remove_litter(tmp_path)
        assert ended in (0, -signal.SIGKILL)
        if write is shards:
            values = {float(t.numpy().flat[0]) for t in load_checkpoint(tmp_path).values()}
            assert len(values) == 1
        after = content(tmp_path)
        seen.add(ended)
        assert not [n for n in after if ".tmp" in n]
        if after != old:
            write(tmp_path, "newer")
            assert after == content(tmp_path)
            write(tmp_path, "old")
        assert content(tmp_path) == old
        if ended == 0:
            return
    raise AssertionError("never written")


def test_a_living_process_keeps_its_temporary_files(tmp_path):
    told, tell = os.pipe()
    waits, goes_on = os.pipe()

    def slow():
        os.close(goes_on)
        with atomic_file(tmp_path / "a", "w") as file, atomic_directory(tmp_path / "d") as folder:
            file.write("first")
            (folder / "x").write_text("x")
            os.write(tell, b".")
            os.read(waits, 1)

    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            slow()
            status = 0
        finally:
            os._exit(status)
    os.read(told, 1)
    write_text(tmp_path / "b", "second")
    directory(tmp_path, "y")
    assert len([n for n in os.listdir(tmp_path) if n.endswith(".tmp")]) == 2
    os.close(waits)
    os.write(goes_on, b".")
    os.close(goes_on)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "checkpoint-1", "d"]


def test_only_our_names_are_removed(tmp_path):
    others = {".x.tmp", ".12-abc.tmp", "1-0123456789ab.tmp", ".1-0123456789ab.tmp.bak", ".hidden"}
    ours = {".1-0123456789ab.tmp", f".{os.getpid()}-ba9876543210.tmp"}
    for name in others | ours:
        (tmp_path / name).write_text("")
    (tmp_path / ".2-0123456789ab.tmp").mkdir()
    (tmp_path / ".3-0123456789ab.tmp").symlink_to(tmp_path / ".hidden")
    write_text(tmp_path / "a", "")
    assert set(os.listdir(tmp_path)) == others | {"a", ".3-0123456789ab.tmp"}


def test_what_somebody_put_there_since_the_kill_stays(tmp_path):
    directory(tmp_path, "old")

    def die():
        kill_at("rename", 2)  # the old one is aside, the new one not in place
        directory(tmp_path, "new")

    assert in_child(die) == -signal.SIGKILL
    assert not (tmp_path / "checkpoint-1").exists()
    (tmp_path / "checkpoint-1").mkdir()
    write_text(tmp_path / "checkpoint-1" / "mine", "")
    remove_litter(tmp_path)
    assert list(content(tmp_path)) == ["checkpoint-1/mine"]


def test_a_name_taken_for_litter_before_it_is_locked(tmp_path, monkeypatch):
    """Another process cleans up between making and locking: another name is taken."""
    real, hindered = staging.lock, []

    def lock(descriptor):
        if len(hindered) < 2:
            hindered.append(descriptor)
            remove_litter(tmp_path)
        return real(descriptor)

    monkeypatch.setattr(staging, "lock", lock)
    write_text(tmp_path / "a", "x")
    assert len(hindered) == 2 and os.listdir(tmp_path) == ["a"]
