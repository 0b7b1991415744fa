"""A GPU: is what it computes right, how fast is it, and where does the time go, beside torch with
transformers and peft where those are installed.

    python benchmarks/gpu.py [--json gpu.json] [--minutes 8] [--only PREFIX ..] [--skip PREFIX ..]
    python benchmarks/gpu.py --device emu    the script itself, at toy shapes: figures mean nothing

Each side is a process of its own with random weights at ChatGLM2-6B's shapes. An item that fails,
hangs or takes its process down is told as such, and the rest go on in a new process; the JSON file
is written after each item. A time is the median of the repeats after one that is not counted. No
network.

    self-test       python -m glmlora.tools.selftest, in three parts
    ceilings        what torch's copy and products of the model's shapes reach here
    chat            ours: prefill and tokens, weights in 16 bits, int8 and int4 (groups of 32)
    train           ours: a LoRA step (rank 8 on the queries, keys and values) with its update
    peer chat       transformers' GlmForCausalLM in 16 bits, SDPA attention, greedy generate
    peer train      peft's LoRA on it, the same labels, fused AdamW; with checkpointing, too
    profile         kernels of ours by time, as torch's profiler sees them

Tokens a second of rows of one length; "uneven" are 16 rows of the lengths of papers, which peft
pads to the longest. Shares: of the copy's bytes a second for tokens one by one (weights and cache
are read once), of the products' FLOP/s elsewhere (2 for each weight and token, 4 in training, and
attention's; the output layer for the rows whose scores are read).
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sides import SIX_B, glm_fields  # noqa: E402

TOY = dict(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    kv_channels=16,
    num_attention_heads=4,
    multi_query_group_num=2,
    padded_vocab_size=101,
    seq_length=256,
)
LABELS = 8  # labelled tokens at a row's end
PARTS = ("float32", "float16", "bfloat16")  # of the self-test


class Shapes:
    """What is measured: the model's sizes, rows and lengths, and what they cost."""

    def __init__(self, toy: bool):
        self.toy, self.sizes = toy, TOY if toy else SIX_B
        self.contexts = (24, 96) if toy else (1024, 8192)
        self.rows, self.new = (3, 4) if toy else (16, 32)
        self.repeats = 2 if toy else 5
        lengths = np.random.default_rng(0).lognormal(np.log(16 if toy else 200), 0.5, self.rows)
        self.steps = {
            "even": np.full(2 if toy else 4, 20 if toy else 512),
            "uneven": np.clip(lengths, 10, 40 if toy else 512).astype(np.int64),
        }
        c = self.sizes
        heads = c["num_attention_heads"] + 2 * c["multi_query_group_num"]
        qkv, hidden, ffn = heads * c["kv_channels"], c["hidden_size"], c["ffn_hidden_size"]
        attended = c["num_attention_heads"] * c["kv_channels"]
        self.layers = c["num_layers"] * (qkv * hidden + attended * hidden + 3 * hidden * ffn)
        self.head = c["padded_vocab_size"] * hidden
        self.attended = c["num_layers"] * attended

    def flops(self, lengths, labels: int, training: bool) -> float:
        """Of a forward pass, or of one with its backward pass to the frozen weights' inputs."""
        lengths = np.asarray(lengths, float)
        products = 2 * (lengths.sum() * self.layers + labels * self.head)
        attention = 2 * (lengths**2).sum() * self.attended  # causal: half of 4
        return 2 * products + 3.5 * attention if training else products + attention

    def read(self, rows: int, context: int, weight_bytes: float, cache_bytes: float) -> float:
        """Bytes that a token of each of `rows` rows reads at least."""
        c = self.sizes
        kv = c["num_layers"] * 2 * c["multi_query_group_num"] * c["kv_channels"]
        return weight_bytes * (self.layers + self.head) + cache_bytes * rows * context * kv


def random_ids(rng, sizes, *shape):
    """Token ids."""
    return rng.integers(3, sizes["padded_vocab_size"], shape).astype(np.int64)


class Side:
    """Items of one process: a method `items` of (name, call); a call returns facts."""

    def __init__(self, device: str):
        self.device, self.toy = device, device == "emu"
        self.shapes, self.rng = Shapes(device == "emu"), np.random.default_rng(1)

    def wait(self):
        """Until the device is done."""

    def timed(
        self, call: Callable[[], Any], repeats: int | None = None, per: int = 1
    ) -> dict[str, Any]:
        """Median, least and number of the seconds of a call, over `per`."""
        call()
        self.wait()
        found = []
        for _ in range(repeats or self.shapes.repeats):
            begin = time.perf_counter()
            call()
            self.wait()
            found.append((time.perf_counter() - begin) / per)
        return {"seconds": statistics.median(found), "least": min(found), "repeats": len(found)}


