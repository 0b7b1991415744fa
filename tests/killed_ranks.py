"""Kills one rank of a training run at random moments: all ranks must end within 10 s, the newest
checkpoint must be whole, and what goes on from it, by turns 2 and 3 ranks, must end with the bytes
of a run that nobody stopped.

    python tests/killed_ranks.py --kills 10

The run is `deterministic`, over a tiny model with random weights. Prints a line a kill; exit status
1 for the first that is not as it must be.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import mpi
import training

SECONDS = 10.0


def words(place: Path, out: Path, updates: int, resume: bool) -> list[str]:
    """The command: `updates` updates of 3 micro-batches of 2 rows."""
    given = {
        "model_name_or_path": place / "tiny-model",
        "dataset": "paper_label",
        "dataset_dir": place / "data",
        "output_dir": out,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": updates,
        "logging_steps": 10,
        "save_steps": 20,
        "save_total_limit": 3,
        "learning_rate": 1e-3,
    }
    flags = [str(w) for name, value in given.items() for w in (f"--{name}", value)]
    flags += ["--do_train", "--deterministic", "--disable_tqdm"]
    flags += ["--resume_from_checkpoint", "last"] if resume else []
    return [sys.executable, "-m", "glmlora", "train", *flags]


def main() -> int:
    """Run, kill and go on as often as asked; 0 where all was as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        training.model_dir(place)
        training.dataset_dir(place, 24)
        begun = time.monotonic()
        whole = mpi.start(2, words(place, place / "whole", args.updates, False))
        said = whole.communicate()[0]
        assert whole.returncode == 0, said[-3000:]
        length = time.monotonic() - begun
        print(f"a run that nobody stops: {length:.1f} s", flush=True)
        out, kills, sizes = place / "killed", 0, [2, 3]
        while True:
            n = sizes[kills % 2]
            resume = any(out.glob("checkpoint-*"))
            process = mpi.start(n, words(place, out, args.updates, resume))
            if kills < args.kills:
                time.sleep(rng.uniform(1, 5))
                ranks = mpi.ranks_of(process)
                if process.poll() is not None or len(ranks) < n:
                    print(f"rank at {kills}: nothing to kill: {len(ranks)} ranks", flush=True)
                    if process.poll() is not None:
                        break
                    process.kill()
                    process.communicate()
                    continue
                rank = rng.randrange(n)
                os.kill(ranks[rank], signal.SIGKILL)
                killed = time.monotonic()
                process.communicate()
                while any(Path(f"/proc/{pid}").exists() for pid in ranks.values()):
                    if time.monotonic() - killed > SECONDS:
                        print(f"kill {kills}: ranks live after {SECONDS} s")
                        return 1
                    time.sleep(0.01)
                took = time.monotonic() - killed
                newest = max((int(p.name[11:]) for p in out.glob("checkpoint-*")), default=0)
                kills += 1
                print(
                    f"kill {kills}: rank {rank} of {n}; all ended after {took:.2f} s; newest "
                    f"checkpoint {newest}",
                    flush=True,
                )
                if took > SECONDS or not process.returncode:
                    return 1
                continue
            said = process.communicate()[0]
            if process.returncode:
                print(said[-3000:])
                return 1
            break
        name = "adapter_model.safetensors"
        same = (out / name).read_bytes() == (place / "whole" / name).read_bytes()
        print(f"after {kills} kills: {'the same bytes' if same else 'OTHER BYTES'}")
        return 0 if same and kills == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
