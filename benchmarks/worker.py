"""Our side of benchmarks/bench.py: a process that answers jobs, one line of JSON each.

    python benchmarks/worker.py DIRECTORY [--bits 8|4] [--group 32] [--threads N]

Prints {"ready": true, ..}, then for each line {"job": name, ..} of its input {"seconds": .., ..} or
{"error": ..}. The peers in benchmarks/peers answer the same jobs.

    gemm     rows, out, in, type (F32, F16, BF16, I8, I4), what (forward, dx)
    prefill  tokens                      logits after the last of them
    decode   rows, context, steps        each row `context` tokens long before the first step
    predict  lengths, new                greedy answers to prompts of these lengths, all at once
    lora     lengths, labelled, checkpointing    forward, backward and update, one micro-batch
    generate tokens                      model.generate, greedy, one row
    attention tokens                     one layer's attention alone: seconds and planned bytes
"""

import argparse
import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import glmlora  # noqa: E402
from glmlora import _core, generation  # noqa: E402


class Peak(threading.Thread):
    """Largest anonymous memory of this process in bytes since `reset`, sampled every 5 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.reset()
        self.start()

    def reset(self):
        self.bytes = self.now()

    @staticmethod
    def now():
        with open("/proc/self/status") as f:
            return 1024 * int(re.search(r"RssAnon:\s+(\d+)", f.read()).group(1))

    def run(self):
        while True:
            self.bytes = max(self.bytes, self.now())
            time.sleep(0.005)


class Worker:
    """A model, and one method for each job; each returns what is answered."""

    def __init__(self, directory, bits, group, threads):
        self.peak = Peak()
        if threads:
            _core.set_num_threads(threads)
        self.model = glmlora.AutoModel.from_pretrained(directory)
        if bits:
            self.model.quantize(bits, group_size=group)
        self.weights = sum(t.nbytes for t in self.model.stored_tensors())
        self.base = self.peak.now()
        self.rng = np.random.default_rng(0)
        self.mats, self.trained = {}, None

    def ids(self, n):
        return self.rng.integers(3, self.model.config.padded_vocab_size, n).astype(np.int32)

    def gemm(self, rows, out, inp, kind, what):
        from ops import BF16, F16, F32, I4, I8, Mat, Ops, float_to_bf16

        ops = Ops("cpu:" + _core.cpu_variants().split(",")[0])
        key = (out, inp, kind)
        if key not in self.mats:
            w = self.rng.random((out, inp), np.float32) - 0.5
            if kind in ("I8", "I4"):
                q = _core.quantize(w, "F32", int(kind[1]), 32 if kind == "I4" else 0)
                mat = Mat(q[0], I8 if kind == "I8" else I4, q[1], 32 if kind == "I4" else 0)
            else:
                as_stored = {
                    "F32": lambda: Mat(w, F32),
                    "F16": lambda: Mat(w.astype(np.float16), F16),
                    "BF16": lambda: Mat(float_to_bf16(w), BF16),
                }
                mat = as_stored[kind]()
            self.mats = {key: mat}  # one at a time
        mat = self.mats[key]
        x = self.rng.random((rows, inp), np.float32)
        y = self.rng.random((rows, out), np.float32)
        start = time.perf_counter()
        if what == "dx":
            ops.linear_backward_input(x, y, mat, rows, 1.0, 0)
        else:
            ops.linear_forward(y, x, mat, None, rows, 1.0, 0)
        return {"seconds": time.perf_counter() - start}

    def prefill(self, tokens):
        cache = self.model.core.cache(1, tokens, 0)
        start = time.perf_counter()
        self.model.core.extend(cache, [0], self.ids(tokens), np.array([tokens], np.int32))
        return {"seconds": time.perf_counter() - start}

    def decode(self, rows, context, steps):
        core = self.model.core
        cache = core.cache(rows, context + steps, 0)
        lengths = np.full(rows, context, np.int32)
        core.extend(cache, list(range(rows)), self.ids(rows * context), lengths)
        ones = np.ones(rows, np.int32)
        times = []
        for _ in range(steps):
            ids = self.ids(rows)
            start = time.perf_counter()
            core.extend(cache, list(range(rows)), ids, ones)
            times.append(time.perf_counter() - start)
        return {"seconds": float(np.median(times)) * steps, "weights": self.weights}

    def predict(self, lengths, new):
        prompts = [self.ids(n).tolist() for n in lengths]
        g = generation.GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=[])
        start = time.perf_counter()
        answers = dict(generation.generate_rows(self.model, prompts, g))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "new": sum(map(len, answers.values()))}

    def lora(self, lengths, labelled, checkpointing):
        core = self.model.core
        if self.trained is None:
            config = glmlora.LoraConfig(
                r=8, lora_alpha=32.0, lora_dropout=0.1, target_modules=["query_key_value"]
            )
            self.trained = glmlora.get_peft_model(self.model, config)
            core.set_trainable([n for n in core.names() if ".lora_" in n])
        ends = np.cumsum(lengths)
        rows = (ends[:, None] - 1 - np.arange(labelled, 0, -1)).ravel().astype(np.int32)
        sizes = (int(ends[-1]), len(lengths), len(rows))
        core.reserve(*sizes, True, 0 if checkpointing else 1 << 40)
        ids = self.ids(ends[-1])
        self.peak.reset()
        start = time.perf_counter()
        core.backward(ids, np.array(lengths, np.int32), rows, ids[rows + 1], dropout_seed=1)
        core.step(lr=5e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)
        seconds = time.perf_counter() - start
        core.zero_grad()
        return {
            "seconds": seconds,
            "tokens": int(ends[-1]),
            "beyond_weights": self.peak.bytes - self.base,
            "resident": self.peak.bytes,
        }

    def generate(self, tokens):
        ids = self.ids(8)[None].astype(np.int64)
        start = time.perf_counter()
        self.model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=[])
        return {"seconds": time.perf_counter() - start}

    def attention(self, tokens):
        from ops import Heads, Ops, Segment

        arch = self.model.config.arch()
        NH, KVH, HD = arch["heads"], arch["kv_heads"], arch["head_dim"]
        ops = Ops("cpu:" + _core.cpu_variants().split(",")[0])
        qkv = self.rng.random((tokens, (NH + 2 * KVH) * HD), np.float32)
        out = np.empty((tokens, NH * HD), np.float32)
        lse = np.empty((tokens, NH), np.float32)
        segment = [Segment(0, tokens, 0, 0, 0, 0, 0)]
        self.peak.reset()
        before = self.peak.now()
        start = time.perf_counter()
        ops.attention_forward(out, lse, qkv, None, segment, 1, Heads(NH, KVH, HD))
        return {
            "seconds": time.perf_counter() - start,
            "bytes": qkv.nbytes + out.nbytes + lse.nbytes,
            "more": max(0, self.peak.bytes - before),
        }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--group", type=int)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    real, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(args.directory, args.bits, args.group, args.threads)
    told = {"ready": True, "threads": _core.get_num_threads(), "weights": worker.weights}
    print(json.dumps(told | {"pid": os.getpid()}), file=real, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = getattr(worker, job.pop("job"))(**job)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=real, flush=True)


if __name__ == "__main__":
    main()
