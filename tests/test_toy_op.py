"""An op with its gradient is written in seven places: one is added to a copy of the project, and
what tests every op tests it there, on the cpu, in the plan and on the emulator.

`make test-deep` builds the copy; `make test` only counts the places."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_op import PLACES

ROOT = Path(__file__).resolve().parent.parent
# what is made of ops.h, and what takes its names from the launches
LISTS = ("csrc/backend.h", "csrc/cpu/cpu.c", "csrc/cpu/kernels.h", "csrc/cpu/kernels_tmpl.h")
LISTS += ("csrc/plan/plan.c", "csrc/python/module.c", "cuda/device.h", "cuda/device.c")
LISTS += ("cuda/mutate.py", "cuda/budget.py", "glmlora/tools/optable.py")


def insert(root, places):
    """Each text before the one line that begins so."""
    for name, insertions in places.items():
        text = (root / name).read_text()
        for line, added in insertions:
            assert text.count(f"\n{line}") == 1, f"{name}: {line}"
            text = text.replace(f"\n{line}", f"\n{added}{line}")
        (root / name).write_text(text)


def test_an_op_is_written_in_seven_places(tmp_path):
    for name in PLACES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    insert(tmp_path, PLACES)  # they are still there
    assert sum(map(len, PLACES.values())) <= 7
    for name in LISTS:  # an op of the same kind is not named there either
        assert "tanh_forward" not in (ROOT / name).read_text(), name


@pytest.mark.deep
@pytest.mark.skipif("GLMLORA_SANITIZED" in os.environ, reason="a plain build is tested")
def test_such_an_op_works(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "cuda", "glmlora", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path / name)
    insert(tmp_path, PLACES)

    def run(*words, **env):
        env = os.environ | {"PYTHONPATH": str(tmp_path), "OUT": str(tmp_path / "cuda-build")} | env
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    run("setup.py", "-q", "build_ext", "--inplace")
    scale = ["-m", "pytest", "-k", "scale or every_op", "tests/test_ops.py"]
    assert " passed" in run(*scale, "tests/test_selftest.py", GLMLORA_CUDA_LIBRARY="")
    planned = """
        import numpy as np
        from glmlora.tools import optable
        op, x = optable.Ops("plan:cuda").scale_forward, np.zeros(5, np.float32)
        op(x, x, 5, 0.3)
    """
    run("-c", "\n".join(line.strip() for line in planned.splitlines()))
    if shutil.which("g++"):
        library = run("cuda/build.py", "emu").split()[-1]
        words = ["-m", "pytest", "-k", "scale", "tests/test_ops.py", "tests/test_cuda.py"]
        assert " passed" in run(*words, GLMLORA_CUDA_LIBRARY=library)
