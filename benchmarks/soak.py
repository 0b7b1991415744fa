"""Mixed work for a given time under a memory limit: does anything grow, get lost, or stay behind?

    python benchmarks/soak.py --minutes 120 [--memory 4] [--folder DIR] [--seed 0]

One process trains, is interrupted (SIGINT, SIGTERM), goes on, chats, predicts, merges, saves and
quantizes; children of it train and are killed (SIGKILL), and it goes on where they were. A line a
minute; at the end the verdict, and exit status 1 unless

    the resident memory of the last quarter is that of the first (10 % or 20 MB more at most),
    no more files are open in the last quarter than in the first,
    no temporary file and no owner's mark is left in any folder,
    every run that was stopped and resumed came to the same bytes as the one that was not,
    and every answer is the one that was given the first time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import training  # noqa: E402

import glmlora  # noqa: E402
from glmlora import cli  # noqa: E402
from glmlora.files.owner import NAME  # noqa: E402
from glmlora.interrupts import ending_signals  # noqa: E402

LITTER = re.compile(r"\.\d+-[0-9a-f]{12}\.tmp|" + re.escape(NAME))
QUESTIONS = ("title:Cells and their walls", "We measure", "Is this a medical paper?")


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    """Open files of this process."""
    return len(os.listdir("/proc/self/fd"))


class Soak:
    """The work, and what was found wrong in it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.answers: dict[str, object] = {}
        self.model_path = training.model_dir(folder)
        self.methods = {
            "lora": {"lora_dropout": 0.1},
            "p_tuning": {"finetuning_type": "p_tuning", "pre_seq_len": 4},
            "freeze": {"finetuning_type": "freeze", "num_layer_trainable": 1},
            "full": {"finetuning_type": "full", "learning_rate": 1e-3},
        }
        self.whole = {}
        for method in self.methods:
            self.train(folder / f"whole-{method}", method)
            self.whole[method] = self.weights(folder / f"whole-{method}")
        table = ["title,abstract", *(f"T{i},We measure cells {i}." for i in range(12))]
        (folder / "in.csv").write_text("\n".join(table) + "\n")
        model = glmlora.AutoModel.from_pretrained(self.model_path)
        self.tokenizer = glmlora.AutoTokenizer.from_pretrained(self.model_path)
        self.model = model.eval()

    def train(self, out: Path, method: str, **settings: object) -> None:
        training.run(self.model_path, out, save_steps=3, **{**self.methods[method], **settings})

    def weights(self, out: Path) -> dict[str, bytes]:
        """What a run has learnt: its weight files."""
        names = re.compile(r"(adapter_)?(pytorch_)?model\.(safetensors|bin)")
        return {p.name: p.read_bytes() for p in out.iterdir() if names.fullmatch(p.name)}

    def same(self, what: str, found: object) -> None:
        if self.answers.setdefault(what, found) != found:
            self.wrong.append(f"{what}: another answer than the first time")

    # The kinds of work, each of which ends as it began

    def interrupted(self) -> None:
        """Stopped by a signal at any moment, then resumed, perhaps stopped again."""
        self._stopped(self._signalled, self.random.choice([signal.SIGINT, signal.SIGTERM]))

    def killed(self) -> None:
        """A child that trains is killed; this process goes on where it was."""
        self._stopped(self._killed, signal.SIGKILL)

    def _stopped(self, stop: Callable[..., None], number: signal.Signals) -> None:
        method = self.random.choice(list(self.methods))
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        for _ in range(self.random.randint(1, 3)):
            stop(out, method, number, self.random.uniform(0, 0.6))
        self.train(out, method, **self._resume(out))
        if self.weights(out) != self.whole[method]:
            self.wrong.append(f"{method} after {number.name}: other weights than without it")

    def _resume(self, out: Path) -> dict[str, object]:
        saved = out.is_dir() and any(out.glob("checkpoint-*"))
        return {"resume_from_checkpoint": "last"} if saved else {}

    def _signalled(self, out: Path, method: str, number: signal.Signals, after: float) -> None:
        timer = threading.Timer(after, os.kill, (os.getpid(), number))
        # Around the run, so that what comes too late for it does not end this program.
        with ending_signals(), contextlib.suppress(KeyboardInterrupt, SystemExit):
            timer.start()
            self.train(out, method, **self._resume(out))
            timer.join()
            time.sleep(0.01)

    def _killed(self, out: Path, method: str, number: signal.Signals, after: float) -> None:
        pid = os.fork()
        if pid == 0:
            try:
                self.train(out, method, **self._resume(out))
            finally:
                os._exit(0)
        time.sleep(after)
        os.kill(pid, number)
        os.waitpid(pid, 0)

    def chat(self) -> None:
        """Three turns of a conversation, one of them streamed."""
        history: list[object] = []
        for question in QUESTIONS:
            answer, history = self.model.chat(
                self.tokenizer, question, history=history, do_sample=False, max_new_tokens=12
            )
            self.same(f"chat {question} after {len(history)} turns", answer)
        *_, last = self.model.stream_chat(
            self.tokenizer, QUESTIONS[0], history=[], do_sample=False, max_new_tokens=24
        )
        self.same("stream", last[0])

    def batch(self) -> None:
        """Answers to padded rows at once."""
        inputs = self.tokenizer(list(QUESTIONS), padding=True, return_tensors="np")
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=16)
        self.same("batch", [list(map(int, row)) for row in ids])

    def predict(self) -> None:
        """A table in, a table out, with an adapter."""
        out = self.folder / "out.csv"
        words = f"predict --model {self.model_path} --adapter {self.folder / 'whole-lora'} --input"
        words += f" {self.folder / 'in.csv'} --output {out} --overwrite --max-length 128"
        if cli.main([*words.split(), "--temperature", "0"]):
            self.wrong.append("predict failed")
        self.same("predict", out.read_bytes())

    def merge(self) -> None:
        """The adapter into the base, saved, opened again, chatted with."""
        base = glmlora.AutoModel.from_pretrained(self.model_path)
        merged = glmlora.PeftModel.from_pretrained(base, self.folder / "whole-lora")
        self._saved(merged.merge_and_unload(), "merged")

    def quantize(self) -> None:
        """The base with fewer bits, saved, opened again, chatted with."""
        bits = self.random.choice([4, 8])
        model = glmlora.AutoModel.from_pretrained(self.model_path).quantize(bits)
        self._saved(model, f"int{bits}")

    def _saved(self, model: glmlora.ChatGLMForConditionalGeneration, name: str) -> None:
        model.save_pretrained(self.folder / name, max_shard_size="60KB")
        self.tokenizer.save_pretrained(self.folder / name)
        again = glmlora.AutoModel.from_pretrained(self.folder / name)
        answer = again.chat(self.tokenizer, QUESTIONS[1], do_sample=False, max_new_tokens=24)[0]
        self.same(name, answer)

    def round(self) -> None:
        """Every kind of work once, in a random order."""
        works = [self.interrupted, self.killed, self.chat, self.batch, self.predict, self.merge,
                 self.quantize]  # fmt: skip
        self.random.shuffle(works)
        for work in works:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                work()
            self.done[work.__name__] += 1
        self.look_for_litter()

    def look_for_litter(self) -> None:
        """Temporary files and owners' marks, of which none is left where nobody is at work."""
        left = [p for p in self.folder.rglob(".*") if LITTER.fullmatch(p.name)]
        self.wrong += [f"{p} is left" for p in left]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--memory", type=float, default=4, help="limit of the address space, GiB")
    parser.add_argument("--folder", help="default: a temporary one, removed at the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (int(args.memory * (1 << 30)),) * 2)
    warnings.simplefilter("ignore")
    folder = Path(args.folder or tempfile.mkdtemp(prefix="glmlora-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()):
        soak = Soak(folder, args.seed)
        soak.round()
    sizes: list[int] = []
    files: list[int] = []
    said = time.monotonic()
    while (spent := time.monotonic() - started) < 60 * args.minutes and len(soak.wrong) < 20:
        soak.round()
        gc.collect()
        sizes.append(resident())
        files.append(descriptors())
        if time.monotonic() - said >= 60:
            said = time.monotonic()
            counts = ", ".join(f"{n} {name}" for name, n in sorted(soak.done.items()))
            print(
                f"{spent / 60:5.1f} min: {resident() >> 20} MiB, {descriptors()} files open, "
                f"{len(soak.wrong)} wrong; {counts}",
                flush=True,
            )
    wrong = list(soak.wrong)
    quarter = max(1, len(sizes) // 4)
    first, last = (sorted(part)[len(part) // 2] for part in (sizes[:quarter], sizes[-quarter:]))
    opened, still = max(files[:quarter]), max(files[-quarter:])
    if last > max(1.1 * first, first + (20 << 20)):
        wrong.append(f"memory grew from {first >> 20} to {last >> 20} MiB")
    if still > opened:
        wrong.append(f"open files grew from {opened} to {still}")
    if not args.folder:
        shutil.rmtree(folder)
    for line in wrong:
        print(line)
    print(
        f"{len(sizes) + 1} rounds in {(time.monotonic() - started) / 60:.1f} minutes: memory "
        f"{first >> 20} -> {last >> 20} MiB, files {opened} -> {still}, "
        f"{len(wrong)} wrong"
    )
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
