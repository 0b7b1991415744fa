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


def written(target: Path, text: str) -> Path:
    """The file, written where it does not say this already: what depends on it stays up to date."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return target


def about(archs: list[str], compiler: str, ptx: str) -> str:
    """C that says how the library was built (glm_cuda_about)."""
    code = " ".join(f"sm_{arch}" for arch in archs)
    text = f"{compiler}, code for {code}, PTX of sm_{ptx} for others"
    return f'const char glm_cuda_built[] = "{text}";\n'


def stale(target: Path, sources: list[Path]) -> bool:
    return not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in sources)
