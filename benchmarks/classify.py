"""`classify` at ChatGLM2-6B's shapes beside what it replaces, its memory, and heads beside LoRA.

    python benchmarks/classify.py [--runs 3] [--torch PYTHON] [--keep DIR] [--rows 16]

Prompts have the lengths of the competition's papers (bench.py: 16 quantiles, mean 495 tokens),
weights are random, 2 threads; seconds are those of 28 layers, found from fewer as worker.py tells.
Sides are run in turn, and a figure is the median of those of the rounds:

    classify      float16, two labels of three tokens
    classify int8 the same over int8 weights, with int8 products, where the processor has them
    batch_chat    the same rows, three new tokens, greedy
    transformers  the loop of the workflow's notebook: one row after the other, three new tokens;
                  in bfloat16 or in float32, whichever was faster in the first round
    limits.c      what the processor's products do at most, before each round

Memory is glm-tiny's over 500 and 2,000 such rows: what grows with the rows is the same for any
model. A head's epoch is a step over the features of 1,333 rows, 16,384 numbers each, that of LoRA
one over as many papers, 4 at a time. Prints a line a bar, and writes classify.json.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bench import (  # noqa: E402
    DENSE,
    MLP,
    OPENING,
    PROMPTS,
    QKV,
    UNEVEN,
    WHOLE,
    Bench,
    Side,
    processor,
)

from glmlora import head  # noqa: E402
from glmlora.files.vectors import VectorFile  # noqa: E402
from glmlora.tools.project import tiny_directory  # noqa: E402

ROWS, FEATURES = 1333, 16384  # of a table that trains a head
BARS = {
    "times the rows/s of transformers' row loop": 3.0,
    "times the rows/s of transformers' row loop, int8 products": 3.0,
    "times the rows/s of batch_chat": 1.15,
    "of the machine's peak of products": 0.85,
    "500 rows' memory / 2,000 rows'": 0.95,
    "LoRA's epoch / a head's": 50.0,
}


def needed_flops(lengths, opening):
    """Operations of the products that `classify` needs: the opening once, every other token of a
    prompt in all layers, but for the end of the last one, and the output layer a row; attention.
    """
    rest = DENSE + MLP
    tokens = opening + sum(n - opening for n in lengths)
    products = tokens * (WHOLE * QKV + (WHOLE - 1) * rest)
    products += len(lengths) * (rest + 65024 * 4096)
    seen = sum(n * n for n in lengths) - (len(lengths) - 1) * opening**2
    return 2 * products + 2 * 4096 * seen * WHOLE


def speed(bench, python, rows, runs):
    """{name: rows a second of each round} and the processor's peak of each, in GFLOP/s."""
    ours, theirs = PROMPTS[:rows], PROMPTS[: max(1, rows // 2)]
    predict = dict(job="predict", new=3)
    jobs = {
        "classify": ("float16", dict(job="classify", lengths=ours, opening=OPENING)),
        "batch_chat": ("float16", predict | dict(lengths=ours, opening=OPENING)),
    }
    if bench.side("int8 arithmetic"):
        jobs["classify int8"] = "int8 arithmetic", jobs["classify"][1]
    for dtype in ("bfloat16", "float32") if python else ():
        path, options = bench.folder / "six", ("--dtype", dtype)
        bench.sides[dtype] = Side(python, "peers/torch_peer.py", path, *options)
        jobs[dtype] = dtype, predict | dict(lengths=theirs, batch=1)
    rates, peaks = {name: [] for name in jobs}, []
    mean = sum(PROMPTS) / len(PROMPTS)  # a row's tokens; rates are of rows of this length
    for number in range(runs):
        peaks.append(bench.limits.measure()[bench.product])
        for name, (side, job) in jobs.items():
            time.sleep(0.1)  # the last side's threads wait for more work, for some milliseconds
            seconds = bench.side(side).ask(job)["seconds"]
            rates[name].append(sum(job["lengths"]) / mean / seconds)
            print(f"{name}: {rates[name][-1]:.4f} rows/s", file=sys.stderr, flush=True)
        if number == 0 and python:  # the better one goes on
            worse = min(("bfloat16", "float32"), key=lambda dtype: rates[dtype][0])
            bench.sides.pop(worse).close()
            del jobs[worse], rates[worse]
    return rates, peaks


def ratio(ours, theirs):
    """The median of the rounds' ratios, each beside its neighbour."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def memory(rows):
    """Peak of the anonymous memory of a process that classifies so many rows with glm-tiny."""
    side = Side(sys.executable, "worker.py", tiny_directory())
    lengths = [PROMPTS[i % len(PROMPTS)] for i in range(rows)]
    answer = side.ask(dict(job="classify", lengths=lengths, opening=OPENING, memory=True))
    side.close()
    return answer["peak"]


def head_seconds(folder):
    """Seconds of reading a table's features, of training a head on them in all, and of a step."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 2, ROWS)
    vectors = rng.normal(size=(ROWS, FEATURES)).astype(np.float32)
    vectors[:, :64] += classes[:, None]
    keys = [i.to_bytes(16, "big") for i in range(ROWS)]
    with VectorFile(folder / "features", FEATURES) as file:
        file.add(keys, vectors)
    start = time.perf_counter()
    with VectorFile(folder / "features", FEATURES) as file:
        assert all(file.read(key, row) for key, row in zip(keys, vectors, strict=True))
    read = time.perf_counter()
    steps, spent = [], []
    usual, solve = head._log_softmax, head._solve

    def counted(scores):
        steps.append(len(scores))
        return usual(scores)

    def timed(*args):
        begun = time.perf_counter()
        found = solve(*args)
        spent.append(time.perf_counter() - begun)
        return found

    head._log_softmax, head._solve = counted, timed
    try:
        head.fit_head(vectors, classes, 2)
    finally:
        head._log_softmax, head._solve = usual, solve
    step = sum(spent) / sum(steps) * ROWS  # of all rows; folds have fewer
    return read - start, time.perf_counter() - read, step


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=len(PROMPTS), help="prompts a run, at most 16")
    parser.add_argument("--torch", help="a Python with torch and transformers; default: of .peers")
    parser.add_argument("--keep", type=Path, help="make the model here, and use it the next time")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="bench."))
    begun, bench = time.perf_counter(), None
    try:
        bench = Bench(folder, 10, ["torch"] if args.torch is None else [])
        rates, peaks = speed(bench, args.torch or bench.torch, args.rows, args.runs)
        lora = bench.side("float16").ask(
            dict(job="lora", lengths=UNEVEN, labelled=3, checkpointing=False)
        )
        bench.close()
        with tempfile.TemporaryDirectory() as features:
            read, trained, step = head_seconds(Path(features))
        peak_memory = {rows: memory(rows) for rows in (500, 2000)}
    finally:
        if bench:
            bench.close()
        if not args.keep:
            shutil.rmtree(folder)
    median = {name: statistics.median(found) for name, found in rates.items()}
    epoch = lora["seconds"] * ROWS / len(UNEVEN) * sum(PROMPTS) / 16 / (sum(UNEVEN) / 4)
    lengths = PROMPTS[: args.rows]
    gflop = needed_flops(lengths, OPENING) / 1e9 / len(lengths)
    gflop *= sum(PROMPTS) / 16 / (sum(lengths) / len(lengths))  # of a row of the mean length
    found = {
        "times the rows/s of batch_chat": ratio(rates["classify"], rates["batch_chat"]),
        "of the machine's peak of products": gflop * ratio(rates["classify"], peaks),
        "500 rows' memory / 2,000 rows'": peak_memory[500] / peak_memory[2000],
        "LoRA's epoch / a head's": epoch / step,
    }
    for dtype in {"bfloat16", "float32"} & set(median):
        loop = "times the rows/s of transformers' row loop"
        found[loop] = ratio(rates["classify"], rates[dtype])
        if "classify int8" in rates:
            found[f"{loop}, int8 products"] = ratio(rates["classify int8"], rates[dtype])
    facts = dict(machine=processor(), seconds=round(time.perf_counter() - begun))
    facts |= dict(rows_per_second=rates, median=median, peak_gflop_s=peaks)
    facts |= dict(peak_memory=peak_memory, lora_epoch_seconds=epoch, found=found, bars=BARS)
    facts |= dict(head=dict(read_seconds=read, all_seconds=trained, epoch_seconds=step))
    (args.out / "classify.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(facts["machine"], f"{facts['seconds']} s")
    print(", ".join(f"{name} {rate:.4f} rows/s" for name, rate in median.items()))
    print(f"memory: {', '.join(f'{n} rows {b / 1e6:.0f} MB' for n, b in peak_memory.items())}")
    print(
        f"{ROWS} rows: LoRA epoch {epoch:.0f} s; head: features read in {read:.2f} s, an epoch "
        f"{1e3 * step:.1f} ms, all of its training {trained:.1f} s"
    )
    for what, least in BARS.items():
        if what in found:
            met = "met" if found[what] >= least else "NOT MET"
            print(f"{found[what]:10.3g} {what} (bar {least:g}): {met}")


if __name__ == "__main__":
    main()
