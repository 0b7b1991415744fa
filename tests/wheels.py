"""Wheels of the working tree, made and installed with the network off."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def make_wheel(place, **env):
    """A wheel in the folder `place`, of a copy of the tree; what is compiled already goes along."""
    build = ROOT / "build"

    def ignore(folder, names):
        if folder == str(build):
            return set(names) - {"objects"}
        unwanted = shutil.ignore_patterns(".*", "*.so", "__pycache__", "*.egg-info", "demo", "dist")
        return unwanted(folder, names)

    shutil.copytree(ROOT, place / "source", ignore=ignore, symlinks=True)
    words = ["wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", place, "."]
    subprocess.run([*PIP, *words], cwd=place / "source", check=True, env=os.environ | env)
    [wheel] = place.glob("*.whl")
    return wheel


def install(wheel, target):
    """Unpack a wheel into the folder `target` as pip does."""
    words = ["install", "-q", "--no-index", "--no-deps", "--target", target, wheel]
    subprocess.run([*PIP, *words], check=True)
    return target