class Ours(Side):
    """The model of random weights on the device, in 16 bits or quantized."""

    def __init__(self, device: str, bits: int = 0):
        super().__init__(device)
        from glmlora.files.tensor import Tensor
        from glmlora.model import device as devices
        from glmlora.model.configuration import ChatGLMConfig
        from glmlora.model.modeling import ChatGLMForConditionalGeneration
        from glmlora.model.quantization import QuantizedTensor
        from glmlora.tools import selftest

        stored = "F16" if devices.info(device)["capability"] < (8, 0) else "BF16"
        backend = devices.backend(devices.parse(device), stored)
        config = ChatGLMConfig(**{**selftest.SIZES, **self.shapes.sizes})
        kind = type("Model", (ChatGLMForConditionalGeneration,), {"backend": backend})
        from glmlora import _core

        shapes = _core.Model(config.arch(), backend, names=config.tensor_names).shapes()
        most = max(int(np.prod(shape)) for shape in shapes.values())
        block = 0.02 * self.rng.standard_normal(min(most, 1 << 25), np.float32)
        block = (block.view(np.uint32) >> 16).astype(np.uint16) if stored == "BF16" else block
        block = np.resize(block.astype(np.uint16 if stored == "BF16" else np.float16), most)
        one = 0x3F80 if stored == "BF16" else 1

        def values(name: str, shape):
            if len(shape) == 1:
                return np.full(shape, one if "norm" in name else 0, block.dtype)
            return block[: int(np.prod(shape))].reshape(shape)

        self.model = kind(config, {n: Tensor(values(n, s), stored) for n, s in shapes.items()})
        integers = self.rng.integers(-128, 128, most, np.int8) if bits else None
        for name, (rows, columns) in self.model._linear_shapes().items() if bits else ():
            scales = (rows, columns // 32) if bits == 4 else (rows,)
            data = integers[: rows * columns * bits // 8].reshape(rows, -1)
            small = np.full(scales, 0.02 / (4 if bits == 4 else 64), np.float16)
            group = 32 if bits == 4 else 0
            self.model._bind(name, QuantizedTensor(Tensor(data), Tensor(small), bits, group))
        self.bits, self.core = bits, self.model.core
        self.facts = {"backend": backend}

    def peak(self) -> int:
        """The most bytes that were live since it was asked."""
        return self.core.counts()["peak"]

    def ids(self, *shape):
        return random_ids(self.rng, self.shapes.sizes, *shape).astype(np.int32)

    def extend(self, cache, rows, context):
        """So many tokens into empty rows."""
        for row in rows:
            if cache.lengths[row]:
                cache.rewind(row, 0)
            self.core.extend(cache, [row], self.ids(context), np.array([context], np.int32))


class Chat(Ours):
    """Prefill and tokens one by one."""

    def items(self):
        s = self.shapes
        weight = {0: 2, 8: 1, 4: 0.5 + 2 / 32}[self.bits]
        for context in s.contexts:
            cache = self.core.cache(1, context + s.new + 8, 0)

            def prefill(cache=cache, context=context):
                self.core.counts()
                found = self.timed(lambda: self.extend(cache, [0], context), 3)
                return found | {"tokens": context, "flops": s.flops([context], 1, False)}

            yield f"prefill, {context} tokens", prefill
            yield from self.tokens(cache, 1, context, weight)
            cache = None
        cache = self.core.cache(s.rows, s.contexts[0] + s.new + 8, 0)
        yield from self.tokens(cache, s.rows, s.contexts[0], weight)

    def tokens(self, cache, rows, context, weight):
        """Greedy tokens of `rows` rows, as `generate` asks for them: a recorded graph each."""
        s = self.shapes

        def run():
            ids, counts = self.ids(rows), np.ones(rows, np.int32)
            self.extend(cache, range(rows), context)

            def decode():
                for row in range(rows):
                    cache.rewind(row, context)
                for _ in range(s.new):
                    self.core.next(cache, list(range(rows)), ids, counts)

            found = self.timed(decode, per=s.new)
            read = s.read(rows, context, weight, 4)
            return found | {"rows": rows, "context": context, "bytes": read, "peak": self.peak()}

        yield f"token of {rows} row{'s' * (rows > 1)} at {context}", run


class Train(Ours):
    """LoRA steps."""

    def __init__(self, device: str, bits: int = 0):
        super().__init__(device, bits)
        from glmlora.model import device as devices
        from glmlora.model.peft import LoraConfig, get_peft_model

        targets = ["query_key_value"]
        get_peft_model(self.model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets))
        self.model.prepare_training()
        self.room = max(1, devices.memory_available(self.model.device) - (1 << 30))

    def items(self):
        for name, lengths in self.shapes.steps.items():
            yield f"LoRA step, {name} rows", lambda lengths=lengths: self.step(lengths)

    def step(self, lengths):
        core, n = self.core, int(lengths.sum())
        ends = np.cumsum(lengths)[:, None]
        rows = (ends - 1 - np.arange(LABELS, 0, -1)).ravel().astype(np.int32)
        ids = self.ids(n)
        core.reserve(n, len(lengths), len(rows), True, self.room)
        core.counts()

        def step():
            core.backward(ids, lengths.astype(np.int32), rows, ids[rows + 1])
            core.step(1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0)

        found = self.timed(step) | {"tokens": n, "peak": self.peak()}
        return found | {"flops": self.shapes.flops(lengths, len(rows), True)}


class Peer(Side):
    """transformers' model of the same shapes and random weights, made where it will be."""

    def __init__(self, device: str):
        super().__init__(device)
        import torch
        import transformers

        self.torch, self.where = torch, "cpu" if self.toy else "cuda"
        config = transformers.GlmConfig(**glm_fields(self.shapes.sizes))
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self.where):
            self.model = transformers.GlmForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.facts = {p.__name__: p.__version__ for p in (torch, transformers)}
        self.facts["attention"] = self.model.config._attn_implementation

    def wait(self):
        if self.where == "cuda":
            self.torch.cuda.synchronize()

    def peak(self) -> int:
        """The most bytes that were allocated since it was asked."""
        if self.where == "cpu":
            return 0
        found = self.torch.cuda.max_memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        return found

    def ids(self, *shape):
        ids = random_ids(self.rng, self.shapes.sizes, *shape)
        return self.torch.tensor(ids, device=self.where)


