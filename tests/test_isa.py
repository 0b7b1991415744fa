"""Every instruction set that this processor runs, forced by GLMLORA_ISA: the same bars hold."""

import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glmlora import _core, cli
from glmlora.model import device
from glmlora.tools import speed

BARS = ("test_golden.py", "test_model_gradient.py", "test_generation.py", "test_quantization.py")
# the VNNI ones have the kernels of others, but for bytes (test_ops.py)
OTHERS = [isa for isa in _core.cpu_variants().split(",")[1:] if not isa.endswith("vnni")]


def run(words, isa, **kwargs):
    env = dict(os.environ, GLMLORA_ISA=isa)
    return subprocess.run(
        [sys.executable, *words], env=env, capture_output=True, text=True, timeout=900, **kwargs
    )


@pytest.mark.skipif("GLMLORA_ISA" in os.environ, reason="an instruction set is forced already")
@pytest.mark.skipif(not OTHERS, reason="this processor runs the generic kernels only")
@pytest.mark.parametrize("isa", OTHERS)
def test_the_bars_hold_on(isa):
    here = Path(__file__).parent
    done = run(["-m", "pytest", "-q", "-x", *(str(here / name) for name in BARS)], isa)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


BF16 = "avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni avx512vbmi".split()
FLAGS = {  # as Linux names them
    "amx": [*BF16, "amx_tile", "amx_int8"],
    "avx512bf16": BF16,
    "avx512vnni": "avx512f avx512bw avx512vl avx512dq avx512_vnni".split(),
    "avx512": "avx512f avx512bw avx512vl avx512dq".split(),
    "avxvnni": "avx2 fma f16c avx_vnni".split(),
    "avx2": "avx2 fma f16c".split(),
    "neon_bf16": "asimd asimddp i8mm bf16".split(),
    "neon_i8mm": "asimd asimddp i8mm".split(),
    "neon_dotprod": "asimd asimddp".split(),
    "neon": ["asimd"],
    "generic": [],
}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_the_sets_are_those_that_the_system_names():
    """Whatever compiler built the core: what it finds itself is what the kernel lists, which leaves
    out sets whose registers it does not save."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = "Features" if "neon" in _core.cpu_kernels() else "flags"
    flags = next((line.split() for line in lines if line.startswith(named)), None)
    if flags is None:
        pytest.skip("/proc/cpuinfo is another processor's: the emulator passes it on")
    here = _core.cpu_kernels()
    sets = [name for name in here if set(FLAGS[name]) <= set(flags)]
    assert _core.cpu_variants().split(",") == sets


@pytest.mark.deep
@pytest.mark.skipif("amx" not in _core.cpu_kernels(), reason="another kind of processor")
@pytest.mark.skipif(not _core.cpu_kernels().get("amx", (0, 0))[0], reason="the compiler lacks AMX")
def test_tiles_of_bytes_have_the_bits_of_every_set(tmp_path):
    """The kernels for AMX, over tiles in plain C (portable/tiles.h) and linked with what is built:
    what the op suite says of bytes, forwards and backwards, and the golden fixtures."""
    here = Path(__file__).parent
    built = max(here.parent.glob("build/objects/*/csrc/cpu/kernels_amx.o"), key=os.path.getmtime)
    others = [o for o in built.parents[1].rglob("*.o") if o.stem not in ("kernels_amx", "cpu")]
    made = []
    for name in ("kernels_amx", "cpu"):
        words = built.with_name(f"{name}.o.command").read_text().split("\n")
        words = [word.replace(str(Path("build", "objects")), str(tmp_path)) for word in words]
        made.append(tmp_path.joinpath(*built.parts[-4:-1], f"{name}.o"))
        made[-1].parent.mkdir(parents=True, exist_ok=True)
        emulated = f'-DTILES_EMULATED="{here / "portable/tiles.h"}"'
        subprocess.run([*words, emulated], check=True, cwd=here.parent)
    for folder in ("glmlora", "tests"):
        skipped = shutil.ignore_patterns("__pycache__", "_core*", "notebook*")
        shutil.copytree(here.parent / folder, tmp_path / folder, ignore=skipped)
    core = tmp_path / "glmlora" / Path(_core.__file__).name
    words = [words[0], "-shared", "-pthread", "-o", core, *made, *others, "-lm"]
    subprocess.run([str(word) for word in words], check=True)
    env = dict(os.environ, PYTHONPATH=str(tmp_path), GLMLORA_ISA="amx")
    asked = ["test_ops.py", "test_compute.py", "test_int16.py", "test_golden.py", "-k"]
    asked += ["bit_for_bit or way_back or bfloat16 or forward"]
    words = [sys.executable, "-m", "pytest", "-q", "-x", "--rootdir=.", *asked]
    done = subprocess.run(words, env=env, cwd=tmp_path / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


MODEL = """
import sys
from glmlora import _core
from glmlora.model.configuration import ChatGLMConfig
from glmlora.tools.project import tiny_directory
config = ChatGLMConfig.from_pretrained(tiny_directory())
print(_core.Model(config.arch(), "cpu", names=config.tensor_names).backend)
"""


def test_the_variable_chooses_the_kernels():
    done = run(["-c", MODEL], "generic")
    assert done.stdout.strip() == "cpu:generic", done.stderr
    assert run(["-c", MODEL], "").stdout.strip() == "cpu:" + _core.cpu_variants().split(",")[0]


def test_a_set_that_the_processor_lacks_is_named():
    done = run(["-c", MODEL], "sse9")
    assert "backend 'cpu:sse9': this processor runs" in done.stderr
    done = run(["-m", "glmlora", "doctor"], "sse9")
    assert done.returncode == 1 and "PROBLEM       backend 'cpu:sse9'" in done.stdout, done.stderr


def test_doctor_says_what_is_compiled_and_picked():
    sets = _core.cpu_variants().split(",")
    done = run(["-m", "glmlora", "doctor"], "generic")
    assert "instructions  generic in use (GLMLORA_ISA); this processor runs" in done.stdout
    assert "NOT compiled" not in done.stdout  # as this machine's compiler has them all
    lacking = [name for name, (_, runs) in _core.cpu_kernels().items() if not runs]
    assert ("it lacks what these take: " + ", ".join(lacking) in done.stdout) == bool(lacking)
    assert [name for name, pair in _core.cpu_kernels().items() if all(pair)] == sets


def test_doctor_measures_and_says_what_that_makes_of_models(capsys):
    found = speed.measure(64, 8, 0)
    assert list(found.reading) == [form.title for form in speed.FORMS]
    assert all(1e6 < rate < 1e15 for rates in found for rate in rates.values())
    same = speed.Speed(dict.fromkeys(found.reading, 10e9), {})
    rates = speed.expected(same)[
        "6B"
    ]  # 11.96 GB in 16 bits, 5.71 + 0.54 in 8, 3.21 + 0.54 in groups
    assert [round(rate, 2) for rate in rates.values()] == [0.84, 1.6, 2.95, 2.67]
    assert cli.main(["doctor", "--speed"]) == 0
    told = capsys.readouterr().out
    assert "reading weights for a token: float16 " in told and "    9B: float16 " in told
    assert "int8 " in told.split("products of many rows: ")[1].splitlines()[0]
    assert cli.main(["doctor"]) == 0 and "speed" not in capsys.readouterr().out


def test_a_build_that_lacks_a_set_tells_so(monkeypatch, capsys):
    kernels = {"avx512": (False, True), "avx2": (False, False), "generic": (True, True)}
    monkeypatch.setattr(_core, "cpu_kernels", lambda: kernels)
    monkeypatch.setattr(device, "_announced", {"bfloat16", "int8"})
    assert cli.main(["doctor"]) == 0
    assert "NOT compiled: avx512, which" in capsys.readouterr().out
    for _ in range(2):
        device.backend_of("cpu", "float32", ["F32"])
    told = capsys.readouterr().err
    assert told.count("built without the kernels for avx512, which this processor has") == 1


OLD_COMPILER = """#!/bin/sh
# takes all but AVX-512, and makes empty files
case " $* " in *" -mavx512f "*) echo "unrecognized option -mavx512f" >&2; exit 1 ;;
*" -mavxvnni "*) echo "unrecognized option -mavxvnni" >&2; exit 1 ;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && [ "$2" != /dev/null ] && : >"$2"; shift; done
exit 0
"""


@pytest.mark.skipif("avx2" not in _core.cpu_kernels(), reason="x86-64 has the sets")
def test_a_compiler_that_lacks_a_set_builds_the_others(tmp_path):
    root = Path(__file__).resolve().parent.parent
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(root / "csrc", tmp_path / "csrc")
    (tmp_path / "glmlora").mkdir()
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"glmlora/_core{suffix}").touch()  # of an earlier build, and imported first
    (tmp_path / "cc").write_text(OLD_COMPILER)
    (tmp_path / "cc").chmod(0o755)
    cc = str(tmp_path / "cc")
    done = subprocess.run(
        [sys.executable, "setup.py", "-v", "build_ext", "--inplace"],
        env=os.environ | {"CC": cc, "LDSHARED": cc},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("WARNING: ") == 5 and "built without csrc/cpu/kernels_avx512.c" in (
        done.stderr
    )
    objects = {path.name for path in tmp_path.rglob("kernels_*.o")}
    assert objects == {"kernels_generic.o", "kernels_avx2.o"}
    made = [path.name for path in (tmp_path / "glmlora").glob("_core*")]
    assert made == [Path(_core.__file__).name]
