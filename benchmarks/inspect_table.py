"""Seconds of `glmlora.inspect` over a large table with planted faults, all of which must be found.

    python benchmarks/inspect_table.py [--rows 100000] [--model DIR]

Synthetic papers: words drawn by Zipf's law from 50,000 made-up ones, 240 words an abstract in the
median as in real ones (1,700 characters), a title and a label; 1 row in 100 is a duplicate, a
near-duplicate (3 words changed) or a label conflict of another, and 1 of 100 rows to predict leaks.
Prints a line without a tokenizer and one with that of DIR (default: glm-tiny).
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

import numpy as np

import glmlora
from glmlora.tools.project import tiny_directory

SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]


def papers(rng, rows):
    """(rows, words of each)."""
    words = np.array(["".join(rng.choice(SYLLABLES, 1 + i % 4)) for i in range(50_000)])
    shares = 1 / np.arange(10, 10 + len(words))
    lengths = np.clip(rng.lognormal(np.log(240), 0.35, rows), 80, 900).astype(int)
    drawn = words[rng.choice(len(words), lengths.sum(), p=shares / shares.sum())]
    parts = np.split(drawn, np.cumsum(lengths)[:-1])
    return [
        {
            "uuid": i,
            "title": " ".join(p[:10]),
            "abstract": " ".join(p[10:]),
            "label": int(p.size) % 2,
        }
        for i, p in enumerate(parts)
    ]


def plant(rng, rows, test):
    """Faults at places of their own; how many there are of each kind."""
    places = rng.permutation(len(rows))[: len(rows) // 50].reshape(-1, 2)
    counts = dict.fromkeys(("duplicates", "near-duplicates", "conflicts", "leaks"), 0)
    for number, (copy, of) in enumerate(places.tolist()):
        kind = list(counts)[number % 3]
        rows[copy] = rows[of] | {"uuid": copy}
        if kind == "conflicts":
            rows[copy]["label"] = 1 - rows[of]["label"]
        if kind == "near-duplicates":
            words = rows[of]["abstract"].split()
            for at in (1, len(words) // 2, len(words) - 2):
                words[at] = "changed"
            rows[copy]["abstract"] = " ".join(words)
        counts[kind] += 1
    free = np.setdiff1d(np.arange(len(rows)), places)
    for at, of in zip(range(0, len(test), 100), rng.permutation(free).tolist(), strict=False):
        test[at] = rows[of] | {"uuid": test[at]["uuid"]}
        counts["leaks"] += 1
    return counts


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default=str(tiny_directory()))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = papers(rng, args.rows + args.rows // 10)
    rows, test = rows[: args.rows], rows[args.rows :]
    counts = plant(rng, rows, test)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("train.csv", "test.csv")]
        write(paths[0], rows)
        write(paths[1], test)
        size = sum(path.stat().st_size for path in paths) / 1e6
        for name, model in (("characters", None), ("tokens", args.model)):
            wall, processor = time.perf_counter(), time.process_time()
            report = glmlora.inspect(*paths, tokenizer=model)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            found = {
                "duplicates": len(report.duplicates),
                "near-duplicates": len(report.near_duplicates),
                "conflicts": len(report.conflicts),
                "leaks": len(report.leaks),
            }
            assert found == counts, (found, counts)
            print(
                f"{name:10} {len(rows):,} + {len(test):,} rows, {size:.0f} MB: {wall:.1f} s, "
                f"{processor:.1f} s of processor; found {found}"
            )


if __name__ == "__main__":
    main()