class PeerChat(Peer):
    """The same by generate."""

    def items(self):
        s = self.shapes
        for context in s.contexts:

            def prefill(context=context):
                with self.torch.inference_mode():
                    ids = self.ids(1, context)
                    return self.timed(lambda: self.model(ids, use_cache=True, logits_to_keep=1), 3)

            yield f"prefill, {context} tokens", prefill
        for rows, context in ((1, s.contexts[0]), (1, s.contexts[1]), (s.rows, s.contexts[0])):
            yield (
                f"token of {rows} row{'s' * (rows > 1)} at {context}",
                lambda rows=rows, context=context: self.tokens(rows, context),
            )

    def tokens(self, rows, context):
        """Of new + 1 tokens less one, so that the prefill is in both."""
        ids, new = self.ids(rows, context), self.shapes.new

        def generate(count):
            mask = self.torch.ones_like(ids)
            with self.torch.inference_mode():
                self.model.generate(ids, attention_mask=mask, max_new_tokens=count,
                                    min_new_tokens=count, do_sample=False)  # fmt: skip

        self.peak()
        most, one = (self.timed(lambda c=c: generate(c), 3) for c in (new + 1, 1))
        seconds = (most["seconds"] - one["seconds"]) / new
        return {"seconds": seconds, "repeats": 3, "peak": self.peak()}


