"""`glmlora serve` under load: is every answer right, does memory stay, how long does one wait?

    python benchmarks/serve_load.py load --minutes 10 [--clients 64]
    python benchmarks/serve_load.py throughput --model DIR [--clients 8]

load: glm-tiny with two adapters whose numbers are random. Every client asks in turn, whole or
streamed, the base or an adapter; some go away in the middle, some send too much or no JSON, some
classify. Each answer is compared with the one that `model.chat` gives alone; exit status 1 for a
wrong one, a status that was not expected, or memory of the last quarter 10 % above the second's.

throughput: tokens a second of 8 clients against those of `batch_chat` over the same questions with
8 rows, in turns, and with --one both at one. Both give the same greedy answers.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

import glmlora

TINY = Path(glmlora.__file__).parent / "tiny"
WORDS = "insulin sorting cells a GPU and medicine of graphs 你好 who are you rain".split()
SECONDS = 5  # between two looks at the memory


class Serving:
    """A server as a process, and what its log says."""

    def __init__(self, model, adapters=(), *flags):
        words = [sys.executable, "-m", "glmlora", "serve", "--model", str(model), "--port", "0"]
        words += ["--name", "base", *flags]
        for name, folder in adapters:
            words += ["--adapter", f"{name}={folder}"]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        self.lines, self.other = [], []
        for line in self.process.stderr:
            if line.startswith("glmlora serve:"):
                self.url = line.split(" on ")[1].split()[0]
                break
        else:
            raise SystemExit("the server did not start")
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            if line.startswith("{"):
                self.lines.append(line)
            elif not line.startswith("glmlora serve: ending"):
                self.other.append(line)

    def resident(self):
        """Megabytes of anonymous memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0]) / 1e3

    def stop(self):
        self.process.terminate()
        status = self.process.wait(120)
        self.reader.join(10)
        return status

    def percentiles(self, field, path="/v1/chat/completions"):
        """(p50, p99, most) in ms of a field of the log."""
        lines = [json.loads(line) for line in self.lines]
        found = [one[field] for one in lines if one["path"] == path and one.get(field) is not None]
        return [float(np.percentile(found, p)) for p in (50, 99, 100)] if found else [0.0] * 3


def random_adapters(folder, names):
    found = []
    for seed, name in enumerate(names, 1):
        base = glmlora.AutoModel.from_pretrained(TINY, compute_dtype="float32")
        model = glmlora.get_peft_model(base, glmlora.LoraConfig(r=8), seed=seed)
        rng = np.random.default_rng(seed)
        for weight in model.adapter_names:
            values = rng.normal(0, 0.1, model.core.shape(weight)).astype(np.float32)
            model.core.write(weight, values)
        model.save_pretrained(Path(folder) / name)
        found.append((name, Path(folder) / name))
    return found


def expected_answers(adapters, questions, tokens):
    """What each model says alone, by (model, question)."""
    tokenizer = glmlora.AutoTokenizer.from_pretrained(TINY)
    found = {}
    for name, folder in [("base", None), *adapters]:
        model = glmlora.AutoModel.from_pretrained(TINY, compute_dtype="float32").eval()
        if folder is not None:
            model = glmlora.PeftModel.from_pretrained(model, folder).eval()
        for question in questions:
            settings = {"history": [], "do_sample": False, "max_new_tokens": tokens}
            found[name, question] = model.chat(tokenizer, question, **settings)[0]
    return found


