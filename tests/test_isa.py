"""Every instruction set that this processor runs, forced by GLMLORA_ISA: the same bars hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from glmlora import _core

BARS = ("test_golden.py", "test_model_gradient.py", "test_generation.py", "test_quantization.py")
OTHERS = _core.cpu_variants().split(",")[1:]


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


FLAGS = {  # as Linux names them
    "avx512bf16": "avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni avx512vbmi".split(),
    "avx512": "avx512f avx512bw avx512vl avx512dq".split(),
    "avx2": "avx2 fma f16c".split(),
    "generic": [],
}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc/cpuinfo")
def test_the_sets_are_those_that_the_system_names():
    """Whatever compiler built the core: what it finds itself is what the kernel lists, which leaves
    out sets whose registers it does not save."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    sets = [name for name, needed in FLAGS.items() if set(needed) <= set(flags)]
    assert _core.cpu_variants().split(",") == sets


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
