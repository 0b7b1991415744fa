"""A folder has one owner: temporary names belong to a living process, or the next removes them."""

import errno
import gc
import json
import os
import signal
import socket
import sys
from contextlib import contextmanager

import numpy as np
import pytest
from training import model_dir, run

import glmlora
from glmlora.files import owner, staging
from glmlora.files.checkpoint import (
    atomic_directory,
    atomic_file,
    load_checkpoint,
    save_sharded,
    write_text,
)
from glmlora.files.owner import NAME, owned
from glmlora.files.regular import read_text
from glmlora.files.staging import remove_litter, remove_tree


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


@pytest.mark.parametrize("write", [directory, shards])
def test_killed_in_the_middle_of_a_write(tmp_path, write):
    """At every rename: the next writer finds the old state or the new one, whole, and cleans up."""
    write(tmp_path, "old")
    old, seen = content(tmp_path), set()
    for call in range(1, 40):

        def die(call=call):
            kill_at("rename", call)
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


# Owners


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("base"))


@contextmanager
def owning_child(folder):
    """A process that owns `folder` until the block ends or kills it: its number."""
    told, tell = os.pipe()
    waits, goes_on = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(goes_on)
        with owned(folder):
            os.write(tell, b".")
            os.read(waits, 1)
        os._exit(0)
    os.read(told, 1)
    os.close(waits)
    try:
        yield pid
    finally:
        os.close(goes_on)
        os.waitpid(pid, 0)
        os.close(told)
        os.close(tell)


def test_a_second_run_in_a_folder_is_refused(tiny_model, tmp_path):
    with owning_child(tmp_path) as pid:
        says = (
            rf"process {pid} on {socket.gethostname()} \(since .*works in this folder.*{tmp_path}"
        )
        with pytest.raises(OSError, match=says) as caught:
            run(tiny_model, tmp_path, max_steps=1)
        assert caught.value.errno == errno.EBUSY
        run(tiny_model, tmp_path / "other", max_steps=1)
    run(tiny_model, tmp_path, max_steps=1)
    assert NAME not in os.listdir(tmp_path)


def test_a_run_inside_a_run_has_a_folder_of_its_own(tiny_model, tmp_path):
    seen = []

    class Inner:
        def on_step_end(self, state):
            with pytest.raises(OSError, match=f"process {os.getpid()} .*works in this folder"):
                run(tiny_model, tmp_path, max_steps=1)
            run(tiny_model, tmp_path / "inner", max_steps=1)
            state.model.save_pretrained(tmp_path)  # of this run: allowed
            seen.append(True)

    run(tiny_model, tmp_path, max_steps=1, callbacks=[Inner()])
    assert seen and NAME not in os.listdir(tmp_path)


def test_the_folder_of_a_killed_owner_is_taken_over(tmp_path):
    with owning_child(tmp_path) as pid:
        os.kill(pid, signal.SIGKILL)
    assert NAME in os.listdir(tmp_path)
    with pytest.warns(UserWarning, match=f"process {pid} on .* taken over"), owned(tmp_path):
        assert json.loads((tmp_path / NAME).read_bytes())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_others_do_not_save_into_an_owned_folder(tiny_model, tmp_path):
    model = glmlora.AutoModel.from_pretrained(tiny_model)
    adapted = glmlora.get_peft_model(model, glmlora.LoraConfig(r=2))
    with owning_child(tmp_path) as pid:
        for save in (model.save_pretrained, adapted.save_pretrained):
            with pytest.raises(OSError, match=f"process {pid} "):
                save(tmp_path)
        assert os.listdir(tmp_path) == [NAME]
    adapted.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_forked_child_does_not_hold_its_parents_folder(tmp_path):
    ready, tell = os.pipe()
    waits, goes_on = os.pipe()
    pid = os.fork()
    if pid == 0:  # the owner, with a child that outlives it
        with owned(tmp_path):
            if os.fork() == 0:
                os.close(goes_on)
                os.write(tell, b".")
                os.read(waits, 1)
                os._exit(0)
            os.read(ready, 1)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        with pytest.warns(UserWarning, match="taken over"), owned(tmp_path):
            pass
    finally:
        for descriptor in (goes_on, waits, ready, tell):
            os.close(descriptor)


@pytest.mark.parametrize("whose", ["dead", "mine", "reused", "elsewhere", "nobody"])
def test_without_locks_the_process_itself_is_looked_for(tmp_path, monkeypatch, whose):
    def flock(descriptor, how):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    process = owner.this_process()
    named = {
        "dead": {**process, "pid": pid},
        "mine": process,
        "reused": {**process, "started": "1"},
        "elsewhere": {**process, "host": "elsewhere"},
    }
    if whose in named:
        (tmp_path / NAME).write_text(json.dumps(named[whose]))
    if whose in ("mine", "elsewhere"):
        with pytest.raises(OSError, match=f"or remove {tmp_path / NAME} if"), owned(tmp_path):
            pass
    elif whose == "nobody":
        with owned(tmp_path):
            pass
    else:
        with pytest.warns(UserWarning, match="taken over"), owned(tmp_path):
            pass
    assert (NAME in os.listdir(tmp_path)) == (whose in ("mine", "elsewhere"))


def interrupted(work, at: int) -> bool:
    """Whether `work` came to step `at` of the interpreter in glmlora/files, or in the os module
    that walks folders for it, where Ctrl-C met it.
    """
    left = at

    def trace(frame, event, arg):
        nonlocal left
        file = frame.f_code.co_filename
        if os.path.dirname(file) != os.path.dirname(owner.__file__) and file != os.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.filterwarnings("ignore:.*taken over")
def test_ctrl_c_at_every_step_leaves_no_file_open_and_no_lock(tmp_path):
    """At each of the interpreter's steps: whoever comes next finds the folder free, and whole."""

    def work():
        with owned(tmp_path):
            write_text(tmp_path / "a", "x")
            assert read_text(tmp_path / "a") == "x"
            with atomic_directory(tmp_path / "b") as inside:
                (inside / "c").write_text("y")

    work()
    gc.collect()
    before, steps = len(os.listdir("/proc/self/fd")), 0
    while interrupted(work, steps):
        assert len(os.listdir("/proc/self/fd")) == before, f"step {steps}"
        steps += 1
    assert steps > 500
    work()
    assert content(tmp_path) == {"a": b"x", "b/c": b"y"}


def test_a_tree_is_removed_and_links_are_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x", encoding="utf-8")
    (tmp_path / "gone/a/b").mkdir(parents=True)
    (tmp_path / "gone/a/file").write_text("y", encoding="utf-8")
    (tmp_path / "gone/a/folder").symlink_to(tmp_path / "kept")
    (tmp_path / "gone/link").symlink_to(tmp_path / "kept/file")
    remove_tree(tmp_path / "gone")
    assert content(tmp_path) == {"kept/file": b"x"} and os.listdir(tmp_path) == ["kept"]
    with pytest.raises(FileNotFoundError):
        remove_tree(tmp_path / "gone")