class Load:
    """What 64 clients do, and what they saw."""

    def __init__(self, url, expected, tokens, seed):
        self.url, self.expected, self.tokens = url, expected, tokens
        self.counts, self.wrong, self.seed = Counter(), [], seed

    def body(self, model, question, **more):
        messages = [{"role": "user", "content": question}]
        given = {"model": model, "messages": messages, "temperature": 0}
        return given | {"max_tokens": self.tokens} | more

    async def client(self, number, until):
        rng = random.Random(self.seed * 1000 + number)
        headers = {"Authorization": f"Bearer client-{number}"}
        async with httpx.AsyncClient(base_url=self.url, timeout=300, headers=headers) as http:
            while time.monotonic() < until:
                kind = rng.choices(
                    ("whole", "stream", "leave", "hang up", "oversize", "malformed", "classify"),
                    (35, 30, 10, 5, 3, 10, 7),
                )[0]
                model, question = rng.choice(list(self.expected))
                try:
                    await getattr(self, kind.replace(" ", "_"))(http, rng, model, question)
                    self.counts[kind] += 1
                except httpx.HTTPError as error:
                    self.wrong.append(f"{kind}: {error!r}")

    async def check(self, kind, model, question, text):
        if text != self.expected[model, question]:
            self.wrong.append(f"{kind} {model} {question!r}: {text!r}")

    async def post(self, http, status, path="/v1/chat/completions", **given):
        answer = await http.post(path, **given)
        if answer.status_code != status:
            self.wrong.append(f"{answer.status_code}, expected {status}: {answer.text[:200]}")
        return answer

    async def whole(self, http, rng, model, question):
        answer = await self.post(http, 200, json=self.body(model, question))
        if answer.status_code == 200:
            text = answer.json()["choices"][0]["message"]["content"]
            await self.check("whole", model, question, text)

    async def stream(self, http, rng, model, question, parts=1 << 30):
        body, text = self.body(model, question, stream=True), ""
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:]).get("choices", [])
                    text += choices[0]["delta"].get("content") or "" if choices else ""
                    parts -= 1
                    if parts < 0:
                        return
        await self.check("stream", model, question, text)

    async def leave(self, http, rng, model, question):
        await self.stream(http, rng, model, question, rng.randrange(6))

    async def hang_up(self, http, rng, model, question):
        body = self.body(model, question)
        try:
            await http.post("/v1/chat/completions", json=body, timeout=rng.uniform(0.005, 0.2))
        except httpx.TimeoutException:
            pass

    async def oversize(self, http, rng, model, question):
        if rng.random() < 0.5:
            await self.post(http, 413, content=b" " * (1 << 20) + b" ")
        else:
            await self.post(http, 400, json=self.body(model, "cells " * 2000))

    async def malformed(self, http, rng, model, question):
        text = json.dumps(self.body(model, question)).encode()
        cut = text[: rng.randrange(len(text))]
        wrong = rng.choice([cut, b"\xff" + text, b"[]", json.dumps({"model": model}).encode()])
        await self.post(http, 400, content=wrong)

    async def classify(self, http, rng, model, question):
        body = {"model": model, "input": [question, "title: cells"], "labels": [0, 1]}
        answer = await self.post(http, 200, "/v1/classify", json=body)
        if answer.status_code == 200:
            found = answer.json()["data"]
            if abs(sum(found[0]["probabilities"].values()) - 1) > 1e-9:
                self.wrong.append(f"classify: {found}")