class PeerTrain(Peer):
    """The same by peft."""

    def items(self):
        import peft

        self.facts["peft"] = peft.__version__
        targets = ["q_proj", "k_proj", "v_proj"]
        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets)
        self.trained = peft.get_peft_model(self.model, settings).train()
        trains = [p for p in self.trained.parameters() if p.requires_grad]
        self.optimizer = self.torch.optim.AdamW(trains, lr=1e-4, fused=self.where == "cuda")
        for name, lengths in self.shapes.steps.items():
            yield f"LoRA step, {name} rows", lambda lengths=lengths: self.step(lengths)
        yield "checkpointing on", self.checkpoint
        for name, lengths in self.shapes.steps.items():
            yield (
                f"LoRA step, {name} rows, checkpointed",
                lambda lengths=lengths: self.step(lengths),
            )

    def checkpoint(self):
        self.trained.enable_input_require_grads()
        how = {"use_reentrant": False}
        self.trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        return {}

    def step(self, lengths):
        torch, width = self.torch, int(lengths.max())
        ids, at = self.ids(len(lengths), width), torch.arange(width, device=self.where)[None]
        ends = torch.tensor(lengths, device=self.where)[:, None]
        mask = (at < ends).long()
        labels = torch.where((at < ends) & (at >= ends - LABELS), ids, -100)
        self.peak()

        def step():
            self.trained(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return self.timed(step) | {"tokens": int(lengths.sum()), "peak": self.peak()}


class Ceilings(Side):
    """What the card does through torch: a copy, and products of random numbers."""

    facts: dict[str, Any] = {}

    def items(self):
        import torch

        self.torch, where = torch, "cpu" if self.toy else "cuda"
        n, tokens = (1 << 20, 32) if self.toy else (1 << 31, 2048)
        c = self.shapes.sizes

        def copy():
            a = torch.empty(n, dtype=torch.uint8, device=where).random_()
            b = torch.empty_like(a)
            found = self.timed(lambda: b.copy_(a))
            return found | {"bytes_per_second": 2 * n / found["seconds"]}

        yield "copy", copy
        for name, rows, columns in (
            ("dense_h_to_4h", 2 * c["ffn_hidden_size"], c["hidden_size"]),
            ("dense_4h_to_h", c["hidden_size"], c["ffn_hidden_size"]),
        ):

            def product(rows=rows, columns=columns):
                x = torch.randn(tokens, columns, dtype=torch.bfloat16, device=where)
                w = torch.randn(rows, columns, dtype=torch.bfloat16, device=where)

                def ten():
                    for _ in range(10):
                        x @ w.T

                found = self.timed(ten)
                return found | {"flops_per_second": 20 * tokens * rows * columns / found["seconds"]}

            yield f"product of {tokens} tokens, {name}", product

    def wait(self):
        if not self.toy:
            self.torch.cuda.synchronize()


class Profiled(Side):
    """Kernels of one call by time, in place of its time."""

    def timed(self, call, repeats=None, per=1):
        from torch.profiler import ProfilerActivity, profile

        call()
        call()
        with profile(activities=[ProfilerActivity.CPU if self.toy else ProfilerActivity.CUDA]) as p:
            call()
            self.wait()
        rows = []
        for event in p.key_averages():
            micro = event.self_cpu_time_total if self.toy else event.self_device_time_total
            rows.append([event.key[:80], event.count / per, round(micro / per, 1)])
        rows.sort(key=lambda row: -row[2])
        return {"kernels": rows[:40], "seconds": 1e-6 * sum(row[2] for row in rows)}


class ProfiledTrain(Profiled, Train):
    """LoRA steps."""


class ProfiledChat(Profiled, Chat):
    """Prefill and tokens."""


SIDES: dict[str, Callable[[str], Side]] = {
    "ceilings": Ceilings,
    "chat": Chat,
    "train": Train,
    "peer train": PeerTrain,
    "peer chat": PeerChat,
    "profile train": ProfiledTrain,
    "profile chat": ProfiledChat,
    "chat int4": lambda device: Chat(device, 4),
    "chat int8": lambda device: Chat(device, 8),
    "train int4": lambda device: Train(device, 4),
}
GOALS = {  # of the card, times the peer, no more memory
    "chat, token of 1 row": (0.8, 3.0, False),
    "chat, prefill": (None, 1.0, False),
    "train, LoRA step, even rows": (None, 1.2, True),
    "train, LoRA step, uneven rows": (None, 2.0, True),
}
LIMIT = 90.0  # seconds of an item; of a side's beginning twice that


# ---- a side's process


def work(side: str, device: str, skip: int) -> None:
    """All items of a side but the first `skip`; a line of JSON before and after each."""

    def tell(**fields: Any) -> None:
        print("@" + json.dumps(fields, default=str), flush=True)

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it dies with its run
    begin = time.perf_counter()
    made = SIDES[side](device)
    tell(about={"ready": round(time.perf_counter() - begin, 1)} | made.facts)
    for place, (name, call) in enumerate(made.items()):
        if place < skip and name != "checkpointing on":
            continue
        tell(begun=name)
        begin = time.perf_counter()
        try:
            found = call()
        except Exception as error:  # the items after it are not to be lost
            text = traceback.format_exc()[-800:]
            found = {"failed": f"{type(error).__name__}: {error}"[:400], "trace": text}
        tell(found=found | {"took": round(time.perf_counter() - begin, 1)})
        if "failed" in found and "CUDA" in found["failed"]:
            sys.exit("an error of the device stays in its process")
    tell(about=made.facts, done=True)


# ---- the run


def started(*words: str) -> subprocess.Popen:
    """A process that ended() ends with all that it started."""
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def ended(child: subprocess.Popen) -> None:
    """It has ended, or does now."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def lines_of(child: subprocess.Popen, patience: Callable[[], float]) -> Iterator[str]:
    """What it prints. TimeoutError where a line takes longer than patience() seconds."""
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        for line in child.stdout:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=max(0.1, patience()))
        except queue.Empty:
            raise TimeoutError from None
        if not line:
            return
        yield line


class Run:
    """Sides one after another; what they found is in a file after each item."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.end = args, time.perf_counter() + 60 * args.minutes
        self.told: dict[str, Any] = {"sides": {}}
        self.limit = LIMIT

    def patience(self) -> float:
        """Seconds that the next line of a process may take."""
        return min(self.limit, self.end + 5 - time.perf_counter())

    def save(self) -> None:
        """The file is whole at any time."""
        to = Path(self.args.json)
        part = to.with_name(to.name + ".part")
        part.write_text(json.dumps(self.told, indent=1, default=str))
        os.replace(part, to)

    def wanted(self, side: str) -> bool:
        """By --only and --skip."""
        only, skip = self.args.only, self.args.skip
        return not any(side.startswith(s) for s in skip) and (
            not only or any(side.startswith(s) for s in only)
        )

    def self_test(self) -> None:
        """Its parts at the same time, a process each."""
        parts = ("float32 norm",) if self.args.device == "emu" else PARTS
        words = [sys.executable, "-m", "glmlora.tools.selftest", "--device", self.args.device]
        with tempfile.TemporaryDirectory() as folder:
            files = {part: f"{folder}/{place}.json" for place, part in enumerate(parts)}
            running = {p: started(*words, "--only", p, "--output", files[p]) for p in parts}
            self.told["self-test"] = found = {}
            try:
                for part, child in running.items():
                    found[part] = self.verdict(part, child)
                    self.save()
            finally:
                for child in running.values():
                    ended(child)

    @staticmethod
    def verdict(part: str, child: subprocess.Popen) -> dict[str, Any]:
        try:
            printed = child.communicate(timeout=2 * LIMIT)[0]
        except subprocess.TimeoutExpired:
            ended(child)
            printed = child.communicate()[0] + f"\nno answer in {2 * LIMIT:.0f} s"
        lines = printed.splitlines()
        failed = [line for line in lines if line.startswith("FAIL")]
        passed = sum(line.startswith("ok") for line in lines)
        shown = [f"self-test {part}: {passed} passed, {len(failed)} failed", *failed, *lines[-1:]]
        print(*shown, sep="\n  ", flush=True)
        return {"passed": passed, "failed": failed, "last": lines[-1:]}

    def side(self, side: str) -> None:
        """Processes until each item was measured or failed."""
        about = self.told["sides"][side] = {"items": {}}
        before = -1
        while before < len(about["items"]):  # the last process got on by an item, at least
            if time.perf_counter() > self.end:
                about["left out"] = "no time left"
                break
            before = len(about["items"])
            how = self.process(side, about)
            if not how:
                break
            about.setdefault("ended", []).append(how)
            print(f"{side}: {how}", flush=True)
        self.save()

    def process(self, side: str, about: dict[str, Any]) -> str:
        """The items that are not in `about` yet. "" where it came to its end, else how it ended."""
        items, begun, self.limit = about["items"], "", 2 * LIMIT
        printed: collections.deque = collections.deque(maxlen=15)
        words = [sys.executable, sys.argv[0], "--device", self.args.device, "--side", side]
        child = started(*words, "--skip-items", str(len(items)))
        try:
            for line in lines_of(child, self.patience):
                if not line.startswith("@"):
                    printed.append(line.rstrip()[:200])
                    continue
                fields = json.loads(line[1:])
                about |= fields.get("about", {})
                begun, self.limit = fields.get("begun", begun), LIMIT
                if "found" in fields:
                    items[begun] = found = fields["found"]
                    short = {k: v for k, v in found.items() if k not in ("kernels", "trace")}
                    print(f"{side}, {begun}: {short}", flush=True)
                    begun = ""
                self.save()
                if "done" in fields:
                    return ""
            how = f"its process ended with status {child.wait()}"
        except TimeoutError:
            late = time.perf_counter() > self.end
            how = "no time left" if late else f"no answer in {self.limit:.0f} s"
        finally:
            ended(child)
        if begun:
            items[begun] = {"failed": how, "printed": list(printed)}
        return " | ".join([how, *list(printed)[-3:]])

    def table(self) -> None:
        """Ours beside the peer's, and what was aimed at."""
        sides, rows = self.told["sides"], []

        def of(side: str, item: str, what: str = "seconds") -> Any:
            return sides.get(side, {}).get("items", {}).get(item, {}).get(what)

        copy = of("ceilings", "copy", "bytes_per_second")
        ceilings = sides.get("ceilings", {}).get("items", {})
        products = [v.get("flops_per_second") or 0 for k, v in ceilings.items() if "product" in k]
        for side in ("chat", "chat int8", "chat int4", "train", "train int4"):
            peer = "peer " + side.split()[0]
            for item in sides.get(side, {}).get("items", {}):
                mine, share = of(side, item), None
                fastest = [t for t in (of(peer, item), of(peer, item + ", checkpointed")) if t]
                theirs = min(fastest, default=None)
                if mine and copy and of(side, item, "bytes"):
                    share = of(side, item, "bytes") / mine / copy
                elif mine and products and of(side, item, "flops"):
                    share = of(side, item, "flops") / mine / max(products)
                memory = (of(side, item, "peak"), of(peer, item, "peak"))
                rows.append({"side": side, "item": item, "seconds": mine, "peer": theirs,
                             "share": share, "memory": memory})  # fmt: skip
        self.told["table"] = rows
        self.save()
        print("\n| ours | ms | peer, ms | peer / ours | of what the card does | GB | peer, GB |")
        print("| --- | --- | --- | --- | --- | --- | --- |")

        def shown(value: Any, form: str) -> str:
            return "" if not value else form.format(value)

        for row in rows:
            mine, theirs = row["seconds"], row["peer"]
            cells = [f"{row['side']}, {row['item']}", shown(mine and 1e3 * mine, "{:.2f}")]
            cells += [shown(theirs and 1e3 * theirs, "{:.2f}")]
            cells += [shown(mine and theirs and theirs / mine, "{:.2f}")]
            cells += [shown(row["share"], "{:.0%}")]
            cells += [shown(m and m / 1e9, "{:.2f}") for m in row["memory"]]
            print(f"| {' | '.join(cells)} |")
        print()
        for row in rows:
            name = f"{row['side']}, {row['item']}"
            for goal in (GOALS[begin] for begin in GOALS if name.startswith(begin)):
                print(f"{name}: {verdict_on(row, *goal)}")


def verdict_on(row: dict[str, Any], share: float | None, times: float, memory: bool) -> str:
    """MET, NOT MET or not known, and by what."""
    mine, theirs = row["memory"]
    parts = [(row["share"], share, "of the card")] if share else []
    known = row["peer"] and row["seconds"]
    parts.append((known and row["peer"] / row["seconds"], times, "times the peer"))
    if memory:
        parts.append((mine and theirs and theirs / mine, 1.0, "times less memory"))
    if any(not found for found, _, _ in parts):
        return "not known, something was not measured"
    told = ", ".join(f"{found:.2f} {what} (goal {goal})" for found, goal, what in parts)
    return f"{'MET' if all(found >= goal for found, goal, _ in parts) else 'NOT MET'}: {told}"


def main() -> None:
    """The run, or a side of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "emu"])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--json", default="gpu.json")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--skip-items", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        work(args.side, args.device, args.skip_items)
        return
    from glmlora.model import device as devices

    found = devices.info(args.device)
    if not found["count"]:
        raise SystemExit(
            f"{args.device}: {found['why']}; python cuda/build.py "
            f"{'emu' if args.device == 'emu' else 'here'} builds the library"
        )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and its processes with it
    run = Run(args)
    run.told["device"] = found
    run.save()
    if run.wanted("self-test"):
        run.self_test()
    for side in filter(run.wanted, SIDES):
        run.side(side)
    run.table()
    print(f"\n{found['name']}; {args.json}")
    if args.device == "emu":
        print("on the emulator: this shows that the script runs, and nothing about a GPU")


if __name__ == "__main__":
    main()
