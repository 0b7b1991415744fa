"""Every speed and memory bar of the project, in one table: ours, the machine's limit, the peers.

    make bench          (python benchmarks/bench.py [--minutes 6] [--only decode,prefill])

ChatGLM2-6B's shapes with random weights, 2 threads. Seconds are those of 28 layers; worker.py and
the peers tell how they are found from fewer. GLMLORA_ISA=avx2 measures another set than the best:
the limits are that set's, and llama.cpp is the one that `make peers SET=avx2` built. Sides are run
in turn, again and again, at most 5 times (`x5`), fewer where `--minutes` do not allow; a figure is
the median. limits.c is run between the runs, and a limit is the median of those. Peers
(benchmarks/peers) are torch + transformers + peft, in bfloat16 where the processor multiplies it,
and llama.cpp; rows stand without them where they are not installed. A bar is what the row has to
reach: a share of the limit, or how many times a peer's speed. Rows go to stderr as they come; the
table, results.json and bench.png (where matplotlib is installed) are written at the end.
"""

import argparse
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
sys.path[:0] = [str(HERE), str(HERE / "peers")]

import make_gguf  # noqa: E402
import six_b  # noqa: E402
from sides import SIX_B, glm_fields  # noqa: E402

from glmlora import _core  # noqa: E402

