"""Paths that tests share. The shared folder holds the golden data and real papers; it is not
part of the project."""

import os
import signal
import sys
from pathlib import Path

import pytest
from emulator import emulator
from progress import Progress
from wheels import make_wheel

from glmlora import _core
from glmlora.model.modeling import ChatGLMForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks/peers")]  # their modules

if os.environ.get("GLMLORA_SANITIZED") and "/lib/" not in _core.__file__:
    raise RuntimeError(f"{_core.__file__} is tested in place of the sanitized build")

# GLMLORA_TEST_BACKEND=emu: models of the suite run there. Tests of what only the cpu has (bits that
# do not depend on threads or packing, memory that is mapped) are then expected to fail.
if os.environ.get("GLMLORA_TEST_BACKEND"):
    ChatGLMForConditionalGeneration.backend = os.environ["GLMLORA_TEST_BACKEND"]

# The suite has the same bits on every processor; tests of other products ask for them.
os.environ.setdefault("GLMLORA_COMPUTE_DTYPE", "float32")

# A job started in the background ignores Ctrl-C, and so would the tests of it and their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to who started it
        config.pluginmanager.register(Progress(config))


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker ends with it alone."""
    items.sort(key=lambda item: item.path.name != "test_emu.py")


@pytest.fixture(autouse=True)
def no_reports():
    """What runs on the emulated device gives it nothing to report."""
    emu = emulator()
    before = emu.reports()[0] if emu else 0
    yield
    if emu:
        count, text = emu.reports()
        assert count == before, f"{count - before} reports of the emulator, the last: {text}"


@pytest.fixture
def shared() -> Path:
    """The folder with golden fixtures, seed notebook and real papers; skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(
            "../shared (golden fixtures, real papers) is absent: it is not part of the project"
        )
    return SHARED


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the working tree, built with the network off from the objects that are there."""
    if os.environ.get("GLMLORA_SANITIZED"):
        pytest.skip("a plain build is tested")
    return make_wheel(tmp_path_factory.mktemp("wheel"))
