"""What the scripts of this folder share: where things lie, and how a command is run."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "cuda"
OUT = Path(os.environ.get("OUT", ROOT / "build/cuda"))
EMU = Path(os.environ.get("EMU_DIR", CUDA / "emu")).resolve()
KERNELS = sorted(CUDA.glob("*.cu"))
HOST = [CUDA / "device.c", CUDA / "blas.c", ROOT / "csrc/status.c"]
HEADERS = [*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), *(ROOT / "csrc").glob("*.h")]
INCLUDE = [f"-I{CUDA}", f"-I{ROOT / 'csrc'}"]


def run(*command: object, quiet: bool = False) -> str:
    words = [str(c) for c in command]
    print(shlex.join(words) if not quiet else f"{words[0]} {words[-3]}", flush=True)
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        kept = [line for line in done.stdout.splitlines() if "ptxas info" not in line]
        print("\n".join(line for line in kept if " 0 bytes spill loads" not in line))
        raise SystemExit(f"failed: {shlex.join(words)}")
    return done.stdout


def stale(target: Path, sources: list[Path]) -> bool:
    return not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in sources)
