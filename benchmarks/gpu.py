"""A GPU: the self-test, then prefill, decoding and LoRA steps at 6B shapes, ours beside torch with
transformers and peft where those are installed. 8 minutes at most, no network.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--json FILE]
    python benchmarks/gpu.py --device emu    the script itself, at toy shapes: figures mean nothing

Builds the library where nvcc is and no library is there yet. Weights are zeros of the right shapes:
a product takes as long. Every time is the best of the repeats after a first one that is not
counted; a part whose turn comes after the time is up is left out and said to be. Shares are of the
nominal figures in PEAKS.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sides import SIX_B, glm_fields  # noqa: E402

from glmlora.model import device as devices  # noqa: E402
from glmlora.model.configuration import ChatGLMConfig  # noqa: E402
from glmlora.model.peft import LoraConfig, get_peft_model  # noqa: E402
from glmlora.tools import plan, selftest  # noqa: E402

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
# Dense 16-bit FLOP/s and bytes a second as NVIDIA's data sheets give them.
PEAKS = {
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100": (312e12, 2.0e12),
    "L4": (121e12, 0.3e12),
    "T4": (65e12, 0.32e12),
}


class Clock:
    """The minutes of the whole run; `best` times a call, or says None where they are over."""

    def __init__(self, minutes: float):
        self.end = time.perf_counter() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def best(self, call, repeats: int = 3) -> float | None:
        """Seconds of the fastest repeat."""
        if self.left() <= 0:
            return None
        call()
        found = None
        for _ in range(repeats):
            if found is not None and self.left() < found:
                break
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
            found = seconds if found is None else min(found, seconds)
        return found


def model_of(sizes, backend, stored):
    """Ours, of zeros."""
    fields = {**selftest.SIZES, **sizes}
    return plan._build(ChatGLMConfig(**fields), stored, 0, 0, backend)[0]


def uneven(rows, longest, seed=0):
    """Lengths of papers: many short ones, a few long."""
    lengths = np.random.default_rng(seed).lognormal(np.log(longest / 2.5), 0.5, rows)
    return np.clip(lengths, 8, longest).astype(np.int32)


def ours(sizes, backend, stored, toy, clock):
    """{part: (seconds, what)}; peak bytes."""
    model = model_of(sizes, backend, stored)
    core, one, V = model.core, np.ones(1, np.int32), sizes["padded_vocab_size"]  # noqa: N806
    prompt, rows = (24, 2) if toy else (1024, 16)
    facts = {}
    cache = core.cache(rows, 2 * prompt, 0)

    def prefill():
        cache.rewind(0, 0)
        core.extend(cache, [0], np.full(prompt, 3, np.int32), one * prompt)

    facts["prefill"] = clock.best(prefill), prompt
    for n in (1, rows):
        for row in range(n):
            if cache.lengths[row]:
                cache.rewind(row, 0)
            core.extend(cache, [row], np.full(prompt, 3, np.int32), one * prompt)
        tokens = 8 if toy else 64

        def decode(n=n, tokens=tokens):
            for row in range(n):
                cache.rewind(row, prompt)
            for _ in range(tokens):
                core.next(cache, list(range(n)), np.full(n, 3, np.int32), np.ones(n, np.int32))

        seconds = clock.best(decode)
        facts[f"decode, {n} rows"] = seconds and seconds / tokens, n
    cache = None  # its memory is for the steps
    targets = ["query_key_value"]
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=targets))
    model.prepare_training()
    even = np.full(2 if toy else 4, 20 if toy else 512, np.int32)
    for name, lengths in (("even", even), ("uneven", uneven(*((3, 40) if toy else (16, 512))))):
        N = int(lengths.sum())  # noqa: N806
        last = np.cumsum(lengths) - 2
        total = devices.memory_available(model.device)
        core.reserve(N, len(lengths), len(lengths), True, max(1, total - (1 << 30)))

        def step(N=N, lengths=lengths, last=last):  # noqa: N803
            core.backward(np.full(N, 3, np.int32), lengths, last, np.full(len(last), 5 % V))
            core.step(1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0)

        facts[f"LoRA step, {name} rows"] = clock.best(step), N
    return facts, core.counts()["peak"]


def theirs(sizes, toy, clock):
    """The same by torch, transformers and peft; None and why where they are not installed."""
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        return None, str(error), 0
    dtype = torch.bfloat16
    config = transformers.GlmConfig(**glm_fields(sizes))
    where = "cpu" if toy else "cuda"
    model = transformers.GlmForCausalLM(config).to(where, dtype).eval()
    prompt, rows, facts = (24, 2, {}) if toy else (1024, 16, {})

    def wait():
        if where == "cuda":
            torch.cuda.synchronize()

    def tokens(n, length):
        return torch.full((n, length), 3, device=where)

    with torch.inference_mode():

        def prefill():
            model(tokens(1, prompt), use_cache=True, logits_to_keep=1)
            wait()

        facts["prefill"] = clock.best(prefill), prompt
        for n in (1, rows):
            new = 8 if toy else 64

            def decode(n=n, new=new):
                model.generate(
                    tokens(n, prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False
                )
                wait()

            seconds, before = clock.best(decode), facts["prefill"][0]
            facts[f"decode, {n} rows"] = (
                seconds and before and max(0, seconds - n * before) / new,
                n,
            )
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["qkv_proj", "q_proj"])
    trained = peft.get_peft_model(model, settings).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-4)
    even = np.full(2 if toy else 4, 20 if toy else 512, np.int32)
    for name, lengths in (("even", even), ("uneven", uneven(*((3, 40) if toy else (16, 512))))):
        ids = tokens(len(lengths), int(lengths.max()))
        mask = torch.arange(ids.shape[1], device=where)[None] < torch.tensor(lengths)[:, None].to(
            where
        )
        labels = torch.where(mask, ids, -100)

        def step(ids=ids, mask=mask, labels=labels):
            trained(input_ids=ids, attention_mask=mask.long(), labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            wait()

        facts[f"LoRA step, {name} rows"] = clock.best(step), int(lengths.sum())
    peak = torch.cuda.max_memory_allocated() if where == "cuda" else 0
    packages = (torch, transformers, peft)
    versions = ", ".join(f"{p.__name__} {p.__version__}" for p in packages)
    return facts, versions, peak


def shares(facts, sizes, stored, name):
    """Of the nominal peak: bandwidth while decoding, FLOP/s elsewhere; {} where it is unknown."""
    peak = next((p for n, p in PEAKS.items() if n in name), None)
    if peak is None:
        return {}
    C, F, L = sizes["hidden_size"], sizes["ffn_hidden_size"], sizes["num_layers"]  # noqa: N806
    heads = sizes["num_attention_heads"] + 2 * sizes["multi_query_group_num"]
    QKV = heads * sizes["kv_channels"]  # noqa: N806
    weights = L * (QKV * C + C * C + 3 * C * F) + sizes["padded_vocab_size"] * C
    found = {}
    for part, (seconds, n) in facts.items():
        if seconds is None:
            continue
        if part == "decode, 1 rows":
            found[part] = (4 if stored == "F32" else 2) * weights / seconds / peak[1]
        elif part != "decode, 16 rows":
            found[part] = (2 if part == "prefill" else 4) * n * weights / seconds / peak[0]
    return found


def main():
    """Self-test, ours, theirs, a table and a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "emu"])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--json", default="gpu.json")
    parser.add_argument("--no-selftest", action="store_true")
    args = parser.parse_args()
    clock, toy = Clock(args.minutes), args.device == "emu"
    found = devices.info(args.device)
    if not found["count"] and (toy or shutil.which("nvcc")):
        goal = "emu" if toy else "lib"
        subprocess.run([sys.executable, ROOT / "cuda" / "build.py", goal], check=True)
        found = devices.info(args.device)
    if not found["count"]:
        raise SystemExit(f"{args.device}: {found['why']}")
    facts = {"device": found, "toy": toy, "weights": "zeros"}
    if not args.no_selftest:
        only = "float32 norm" if toy else ""
        if selftest.run(
            f"{args.device}:0", only=only, output=str(Path(args.json).with_name("selftest.json"))
        ):
            raise SystemExit("the self-test failed: no time is worth measuring")
    stored = "F16" if found["capability"] < (8, 0) else "BF16"
    sizes = TOY if toy else SIX_B
    backend = devices.backend(devices.parse(args.device), stored)
    mine, peak = ours(sizes, backend, stored, toy, clock)
    other, what, other_peak = theirs(sizes, toy, clock)
    share = {} if toy else shares(mine, sizes, stored, found["name"])
    rows = []
    for part, (seconds, n) in mine.items():
        peer = other[part][0] if other and part in other else None
        rows.append({"part": part, "tokens": n, "seconds": seconds, "peer_seconds": peer,
                     "share_of_nominal_peak": share.get(part)})  # fmt: skip
    facts |= {"rows": rows, "peak_bytes": peak, "peer": what, "peer_peak_bytes": other_peak}
    Path(args.json).write_text(json.dumps(facts, indent=1, default=str))
    print(f"\n{found['name']}, {backend}; peer: {what}")
    print("| part | tokens | ours | peer | peer / ours | share of nominal peak |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        mine_, peer = row["seconds"], row["peer_seconds"]
        cells = [row["part"], str(row["tokens"])]
        cells.append("no time left" if mine_ is None else f"{1e3 * mine_:.2f} ms")
        cells.append("" if peer is None else f"{1e3 * peer:.2f} ms")
        cells.append("" if not (peer and mine_) else f"{peer / mine_:.2f}")
        of_peak = row["share_of_nominal_peak"]
        cells.append("" if of_peak is None else f"{of_peak:.0%}")
        print(f"| {' | '.join(cells)} |")
    print(f"peak {peak / 1e9:.2f} GB, peer {other_peak / 1e9:.2f} GB; {args.json}")
    if toy:
        print("on the emulator: this shows that the script runs, and nothing about a GPU")


if __name__ == "__main__":
    main()
