"""Everything that the README says about speed, in one table: ours, the machine's limit, a peer.

    make bench          (python benchmarks/bench.py [--reps 3] [--layers 2] [--out benchmarks])

Weights are random at ChatGLM2-6B's shapes, with few layers so that it ends in ten minutes; each
figure is the median of interleaved runs: ours, then the peer's, again. The machine's limits
(limits.c) are measured before and between the parts. The peer is torch + transformers (+ peft)
where they are installed (benchmarks/peers), in the number type that is fast on the processor; its
columns stay empty elsewhere. Writes results.json, and bench.png where matplotlib is installed: cost
against tokens, attention's memory against length, decoding against context.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import six_b  # noqa: E402

SHAPES = [(4608, 4096), (27392, 4096), (4096, 13696)]
TINY = dict(
    hidden_size=64,
    ffn_hidden_size=172,
    num_layers=4,
    num_attention_heads=4,
    multi_query_group_num=2,
    kv_channels=16,
    padded_vocab_size=1024,
    seq_length=512,
    torch_dtype="float32",
)
UNEVEN = [33, 65, 105, 240]  # tokens of four papers, a quarter as long as real ones


class Side:
    """A worker process; `ask` sends a job and waits for its answer."""

    def __init__(self, script, directory, *options):
        command = [sys.executable, str(HERE / script), str(directory), *map(str, options)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ, TQDM_DISABLE="1"),
        )
        self.ready = json.loads(self.process.stdout.readline())

    def ask(self, job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise RuntimeError(f"{self.process.args[1]}: {job}: {answer['error']}")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Limits:
    """What the machine does at most: the best that limits.c saw so far in this run."""

    def __init__(self, folder):
        self.program = str(folder / "limits")
        source = str(HERE / "limits.c")
        flags = ["-O3", "-march=native", "-std=c11"]
        subprocess.run(["gcc", *flags, source, "-o", self.program, "-pthread"], check=True)
        self.best = {}

    def measure(self):
        out = subprocess.run([self.program, "2"], capture_output=True, text=True, check=True)
        for name, value in json.loads(out.stdout).items():
            self.best[name] = max(value, self.best.get(name, 0))


class Bench:
    """Runs jobs and keeps rows of the table."""

    def __init__(self, reps, limits):
        self.reps, self.limits, self.rows = reps, limits, []

    def run(self, sides, reps=None):
        """sides: {name: (Side, job)}; one row for each, in the order given. Returns medians."""
        answers = {name: [] for name in sides}
        for _ in range(reps or self.reps):
            for name, (side, job) in sides.items():
                answers[name].append(side.ask(dict(job)))
        medians = {}
        for name, runs in answers.items():
            medians[name] = dict(runs[-1], seconds=statistics.median(r["seconds"] for r in runs))
        return medians

    def row(self, what, seconds, rate=None, unit="", limit=None, peer=None, note=""):
        """rate in `unit`; limit: name in limits.c's line; peer: its seconds."""
        self.rows.append(
            dict(job=what, seconds=seconds, rate=rate, unit=unit, limit=limit, peer=peer, note=note)
        )
        share = f"{rate / self.limits.best[limit]:7.0%}" if limit else " " * 7
        beside = f"{peer:9.3f} {peer / seconds:6.2f}x" if peer else " " * 17
        told = f"{rate:8.1f} {unit:8}" if rate else " " * 17
        print(f"{what:44} {seconds:9.3f} {told} {share} {beside}  {note}", flush=True)


def products(bench, ours, peer):
    for out, inp in SHAPES:
        for kind, what in (("F32", "forward"), ("F16", "forward"), ("F16", "dx")):
            job = dict(job="gemm", rows=512, out=out, inp=inp, kind=kind, what=what)
            sides = {"ours": (ours, job)}
            if peer:
                sides["peer"] = (peer, dict(job, kind="F32"))
            m = bench.run(sides, max(5, bench.reps))
            flops = 2e-9 * 512 * out * inp / m["ours"]["seconds"]
            name = f"{what} 512 x ({out}, {inp}) {kind}"
            peer_seconds = m["peer"]["seconds"] if peer else None
            bench.row(name, m["ours"]["seconds"], flops, "GFLOP/s", "fma_gflop_s", peer_seconds)