LAYERS, WHOLE, REPS = 2, 28, 5  # in the file, in the model, runs at most
QKV, DENSE, MLP = 4608 * 4096, 4096 * 4096, 3 * 4096 * 13696  # weights of a layer
MODULES = {
    "self_attention.query_key_value": (4608, 4096),
    "self_attention.dense": (4096, 4096),
    "mlp.dense_h_to_4h": (27392, 4096),
    "mlp.dense_4h_to_h": (4096, 13696),
}
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
# Tokens of real prompts (1,333 papers, order and text, glm-tiny's tokenizer, cut at 1,024): 16
# quantiles, mean 496, out of order as papers are; 4 quantiles as a batch, which padding makes 1.33
# times as long (random batches of 4: 1.30). All begin with the same 41 tokens.
PROMPTS = [268, 430, 533, 792, 410, 513, 684, 389, 491, 632, 367, 473, 592, 331, 452, 561]
UNEVEN, OPENING = [349, 441, 523, 654], 41
SHORTER = [n * 440 // 496 for n in PROMPTS]
FORECAST_ROWS = 2000
FORCED = os.environ.get("GLMLORA_ISA", "")  # of ours, the limits and llama.cpp alike


class Side:
    """A worker process; `ask` sends a job and waits for its answer."""

    def __init__(self, python, script, path, *options):
        command = [python, str(HERE / script), str(path), *map(str, options)]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.ready = json.loads(self.process.stdout.readline() or "{}")

    def last_words(self):
        """The last line of its stderr."""
        self.errors.seek(0)
        return self.errors.read().strip().rpartition("\n")[2]

    def ask(self, job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
        if "error" in answer:
            raise RuntimeError(f"{' '.join(self.process.args)}: {job}: {answer['error']}")
        return answer

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def forget(path):
    """Take a new file out of memory: it is read again as a file of another day is, in large pages;
    what has just been written lies in small ones."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Limits:
    """What the machine does at most with the instruction set that GLMLORA_ISA forces, by limits.c:
    `now`."""

    def __init__(self, folder, threads=2):
        self.threads = str(threads)
        self.program = str(folder / "limits")
        source = str(HERE / "limits.c")
        flags = ["-O3", "-march=native", "-std=c11"]
        subprocess.run(["gcc", *flags, source, "-o", self.program, "-pthread"], check=True)
        self.measure()

    def measure(self):
        out = subprocess.run(
            [self.program, self.threads, FORCED], capture_output=True, text=True, check=True
        )
        self.now = json.loads(out.stdout)
        return self.now


class Bench:
    """Opens sides when they are first needed, runs jobs on them and keeps rows of the table.
    MODELS: name -> what writes its directory."""

    MODELS = {
        "six": lambda directory: six_b.make(directory, num_layers=LAYERS),
        "tiny": lambda directory: six_b.make(directory, **TINY),
    }
    OURS = {
        "float16": (),
        "int8": ("--bits", 8),
        "int8 arithmetic": ("--bits", 8, "--compute", "int8"),
        "int4": ("--bits", 4),
        "int4, int8 arithmetic": ("--bits", 4, "--compute", "int8"),
        "int4 groups": ("--bits", 4, "--group", 32),
        "int4 groups, int8 arithmetic": ("--bits", 4, "--group", 32, "--compute", "int8"),
    }

    def __init__(self, folder, minutes, peers):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.minutes = folder, minutes
        self.limits, self.rows, self.sides, self.curves = Limits(folder), [], {}, {}
        for name, make in self.MODELS.items():
            if not any((folder / name).glob("*.safetensors")):
                (folder / name).mkdir(parents=True, exist_ok=True)
                make(folder / name)
                for file in (folder / name).glob("*.safetensors"):
                    forget(file)
        self.torch = "torch" in peers and interpreter("torch", "transformers", "peft")
        self.llama = "llama" in peers and interpreter("llama_cpp", among=LLAMA_PEERS)
        self.product = "bf16_gflop_s" if "bf16_gflop_s" in self.limits.now else "fma_gflop_s"

    def side(self, name):
        """The process of that name, or None where it cannot be: no peer, no such instructions."""
        if name not in self.sides:
            self.sides[name] = self.open(name)
        return self.sides[name]

    def open(self, name):
        six = self.folder / "six"
        if name in self.OURS:
            side = Side(sys.executable, "worker.py", six, "--whole", WHOLE, *self.OURS[name])
        elif name == "tiny":
            side = Side(sys.executable, "worker.py", self.folder / "tiny")
        elif name == "tiny torch":
            options = ("--whole", TINY["num_layers"], "--dtype", "float32")
            path = self.folder / "tiny"
            side = self.torch and Side(self.torch, "peers/torch_peer.py", path, *options)
        elif name in ("torch", "peft"):
            side = self.torch and Side(self.torch, "peers/torch_peer.py", six)
        else:
            kind = name.removeprefix("llama.cpp ")
            path = self.folder / f"{kind}.gguf"
            if self.llama and not path.exists():
                make_gguf.make(json.loads((six / "config.json").read_text()), path, kind)
                forget(path)
            side = self.llama and Side(self.llama, "peers/llama_peer.py", path)
        if side and not side.ready:
            print(f"{name}: left out, {side.last_words()}", file=sys.stderr)
            return None
        return side

    def close(self):
        for side in filter(None, self.sides.values()):
            side.close()
        self.sides.clear()

    def run(self, jobs, seconds):
        """jobs: {name: (side's name, job)}. Runs each in turn, again and again, for so many seconds
        of measured time in a bench of 10 minutes, and the limits between. Returns {name: the last
        answer with the median of its times, `every` time and the `limits` between them} without
        those that no side can do."""
        there = {n: (self.side(s), job) for n, (s, job) in jobs.items() if self.side(s)}
        answers, limits = {name: [] for name in there}, [self.limits.now]
        spent = 0.0  # without what the sides prepare for their first run
        for run in range(REPS):
            if run and spent * (run + 1) / run > seconds * self.minutes / 10:
                break
            for name, (side, job) in there.items():
                time.sleep(0.1)  # the last side's threads wait for more work, for some milliseconds
                answers[name].append(side.ask(dict(job)))
                spent += answers[name][-1]["measured"]
            limits.append(self.limits.measure())
        medians = {}
        for name, runs in answers.items():
            every = [r["seconds"] for r in runs]
            medians[name] = runs[-1] | dict(seconds=statistics.median(every), runs=len(runs))
            medians[name] |= dict(every=every, limits=limits)
        return medians

    def row(
        self,
        line,
        job,
        answer,
        *,
        rate=None,
        unit="",
        limit=None,
        peers=(),
        ratios=(),
        bars=(),
        note="",
    ):
        """One row. line: of the acceptance list; answer: of `run`; rate in `unit` at its median,
        and `limit` the name in limits.c's line; peers: {name: answer}; ratios: others, {what:
        times}; bars: {what: at least} of "limit", peers and ratios. A peer's ratio is the median of
        those of the runs, each beside its neighbour; a limit is the median of its own."""
        seconds, every = answer["seconds"], answer["every"]
        row = dict(line=line, job=job, seconds=seconds, runs=answer["runs"], every=every)
        row |= dict(rate=rate, unit=unit, note=note, bars=dict(bars), peers={}, ratios={})
        if limit in self.limits.now:
            values = [between[limit] for between in answer["limits"]]
            row |= dict(limit=dict(name=limit, values=values))
            row["ratios"]["limit"] = rate / statistics.median(values)
        for name, peer in dict(peers).items():
            row["peers"][name] = dict(seconds=peer["seconds"], every=peer["every"])
            pairs = zip(peer["every"], every, strict=True)
            row["ratios"][name] = statistics.median(p / s for p, s in pairs)
        row["ratios"] |= dict(ratios)
        row["met"] = verdict(row["bars"], row["ratios"])
        self.rows.append(row)
        print(table_line(row), file=sys.stderr, flush=True)


def verdict(bars, ratios):
    """Whether the bars are met; None where there is nothing to compare with."""
    known = [ratios[what] >= least for what, least in bars.items() if what in ratios]
    return all(known) if known else None


def times(answer, factor):
    """The answer with its times so many times as long."""
    every = [s * factor for s in answer["every"]]
    return answer | dict(seconds=answer["seconds"] * factor, every=every)


def table_line(row):
    """A row of the table as text."""
    facts = f"{row['rate']:9.2f} {row['unit']:8}" if row["rate"] else " " * 18
    beside = []
    for what, ratio in row["ratios"].items():
        bar = row["bars"].get(what)
        wanted = (
            "" if bar is None else f" (bar {bar:.0%})" if what == "limit" else f" (bar {bar:g})"
        )
        if what == "limit":
            beside.append(f"limit {ratio:.0%}{wanted}")
        else:
            peer = row["peers"].get(what)
            time_told = f" {peer['seconds']:.4g} s" if peer else ""
            beside.append(f"{what}{time_told} {ratio:.2f}x{wanted}")
    met = {True: "met", False: "NOT MET", None: ""}[row["met"]]
    note = f"  [{row['note']}]" if row["note"] else ""
    return (
        f"{row['line']:>3} {row['job']:44} {row['seconds']:10.4g} s x{row['runs']} {facts} "
        f"{met:8}{'; '.join(beside)}{note}"
    )


def those(medians, names):
    """{name as shown: answer} of the peers that answered."""
    return {shown: medians[n] for shown, n in names.items() if n in medians}


def step_flops(lengths, labelled, config=SIX_B):
    """Of a LoRA step on queries, keys and values: what the mathematics needs. Below the lowest
    adapter nothing goes back, and of the last layer's rows after attention only the labelled are
    read."""
    f = glm_fields(config)
    hidden, width = f["hidden_size"], f["num_attention_heads"] * f["head_dim"]
    qkv = hidden * (width + 2 * f["num_key_value_heads"] * f["head_dim"])
    rest = hidden * (width + 3 * f["intermediate_size"])
    layers, head = f["num_hidden_layers"], f["vocab_size"] * hidden
    tokens, read = sum(lengths), labelled * len(lengths)
    square = sum(n * n for n in lengths)
    forward = tokens * (layers * qkv + (layers - 1) * rest) + read * (rest + head)
    back = tokens * (layers - 1) * (qkv + rest) + read * (rest + head)
    return 2 * (forward + back) + 3 * 2 * width * square * layers  # attention: causal, 1 + 2 times


def prefill_flops(tokens):
    rest = DENSE + MLP
    needed = tokens * (WHOLE * QKV + (WHOLE - 1) * rest) + rest + 65024 * 4096
    return 2 * needed + 2 * 4096 * tokens * tokens * WHOLE


def gemm(b):
    kinds = {
        "bfloat16": ("F16", "bf16_gflop_s", "BF16", {"limit": 0.88, "torch": 1.0}),
        "float32": ("F32", "fma_gflop_s", "F32", {"limit": 0.85, "torch": 1.05}),
        "int8": ("I8", "int8_gop_s", None, {"limit": 0.75}),
    }
    for rows, seconds in ((512, 15), (2048, 40)):
        jobs = {}
        for compute, (kind, limit, peer, _) in kinds.items():
            for module, (out, inp) in MODULES.items() if limit in b.limits.now else ():
                job = dict(job="gemm", module=module, rows=rows, what="forward")
                jobs[compute, module] = ("float16", job | dict(kind=kind, compute=compute))
                if peer:
                    job = dict(job="gemm", out=out, inp=inp, rows=rows, what="forward", kind=peer)
                    jobs["torch", compute, module] = ("torch", job)
        m = b.run(jobs, seconds)
        for compute, (_, limit, _, bars) in kinds.items():
            for module, (out, inp) in MODULES.items():
                if (compute, module) not in m:
                    continue
                mine = m[compute, module]
                peers = those(m, {"torch": ("torch", compute, module)})
                flops = 2e-9 * rows * out * inp / mine["seconds"]
                job = f"{compute} {rows} x ({out}, {inp})"
                b.row(1, job, mine, rate=flops, unit="GFLOP/s", limit=limit, peers=peers, bars=bars)


LLAMA = {"float16": "F16", "int8": "Q8_0", "int8 arithmetic": "Q8_0"}
LLAMA |= {n + a: "Q4_0" for n in ("int4", "int4 groups") for a in ("", ", int8 arithmetic")}


def decode(b):
    kinds = ("float16", "int8", *(name for name, kind in LLAMA.items() if kind == "Q4_0"))
    job = dict(job="decode", rows=1, context=128, steps=6)
    jobs = {name: (name, job) for name in kinds} | {"torch": ("torch", job)}
    jobs |= {LLAMA[n]: (f"llama.cpp {LLAMA[n]}", job) for n in kinds}
    m = b.run(jobs, 25)
    for name in kinds:
        rate = b.side(name).ready["read"] / m[name]["seconds"] / 1e9
        kind = LLAMA[name]
        peers = those(m, {"torch": "torch", kind: kind})
        bars = {"limit": 0.9, "torch": 2.5, kind: 1.0 if kind == "F16" else 1.1}
        facts = dict(rate=rate, unit="GB/s", limit="read_gb_s", peers=peers, bars=bars)
        b.row(2, f"decode, 1 row, context 128, {name}", m[name], **facts)
    job = dict(job="decode", rows=16, context=64, steps=6)
    kinds = ("float16", "int8", "int8 arithmetic", "int4 groups", "int4 groups, int8 arithmetic")
    jobs = {n: (n, job | dict(layers=[1, 3])) for n in kinds} | {"torch": ("torch", job)}
    jobs |= {LLAMA[n]: (f"llama.cpp {LLAMA[n]}", job) for n in kinds}
    m = b.run(jobs, 20)
    for name in kinds:
        peers = those(m, {"torch": "torch", LLAMA[name]: LLAMA[name]})
        facts = dict(rate=16 / m[name]["seconds"], unit="tokens/s", peers=peers)
        b.row(8, f"decode, 16 rows, context 64, {name}", m[name], **facts, bars={"torch": 2.0})


def prefill(b):
    job = dict(job="prefill", tokens=512)
    kinds = {
        "float16": {"torch": 1.0, "F16": 1.8},
        "int8 arithmetic": {"torch": 1.7, "Q8_0": 2.5},
        "int4 groups": {"Q4_0": 1.4},
        "int4 groups, int8 arithmetic": {"Q4_0": 1.8},
    }
    jobs = {name: (name, job) for name in kinds} | {"torch": ("torch", job)}
    jobs |= {k: (f"llama.cpp {k}", job) for k in ("F16", "Q8_0", "Q4_0")}
    m = b.run(jobs, 40)
    for name, bars in kinds.items():
        if name not in m:
            continue
        seconds = m[name]["seconds"]
        limit = "int8_gop_s" if "arithmetic" in name else b.product
        peers = those(m, {"torch": "torch", LLAMA[name]: LLAMA[name]})
        note = f"{512 / seconds:.1f} tokens/s"
        facts = dict(
            rate=prefill_flops(512) / seconds / 1e9, unit="GFLOP/s", limit=limit, note=note
        )
        b.row(3, f"prefill of 512 tokens, {name}", m[name], **facts, peers=peers, bars=bars)


def predict(b):
    job = dict(job="predict", lengths=SHORTER, new=3, opening=OPENING)
    bars = {"float16": {"torch": 1.2, "F16": 2.0}, "int8 arithmetic": {"torch": 2.2, "Q8_0": 2.0}}
    bars |= {"int4 groups, int8 arithmetic": {"Q4_0": 2.0}}
    jobs = {name: (name, job) for name in bars} | {"torch": ("torch", job)}
    jobs |= {LLAMA[n]: (f"llama.cpp {LLAMA[n]}", job) for n in bars}
    m = b.run(jobs, 90)
    scale = FORECAST_ROWS / len(PROMPTS) * sum(PROMPTS) / sum(SHORTER)
    for name in bars:
        if name in m:
            peers = those(m, {"torch": "torch", LLAMA[name]: LLAMA[name]})
            facts = dict(rate=16 / m[name]["seconds"], unit="rows/s", peers=peers, bars=bars[name])
            b.row(8, f"16 prompts of 440, 3 new tokens, {name}", m[name], **facts)
            mine, later = times(m[name], scale), {n: times(a, scale) for n, a in peers.items()}
            hours = {"hours:": mine} | later
            note = ", ".join(f"{n} {a['seconds'] / 3600:.1f}" for n, a in hours.items())
            b.row(8, f"forecast: 2,000 prompts of 496, {name}", mine, peers=later, note=note)


def lora(b):
    """Ours with all layers' activations kept and with none; between the two, time and memory are a
    straight line in the layers kept, and a row says how many are so that a bar of memory holds."""
    job = dict(job="lora", lengths=[512] * 4, labelled=3, checkpointing=False)
    again = job | dict(checkpointing=True)
    kinds = ("float16", "int8 arithmetic", "int4 groups")
    jobs = {(n, kept): (n, job if kept else again) for n in kinds for kept in (True, False)}
    jobs |= {"peft": ("peft", job), "peft checkpointing": ("peft", again)}
    m = b.run(jobs, 90)
    peers = those(m, {n: n for n in ("peft", "peft checkpointing")})
    theirs = {n: m[n]["beyond_weights"] for n in peers}

    def kept(name, layers):
        most, least = m[name, True], m[name, False]
        part, mixed = layers / WHOLE, dict(least)
        for what in ("seconds", "beyond_weights", "resident"):
            mixed[what] += (most[what] - least[what]) * part
        pairs = zip(most["every"], least["every"], strict=True)
        return mixed | {"every": [n + (a - n) * part for a, n in pairs]}

    def fitting(name, what, most):
        """Layers that can be kept."""
        none, every = m[name, False][what], m[name, True][what]
        return max(0, min(WHOLE, int((most - none) / (every - none) * WHOLE)))

    def row(line, name, layers, **facts):
        mine = kept(name, layers)
        rate, beyond = mine["tokens"] / mine["seconds"], mine["beyond_weights"]
        memory = [f"{n} {v / 1e9:.1f}" for n, v in {"": beyond, **theirs}.items()]
        note = f"{rate:.1f} tokens/s, GB beyond the weights:{', '.join(memory)}"
        if line == 7:
            note += f"; {mine['resident'] / 1e9:.1f} GB resident"
        facts = dict(peers=peers, ratios={}) | facts
        facts["ratios"] |= {f"memory of {n}": v / beyond for n, v in theirs.items()}
        facts |= dict(rate=step_flops([512] * 4, 3) / mine["seconds"] / 1e9, unit="GFLOP/s")
        facts |= dict(limit="int8_gop_s" if "arithmetic" in name else b.product, note=note)
        b.row(line, f"LoRA step, 4 x 512, {name}, {layers} kept", mine, **facts)

    half = theirs.get("peft", 16e9) / 2
    for line, name, bars in (
        (4, "float16", {"limit": 0.85, "peft": 1.35, "peft checkpointing": 1.8}),
        (5, "int8 arithmetic", {"peft": 2.2, "peft checkpointing": 2.8}),
    ):
        if (name, True) in m:
            bars |= {"memory of peft": 2.0}
            most = fitting(name, "beyond_weights", half)
            row(line, name, most, bars=bars)
            for layers in {WHOLE, 0} - {most}:
                row(line, name, layers)
    layers = fitting("int4 groups", "resident", 6.5e9)
    small = kept("int4 groups", layers)["resident"]
    beside = peers | {"float16 base": kept("float16", layers)}
    bars = {"float16 base": 0.8, "6.5 GB": 1.0}
    row(7, "int4 groups", layers, peers=beside, ratios={"6.5 GB": 6.5e9 / small}, bars=bars)


def uneven(b):
    job = dict(job="lora", lengths=UNEVEN, labelled=3, checkpointing=False)
    jobs = {"float16": ("float16", job)}
    jobs |= {"ckpt": ("peft", job | dict(checkpointing=True))}
    m = b.run(jobs, 40)
    mine = m["float16"]
    facts = dict(
        rate=step_flops(UNEVEN, 3) / mine["seconds"] / 1e9, unit="GFLOP/s", limit=b.product
    )
    facts |= dict(peers=those(m, {"peft checkpointing": "ckpt"}))
    note = f"{mine['tokens'] / mine['seconds']:.1f} real tokens/s"
    b.row(
        6, "LoRA step, 4 uneven papers", mine, **facts, bars={"peft checkpointing": 2.5}, note=note
    )


def threads(b):
    product = dict(job="gemm", module="mlp.dense_h_to_4h", rows=512, kind="F16", what="forward")
    cases = {
        "prefill of 256 tokens": dict(job="prefill", tokens=256),
        "LoRA step, 4 x 64": dict(job="lora", lengths=[64] * 4, labelled=3, checkpointing=False),
        "product, 512 rows": product
        | dict(compute="bfloat16" if "bf16" in b.product else "float32"),
    }
    jobs = {(n, k): ("float16", job | dict(threads=k)) for n, job in cases.items() for k in (2, 1)}
    m = b.run(jobs, 20)
    for name in cases:
        one = {"1 thread": m[name, 1]}
        b.row(9, f"{name}, 2 threads", m[name, 2], peers=one, bars={"1 thread": 1.85})


def tiny(b):
    # many steps on end: one of 2 ms alone would measure how the caches were left by the others
    step = dict(job="lora", lengths=[64] * 4, labelled=3, checkpointing=False, steps=20)
    for job, facts, each, bar in (
        (dict(job="generate", tokens=64), "tiny model: a token of generate", 64, 50),
        (step, "tiny model: LoRA step, 4 x 64", 1, 20),
    ):
        m = b.run({"ours": ("tiny", job), "torch": ("tiny torch", job)}, 8)
        peers = {n: times(a, 1 / each) for n, a in those(m, {"torch": "torch"}).items()}
        b.row(10, facts, times(m["ours"], 1 / each), peers=peers, bars={"torch": bar})


def cold(b):
    """Whole processes: start, import, open, feed 8 tokens; the files are in memory, and what Python
    compiles lies beside its source, as after an installation."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    commands = {"ours": [sys.executable, str(HERE / "worker.py"), str(b.folder / "six")]}
    if b.torch:
        if not (b.folder / "saved/model.safetensors").exists():
            b.side("torch").ask(dict(job="save", directory=str(b.folder / "saved")))
            forget(b.folder / "saved/model.safetensors")
        commands["torch"] = [b.torch, str(HERE / "peers/torch_peer.py"), str(b.folder / "saved")]
    every = {name: [] for name in commands}
    for _ in range(4):
        for name, command in commands.items():
            start = time.perf_counter()
            words = [*command, "--cold"]
            subprocess.run(words, check=True, capture_output=True, env=environment)
            every[name].append(time.perf_counter() - start)
    answers = {  # the first run reads the files
        n: dict(seconds=statistics.median(t[1:]), runs=3, every=t[1:]) for n, t in every.items()
    }
    facts = dict(peers=those(answers, {"torch": "torch"}), bars={"torch": 10})
    b.row(10, "start, import, open, feed 8", answers["ours"], **facts, note=f"{LAYERS} layers")


def curves(b):
    """Points (x, y) of each curve; the median of `run` each."""
    found = b.curves
    side = b.side("float16")
    found["seconds of a LoRA step"], found["GB beyond the weights"] = [], []
    for tokens in (128, 256, 512, 1024):
        a = side.ask(dict(job="lora", lengths=[tokens], labelled=3, checkpointing=False))
        found["seconds of a LoRA step"].append((tokens, a["seconds"]))
        found["GB beyond the weights"].append((tokens, a["beyond_weights"] / 1e9))
    found["attention: MB"] = []
    for tokens in (512, 1024, 2048, 8192):
        a = side.ask(dict(job="attention", tokens=tokens))
        found["attention: MB"].append((tokens, a["bytes"] / 1e6))
    found["seconds of a decoding step"] = []
    for context in (16, 512, 1024, 2048):
        job = dict(job="decode", rows=1, context=context, steps=9, layers=[1, 2])
        found["seconds of a decoding step"].append((context, side.ask(job)["seconds"]))
    for name, points in found.items():
        (x, y), (x_end, y_end) = points[0], points[-1]
        note = ", ".join(f"{n}: {v:.3g}" for n, v in points)
        note = f"{note}; {y_end / y:.2f} times"
        b.row(
            12, f"{name}, {x} to {x_end} tokens", dict(seconds=y_end, runs=1, every=[]), note=note
        )


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


PEERS = [sys.executable, str(HERE.parent / ".peers/bin/python")]
LLAMA_PEERS = [str(HERE.parent / f".peers-{FORCED}/bin/python")] if FORCED else PEERS


def interpreter(*modules, among=PEERS):
    """The first Python of these that has the modules; None without."""
    find = f"import importlib.util as u; assert all(map(u.find_spec, {modules!r}))"
    for python in among:
        if Path(python).exists():
            if subprocess.run([python, "-c", find], capture_output=True).returncode == 0:
                return python
    return None


def processor():
    with open("/proc/cpuinfo") as f:
        lines = f.read().splitlines()
    name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    flags = next((x.split() for x in lines if x.startswith("flags")), [])
    sets = [s for s in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if s in flags]
    used = _core.backend_name("cpu") + (", forced" if FORCED else "")
    return f"{name or platform.processor()} ({', '.join(sets)}), {used}"


# in this order; after `cold` and `curves` the sides are closed, which gives their memory back
PARTS = {f.__name__: f for f in (gemm, decode, prefill, predict, cold)}
PARTS |= {f.__name__: f for f in (lora, uneven, threads, curves, tiny)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=6, help="to plan for; 25: 5 runs of all")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--peers", default="torch,llama", help="none: ours alone")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument(
        "--keep", type=Path, help="make the models here, and use them the next time"
    )
    args = parser.parse_args()
    begun = time.perf_counter()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="bench."))
    parts = [name for name in PARTS if name in args.only.split(",")]
    bench = None
    try:
        bench = Bench(folder, args.minutes, args.peers.split(","))
        print(processor(), platform.platform(), "2 threads,", json.dumps(bench.limits.now))
        for name in parts:
            PARTS[name](bench)
            if name in ("cold", "curves"):
                bench.close()
        if bench.curves:
            draw(bench.curves, args.out / "bench.png")
        bench.rows.sort(key=lambda row: row["line"])
        for row in bench.rows:
            print(table_line(row))
        spent = round(time.perf_counter() - begun)
        facts = dict(machine=processor(), seconds=spent, rows=bench.rows)
        (args.out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
        asked = [row["met"] for row in bench.rows if row["met"] is not None]
        print(f"{sum(asked)} of {len(asked)} rows meet their bars; {spent} s in all")
    finally:
        if bench:
            bench.close()
        if not args.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
