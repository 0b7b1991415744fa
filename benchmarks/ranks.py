"""What it costs ranks to make one update together, at ChatGLM2-6B's shapes (LoRA, rank 8 on
query_key_value, float16): the exchange of the gradients beside the step, and what follows for
clusters.

    mpiexec -n 2 python benchmarks/ranks.py             # measures, then the model
    python benchmarks/ranks.py --step 56.5 --exchange 0.012     # the model alone, of these figures

Measured on two random layers: a step of 28 is that of one and 27 times what the second takes, each
rank with its share of 4 rows of 512 tokens; the gradients are as many as those of 28 layers (rank
112). Each rank has one thread. The model, which is no measurement: a ring, in which each node sends
and receives 2 (n - 1) / n of the gradients, and 2 (n - 1) messages of 30 us (10 GbE) or 3 us (100
Gb), at 85 % of the wire's speed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import glmlora  # noqa: E402
from glmlora.training.ranks import world  # noqa: E402

LAYERS, ROWS, TOKENS, LABELLED = 28, 4, 512, 4
GRADIENTS = LAYERS * 8 * (4096 + 4608)
WIRES = {"10 GbE": (10e9, 30e-6), "100 Gb": (100e9, 3e-6)}


def adapted(directory: str, rank: int) -> Any:
    """The model with an adapter that is trained."""
    model = glmlora.AutoModel.from_pretrained(directory, compute_dtype=os.environ.get("COMPUTE"))
    config = glmlora.LoraConfig(r=rank, lora_dropout=0.1, target_modules=["query_key_value"])
    glmlora.get_peft_model(model, config)
    model.core.set_trainable([n for n in model.core.names() if ".lora_" in n])
    return model


def step_seconds(directory: str, rows: int) -> float:
    """Forward, backward and update of so many rows, the faster of two."""
    core = adapted(directory, 8).core
    ids = np.arange(rows * TOKENS) % 60000
    lengths = np.full(rows, TOKENS)
    at = np.concatenate([np.arange(-LABELLED - 1, -1) + TOKENS * (i + 1) for i in range(rows)])
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        core.backward(ids, lengths, at, ids[at + 1])
        core.step(1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0)
        times.append(time.perf_counter() - begun)
    return min(times)


def measure(ranks: Any) -> tuple[float, float]:
    """(seconds of a step of a rank, of an exchange), of the slowest rank."""
    from six_b import make

    glmlora.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = ranks.from_first(lambda: folder)
        if ranks.rank == 0:
            for layers in (1, 2):
                path = Path(place) / str(layers)
                path.mkdir()
                make(path, num_layers=layers)
        ranks.agree()
        rows = max(1, ROWS // ranks.size)
        one, two = (step_seconds(f"{place}/{layers}", rows) for layers in (1, 2))
        core = adapted(f"{place}/2", 8 * LAYERS // 2).core
        assert core.gradient_size == GRADIENTS
        buffer, times = np.empty(1 << 22, np.float32), []
        for _ in range(30):
            ranks.agree()  # so that none waits for another in the time that follows
            begun = time.perf_counter()
            ranks.agree(1.0, 2.0)
            ranks.add_gradients(core, buffer)
            ranks.agree(0)
            times.append(time.perf_counter() - begun)
        own = one + (LAYERS - 1) * (two - one), statistics.median(times)
        step, exchange = ranks.agree(*own).max(axis=0).tolist()
    return step, exchange


def ring(nodes: int, bits: float, latency: float) -> float:
    """Seconds of an all-reduce of the gradients."""
    return 2 * (nodes - 1) / nodes * GRADIENTS * 4 * 8 / (0.85 * bits) + 2 * (nodes - 1) * latency


def main() -> None:
    """Measure unless told, then print the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--step", type=float, help="seconds of a rank's share of an update")
    parser.add_argument("--exchange", type=float, help="seconds of the exchange within a machine")
    args = parser.parse_args()
    ranks = world()
    step, exchange = args.step, args.exchange
    if step is None or exchange is None:
        with ranks.together():
            step, exchange = measure(ranks)
    if ranks.rank:
        return
    print(f"{GRADIENTS} gradients, {GRADIENTS * 4 / 1e6:.1f} MB; {ranks.size} ranks")
    print(f"step of a rank    {step:8.2f} s")
    print(f"exchange          {exchange * 1e3:8.2f} ms: {100 * exchange / step:.3f} % of the step")
    print("\nmodel: the exchange between nodes, and its part of an update with that step")
    print(f"{'nodes':>6}" + "".join(f"{wire:>24}" for wire in WIRES))
    for nodes in (8, 16, 32, 64):
        cells = []
        for bits, latency in WIRES.values():
            seconds = exchange + ring(nodes, bits, latency)
            cells.append(f"{seconds * 1e3:10.1f} ms {100 * seconds / (step + seconds):8.3f} %")
        print(f"{nodes:>6}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
