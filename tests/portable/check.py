"""Checks the wheels that build.py made: `make wheels-check`.

    python tests/portable/check.py [--only files,again,..] [--python FILE ..] [--dist D]

files     tags, RECORD, the bill of materials, and abi3audit's word on the stable ABI
again     a second build, from nothing, has equal bytes
pythons   the x86-64 wheel in every CPython from 3.10 on that is found (PATH, ~/.pyenv) or named:
          it picks the kernels that /proc/cpuinfo says the processor has, and passes TESTS
clean     the x86-64 wheel on Debians without compiler, headers and network (clean.sh; root,
          debootstrap)
aarch64   the other wheel passes TESTS under qemu-user (root, debootstrap, qemu-user-static)
threads   those for CPythons without a GIL pass FREE_TESTS there, and the GIL stays off

What cannot be done here is said at the end, and is no failure; --only makes it one.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from build import MACHINES, ROOT, build, environment_of, free_threaded

PLACE = ROOT / "build/wheels-check"
# less what needs the tree, a compiler or the notebook's packages, and what takes minutes
WANTED = "not (bars or compiler or notebook or jupyter or narrow)"
TESTS = ["isa", "golden", "core", "model_gradient", "workflow", "quantization"]
FREE_TESTS = ["threads", *TESTS]
KERNELS = ["ops"]  # in one Python: they do not depend on it
# a test takes thirty times as long under qemu
ARM_WANTED = f"{WANTED} and (against_reference or gradient or forward or greedy or ptuning or "
ARM_WANTED += "training or merge or predict or picked or system)"
ARM_TESTS = ["isa", "golden", "model_gradient", "workflow", "ops"]
ARM_SETS = ("neon_bf16", "neon_i8mm", "neon_dotprod", "neon")
ARM_PROCESSORS = {"cortex-a72": "neon,generic", "neoverse-n1": "neon_dotprod,neon,generic"}
CHECKS = ("files", "again", "pythons", "clean", "aarch64", "threads")


class Absent(Exception):
    """What a check needs and this machine lacks."""


def run(*words, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], check=True, **kwargs)


def the_wheel(dist: Path, machine: str) -> Path:
    return one_of(dist, f"-cp310-abi3-manylinux2014_{machine}.manylinux_2_17_")


def free_wheel(dist: Path, tag: str) -> Path:
    return one_of(dist, f"-{tag[:-1]}-{tag}-manylinux2014_x86_64.manylinux_2_17_")


def one_of(dist: Path, tags: str) -> Path:
    found = sorted(dist.glob(f"glmlora-*{tags}*.whl"))
    if len(found) != 1:
        raise SystemExit(f"{dist}: expected one wheel with the tags {tags}, found {len(found)}")
    return found[0]


def check_files(dist: Path) -> None:
    wheels = [(the_wheel(dist, machine), "_core.abi3.so") for machine in MACHINES]
    for tag in free_threaded():
        name = f"_core.cpython-{tag[2:]}-x86_64-linux-gnu.so"
        wheels.append((free_wheel(dist, tag), name))
    for wheel, core in wheels:
        archive = zipfile.ZipFile(wheel)
        names = set(archive.namelist())
        [record] = [name for name in names if name.endswith(".dist-info/RECORD")]
        rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
        if {row[0] for row in rows} != names:
            raise SystemExit(f"{wheel.name}: RECORD does not list what is there")
        for name, digest, size in rows:
            data = archive.read(name)
            sha = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            if name != record and (digest, size) != (f"sha256={sha}", str(len(data))):
                raise SystemExit(f"{wheel.name}: {name}: is not what RECORD says")
        [bill] = [name for name in names if ".dist-info/sboms/" in name]
        stated = {c["name"] for c in json.loads(archive.read(bill))["components"]}
        modules = {name for name in names if name.endswith(".so")}
        if modules != {f"glmlora/{core}"} or not modules <= stated:
            raise SystemExit(f"{wheel.name}: modules {modules}, the bill of materials: {stated}")
        text = archive.read(f"glmlora/{core}")
        for folder in (ROOT, Path.home(), Path(tempfile.gettempdir())):
            if os.fsencode(folder) + b"/" in text:
                raise SystemExit(f"{wheel.name}: {folder} is in the module")
        tools = Path(sys.executable).parent
        if "abi3" in core:
            run(tools / "abi3audit", "--strict", "--summary", wheel)
        run(tools / "auditwheel", "show", wheel, stdout=subprocess.DEVNULL)


def check_again(dist: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        each = [(the_wheel(dist, machine), machine, sys.executable) for machine in MACHINES]
        for tag, file in free_threaded().items():
            each.append((free_wheel(dist, tag), "x86_64", environment_of(file, tag)))
        for first, machine, python in each:
            second = build(machine, Path(folder), Path(folder) / f"zig-{first.name}", python)
            if first.name != second.name or first.read_bytes() != second.read_bytes():
                kept = shutil.copy(second, PLACE)
                raise SystemExit(f"{first}: a second build differs, {kept}")
            print(f"{first.name}: equal bytes again")


def pythons(named: list[str]) -> dict[str, str]:
    """{version: file} of the CPythons from 3.10 on, those that have a GIL."""
    code = (
        "import sys, sysconfig as s, ensurepip; v = sys.version_info; "
        "print(f'{v[0]}.{v[1]}' if sys.implementation.name == 'cpython' and v >= (3, 10) "
        "and not s.get_config_var('Py_GIL_DISABLED') else '')"
    )
    places = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    places += sorted((Path.home() / ".pyenv/versions").glob("*/bin"))
    files = [Path(name) for name in named]
    files += [p / f"python3.{minor}" for p in places for minor in range(10, 30)]
    found: dict[str, str] = {}
    for file in files:
        if file.is_file():
            done = subprocess.run([file, "-c", code], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout.strip():
                found.setdefault(done.stdout.strip(), str(file))
    return dict(sorted(found.items(), key=lambda item: int(item[0].split(".")[1])))


def test_words(tests: list[str], wanted: str) -> list[str]:
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    words += ["--rootdir", str(ROOT), "-k", wanted]
    return words + [str(ROOT / f"tests/test_{name}.py") for name in tests]


def check_installed(wheel: Path, file: str, name: str, tests: list[str], **more: str) -> str:
    """The wheel, installed in an environment of that Python, passes the tests. more: variables."""
    with tempfile.TemporaryDirectory() as folder:
        run(file, "-m", "venv", Path(folder) / "v")
        bin = Path(folder) / "v/bin"
        words = ["-m", "pip", "--disable-pip-version-check", "install", "-q"]
        run(bin / "python", *words, "--only-binary", ":all:", wheel, "pytest", "hypothesis")
        environment = os.environ | {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}"} | more
        environment.pop("PYTHONPATH", None)
        code = "import sys, glmlora._core as c; g = getattr(sys, '_is_gil_enabled', lambda: True)()"
        code += "; print(c.__file__, c.cpu_variants(), 'with a GIL' if g else 'without a GIL')"
        done = run(bin / "python", "-c", code, cwd=folder, capture_output=True, text=True)
        print(f"\nCPython {name}: {done.stdout}", end="", flush=True)
        if not done.stdout.startswith(folder):
            raise SystemExit(f"another glmlora was imported: {done.stdout}")
        run(bin / "python", *test_words(tests, WANTED), cwd=folder, env=environment)
        return done.stdout


def check_pythons(dist: Path, named: list[str]) -> None:
    wheel, found = the_wheel(dist, "x86_64"), pythons(named)
    for number, file in found.items():
        tests = TESTS + (KERNELS if number == next(iter(found)) else [])
        check_installed(wheel, file, number, tests)
    print(f"\nthe x86-64 wheel was tested in CPython {', '.join(found)}")


def check_threads(dist: Path) -> None:
    found = free_threaded()
    if not found:
        raise Absent("no python3.13t or newer; sh tests/portable/free_threaded.sh makes one")
    for tag, file in found.items():
        # PYTHON_GIL=0 is for what the tests import: the module turns nothing on by itself
        said = check_installed(free_wheel(dist, tag), file, tag, FREE_TESTS, PYTHON_GIL="0")
        if not said.rstrip().endswith("without a GIL"):
            raise SystemExit(f"{tag}: importing glmlora turned the GIL on")


def check_clean(dist: Path) -> None:
    if os.getuid() or not shutil.which("debootstrap"):
        raise Absent("a clean Debian takes root and: apt-get install debootstrap")
    run("sh", ROOT / "tests/portable/clean.sh", the_wheel(dist, "x86_64"))


def arm_root() -> Path:
    """A Debian for aarch64 with Python, unpacked and not configured: qemu runs its files."""
    root = PLACE / "arm"
    if not (root / "usr/bin/python3.11").exists():
        shutil.rmtree(root, ignore_errors=True)
        words = ["--arch=arm64", "--foreign", "--variant=minbase", "--include=libpython3.11-stdlib"]
        words += ["--include=libpython3.11-stdlib,python3.11", "bookworm", root]
        run("debootstrap", *words, stdout=subprocess.DEVNULL)
        for archive in (root / "var/cache/apt/archives").glob("*.deb"):
            run("dpkg-deb", "-x", archive, root)
    return root


def check_aarch64(dist: Path) -> None:
    qemu = shutil.which("qemu-aarch64-static")
    if os.getuid() or not qemu or not shutil.which("debootstrap"):
        raise Absent(
            "aarch64 takes root and: apt-get install qemu-user-static debootstrap",
        )
    root, site = arm_root(), PLACE / "site"
    shutil.rmtree(site, ignore_errors=True)
    words = ["-m", "pip", "--disable-pip-version-check", "install", "-q", "--target", site]
    words += ["--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"]
    for level in ("2014", "_2_24", "_2_27", "_2_28"):
        words += ["--platform", f"manylinux{level}_aarch64"]
    run(sys.executable, *words, the_wheel(dist, "aarch64"), "pytest", "hypothesis")
    with tempfile.TemporaryDirectory() as folder:
        # sys.executable is this, so that what the tests start runs under qemu as well
        python = Path(folder) / "python"
        inside = f"{qemu} -L {root} -0 {python} {root}/usr/bin/python3.11"
        python.write_text(f'#!/bin/sh\nexec {inside} "$@"\n')
        python.chmod(0o755)
        environment = os.environ | {
            "PYTHONPATH": str(site),
            "PYTHONHOME": str(root / "usr"),
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        code = "import platform, glmlora._core as c; print(platform.machine(), c.__file__)"
        done = run(python, "-c", code, cwd=folder, env=environment, capture_output=True, text=True)
        print(done.stdout, end="", flush=True)
        if not done.stdout.startswith(f"aarch64 {site}"):
            raise SystemExit(f"expected aarch64 and the wheel in {site}, got {done.stdout}")
        run(python, *test_words(ARM_TESTS, ARM_WANTED), cwd=folder, env=environment)
        for isa in ARM_SETS:  # the ops above ran on each; qemu's own processor has them all
            forced = environment | {"GLMLORA_ISA": isa}
            run(python, *test_words(["golden"], ARM_WANTED), cwd=folder, env=forced)
        for processor, sets in ARM_PROCESSORS.items():
            code = "import glmlora._core as c; print(c.cpu_variants())"
            words = [qemu, "-cpu", processor, "-L", root, f"{root}/usr/bin/python3.11", "-c", code]
            done = run(*words, cwd=folder, env=environment, capture_output=True, text=True)
            if done.stdout.strip() != sets:
                raise SystemExit(f"{processor}: expected {sets}, got {done.stdout}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--python", nargs="*", default=[], help="more Pythons, by file")
    parser.add_argument("--only", default="", help=", ".join(CHECKS))
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    asked = [name for name in args.only.split(",") if name]
    for name in asked:
        if name not in CHECKS:
            parser.error(f"--only: expected some of {', '.join(CHECKS)}, got {name!r}")
    PLACE.mkdir(parents=True, exist_ok=True)
    dist, skipped = args.dist.resolve(), []
    for name in asked or CHECKS:
        print(f"==== {name}", flush=True)
        try:
            if name == "pythons":
                check_pythons(dist, args.python)
            else:
                globals()[f"check_{name}"](dist)
        except Absent as reason:
            if asked:
                raise SystemExit(f"{name}: {reason}") from None
            skipped.append(f"{name}: {reason}")
    for line in skipped:
        print(f"NOT CHECKED: {line}")


if __name__ == "__main__":
    main()
