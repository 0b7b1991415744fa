"""The self-test of a GPU, run on the emulator: it passes, and it says what fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import built, needs_compiler

from glmlora.tools import selftest
from glmlora.tools.optable import SIGNATURES

ROOT = Path(__file__).resolve().parent.parent


COMMAND = ("-m", "glmlora.tools.selftest")
SHORT = "from glmlora.tools import selftest; selftest.STEPS = 4; raise SystemExit(selftest.main())"


def run(*words, start=COMMAND, **env):
    command = [sys.executable, *start, *words]
    env = {k: v for k, v in os.environ.items() if k != "GLMLORA_DEVICE"} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_every_op_is_in_the_list():
    used = set()

    class Recording(selftest.Ops):
        def _call(self, op, args):
            used.add(op)
            super()._call(op, args)

    import numpy as np

    for case in selftest.OP_CASES.values():
        case(Recording("cpu"), np.random.default_rng(0))
    assert set(SIGNATURES) - used == {"first_nonfinite"}  # which the tiny model uses


@needs_compiler
@pytest.mark.parametrize(
    "start",
    [
        pytest.param(("-c", SHORT), id="short trainings"),
        pytest.param(COMMAND, id="as it is", marks=pytest.mark.deep),
    ],
)
def test_it_passes_on_the_emulator(start, tmp_path):
    library = str(built())
    out = tmp_path / "told.json"
    status, lines, errors = run(
        "--device", "emu", "--output", str(out), start=start, GLMLORA_CUDA_LIBRARY=library
    )
    assert (status, lines[-1]) == (0, "selftest emu: PASS"), errors[-2000:] + "\n".join(lines[-40:])
    told = json.loads(out.read_text())
    assert told["result"] == "PASS" and len(told["items"]) > 100
    assert told["device"]["name"] == "emulator"
    assert all(item["passed"] for item in told["items"])


@needs_compiler
def test_an_item_that_fails_is_named(tmp_path, monkeypatch, capsys):
    library = str(built())
    monkeypatch.setenv("GLMLORA_CUDA_LIBRARY", library)
    monkeypatch.setitem(selftest.TOLERANCE, "float16", 1e-7)  # no rounding is that small
    out = tmp_path / "told.json"
    assert selftest.run("emu:0", only="float16 linear float16 37", output=str(out)) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("selftest emu: float16 linear float16 37x129x66: AssertionError")
    assert "differs by" in json.loads(out.read_text())["result"]


SANITIZER = """#!/bin/sh
# compute-sanitizer as far as the self-test knows it: --tool NAME --error-exitcode N COMMAND..
[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 2
echo "$2" >> "$TOLD"
[ "$2" != "$FAILING" ] || exit "$4"
shift 4
exec "$@"
"""


@needs_compiler
def test_deep_runs_the_items_under_each_tool(tmp_path, monkeypatch):
    library = str(built())
    assert selftest.deep("emu:0").startswith("skipped")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert selftest.deep("cuda:0").startswith("skipped")
    (tmp_path / "compute-sanitizer").write_text(SANITIZER)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    told = tmp_path / "told"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    for name, value in (
        ("TOLD", str(told)),
        ("FAILING", ""),
        ("GLMLORA_DEVICE", "emu"),  # what "cuda" is in the processes that it starts
        ("GLMLORA_CUDA_LIBRARY", library),
    ):
        monkeypatch.setenv(name, value)
    only = "float16 linear float16 1x"
    assert selftest.deep("cuda:0", only) == "memcheck, racecheck, initcheck, synccheck"
    assert told.read_text().split() == list(selftest.TOOLS)
    monkeypatch.setenv("FAILING", "racecheck")
    with pytest.raises(AssertionError, match="racecheck: exit status 9"):
        selftest.deep("cuda:0", only)
    monkeypatch.setenv("FAILING", "")
    monkeypatch.setenv("GLMLORA_CUDA_LIBRARY", str(tmp_path / "none.so"))  # the items fail
    with pytest.raises(AssertionError, match="(?s)memcheck: exit status 1.*environment"):
        selftest.deep("cuda:0", only)


def test_without_a_device_it_fails_and_says_why(tmp_path):
    library = str(tmp_path / "none.so")
    status, lines, _ = run("--device", "cuda", "--output", os.devnull, GLMLORA_CUDA_LIBRARY=library)
    assert status == 1 and lines[-1].startswith("selftest cuda: environment: ")
    status, _, errors = run("--device", "cpu")
    assert status == 2 and "expected cuda" in errors