def load(args):
    rng = random.Random(args.seed)
    questions = [" ".join(rng.choices(WORDS, k=rng.randint(2, 40))) for _ in range(24)]
    with tempfile.TemporaryDirectory() as folder:
        adapters = random_adapters(folder, ["red", "blue"])
        expected = expected_answers(adapters, questions, args.tokens)
        flags = ["--compute-dtype", "float32", "--rows", "8", "--context", "1024"]
        serving = Serving(TINY, adapters, *flags, "--body-limit", "1", "--waiting", "256")
        work = Load(serving.url, expected, args.tokens, args.seed)
        memory = []

        async def watch(until):
            while time.monotonic() < until:
                await asyncio.sleep(SECONDS)
                memory.append(serving.resident())

        async def all_clients():
            until = time.monotonic() + 60 * args.minutes
            clients = [work.client(number, until) for number in range(args.clients)]
            await asyncio.gather(*clients, watch(until))

        try:
            asyncio.run(all_clients())
        finally:
            status = serving.stop()
    quarter = max(1, len(memory) // 4)
    second, last = (
        float(np.mean(part)) for part in (memory[quarter : 2 * quarter], memory[-quarter:])
    )
    print(f"{args.clients} clients, {args.minutes:g} minutes: {dict(work.counts)}")
    print(f"wrong: {len(work.wrong)}; exit status {status}; other lines: {len(serving.other)}")
    for text in [*work.wrong[:10], *serving.other[:10]]:
        print("  ", text.strip())
    for field in ("queue_ms", "first_token_ms", "ms"):
        p50, p99, most = serving.percentiles(field)
        print(f"{field}: p50 {p50:.0f}, p99 {p99:.0f}, most {most:.0f}")
    print(f"memory (RssAnon): {second:.0f} MB in the second quarter, {last:.0f} MB in the last")
    flat = last <= 1.1 * second
    return 0 if not work.wrong and status == 0 and flat and not serving.other else 1


def throughput(args):
    rng = random.Random(args.seed)
    questions = [" ".join(rng.choices(WORDS, k=20)) for _ in range(args.questions)]
    rows = str(args.clients)
    flags = ["--rows", rows, "--context", "512"]
    if args.compute_dtype:
        flags += ["--compute-dtype", args.compute_dtype]
    model = glmlora.AutoModel.from_pretrained(args.model, compute_dtype=args.compute_dtype).eval()
    tokenizer = glmlora.AutoTokenizer.from_pretrained(args.model)
    serving = Serving(args.model, (), *flags)

    async def ask(clients):
        waiting, firsts, lengths = list(questions), [], []

        async def client(http):
            while waiting:
                body = {
                    "model": "base",
                    "messages": [{"role": "user", "content": waiting.pop()}],
                    "temperature": 0,
                    "max_tokens": args.tokens,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                begun, first = time.monotonic(), None
                async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if first is None and '"content": "' in line and '"content": ""' not in line:
                            first = time.monotonic() - begun
                        if '"prompt_tokens"' in line:
                            lengths.append(json.loads(line[6:])["usage"]["completion_tokens"])
                firsts.append(first or 0.0)

        async with httpx.AsyncClient(base_url=serving.url, timeout=3600) as http:
            begun = time.monotonic()
            await asyncio.gather(*(client(http) for _ in range(clients)))
            seconds = time.monotonic() - begun
            return sum(lengths), seconds, float(np.median(firsts))

    def batch(at_once):
        begun = time.monotonic()
        how = {"do_sample": False, "max_new_tokens": args.tokens}
        model.batch_chat(tokenizer, questions, at_once, **how)
        return time.monotonic() - begun

    try:
        for clients in (args.clients, 1) if args.one else (args.clients,):
            runs = []
            for turn in range(args.turns + 1):
                tokens, seconds, first = asyncio.run(ask(clients))
                alone = batch(clients)
                if turn:  # the first warms up
                    runs.append((tokens / seconds, tokens / alone, alone / seconds, 1000 * first))
            server, chat, ratio, first = np.median(runs, axis=0)
            print(
                f"{clients} clients: {server:.1f} tokens/s, first token after {first:.0f} ms; "
                f"batch_chat {chat:.1f} tokens/s; ratio {ratio:.3f}"
            )
    finally:
        serving.stop()
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    p = verbs.add_parser("load")
    p.add_argument("--minutes", type=float, default=10)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--tokens", type=int, default=24)
    p.add_argument("--seed", type=int, default=0)
    p = verbs.add_parser("throughput")
    p.add_argument("--model", required=True)
    p.add_argument("--clients", type=int, default=8)
    p.add_argument("--questions", type=int, default=32)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--one", action="store_true", help="one client, too")
    p.add_argument("--compute-dtype")
    p.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return load(args) if args.verb == "load" else throughput(args)


if __name__ == "__main__":
    sys.exit(main())
