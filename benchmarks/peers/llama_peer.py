"""llama.cpp through llama-cpp-python's low-level API, answering the jobs of benchmarks/worker.py.

    python benchmarks/peers/llama_peer.py FILE.gguf [--whole 28] [--threads N]

FILE: from make_gguf.py, 2 layers or more. A job's "seconds" are those of `--whole` layers: the
first layer is timed on its own inside the run (llama.cpp calls back after it), and counted for each
layer that the file lacks. Logits are made for the last token of a row only. llama.cpp does not
train.
"""

import argparse
import ctypes
import os
import sys
import time
from pathlib import Path

import llama_cpp as llama
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sides import SIX_B, Jobs, serve  # noqa: E402

VOCABULARY = SIX_B["padded_vocab_size"]


def ggml_names():
    """ggml's function from a tensor's address to its name."""
    folder = os.path.join(os.path.dirname(llama.__file__), "lib")
    function = ctypes.CDLL(os.path.join(folder, "libggml-base.so")).ggml_get_name
    function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    return function


class LayerClock:
    """Seconds spent from the first operation of each graph to the end of layer 0."""

    def __init__(self):
        self.name, self.first, self.begun, self.seconds = ggml_names(), None, 0.0, 0.0
        self.callback = llama.ggml_backend_sched_eval_callback(self.called)

    def called(self, tensor, ask, _):
        name = self.name(tensor)
        if not ask:
            self.seconds += time.perf_counter() - self.begun
            return True
        self.first = self.first or name
        if name == self.first:
            self.begun = time.perf_counter()
        return name == b"l_out-0"


class Context:
    """Sequences of at most `capacity` tokens each, side by side."""

    def __init__(self, model, rows, capacity, threads, clock):
        p = llama.llama_context_default_params()
        capacity = -(-capacity // 256) * 256
        p.n_ctx, p.n_seq_max = rows * capacity, rows
        p.n_threads = p.n_threads_batch = threads
        p.cb_eval = clock.callback
        self.context = llama.llama_init_from_model(model, p)
        if not self.context:
            raise MemoryError(f"llama.cpp has no context of {rows} x {capacity} tokens")
        self.batch = llama.llama_batch_init(2048, 0, 1)
        self.rows, self.held = rows, [0] * rows

    def clear(self):
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)
        self.held = [0] * self.rows

    def copy_first(self):
        """Every sequence becomes what the first one is."""
        memory = llama.llama_get_memory(self.context)
        for row in range(1, self.rows):
            llama.llama_memory_seq_cp(memory, 0, row, -1, -1)
        self.held = [self.held[0]] * self.rows

    def feed(self, ids):
        """Append ids[row], as many tokens for each row as there are, and choose the best next token
        of each."""
        waiting = [(row, i, token) for row, some in enumerate(ids) for i, token in enumerate(some)]
        best = [0] * self.rows
        b = self.batch
        for begin in range(0, len(waiting), 2048):
            piece, ends = waiting[begin : begin + 2048], {}
            for n, (row, i, token) in enumerate(piece):
                last = i + 1 == len(ids[row])
                b.token[n], b.pos[n], b.logits[n] = token, self.held[row] + i, last
                b.n_seq_id[n], b.seq_id[n][0] = 1, row
                if last:
                    ends[row] = n
            b.n_tokens = len(piece)
            status = llama.llama_decode(self.context, b)
            if status:
                raise RuntimeError(f"llama_decode: {status}")
            for row, n in ends.items():
                logits = llama.llama_get_logits_ith(self.context, n)
                best[row] = int(np.ctypeslib.as_array(logits, (VOCABULARY,)).argmax())
        self.held = [h + len(some) for h, some in zip(self.held, ids, strict=True)]
        return best


class Worker(Jobs):
    """A model, and one method for each job; each returns what is answered."""

    def __init__(self, path, whole, threads):
        p = llama.llama_model_default_params()
        p.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(os.fsencode(path), p)
        if not self.model:
            raise OSError(f"{path}: llama.cpp cannot open it")
        self.layers = llama.llama_model_n_layer(self.model)
        self.more = max(0, whole - self.layers)
        self.weights = llama.llama_model_size(self.model)
        self.facts = {"weights": self.weights}
        self.threads, self.clock, self.contexts = threads, LayerClock(), {}
        self.rng = np.random.default_rng(0)
        self.prefill(32)

    def ids(self, n):
        return self.rng.integers(3, VOCABULARY, n).tolist()

    def context(self, rows, capacity):
        """Made once for each size."""
        key = rows, capacity
        if key not in self.contexts:
            self.contexts[key] = Context(self.model, rows, capacity, self.threads, self.clock)
        self.contexts[key].clear()
        return self.contexts[key]

    def timed(self, function, *args):
        """(result, seconds of the whole model, seconds as measured)."""
        self.clock.seconds = 0.0
        start = time.perf_counter()
        result = function(*args)
        measured = time.perf_counter() - start
        return result, measured + self.more * self.clock.seconds, measured

    def prefill(self, tokens):
        context, ids = self.context(1, tokens), [self.ids(tokens)]
        _, seconds, measured = self.timed(context.feed, ids)
        return {"seconds": seconds, "measured": measured}

    def decode(self, rows, context, steps):
        c = self.context(rows, context + steps)
        c.feed([self.ids(context) for _ in range(rows)])
        times = []
        for _ in range(steps):
            _, seconds, measured = self.timed(c.feed, [self.ids(1) for _ in range(rows)])
            times.append((seconds, measured))
        seconds, measured = zip(*times, strict=True)
        return {"seconds": float(np.median(seconds)), "measured": sum(measured)}

    def predict(self, lengths, new, opening=0):
        """The first `opening` tokens of all prompts are computed once and copied."""
        c = self.context(len(lengths), max(lengths) + new)
        first, rest = self.ids(opening), [self.ids(n - opening) for n in lengths]

        def run():
            if opening:
                c.feed([first] + [[]] * (len(lengths) - 1))
                c.copy_first()
            best = c.feed(rest)
            for _ in range(new - 1):
                best = c.feed([[token] for token in best])

        _, seconds, measured = self.timed(run)
        return {"seconds": seconds, "measured": measured}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("--whole", type=int, default=28)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    serve(Worker, args.file, args.whole, args.threads)


if __name__ == "__main__":
    main()
