"""The CUDA sources, compiled for the host and run by the emulator: every op against the reference
and the cpu, models, golden arrays and the whole workflow. In processes of their own, since a
library is opened once. `make test-deep`: other orders of threads, the checked build, and what the
suite says to kernels that were broken on purpose."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import built

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed: nothing is emulated"),
    pytest.mark.skipif("GLMLORA_SANITIZED" in os.environ, reason="fibers have stacks of their own"),
    pytest.mark.skipif("GLMLORA_ISA" in os.environ, reason="nothing of it depends on that"),
]

OPS, CUDA, GOLDEN = ["test_ops.py"], ["test_cuda.py"], ["test_golden.py", "test_quantization.py"]
MODELS = {"GLMLORA_TEST_BACKEND": "emu"}
# A device computes in the type of 16-bit weights, the cpu does not; two families stand for all but
# for what a forward and a backward show of others: rotary base and eps, parts of a layer apart. A
# third has ops of its own: a model of 2 layers goes through them, where its fixture has 28.
ALL = "not other_storage"
FEW = f"{ALL} and not (32k or hf or edge or 32b or glm4 and (greedy or training) or first_release"
FEW += " or v1 and (greedy or training or gradients or ptuning))"
TWO_WAY = "methods or quantized or takes_its_context or adapter or beams or labels"

# name: (build, words of pytest, environment)
PARTS = {
    "ops": ("emu", [*OPS, "-k", "emu"], {}),
    "cuda": ("emu", [*CUDA, "-k", "not workflow"], {}),
    "golden": ("emu", [*GOLDEN, "-k", FEW], MODELS),
    "two-way": ("emu", ["test_chatglm_6b.py", "-k", TWO_WAY], MODELS),
    "workflow": ("emu", [*CUDA, "-k", "workflow"], {}),
}
DEEP = {
    "other orders": ("emu", [*OPS, *CUDA, "-k", "emu", "-m", "deep"], {}),
    "golden of all families": ("emu", [*GOLDEN, "-k", ALL], MODELS),
    "checked ops": ("emu-checked", [*OPS, "-k", "emu"], {}),
    "checked": ("emu-checked", [*CUDA, "-k", "not workflow", "-m", "deep or not deep"], {}),
}


def run(words, environment):
    """Output of a command, or what it failed with."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=7200,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.parametrize(
    "build, words, environment",
    [pytest.param(*part, id=name) for name, part in PARTS.items()]
    + [pytest.param(*part, id=name, marks=pytest.mark.deep) for name, part in DEEP.items()],
)
def test_on_the_emulator(build, words, environment):
    words = [ROOT / "tests" / w if w.endswith(".py") else w for w in words]
    environment = {**environment, "GLMLORA_CUDA_LIBRARY": str(built(build))}
    assert " passed" in run(["-m", "pytest", "-x", "-rs", *words], environment)


@pytest.mark.deep
def test_broken_kernels_are_noticed():
    """Barriers that are gone, bounds that are wider by one: all of them."""
    assert "mutants noticed" in run([ROOT / "cuda" / "mutate.py"], {})
