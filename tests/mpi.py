"""Starts programs of several ranks for tests, by the mpiexec beside this Python or in PATH."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from glmlora import _core

TESTS = Path(__file__).resolve().parent
PATHS = [str(TESTS), str(Path(_core.__file__).resolve().parent.parent)]  # the build under test
BESIDE = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(
    not MPIEXEC or importlib.util.find_spec("mpi4py") is None,
    reason="several ranks need mpi4py and mpiexec: pip install mpi4py mpich",
)
# Open MPI starts as many ranks as there are cores, and none for root, unless it is told.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMP_NUM_THREADS": "1",
}
# Runs of training.run, one after another, and what each of them gave, as JSON.
RUNS = """
import json, sys
sys.path[:0] = {paths!r}
import training
from glmlora.training.ranks import world
given = []
for model, out, data, settings in json.loads({runs!r}):
    result = training.run(model, out, data, **settings)
    given.append([training.losses(result), result.log_history])
if world().rank == 0:
    open({answer!r}, "w").write(json.dumps(given))
"""


def rank_here() -> str | None:
    """The number of this process among those that mpiexec has started."""
    return os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))


class Launched(subprocess.Popen):
    """A program of several ranks, which all have `mark` in their environment."""

    mark: bytes


def start(n: int, words: Sequence[str], **env: str) -> Launched:
    """`words` in n processes, as a group of their own."""
    assert MPIEXEC
    env["GLMLORA_TEST"] = uuid.uuid4().hex
    process = Launched(
        [MPIEXEC, "-n", str(n), *words],
        env=os.environ | ENVIRONMENT | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    process.mark = f"GLMLORA_TEST={env['GLMLORA_TEST']}".encode()
    return process


def ranks_of(process: Launched) -> dict[int, int]:
    """Process numbers of the ranks of `glmlora train`, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        ranks = [x for x in environ if x.startswith((b"PMI_RANK=", b"OMPI_COMM_WORLD_RANK="))]
        if ranks and b"glmlora\0train" in command and process.mark in environ:
            found[int(ranks[0].partition(b"=")[2])] = int(folder.name)
    return found


def train_together(n: int, place: Path, runs: Sequence[Any], **env: str) -> list[Any]:
    """For each (model, output_dir, data, settings) of `training.run`: what the updates were, and
    the log.
    """
    answer = place / f"ranks-{n}.json"
    text = json.dumps([[str(model), str(out), data, more] for model, out, data, more in runs])
    code = RUNS.format(paths=PATHS, runs=text, answer=str(answer))
    process = start(n, [sys.executable, "-c", code], **env)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said[-4000:]
    return json.loads(answer.read_text())
