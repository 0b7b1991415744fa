"""Our side of benchmarks/bench.py: a process that answers jobs, one line of JSON each.

    python benchmarks/worker.py DIRECTORY [--whole 28] [--compute bfloat16] [--bits 8|4] [--group N]
    python benchmarks/worker.py --cold DIRECTORY

Prints {"ready": true, ..}, then for each line {"job": name, ..} of its input {"seconds": .., ..} or
{"error": ..}. The peers in benchmarks/peers answer the same jobs. "seconds" are those of a model of
`--whole` layers, whose layers are the directory's, again and again. Decoding runs it as it is; what
takes long runs 1 and 2 layers, and each further one is counted as the second ("measured" is what
was spent). Any job may carry "threads". The line in and the line out are of sides.py.

    gemm     module, rows, kind (F32, F16, I8), what (forward, dx), compute
    prefill  tokens                      logits after the last of them
    decode   rows, context, steps        a step, with rows of `context` tokens
    predict  lengths, new, opening       greedy answers to prompts of these lengths, all at once;
                                         they begin with the same `opening` tokens
    classify lengths, opening, memory    the probabilities of two labels after such prompts; memory:
                                         "peak" of it, too
    lora     lengths, labelled, checkpointing, steps    forward, backward and update, one
                                         micro-batch; of many steps the mean
    generate tokens                      model.generate, greedy, one row
    attention tokens                     one layer's attention alone: seconds and bytes

--cold opens the directory and feeds 8 tokens, nothing else: what a user waits for.
"""

import argparse
import copy
import re
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from sides import Jobs, Peak, memory, serve  # noqa: E402

import glmlora  # noqa: E402
from glmlora import _core, families  # noqa: E402
from glmlora.generation.config import GenerationConfig  # noqa: E402
from glmlora.generation.generate import generate_rows  # noqa: E402
from glmlora.generation.labels import score_ids  # noqa: E402
from glmlora.model.parameters import embedding_of  # noqa: E402

KEEP_ALL, KEEP_NONE = 1 << 40, 1  # budgets of activations


def with_lora(model):
    """The model with rank 8 on queries, keys and values, to be trained."""
    targets = families.of(model.config.family).targets
    config = glmlora.LoraConfig(
        r=8, lora_alpha=32.0, lora_dropout=0.1, target_modules=list(targets)
    )
    glmlora.get_peft_model(model, config)
    model.core.set_trainable([n for n in model.core.names() if ".lora_" in n])
    return model


def planned(model, sizes, budget):
    """Bytes beyond the weights."""
    plan = model.core.plan(*sizes, True, budget)
    return plan["total"] - plan["weights"]


def step(core, ids, lengths, rows):
    core.backward(ids, lengths, rows, ids[rows + 1], dropout_seed=1)
    core.step(lr=5e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0)


