"""Kills the workers of `glmlora predict --engine ray` every few seconds, and the command itself now
and then: the output must be that of one process that nobody stopped, byte for byte, and no row may
be kept twice.

    python tests/killed_workers.py --rows 10000 --workers 3 --every 3 --layers 40

Needs Ray. Over a tiny model with random weights that samples; with --labels, that weighs labels.
Prints what was killed, and how long the command took to end after a signal; exit status 1 for what
is not as it must be.
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

import killed
import tiny
from killed import STATUS


def writer_of(journal: Path) -> int | None:
    """The process that writes a journal; None where it has ended, is no worker of Ray, or has kept
    no row so far: if none did, the job would end.
    """
    lines = journal.read_bytes().split(b"\n")[:-1]
    named = [i for i, line in enumerate(lines) if line.startswith(b'{"process"')]
    process = json.loads(lines[named[-1]])["process"] if named and lines[named[-1] + 1 :] else None
    try:
        words = Path(f"/proc/{process['pid']}/cmdline").read_bytes() if process else b""
    except OSError:
        return None
    return process["pid"] if words.startswith(b"ray::Worker") else None


class Watch:
    """The folder of shards of a running command: its journals stay when it removes them."""

    def __init__(self, folder: Path, kept: Path):
        self.folder, self.kept = folder, kept
        kept.mkdir()

    def link(self) -> list[Path]:
        """The journals by now, each linked once."""
        found = sorted(self.folder.glob("*.journal"))
        for path in found:
            if not (self.kept / path.name).exists():
                try:
                    os.link(path, self.kept / path.name)
                except FileNotFoundError:
                    pass
        return found

    def writers(self) -> list[int]:
        """The workers that write now."""
        pids = set()
        for path in self.link():
            try:
                pids.add(writer_of(path))
            except FileNotFoundError:
                pass
        return sorted(pids - {None})

    def rows(self) -> list[int]:
        """All rows that were ever kept, as often as they were."""
        return sorted(row for path in self.kept.iterdir() for row in killed.rows_kept(path))


def run(
    words: list[str], watch: Watch, every: float, rng: random.Random, stop: int | None
) -> tuple:
    """(status, workers killed, seconds from the signal `stop` to the end) of the command."""
    process = subprocess.Popen([sys.executable, "-m", "glmlora", *words], stdout=subprocess.DEVNULL)
    count, next_kill, ended = 0, time.monotonic() + every, 0.0
    while process.poll() is None:
        time.sleep(0.05)
        writers = watch.writers()
        if not writers or time.monotonic() < next_kill:
            continue
        next_kill = time.monotonic() + every
        if stop is not None and count:
            begin = time.monotonic()
            process.send_signal(stop)
            process.wait()
            ended = time.monotonic() - begin
            break
        try:
            os.kill(rng.choice(writers), signal.SIGKILL)
            count += 1
        except ProcessLookupError:
            pass
    return process.wait(), count, ended


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--labels", action="store_true", help="weighed, in place of drawn answers")
    parser.add_argument("--length", type=int, default=400, help="tokens of a prompt and its answer")
    parser.add_argument("--layers", type=int, default=2, help="of the model: more take longer")
    parser.add_argument("--stops", type=int, default=0, help="signals to the command itself")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        words = killed.job(place, args.rows, rng, args.labels)
        tiny.tiny_model_dir(place, padded_vocab_size=480, num_layers=args.layers)
        if not args.labels:
            words[words.index("--max-length") + 1] = str(args.length)
        plain, output = place / "plain.csv", place / "ray.csv"
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "glmlora", *words, "--output", str(plain)]
        assert subprocess.run(command, env=one, stdout=subprocess.DEVNULL).returncode == 0
        watch = Watch(Path(f"{output}.shards"), place / "kept")
        words += ["--output", str(output), "--engine", "ray", "--workers", str(args.workers)]
        total = 0
        for number in range(args.stops + 1):
            stop = (
                killed.SIGNALS[(number + 1) % len(killed.SIGNALS)] if number < args.stops else None
            )
            status, count, seconds = run(words, watch, args.every, rng, stop)
            total += count
            if output.exists() and not watch.folder.exists():
                break
            assert status == STATUS[stop], (status, stop)
            kept = len(watch.rows())
            print(
                f"{stop.name}: status {status} after {seconds:.2f} s, {kept} rows kept", flush=True
            )
        assert status == 0, status
        assert output.read_bytes() == plain.read_bytes(), "another output"
        assert watch.rows() == list(range(args.rows)), "a row is kept twice, or not"
        assert not watch.folder.exists(), "the folder of shards stays"
        print(f"{total} workers killed over {args.rows} rows: equal, each row kept once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
