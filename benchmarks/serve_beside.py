"""`glmlora serve` beside llama.cpp's server: tokens a second, and the time to the first token.

    python benchmarks/serve_beside.py --llama-server FILE [--layers 4] [--clients 1 8] [--turns 5]

FILE is llama.cpp's own llama-server, built for this processor (cmake --build . --target
llama-server). Both serve one model of ChatGLM2-6B's widths with random weights and a small
vocabulary: float16 as it is and as F16, int8 and Q8_0, int4 in groups of 32 and Q4_0. The same
client asks both for completions of the same texts, in turns, each turn with texts of its own, so
that no prompt is kept from before; a turn of each warms up. Prints medians.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from serve_load import WORDS, Serving
from six_b import make

import glmlora
from glmlora.tools.gguf_export import export
from glmlora.tools.project import tiny_directory

FORMS = {"float16": ("f16", None), "int8": ("q8_0", (8, None)), "int4g32": ("q4_0", (4, 32))}


class Llama:
    """llama-server as a process, with as many slots as there are clients."""

    def __init__(self, program, file, rows, context):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [program, "-m", str(file), "--port", str(port), "-np", str(rows)]
        words += ["-c", str(rows * context), "-t", "2", "-tb", "2"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(words, **quiet)
        self.url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.1)
        self.stop()
        raise SystemExit(f"{program}: it did not answer")

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


async def ask(url, texts, clients, tokens):
    """(tokens a second, median seconds to the first token) of completions of some texts."""
    waiting, firsts, lengths = list(texts), [], []

    async def client(http):
        while waiting:
            body = {"model": "base", "prompt": waiting.pop(), "temperature": 0, "stream": True}
            body |= {"max_tokens": tokens, "stream_options": {"include_usage": True}}
            begun, first = time.monotonic(), None
            async with http.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line[6:])
                    if first is None and any(c.get("text") for c in event.get("choices", ())):
                        first = time.monotonic() - begun
                    if usage := event.get("usage"):
                        lengths.append(usage["completion_tokens"])
            firsts.append(first if first is not None else time.monotonic() - begun)

    # a connection a request: theirs closes one that it had said it would keep
    once = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=3600, limits=once) as http:
        begun = time.monotonic()
        await asyncio.gather(*(client(http) for _ in range(clients)))
        return sum(lengths) / (time.monotonic() - begun), float(np.median(firsts))


def models(folder, layers, forms):
    """(form, our directory, their file) of each form that is asked for."""
    base = folder / "base"
    base.mkdir()
    own = json.loads((tiny_directory() / "config.json").read_text())
    make(base, num_layers=layers, padded_vocab_size=own["padded_vocab_size"], seq_length=2048)
    for form in forms:
        kind, quantized = FORMS[form]
        ours, theirs = base, folder / f"{kind}.gguf"
        if quantized:
            ours = folder / form
            bits, group = quantized
            model = glmlora.AutoModel.from_pretrained(base).quantize(bits, group_size=group)
            model.save_pretrained(ours)
            glmlora.AutoTokenizer.from_pretrained(base).save_pretrained(ours)
        export(base, theirs, kind)
        yield form, ours, theirs


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", required=True)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--words", type=int, default=60, help="of a text")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    args = parser.parse_args()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    rng, rows, context = random.Random(0), max(args.clients), 512

    def texts(count):
        return [" ".join(rng.choices(WORDS, k=args.words)) for _ in range(count)]

    with tempfile.TemporaryDirectory(prefix="beside.") as place:
        for form, ours, theirs in models(Path(place), args.layers, args.forms):
            flags = ["--rows", str(rows), "--context", str(context)]
            sides = [Serving(ours, (), *flags)]
            try:
                sides.append(Llama(args.llama_server, theirs, rows, context))
                for clients in args.clients:
                    runs = []
                    for turn in range(args.turns + 1):
                        asked = texts(4 if clients == 1 else 2 * clients)
                        each = [asyncio.run(ask(s.url, asked, clients, args.tokens)) for s in sides]
                        if turn:
                            runs.append(np.ravel(each))
                    speed, first, their_speed, their_first = np.median(runs, axis=0)
                    print(
                        f"{form}, {clients} clients: {speed:.1f} tokens/s, first token after "
                        f"{1000 * first:.0f} ms; llama.cpp {their_speed:.1f} tokens/s, "
                        f"{1000 * their_first:.0f} ms; {speed / their_speed:.2f}x, "
                        f"{their_first / first:.2f}x",
                        flush=True,
                    )
            finally:
                for side in sides:
                    side.stop()


if __name__ == "__main__":
    sys.exit(main())