class Worker(Jobs):
    """A model, and one method for each job; each returns what is answered."""

    def __init__(self, directory, whole, compute, bits, group):
        self.file = glmlora.AutoModel.from_pretrained(directory, compute_dtype=compute)
        self.floats = dict(zip(self.file.base_names(), self.file.stored_tensors(), strict=True))
        if bits:
            self.file.quantize(bits, group_size=group)
        self.bound = dict(zip(self.file.base_names(), self.file.stored_tensors(), strict=True))
        self.here = self.file.config.num_layers
        self.whole = whole or self.here
        self.rng = np.random.default_rng(0)
        self.mats, self.ops, self.caches, self.models = {}, {}, {}, {}
        self.trainees, self.plans = {}, {}
        self.layer = sum(t.nbytes for n, t in self.bound.items() if ".layers.0." in n)
        self.weights = sum(t.nbytes for t in self.bound.values())
        self.weights += (self.whole - self.here) * self.layer
        # by a step of decoding; of the embedding it is a row, where that is no output layer, too
        config = self.file.config
        table = 0 if config.tied_head else self.bound[embedding_of(config)].nbytes
        self.read = self.weights - table
        self.file.core.extend(self.file.core.cache(1, 8), [0], self.ids(8), np.array([8], np.int32))
        self.resident = memory("VmRSS") + (self.whole - self.here) * self.layer
        self.threads = _core.get_num_threads()
        self.facts = {"threads": self.threads, "backend": self.file.core.backend}
        self.facts |= {"weights": self.weights, "read": self.read}

    def do(self, job, threads=None, **fields):
        _core.set_num_threads(threads or self.threads)
        return super().do(job, **fields)

    def model(self, layers):
        """A new model of so many layers, bound to those of the directory again and again."""
        config = copy.copy(self.file.config)
        config.num_layers = layers
        config.quantization_bit = config.quantization_group_size = None
        of = {}
        for name in _core.Model(config.arch(), "plan", names=config.tensor_names).shapes():
            of[name] = re.sub(r"layers\.(\d+)", lambda m: f"layers.{int(m[1]) % self.here}", name)
        floats = {name: self.floats[here] for name, here in of.items()}
        model = type(self.file)(config, floats, self.file.compute_dtype)
        for name, here in of.items():
            if self.bound[here] is not self.floats[here]:
                model._bind(name, self.bound[here])
        return model

    def kept_model(self, layers):
        if layers not in self.models:
            self.models[layers] = self.model(layers)
        return self.models[layers]

    def line(self, run, layers=(1, 2)):
        """Seconds of the whole model from run(number of layers) -> seconds. A first run is not
        counted: what it waits for (memory, idle cores) would make the others' difference smaller.
        """
        if self.whole == self.here:
            seconds = run(self.whole)
            return {"seconds": seconds, "measured": seconds}
        run(layers[0])
        few, more = (run(n) for n in layers)
        each = (more - few) / (layers[1] - layers[0])
        return {"seconds": more + (self.whole - layers[1]) * each, "measured": few + more}

    def ids(self, n):
        return self.rng.integers(3, self.file.config.padded_vocab_size, n).astype(np.int32)

    def gemm(self, module, rows, kind, what, compute):
        from ops import F16, F32, I8, Mat, Ops

        key = module, kind
        if key not in self.mats:
            tensor = self.floats[f"transformer.encoder.layers.0.{module}.weight"]
            if kind == "I8":
                integers, scale = _core.quantize(tensor.data, tensor.dtype, 8, 0)
                self.mats[key] = Mat(integers, I8, scale, 0)
            elif kind == "F32":
                self.mats[key] = Mat(tensor.numpy().astype(np.float32), F32)
            else:
                self.mats[key] = Mat(np.ascontiguousarray(tensor.data), F16)
        mat = self.mats[key]
        out, inp = self.floats[f"transformer.encoder.layers.0.{module}.weight"].shape
        x, y = np.ones((rows, inp), np.float32), np.ones((rows, out), np.float32)
        x += self.rng.random(inp, np.float32)
        y += self.rng.random(out, np.float32)
        if compute not in self.ops:  # as a model keeps its memory for packing
            self.ops[compute] = Ops(f"cpu/{compute}")
        ops = self.ops[compute]
        start = time.perf_counter()
        if what == "dx":
            ops.linear_backward_input(x, y, mat, rows, 1.0, 0)
        else:
            ops.linear_forward(y, x, mat, None, rows, 1.0, 0)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "measured": seconds}

    def prefill(self, tokens):
        ids, lengths = self.ids(tokens), np.array([tokens], np.int32)

        def run(layers):
            core = self.kept_model(layers).core
            cache = core.cache(1, tokens, 0)
            start = time.perf_counter()
            core.extend(cache, [0], ids, lengths)
            return time.perf_counter() - start

        return self.line(run)

    def decode(self, rows, context, steps, layers=None):
        """layers: of the model, or two numbers for a straight line."""
        ones, places = np.ones(rows, np.int32), list(range(rows))

        def run(layers):
            core = self.kept_model(layers).core
            key = layers, rows, context, steps
            if key not in self.caches:
                self.caches[key] = core.cache(rows, context + steps, 0)
                lengths = np.full(rows, context, np.int32)
                core.extend(self.caches[key], places, self.ids(rows * context), lengths)
            cache, times = self.caches[key], []
            for row in places:
                cache.rewind(row, context)
            for _ in range(steps):
                ids = self.ids(rows)
                start = time.perf_counter()
                core.extend(cache, places, ids, ones)
                times.append(time.perf_counter() - start)
            return float(np.median(times))

        if isinstance(layers, list):
            return self.line(run, layers)
        seconds = run(layers or self.whole)
        return {"seconds": seconds, "measured": seconds * steps}

    def predict(self, lengths, new, opening=0):
        first = self.ids(opening).tolist()
        prompts = [first + self.ids(n - opening).tolist() for n in lengths]
        g = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=[])

        def run(layers):
            model = self.kept_model(layers)
            start = time.perf_counter()
            answers = dict(generate_rows(model, prompts, g))
            seconds = time.perf_counter() - start
            assert sum(map(len, answers.values())) == new * len(lengths)
            return seconds

        return self.line(run)

    def classify(self, lengths, opening=0, memory=False):
        first = self.ids(opening)
        prompts = [np.concatenate([first, self.ids(n - opening)]) for n in lengths]
        labels = [[5, 6, 2], [5, 7, 2]]  # as "0" and "1": a space, a digit, the end

        def run(layers):
            model = self.kept_model(layers)
            start = time.perf_counter()
            assert len(list(score_ids(model, prompts, labels))) == len(lengths)
            return time.perf_counter() - start

        if not memory:
            return self.line(run, (1, 4))
        with Peak() as peak:
            answer = self.line(run, (1, 4))
        return answer | {"peak": peak.bytes}

    def lora(self, lengths, labelled, checkpointing, steps=1):
        ends = np.cumsum(lengths)
        rows = (ends[:, None] - 1 - np.arange(labelled, 0, -1)).ravel().astype(np.int32)
        sizes = (int(ends[-1]), len(lengths), len(rows))
        ids, lengths = self.ids(ends[-1]), np.array(lengths, np.int32)
        budget = KEEP_NONE if checkpointing else KEEP_ALL
        if any(key[1] != sizes for key in self.trainees):
            self.trainees.clear()

        def run(layers):
            key = layers, sizes, budget
            if key not in self.trainees:
                before = memory()
                model = with_lora(self.model(layers))
                model.core.reserve(*sizes, True, budget)
                with Peak() as peak:
                    step(model.core, ids, lengths, rows)  # touches its memory
                self.trainees[key] = model, peak.bytes - before
            start = time.perf_counter()
            for _ in range(steps):
                step(self.trainees[key][0].core, ids, lengths, rows)
            return (time.perf_counter() - start) / steps

        answer = self.line(run) | {"tokens": int(ends[-1])}
        ran = self.whole if self.whole == self.here else 2
        model, beyond = self.trainees[ran, sizes, budget]
        if ran != self.whole:
            if (sizes, budget) not in self.plans:
                whole = with_lora(self.model(self.whole))
                self.plans[sizes, budget] = planned(whole, sizes, budget)
            beyond += self.plans[sizes, budget] - planned(model, sizes, budget)
        return answer | {"beyond_weights": beyond, "resident": self.resident + beyond}

    def generate(self, tokens):
        ids = self.ids(8)[None].astype(np.int64)
        start = time.perf_counter()
        self.file.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=[])
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "measured": seconds}

    def attention(self, tokens):
        from ops import Heads, Ops, Segment

        arch = self.file.config.arch()
        NH, KVH, HD = arch["heads"], arch["kv_heads"], arch["head_dim"]
        ops = Ops(self.file.core.backend)
        qkv = self.rng.random((tokens, (NH + 2 * KVH) * HD), np.float32)
        out = np.empty((tokens, NH * HD), np.float32)
        lse = np.empty((tokens, NH), np.float32)
        segment = [Segment(0, tokens, 0, 0, 0, 0, 0)]
        out[:], lse[:] = 0, 0
        before = memory()
        with Peak() as peak:
            start = time.perf_counter()
            ops.attention_forward(out, lse, qkv, None, segment, 1, Heads(NH, KVH, HD))
            seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "bytes": qkv.nbytes + out.nbytes + lse.nbytes + max(0, peak.bytes - before),
        }


def cold(directory):
    """Open a directory and feed 8 tokens."""
    core = glmlora.AutoModel.from_pretrained(directory).core
    core.extend(core.cache(1, 8), [0], np.arange(3, 11, dtype=np.int32), np.array([8], np.int32))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--whole", type=int, default=0, help="layers; default: the directory's")
    parser.add_argument("--compute", help="float32, bfloat16 or int8; default: the package's")
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--group", type=int)
    args = parser.parse_args()
    if args.cold:
        return cold(args.directory)
    serve(Worker, args.directory, args.whole, args.compute, args.bits, args.group)


if __name__ == "__main__":
    main()
