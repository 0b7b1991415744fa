"""What an install builds where a GPU answers: nvcc, nvidia-smi and NVRTC are stubs on PATH."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from emulator import built, needs_compiler
from wheels import make_wheel

from glmlora.model import device as devices
from glmlora.tools import doctor

ROOT = Path(__file__).resolve().parent.parent
SMI = """#!/bin/sh
test -n "{listed}" || {{ echo "NVIDIA-SMI has failed: no driver"; exit 9; }}
case "$1" in -L) printf '%b' '{listed}' ;; *) printf '%b' '{capabilities}'; exit {status} ;; esac
"""
NVCC = """#!/bin/sh
case "$1" in
--list-gpu-code) echo sm_75; echo sm_80; echo sm_90; echo sm_100; exit ;;
--version) echo "Cuda compilation tools, release 12.8, V12.8.93"; exit ;;
esac
echo "$@" >>"$0.calls"
test -z "{fails}" || {{ echo "error: unsupported GNU version"; exit 1; }}
while [ "$1" != -o ]; do shift; done
echo made >"$2"
"""


def stub(folder, name, text, **fields):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text.format(**fields))
    (folder / name).chmod(0o755)


def gpus(folder, *capabilities, old=False):
    """An nvidia-smi that lists GPUs of these capabilities; of none: it finds no driver."""
    told = "".join(f"{c}\\n" for c in capabilities)
    listed = "".join(f"GPU {i}: Tesla (UUID: x)\\n" for i in range(len(capabilities)))
    stub(folder, "nvidia-smi", SMI, listed=listed, capabilities=told, status=int(old))


def here(folder, *, nvcc=None):
    """(status, last line, calls of nvcc) of `build.py here` with what is in `folder` on PATH."""
    if nvcc:
        stub(folder, "nvcc", NVCC, fails="" if nvcc == "works" else "yes")
    env = {"PATH": f"{folder}:/usr/bin:/bin", "OUT": str(folder / "out"), "CUDA_HOME": "/nowhere"}
    env["NVIDIA_WHEELS"] = str(folder / "wheels")
    done = subprocess.run(
        [sys.executable, str(ROOT / "cuda" / "build.py"), "here"],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    calls = folder / "nvcc.calls"
    lines = (done.stdout + done.stderr).strip().splitlines()
    return done.returncode, lines[-1], calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize(
    "capabilities, codes, ptx",
    [
        (["7.5", "7.5"], ["75"], "75"),  # Kaggle's two T4
        (["9.0"], ["90"], "90"),
        (["8.9"], ["80"], "80"),  # not known to this nvcc: what runs there
        (["12.0"], ["100"], "100"),  # only by PTX
        (["7.5", "9.0"], ["75", "90"], "90"),
    ],
)
def test_nvcc_builds_for_the_gpu_at_hand(tmp_path, capabilities, codes, ptx):
    gpus(tmp_path, *capabilities)
    status, last, calls = here(tmp_path, nvcc="works")
    assert status == 0 and Path(last) == tmp_path / "out" / "libglm_cuda.so"
    code = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in codes]
    code.append(f"-gencode=arch=compute_{ptx},code=compute_{ptx}")
    compiled = [call for call in calls.splitlines() if " -c " in call]
    assert compiled and all(f" {' '.join(code)} " in call for call in compiled)
    assert all(call.count("-gencode") == len(code) for call in compiled)
    told = f"nvcc 12.8, code for {' '.join(f'sm_{c}' for c in codes)}, PTX of sm_{ptx} for others"
    assert told in (tmp_path / "out" / "about.c").read_text()
    # nothing is compiled again for the same GPU, all of it for another one
    before = len(calls.splitlines())
    again = here(tmp_path)[2].splitlines()[before:]
    assert [call for call in again if " -c " in call] == []
    gpus(tmp_path, "8.0")
    other = here(tmp_path)[2].splitlines()[before + len(again) :]
    assert (len([c for c in other if " -c " in c]) == len(compiled)) == (codes != ["80"])


def test_a_driver_that_is_too_old_to_tell_gets_all(tmp_path):
    gpus(tmp_path, "7.5", old=True)
    _, _, calls = here(tmp_path, nvcc="works")
    assert all(f"code=sm_{c} " in calls for c in (75, 80, 90, 100))


@pytest.mark.parametrize(
    "capabilities, nvcc, why",
    [
        ([], "works", "no GPU answers here"),
        (["6.0"], "works", "this GPU's compute capability is 6.0: there is code from 7.0 on"),
        (["7.0"], "works", "nvcc has no code for compute capability 7.0; NVRTC is not found"),
        (["7.5"], "fails", "failed: "),
        (["7.5"], None, "NVRTC is not found: pip install nvidia-cuda-nvrtc-cu12=="),
    ],
)
def test_where_nothing_can_be_built_one_sentence_says_why(tmp_path, capabilities, nvcc, why):
    gpus(tmp_path, *capabilities)
    status, last, _ = here(tmp_path, nvcc=nvcc)
    assert status == 1 and why in last
    if capabilities and capabilities != ["6.0"]:
        assert "or install a CUDA toolkit (11.8 or newer), whose nvcc does it" in last
    assert not (tmp_path / "out" / "libglm_cuda.so").exists()


@pytest.mark.parametrize("nvcc", ["works", "fails", None])
def test_an_install_has_the_library_or_goes_on_without(tmp_path, nvcc, capfd):
    """None: there is no GPU, and nobody is asked to build anything."""
    stubs = tmp_path / "stubs"
    gpus(stubs, *(["8.0"] if nvcc else []))
    stub(stubs, "nvcc", NVCC, fails="" if nvcc == "works" else "yes")
    env = {"PATH": f"{stubs}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    env |= {"NVIDIA_WHEELS": str(tmp_path / "wheels"), "GLMLORA_BUILD_CUDA": ""}
    wheel = make_wheel(tmp_path / "wheel", **env)
    names = zipfile.ZipFile(wheel).namelist()
    assert ("glmlora/libglm_cuda.so" in names) == (nvcc == "works")
    assert any(name.startswith("glmlora/_core.") for name in names)
    assert (stubs / "nvcc.calls").exists() == bool(nvcc)


@needs_compiler
def test_doctor_tells_the_library(monkeypatch):
    """Of the emulator's, which needs no driver, as if it had a CUDA version."""
    library = str(built())
    monkeypatch.setenv("GLMLORA_CUDA_LIBRARY", library)
    monkeypatch.setattr(devices, "info", lambda device: {"runtime": 12090})
    assert doctor.library_lines("emu") == [
        f"cuda library  {library}",
        "              by g++ on the emulator; CUDA 12.9, drivers from 525 on",
        "cublas        the emulator's",
    ]
    assert doctor.library_lines("cuda") == []
