"""The core on other systems: what only one of them has stands in csrc/platform.c, and all of it
compiles and links for macOS on Apple silicon, by zig where that is installed. Nothing runs it."""

import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
ONE_SYSTEM = re.compile(
    r"\b(__linux__|__APPLE__|futex|epoll_\w+|eventfd|memfd_create|prctl|sysinfo|getauxval|"
    r"sched_getaffinity|pthread_mutex_timedlock|pthread_setaffinity_np|MADV_HUGEPAGE|st_mtim\b|"
    r"CLOCK_MONOTONIC_COARSE|sysctl\w*|mach_\w+|host_statistics\w*)|\"/(proc|sys)/"
)
ENDIAN = "#define __BYTE_ORDER 1\n#define __LITTLE_ENDIAN 1\n#define __BIG_ENDIAN 2\n"


def sources():
    if not (ROOT / "csrc").is_dir():
        pytest.skip("csrc/ is not here: an installed package")
    return sorted((ROOT / "csrc").rglob("*.[ch]"))


def test_what_one_system_has_is_called_in_one_file():
    found = []
    for path in sources():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if ONE_SYSTEM.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    elsewhere = [line for line in found if not line.startswith("csrc/platform.c:")]
    assert not elsewhere, "\n".join(elsewhere)
    assert len(found) > 9, "the expression finds nothing where it should"


def zig():
    """A command that is zig's C compiler, or a skip."""
    for python in (ROOT / "build/wheels-env/bin/python", Path(sys.executable)):
        words = [str(python), "-m", "ziglang"]
        if (
            python.exists()
            and not subprocess.run([*words, "version"], capture_output=True).returncode
        ):
            return [*words, "cc"]
    pytest.skip("zig is not installed: `make wheels` installs it")


def flags_by_suffix():
    """What setup.py adds for the kernels, in zig's words; read, since it runs setup() on import."""
    text = (ROOT / "setup.py").read_text()
    found = dict(re.findall(r'"(_neon\w*\.c)": KERNEL(?: \+ \["(-march=[^"]+)"\])?', text))
    return {k: v.replace("-march=armv8.2-a", "-mcpu=generic").split() for k, v in found.items()}


@pytest.mark.deep
def test_the_core_compiles_and_links_for_macos(tmp_path):
    (tmp_path / "endian.h").write_text(ENDIAN)  # numpy's headers here are those for Linux
    words = [*zig(), "-target", "aarch64-macos.11.0"]
    common = ["-std=c11", "-D_GNU_SOURCE", "-DPy_LIMITED_API=0x030A0000", "-fvisibility=hidden"]
    common += ["-O1", "-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{tmp_path}", "-Icsrc"]
    common += [f"-I{np.get_include()}", f"-I{sysconfig.get_path('include')}"]
    by_suffix = flags_by_suffix()
    assert len(by_suffix) == 4

    def compiled(path):
        own = [f for end, flags in by_suffix.items() if path.name.endswith(end) for f in flags]
        out = tmp_path / f"{path.parent.name}_{path.stem}.o"
        done = subprocess.run(
            [*words, *common, *own, "-c", str(path), "-o", str(out)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        return str(out), done.stderr if done.returncode else ""

    files = [p for p in sources() if p.suffix == ".c" and "kernels_a" not in p.name]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, files))
    assert not [error for _, error in objects if error], "\n".join(e for _, e in objects)[:3000]
    module = tmp_path / "_core.abi3.so"
    linked = [*words, "-shared", "-undefined", "dynamic_lookup", *(o for o, _ in objects)]
    done = subprocess.run([*linked, "-o", str(module)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert module.read_bytes()[:4] == b"\xcf\xfa\xed\xfe"  # 64-bit Mach-O
