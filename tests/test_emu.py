"""The CUDA sources, compiled for the host and run by the emulator: every op against the reference
and the cpu, models, golden arrays and the whole workflow, and what the suite says to kernels that
were broken on purpose. In processes of their own, two at a time, since a library is opened once.

GLMLORA_DEEP=1 (make test-deep): the checked build under every seed, and every mutant."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEEP = bool(os.environ.get("GLMLORA_DEEP"))

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed: nothing is emulated"),
    pytest.mark.skipif("GLMLORA_SANITIZED" in os.environ, reason="fibers have stacks of their own"),
    pytest.mark.skipif("GLMLORA_ISA" in os.environ, reason="nothing of it depends on that"),
]

# name: (build, words of pytest, environment)
MODELS = {"GLMLORA_TEST_BACKEND": "emu"}
GOLDEN = "not other_storage"  # a device computes in the type of 16-bit weights, the cpu does not
PARTS = {
    "ops": ("emu", ["test_ops.py", "-k", "emu"], {}),
    "cpu": ("emu", ["test_cuda.py", "-k", "not workflow"], {}),
    "checked": ("emu-checked", ["test_cuda.py", "-k", "sectors or (equals and 1-emu)"], {}),
    "golden": (
        "emu",
        ["test_golden.py", "test_quantization.py", "-k", f"{GOLDEN} and not 32k and not glm4"],
        MODELS,
    ),
    "workflow": ("emu", ["test_cuda.py", "-k", "workflow"], {}),
}
if DEEP:
    PARTS["checked"] = ("emu-checked", ["test_cuda.py", "-k", "not workflow"], {})
    PARTS["checked ops"] = ("emu-checked", ["test_ops.py", "-k", "emu"], {})
    PARTS["golden"] = ("emu", ["test_golden.py", "test_quantization.py", "-k", GOLDEN], MODELS)
MUTANTS = [] if DEEP else ["--sample", "8"]


def run(words, environment):
    """Output of a command, or what it failed with."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=7200 if DEEP else 1200,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def pytest_part(library, words, environment):
    words = [ROOT / "tests" / w if w.endswith(".py") else w for w in words]
    environment = {**environment, "GLMLORA_CUDA_LIBRARY": str(library)}
    return run(["-m", "pytest", "-x", "-rs", *words], environment)


@pytest.fixture(scope="module")
def parts():
    """Everything that is to run, on its way: {name: future}."""
    build = ROOT / "cuda" / "build.py"
    libraries = {name: run([build, name], {}).split()[-1] for name in ("emu", "emu-checked")}
    with ThreadPoolExecutor(2) as pool:
        found = {"mutants": pool.submit(run, [ROOT / "cuda" / "mutate.py", *MUTANTS], {})}
        for name, (library, words, environment) in PARTS.items():
            found[name] = pool.submit(pytest_part, libraries[library], words, environment)
        yield found
        for future in found.values():
            future.cancel()


@pytest.mark.parametrize("name", PARTS)
def test_on_the_emulator(parts, name):
    assert " passed" in parts[name].result()


def test_broken_kernels_are_noticed(parts):
    """Barriers that are gone, bounds that are wider by one: all of them, or a fixed sample."""
    assert "mutants noticed" in parts["mutants"].result()
