"""Kills a prediction at random moments and runs the same command again: the output must be that of
a run that nobody stopped, byte for byte, and no row may be computed again once it was kept.

    python tests/killed.py --rows 3000 --kills 50 --fresh

SIGKILL, SIGTERM and SIGINT take turns, over a tiny model with random weights that samples. With
--fresh each run is the command itself, and is killed at a moment of the clock; without, it is a
fork, and kills itself when a random number of rows is kept. Prints a line a kill; exit status 1 for
the first that is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny

from glmlora import cli
from glmlora.files import journal
from glmlora.generation.generate import ROWS

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STATUS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}


def job(place: Path, rows: int, rng: random.Random) -> list[str]:
    """Model and table in `place`; the words of the command, without an output."""
    model = tiny.tiny_model_dir(place, padded_vocab_size=480)
    tiny.tiny_tokenizer_dir(model, 400)
    words = " ".join(tiny.SENTENCES).replace(",", " ").split()
    lines = [f"{i},{' '.join(rng.choices(words, k=rng.randint(1, 5)))}" for i in range(rows)]
    (place / "in.csv").write_text("\n".join(["id,title", *lines, ""]), encoding="utf-8")
    given = ["--model", model, "--input", place / "in.csv", "--template", "{title}"]
    return ["predict", *map(str, given), "--temperature", "1", "--seed", "5", "--max-length", "60"]


def forked(words: list[str], number: int, after: int) -> int:
    """The status of the command, in a fork that gets a signal when `after` rows are kept."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    add, count = journal.Journal.add, 0

    def counted(self, row, result):
        nonlocal count
        add(self, row, result)
        count += 1
        if count == after:
            os.kill(os.getpid(), number)

    journal.Journal.add = counted
    status = 1
    try:
        status = cli.main(words)
    except SystemExit as end:
        status = int(str(end.code))
    finally:
        sys.stderr.flush()
        os._exit(status)


def fresh(words: list[str], number: int, seconds: float) -> int:
    """The status of the command, which gets a signal after so many seconds."""
    process = subprocess.Popen([sys.executable, "-m", "glmlora", *words], stdout=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        return process.wait()


def rows_kept(path: Path) -> list[int]:
    """The rows of a journal's lines, in their order."""
    whole = path.read_bytes().split(b"\n")[:-1]
    return [line["row"] for line in map(json.loads, whole) if "row" in line]


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"  # in products this small, threads wait for each other
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fresh", action="store_true")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        words = job(place, args.rows, rng)
        begin = time.monotonic()
        whole = place / "whole.csv"
        run = fresh if args.fresh else forked
        assert run([*words, "--output", str(whole)], 0, 1e9) == 0
        length = time.monotonic() - begin
        kept_ever = 0
        for kill in range(args.kills):
            number = SIGNALS[kill % len(SIGNALS)]
            output, kept = place / f"{kill}.csv", place / f"{kill}.kept"
            at = rng.uniform(0, length) if args.fresh else rng.randint(1, args.rows)
            status = run([*words, "--output", str(output)], number, at)
            before: list[int] = []
            there = Path(f"{output}.journal")
            if there.exists():
                before = rows_kept(there)
                os.link(there, kept)  # to see what the second run adds
            ended = output.exists() and not there.exists()
            if not ended:  # before Python takes the signal, it ends a process by itself
                assert status in (STATUS[number], -number), status
                assert run([*words, "--output", str(output)], 0, 1e9) == 0
            assert output.read_bytes() == whole.read_bytes(), f"kill {kill}: another output"
            if kept.exists():
                after = rows_kept(kept)
                assert after[: len(before)] == before
                assert sorted(after) == list(range(args.rows)), "a row is done twice"
                lost = set(range(max(before, default=0))) - set(before)
                assert len(lost) < ROWS, f"{len(lost)} rows are done again, {ROWS} run together"
            kept_ever += bool(before)
            print(f"{number.name} at {at:.2f}: status {status}, {len(before)} rows kept, equal")
            for path in (output, kept):
                path.unlink(missing_ok=True)
    print(f"{args.kills} kills of {args.rows} rows, {kept_ever} with rows kept: all equal")
    return 0


if __name__ == "__main__":
    sys.exit(main())
