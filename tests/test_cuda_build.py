"""What compilers say of the kernels, where they are installed: no warning, spill or local memory,
and the static budget. No GPU is needed. `make test-deep` runs it, in one process of pytest-xdist,
since all of it compiles into build/cuda."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from emulator import built
from wheels import install, make_wheel

pytestmark = pytest.mark.xdist_group("nvcc")
ROOT = Path(__file__).resolve().parent.parent
SPILLING = """
#include "launch.cuh"
GLM_KERNEL(1024) k_spills(float *x)
{
    float v[200];
    for (int i = 0; i < 200; i++)
        v[i] = x[i * 1024 + threadIdx.x];
    for (int i = 0; i < 200; i++)
        x[i] += v[(i * (int)x[0]) % 200];
}
"""


STUB = """
#include <string.h>
int cuDriverGetVersion(int *version) { return *version = VERSION, 0; }
int cuInit(unsigned flags) { return CODE; }
static int fails(void) { return CODE; }
int cuGetExportTable(const void **table, const void *id) { return *table = 0, CODE; }
int cuGetProcAddress_v2(const char *name, void **out, int version, unsigned long flags, int *found)
{
    *out = !strcmp(name, "cuInit") ? (void *)cuInit
         : !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
         : !strcmp(name, "cuGetExportTable") ? (void *)cuGetExportTable
         : !strcmp(name, "cuGetProcAddress") ? (void *)cuGetProcAddress_v2
         : (void *)fails;
    if (found)
        *found = 0;
    return 0;
}
int cuGetProcAddress(const char *name, void **out, int version, unsigned long flags)
{
    return cuGetProcAddress_v2(name, out, version, flags, 0);
}
"""


def build(*words, **env):
    done = subprocess.run(
        [sys.executable, str(ROOT / "cuda" / "build.py"), *words],
        env=os.environ | env, capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_occupancy_is_that_of_the_formula(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "cuda"))
    import budget

    # the programming guide's calculator: threads, registers, shared memory -> blocks at once
    assert budget.blocks_at_once("75", 256, 32, 0) == 4  # all 32 warps
    assert budget.blocks_at_once("86", 128, 189, 17408) == 2  # registers
    assert budget.blocks_at_once("86", 128, 32, 31 << 10) == 3  # shared memory
    assert budget.blocks_at_once("80", 32, 16, 0) == 32  # blocks


@pytest.mark.deep
@pytest.mark.skipif(not shutil.which("nvcc"), reason="NO nvcc: THE KERNELS ARE NOT COMPILED HERE")
def test_nvcc_gate_and_budget(tmp_path):
    status, told = build("budget")
    assert status == 0, told[-3000:]
    assert told.rstrip().endswith("within the budget")
    # the gate fails where it should: a file that spills and indexes local memory
    copy = tmp_path / "cuda"
    shutil.copytree(ROOT / "cuda", copy, ignore=shutil.ignore_patterns("*.cu", "emu"))
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (copy / "spills.cu").write_text(SPILLING)
    done = subprocess.run(
        [sys.executable, str(copy / "build.py"), "nvcc"],
        env=os.environ | {"OUT": str(tmp_path / "out"), "ARCHS": "80"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search("local memory|spill", done.stdout + done.stderr, re.I), done.stdout[-1000:]


def nvrtc_wheels():
    sys.path.insert(0, str(ROOT / "cuda"))
    try:
        import nvrtc

        return nvrtc.wheels()
    except SystemExit:
        return None
    finally:
        sys.path.remove(str(ROOT / "cuda"))


@pytest.mark.deep
@pytest.mark.skipif(nvrtc_wheels() is None, reason="NO NVRTC 12.9: ITS CUBINS ARE NOT MADE HERE")
def test_nvrtc_gate():
    status, told = build("nvrtc")
    assert status == 0, told[-3000:]
    assert told.rstrip().endswith("no warning, spill or local memory")


@pytest.fixture(scope="module")
def library():
    """The CUDA library by nvcc, for one architecture."""
    if not shutil.which("nvcc"):
        pytest.skip("NO nvcc: THE CUDA LIBRARY IS NOT BUILT HERE")
    return str(built("lib", ARCHS="80", OUT=str(ROOT / "build" / "cuda" / "sm_80")))


@pytest.mark.deep
@pytest.mark.skipif("GLMLORA_SANITIZED" in os.environ, reason="a plain build is tested")
@pytest.mark.parametrize("code, version", [(100, 13000), (999, 13000), (803, 13000), (0, 11000)])
def test_a_driver_that_fails_is_told(library, code, version, tmp_path):
    """Of a stub in place of libcuda: the CPU with a warning, and the reason."""
    (tmp_path / "stub.c").write_text(STUB)
    flags = [f"-DCODE={code}", f"-DVERSION={version}", "-w", "-shared", "-fPIC"]
    out = ["-o", str(tmp_path / "libcuda.so.1"), str(tmp_path / "stub.c")]
    subprocess.run(["gcc", *flags, *out], check=True)
    script = """
        import warnings
        from glmlora.model import device
        found = device.info("cuda")
        assert found["count"] == 0
        print(found["why"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert device.find("cuda") == "cpu"
        assert found["why"] in str(caught[0].message)
    """
    env = {"LD_LIBRARY_PATH": str(tmp_path), "GLMLORA_CUDA_LIBRARY": library}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no GPU can be used: " in done.stdout and "(error " in done.stdout


@pytest.mark.deep
@pytest.mark.skipif("GLMLORA_SANITIZED" in os.environ, reason="a plain build is tested")
def test_a_wheel_with_the_library_works_without_cuda(library, tmp_path):
    """It installs, computes on the CPU, and says why there is no GPU."""
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    assert not re.search(r"NEEDED.*(cublas|libcuda|cudart)", needed)
    wheel = make_wheel(tmp_path, GLMLORA_BUILD_CUDA=library)
    target = install(wheel, tmp_path / "site")
    assert "glmlora/libglm_cuda.so" in zipfile.ZipFile(wheel).namelist()
    code = """
        import warnings
        import numpy as np
        import glmlora
        from glmlora.model import device
        from glmlora.tools.project import tiny_directory
        assert glmlora.__file__.startswith(TARGET), glmlora.__file__
        print(device.info("cuda")["why"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = glmlora.AutoModel.from_pretrained(tiny_directory()).half().cuda()
        assert [w for w in caught if "the model stays on the CPU" in str(w.message)] or (
            model.device == "cuda:0")
        tokenizer = glmlora.AutoTokenizer.from_pretrained(tiny_directory())
        print(repr(model.chat(tokenizer, "Hello", temperature=0, max_new_tokens=4)[0]))
    """
    paths = os.pathsep.join([str(target), *(p for p in sys.path if "site-packages" in p)])
    env = {k: v for k, v in os.environ.items() if not k.startswith("GLMLORA")}
    done = subprocess.run(
        [sys.executable, "-c", f"TARGET = {str(target)!r}\n" + textwrap.dedent(code)],
        cwd=tmp_path, env=env | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no GPU can be used" in done.stdout or "cuda:0" in done.stdout
