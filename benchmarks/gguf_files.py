"""GGUF files of a checkpoint of ChatGLM2-6B's exact shapes: written and read back.

    python benchmarks/gguf_files.py [--dir DIR] [--forms q8_0 q4_0 merged]

Writes the checkpoint of six_b.py (12.5 GB) into DIR (default: a new temporary one), or takes one
that is there, exports it in each form ("merged": q4_0, with a LoRA adapter over every linear),
imports the q4_0 file, and deletes it all. Each part is a process of its own; memory is anonymous
memory (RssAnon): what it needs beyond the mapped files.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sides import Peak
from six_b import make

import glmlora
from glmlora.tools.gguf_export import export
from glmlora.tools.gguf_import import import_gguf


def adapter_of(directory, place):
    """A fresh adapter of rank 8 over every linear of a model."""
    model = glmlora.AutoModel.from_pretrained(directory)
    config = glmlora.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    glmlora.get_peft_model(model, config).save_pretrained(place)


def measure(part, directory):
    work = directory / "gguf"
    start = time.perf_counter()
    with Peak() as peak:
        if part == "import":
            import_gguf(work / "q4_0.gguf", work / "again")
            size = sum(p.stat().st_size for p in (work / "again").iterdir())
        else:
            form, adapter = (part, None) if part != "merged" else ("q4_0", work / "adapter")
            size = export(directory, work / f"{part}.gguf", form, adapter=adapter)
    seconds = time.perf_counter() - start
    print(
        f"{part}: {size / 1e9:.2f} GB in {seconds:.0f} s, "
        f"{peak.bytes / 1e9:.2f} GB beyond the mapped file",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir")
    parser.add_argument("--forms", nargs="*", default=["q8_0", "q4_0", "merged"])
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return measure(args.part, Path(args.dir))
    directory = Path(args.dir or tempfile.mkdtemp(prefix="gguf."))
    made = not (directory / "config.json").exists()
    work = directory / "gguf"
    try:
        if made:
            directory.mkdir(parents=True, exist_ok=True)
            make(directory)
        work.mkdir()
        if "merged" in args.forms:
            adapter_of(directory, work / "adapter")
        for part in [*args.forms, *(["import"] if "q4_0" in args.forms else [])]:
            command = [sys.executable, __file__, "--part", part, "--dir", str(directory)]
            subprocess.run(command, check=True)
            if part != "q4_0":
                (work / f"{part}.gguf").unlink(missing_ok=True)
    finally:
        shutil.rmtree(directory if made else work)


if __name__ == "__main__":
    main()