def decoding(bench, sides, peer):
    for rows, context in ((1, 128), (16, 16)):
        job = dict(job="decode", rows=rows, context=context, steps=6)
        jobs = {name: (side, job) for name, side in sides.items()}
        if peer:
            jobs["peer"] = (peer, job)
        m = bench.run(jobs)
        for name in sides:
            read = sides[name].embedding_free / (m[name]["seconds"] / 6) / 1e9
            peer_step = m["peer"]["seconds"] / 6 if peer else None
            what = f"decode, {rows} rows, context {context}, {name}"
            share = "read_gb_s" if rows == 1 else None
            bench.row(what, m[name]["seconds"] / 6, read, "GB/s", share, peer_step)


def prefill(bench, sides, peer, one_thread):
    job = dict(job="prefill", tokens=512)
    jobs = {name: (side, job) for name, side in sides.items()}
    jobs["one thread"] = (one_thread, job)
    if peer:
        jobs["peer"] = (peer, job)
    m = bench.run(jobs)
    for name in sides:
        peer_seconds = m["peer"]["seconds"] if peer else None
        seconds = m[name]["seconds"]
        bench.row(
            f"prefill of 512 tokens, {name}", seconds, 512 / seconds, "tokens/s", None, peer_seconds
        )
    gain = m["one thread"]["seconds"] / m["float16"]["seconds"]
    bench.row("prefill, 2 threads", m["float16"]["seconds"], note=f"{gain:.2f}x one thread")


def training(bench, sides, peer, one_thread, flops):
    for lengths, told in (([128] * 4, "4 x 128"), (UNEVEN, "4 uneven papers")):
        for checkpointing in (False, True):
            job = dict(job="lora", lengths=lengths, labelled=3, checkpointing=checkpointing)
            jobs = {name: (side, job) for name, side in sides.items()}
            if lengths is not UNEVEN and not checkpointing:
                jobs["one thread"] = (one_thread, job)
            if peer:
                jobs["peer"] = (peer, job)
            m = bench.run(jobs, 2)
            for name in sides:
                a = m[name]
                note = f"{a['beyond_weights'] / 1e9:.2f} GB beyond the weights"
                if peer:
                    note += f", peer {m['peer']['beyond_weights'] / 1e9:.2f}"
                kept = "2 GiB kept" if checkpointing else "all kept"
                what = f"LoRA step, {told}, {kept}, {name}"
                peer_seconds = m["peer"]["seconds"] if peer else None
                rate = flops * a["tokens"] / a["seconds"] / 1e9
                bench.row(what, a["seconds"], rate, "GFLOP/s", "fma_gflop_s", peer_seconds, note)
            if "one thread" in m:
                gain = m["one thread"]["seconds"] / m["float16"]["seconds"]
                seconds = m["float16"]["seconds"]
                bench.row("LoRA step, 2 threads", seconds, note=f"{gain:.2f}x one thread")


def prediction(bench, ours, peer):
    job = dict(job="predict", lengths=[400, 420, 440, 460, 480, 430, 450, 440], new=3)
    jobs = {"ours": (ours, job)} | ({"peer": (peer, job)} if peer else {})
    m = bench.run(jobs, 2)
    seconds = m["ours"]["seconds"]
    peer_seconds = m["peer"]["seconds"] if peer else None
    bench.row(
        "8 prompts of 440 tokens, 3 new ones", seconds, 8 / seconds, "rows/s", None, peer_seconds
    )


def tiny(bench, ours, peer):
    for job, told, steps in (
        (dict(job="generate", tokens=64), "tiny model: a token of generate", 64),
        (
            dict(job="lora", lengths=[64] * 4, labelled=3, checkpointing=False),
            "tiny model: LoRA step, 4 x 64",
            1,
        ),
    ):
        jobs = {"ours": (ours, job)} | ({"peer": (peer, job)} if peer else {})
        m = bench.run(jobs, 9)
        peer_seconds = m["peer"]["seconds"] / steps if peer else None
        bench.row(told, m["ours"]["seconds"] / steps, peer=peer_seconds)


