"""Rows a second of one process with two threads against Ray's workers with a thread each.

    python benchmarks/scale.py [--rows 1500] [--workers 2]

Over a model of random weights whose products take the time (4 layers, 1024 wide), labels weighed
and answers drawn. Counted are the rows in the journals, from the first that is there to the last:
not how long Python, Ray and the model take to start, which stands beside it. Needs Ray.
"""

from __future__ import annotations

import argparse
import glob
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tiny  # noqa: E402

SHAPES = {
    **{"hidden_size": 1024, "ffn_hidden_size": 2816, "num_layers": 4, "kv_channels": 64},
    **{"num_attention_heads": 16, "multi_query_group_num": 2, "padded_vocab_size": 480},
}
ASKED = {
    "labels": ["--labels", "0,1"],
    "drawn": ["--temperature", "1", "--seed", "5", "--max-length", "160"],
}


def rate(words: list[str], pattern: str, rows: int, threads: int) -> tuple[float, float]:
    """(rows a second, seconds until the first one) of a command whose journals a pattern names."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.monotonic()
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)
    first, last, seen = (0.0, 0), 0.0, 0
    while process.poll() is None and seen < rows:
        time.sleep(0.02)
        count = 0
        for path in glob.glob(pattern):
            try:
                count += Path(path).read_bytes().count(b'\n{"row": ')
            except FileNotFoundError:
                count = seen
                break
        if count > seen:
            last, seen = time.monotonic(), count
            first = first if first[1] else (last, count)
    assert process.wait() == 0
    return (seen - first[1]) / (last - first[0]), first[0] - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place, rng = Path(folder), random.Random(1)
        model = tiny.tiny_model_dir(place, dtype="F16", **SHAPES)
        tiny.tiny_tokenizer_dir(model, 400)
        words = " ".join(tiny.SENTENCES).replace(",", " ").split()
        lines = [
            f"{i},{' '.join(rng.choices(words, k=rng.randint(4, 12)))}" for i in range(args.rows)
        ]
        (place / "in.csv").write_text("\n".join(["id,title", *lines, ""]), encoding="utf-8")
        command = [sys.executable, "-m", "glmlora", "predict", "--model", str(model)]
        command += ["--input", str(place / "in.csv"), "--template", "{title}"]
        for name, asked in ASKED.items():
            one, ray = place / f"{name}.csv", place / f"{name}-ray.csv"
            alone = rate([*command, *asked, "--output", str(one)], f"{one}.journal", args.rows, 2)
            more = ["--output", str(ray), "--engine", "ray", "--workers", str(args.workers)]
            found = rate([*command, *asked, *more], f"{ray}.shards/*.journal", args.rows, 2)
            assert one.read_bytes() == ray.read_bytes()
            print(
                f"{name}: one process with 2 threads {alone[0]:.1f} rows/s (begins after "
                f"{alone[1]:.1f} s), {args.workers} workers of Ray {found[0]:.1f} rows/s (after "
                f"{found[1]:.1f} s): {found[0] / alone[0]:.3f}; equal bytes",
                flush=True,
            )


if __name__ == "__main__":
    main()
