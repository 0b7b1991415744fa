"""The CUDA sources, compiled for the host and run by the emulator: every op against the reference,
and tiny models against the cpu. In processes of their own, since the library is opened once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed: nothing is emulated"),
    pytest.mark.skipif("GLMLORA_SANITIZED" in os.environ, reason="fibers have stacks of their own"),
    pytest.mark.skipif("GLMLORA_ISA" in os.environ, reason="nothing of it depends on that"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    """libglm_cuda_emu.so of the present sources."""
    words = [sys.executable, str(ROOT / "cuda" / "build.py"), "emu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return Path(done.stdout.split()[-1])


@pytest.mark.parametrize("words", [["test_ops.py", "-k", "emu"], ["test_cuda.py"]], ids=str)
def test_on_the_emulator(library, words):
    path = str(ROOT / "tests" / words[0])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rs", path, *words[1:]],
        env=dict(os.environ, GLMLORA_CUDA_LIBRARY=str(library)),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