def curves(ours):
    """Points (x, y) of each curve; one run each."""
    found = {"seconds of a LoRA step": [], "GB beyond the weights": [], "attention MB": []}
    found["seconds of a decoding step"] = []
    for tokens in (64, 128, 256, 512):
        a = ours.ask(dict(job="lora", lengths=[tokens], labelled=3, checkpointing=False))
        found["seconds of a LoRA step"].append((tokens, a["seconds"]))
        found["GB beyond the weights"].append((tokens, a["beyond_weights"] / 1e9))
    for tokens in (512, 1024, 2048, 8192):
        a = ours.ask(dict(job="attention", tokens=tokens))
        found["attention MB"].append((tokens, (a["bytes"] + a["more"]) / 1e6))
    for context in (16, 512, 1024, 2048):
        a = ours.ask(dict(job="decode", rows=1, context=context, steps=5))
        found["seconds of a decoding step"].append((context, a["seconds"] / 5))
    return found


def draw(found, path):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("bench.png: not drawn, matplotlib is not installed")
    figure = Figure(figsize=(10, 7), layout="constrained")
    for place, (name, points) in enumerate(found.items()):
        axes = figure.add_subplot(2, 2, place + 1)
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.set(xlabel="tokens", title=name, ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    print(path)


def processor():
    with open("/proc/cpuinfo") as f:
        lines = f.read().splitlines()
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    flags = next((x.split() for x in lines if x.startswith("flags")), [])
    sets = [s for s in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if s in flags]
    return f"{name or platform.processor()} ({', '.join(sets)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", default=str(HERE))
    args = parser.parse_args()
    begun = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="bench."))
    opened = []

    def side(script, directory, *options):
        opened.append(Side(script, directory, *options))
        return opened[-1]

    try:
        limits = Limits(folder)
        limits.measure()
        (folder / "six").mkdir()
        (folder / "tiny").mkdir()
        six_b.make(folder / "six", num_layers=args.layers)
        six_b.make(folder / "tiny", **TINY)
        bench = Bench(args.reps, limits)
        has_peer = all(importlib.util.find_spec(n) for n in ("torch", "transformers", "peft"))
        script = "peers/torch_peer.py"
        peer = side(script, folder / "six") if has_peer else None
        tiny_peer = side(script, folder / "tiny") if has_peer else None
        ours = side("worker.py", folder / "six")
        int8 = side("worker.py", folder / "six", "--bits", 8)
        int4 = side("worker.py", folder / "six", "--bits", 4)
        groups = side("worker.py", folder / "six", "--bits", 4, "--group", 32)
        single = side("worker.py", folder / "six", "--threads", 1)
        embedding = 2 * 65024 * 4096
        for one in (ours, int8, int4, groups):
            one.embedding_free = one.ready["weights"] - embedding  # a row of it is read
        print(processor(), platform.platform(), "2 threads")
        print(
            f"{'job':44} {'seconds':>9} {'rate':>8} {'':8} {'limit':>7} {'peer s':>9} {'gain':>7}"
        )
        products(bench, ours, peer)
        limits.measure()
        sides = {"float16": ours, "int8": int8, "int4": int4, "int4 groups": groups}
        decoding(bench, sides, peer)
        limits.measure()
        prefill(bench, {"float16": ours, "int4 groups": groups}, peer, single)
        # forward, and backward to the inputs below the last layer's unread rows
        per_layer = 4608 * 4096 + 4096 * 4096 + 3 * 4096 * 13696
        flops = 4.0 * (args.layers - 1) * per_layer + 2.0 * 4608 * 4096
        training(bench, {"float16": ours, "int4 groups": groups}, peer, single, flops)
        prediction(bench, ours, peer)
        tiny(bench, side("worker.py", folder / "tiny"), tiny_peer)
        found = curves(ours)
        out = Path(args.out)
        draw(found, out / "bench.png")
        told = dict(machine=processor(), layers=args.layers, reps=args.reps, limits=limits.best)
        told |= dict(rows=bench.rows, curves=found, seconds=round(time.perf_counter() - begun))
        (out / "results.json").write_text(json.dumps(told, indent=1) + "\n")
        print("limits:", json.dumps(limits.best), f"{time.perf_counter() - begun:.0f} s in all")
    finally:
        for one in opened:
            one.close()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
