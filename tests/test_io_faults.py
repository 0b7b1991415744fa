"""Whatever fails in a save, and wherever it is killed: what stood there before is whole, nothing is
left behind, and the error says which file and why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("gcc") or shutil.which("g++")
pytestmark = pytest.mark.skipif(
    not COMPILER or "GLMLORA_SANITIZED" in os.environ,
    reason="faults are loaded before everything else: that needs a compiler and a plain build",
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "io_faults.so"
    source = ROOT / "tests" / "io_faults.c"
    flags = ["-O1", "-shared", "-fPIC", "-o", path, source, "-ldl"]
    subprocess.run([COMPILER, *flags], check=True)
    return path


def check(library, place, scenario, stride):
    script = ROOT / "tests" / "io_faults.py"
    words = [sys.executable, script, library, place, scenario, str(stride)]
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    *wrong, last = done.stdout.splitlines() or [""]
    assert done.returncode == 0, done.stderr[-3000:]
    assert not wrong and " 0 faults" not in last and "faults over" in last, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("scenario", "stride"),
    [("File", 1), ("Directory", 8), ("Shards", 9), ("OneFile", 7), ("Adapter", 8), ("Model", 23),
     ("Run", 83)],
)  # fmt: skip
def test_some_calls_of_a_save_fail(library, tmp_path, scenario, stride):
    check(library, tmp_path, scenario, stride)


@pytest.mark.deep
@pytest.mark.parametrize("scenario", ["Directory", "Shards", "OneFile", "Adapter", "Model", "Run"])
def test_every_call_of_a_save_fails(library, tmp_path, scenario):
    check(library, tmp_path, scenario, 1)
