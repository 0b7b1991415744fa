"""Saves under faults: run by test_io_faults.py with io_faults.c loaded before everything else.

    io_faults.py LIBRARY FOLDER SCENARIO STRIDE

Every STRIDE-th call that changes something below the folder fails (the disk is full, the device has
an error) or is where the process is killed, each in a process of its own.
Prints what went wrong, and then how many calls were tried; nothing else.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import training

import glmlora
from glmlora.files.checkpoint import atomic_directory, load_checkpoint, save_sharded, write_json
from glmlora.files.owner import NAME
from glmlora.files.staging import remove_litter

FAULTS = {"full": errno.ENOSPC, "broken": errno.EIO, "killed": 0}
TEMPORARY = re.compile(r"\.\d+-[0-9a-f]{12}\.tmp")


class Scenario:
    """before(): what stands in the folder; save(): what is done under faults; parts: patterns of
    paths that belong together, which are all of the old state or all of the new one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    parts: tuple[str, ...] = (".*",)

    def before(self) -> None: ...

    def save(self) -> None: ...

    def after(self) -> None:
        """What a next run does; raises where it cannot."""
        remove_litter(self.folder)


class File(Scenario):
    parts = ("a.json",)

    def before(self) -> None:
        write_json(self.folder / "a.json", ["old"] * 50)

    def save(self) -> None:
        write_json(self.folder / "a.json", ["new"] * 100)


class Directory(Scenario):
    def fill(self, text: str, n: int) -> None:
        with atomic_directory(self.folder / "checkpoint-1") as new:
            for i in range(n):
                write_json(new / f"{i}.json", text)

    def before(self) -> None:
        self.fill("old", 3)

    def save(self) -> None:
        self.fill("new", 2)


class Shards(Scenario):
    """More shards, then fewer, then one file."""

    def before(self) -> None:
        save_sharded(self.folder, {f"t{i}": np.zeros((4, 4), "f4") for i in range(6)}, 130)

    def save(self) -> None:
        save_sharded(self.folder, {f"t{i}": np.ones((4, 4), "f4") for i in range(4)}, 130)

    def after(self) -> None:
        super().after()
        values = {float(t.numpy().flat[0]) for t in load_checkpoint(self.folder).values()}
        assert len(values) == 1, "a mixture of two saves"


class OneFile(Shards):
    def save(self) -> None:
        save_sharded(self.folder, {f"t{i}": np.ones((4, 4), "f4") for i in range(4)})


class Adapter(Scenario):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        path = training.model_dir(folder.parent)
        self.models = [
            glmlora.get_peft_model(
                glmlora.AutoModel.from_pretrained(path), glmlora.LoraConfig(r=r, lora_alpha=r * 2)
            )
            for r in (2, 4)
        ]

    def before(self) -> None:
        self.models[0].save_pretrained(self.folder)

    def save(self) -> None:
        self.models[1].save_pretrained(self.folder)


class Model(Scenario):
    """A whole model: over itself with other weights."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.models = []
        for seed in (0, 1):
            (folder.parent / str(seed)).mkdir()
            path = training.model_dir(folder.parent / str(seed), seed=seed)
            self.models.append(glmlora.AutoModel.from_pretrained(path))

    def before(self) -> None:
        self.models[0].save_pretrained(self.folder, max_shard_size="60KB")

    def save(self) -> None:
        self.models[1].save_pretrained(self.folder, max_shard_size="60KB")


class Run(Scenario):
    """A whole training over an older one in the same folder: a next run goes on from its newest
    checkpoint, and comes to the same end."""

    parts = ("checkpoint-1/.*", "checkpoint-2/.*")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = training.model_dir(folder.parent)
        self.train(folder.parent / "whole")
        self.whole = training.adapter(folder.parent / "whole")

    def train(self, folder: Path, **settings: object) -> None:
        sys.stdout.flush()
        out, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        try:
            training.run(self.model, folder, max_steps=2, save_steps=1, **settings)
        finally:
            sys.stdout.flush()
            os.dup2(out, 1)
            os.close(out)
            os.close(null)

    def before(self) -> None:
        self.train(self.folder)

    def save(self) -> None:
        self.train(self.folder)

    def after(self) -> None:
        super().after()
        self.train(self.folder, resume_from_checkpoint="last")
        assert training.adapter(self.folder) == self.whole, "the resumed run came to another end"


SCENARIOS = {c.__name__: c for c in (File, Directory, Shards, OneFile, Adapter, Model, Run)}


def content(folder: Path) -> dict[str, bytes]:
    """Files that count: not times, nor who owned the folder."""
    times = re.compile(r".*(_log\.jsonl|_results\.json|_state\.json)")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != NAME:
            found[name] = b"" if times.fullmatch(name) else path.read_bytes()
    return found


def in_child(function: Callable[[], None], folder: Path) -> tuple[int, str]:
    """(exit status, what is wrong with its error); 0: it ended well, 3: with an OSError."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, text = 0, ""
        try:
            function()
        except OSError as error:
            status = 3
            if str(folder) not in str(error) or TEMPORARY.search(str(error)):
                text = f"names no file of the user's: {error}"
            if error.errno is None or os.strerror(error.errno) not in str(error):
                text = f"does not say why: {error}"
        except BaseException as error:
            status, text = 4, f"{type(error).__name__}: {error}"
        os.write(write, text.encode())
        os._exit(status)
    os.close(write)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(read, "rb") as pipe:
        return status, pipe.read().decode()


def belongs_to(state: dict[str, bytes], part: str) -> dict[str, bytes]:
    return {name: data for name, data in state.items() if re.fullmatch(part, name)}


def check(scenario: Scenario, old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    """What is wrong with the folder after a fault."""
    wrong = []
    remove_litter(scenario.folder)
    now = content(scenario.folder)
    for part in scenario.parts:
        found = belongs_to(now, part)
        if found not in (belongs_to(old, part), belongs_to(new, part)):
            wrong.append(f"{part}: neither the old nor the new state")
    wrong += [f"{name} is left" for name in now if TEMPORARY.search(name)]
    try:
        scenario.after()
    except Exception as error:
        wrong.append(f"what comes next: {type(error).__name__}: {error}")
    return wrong


def main(library: str, place: str, name: str, stride: str) -> None:
    warnings.simplefilter("ignore")
    faults = ctypes.CDLL(library)
    folder = Path(place, "folder")
    folder.mkdir()
    scenario = SCENARIOS[name](folder)

    def fresh() -> dict[str, bytes]:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        scenario.before()
        return content(folder)

    old = fresh()
    faults.io_faults_set(str(folder).encode(), 0, 0)
    scenario.save()
    calls, new = faults.io_faults_seen(), content(folder)
    faults.io_faults_set(b"", 0, 0)
    tried = 0
    for at in range(int(stride) // 2 + 1, calls + 1, int(stride)):
        for fault, code in FAULTS.items():
            if fresh() != old:
                print(f"{name}: the old state is not the same twice")

            def work(at: int = at, code: int = code) -> None:
                faults.io_faults_set(str(folder).encode(), at, code)
                scenario.save()

            status, text = in_child(work, folder)
            expected = (-signal.SIGKILL,) if fault == "killed" else (0, 3)
            wrong = check(scenario, old, new) + ([text] if text else [])
            if status not in expected:
                wrong.append(f"ended with {status}")
            for line in wrong:
                print(f"{name}: {fault} at call {at} of {calls}: {line}")
            tried += 1
    print(f"{name}: {tried} faults over {calls} calls")


if __name__ == "__main__":
    main(*sys.argv[1:])
