"""GLM-4-0414-32B's shapes in 4 bits on a machine of 24 GB: written, opened, asked, trained a step.

    python benchmarks/big.py [--group 32] [--layers 61] [--dir DIR] [--keep]

Random bfloat16 weights (65 GB in all) are made one matrix at a time, and written as
`glmlora quantize` writes a directory: neither the disk nor the memory ever holds the 16-bit model.
--group 0: a scale a row (19 GB), else one for so many columns (32: 21 GB). Each part runs in a
process of its own and prints its time, its anonymous memory at most (RssAnon), and all that it had
in memory with the mapped file (VmHWM). All is deleted at the end.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from bench import forget, processor
from sides import GLM4_32B, Peak, memory
from six_b import random_weights

import glmlora
from glmlora.files.checkpoint import save_sharded, write_json
from glmlora.model.quantization import quantized_sources


def write(directory, layers, group):
    fields = GLM4_32B | dict(num_hidden_layers=layers)
    config = glmlora.ChatGLMConfig(**fields)
    weights = random_weights(config)
    linears = {s.name for s in weights if ".layers." in s.name and len(s.shape) == 2}
    sources = quantized_sources(weights, linears, 4, group)
    size, wide = (sum(s.nbytes for s in listed) for listed in (sources, weights))
    if shutil.disk_usage(directory).free < size + (1 << 30):
        sys.exit(f"{directory}: {(size >> 30) + 1} GiB are needed")
    fields |= dict(quantization_bit=4, quantization_group_size=group or None)
    save_sharded(directory, sources, beside=lambda new: write_json(new / "config.json", fields))
    for file in directory.glob("*.safetensors"):
        forget(file)
    return f"written: {size / 1e9:.1f} GB of what is {wide / 1e9:.1f} in bfloat16"


def opened(directory):
    return glmlora.AutoModel.from_pretrained(directory, device="cpu")


def answer(directory):
    """The first token reads the file; the others are what a chat goes on with."""
    model = opened(directory)
    ids = np.random.default_rng(0).integers(3, model.config.padded_vocab_size, (1, 32))
    times = [time.perf_counter()]
    for _ in model.stream_generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=[]):
        times.append(time.perf_counter())
    spent = np.diff(times)
    each = f"{np.median(spent[1:]):.2f} s a token ({1 / np.median(spent[1:]):.2f} tokens/s)"
    return f"answer: 32 tokens read and the first written in {spent[0]:.1f} s, then {each}"


def step(directory):
    model = opened(directory)
    model = glmlora.get_peft_model(model, glmlora.LoraConfig(r=8, lora_alpha=32.0))
    model.gradient_checkpointing_enable()
    ids = np.random.default_rng(1).integers(3, model.config.padded_vocab_size, (1, 128))
    labels = np.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    optimizer, start = glmlora.AdamW(model, lr=5e-5, max_grad_norm=1.0), time.perf_counter()
    loss = model.backward(input_ids=ids, labels=labels)
    norm = optimizer.step()
    seconds = time.perf_counter() - start
    return f"LoRA step of 128 tokens: loss {loss:.2f}, norm {norm:.3g}, {seconds:.0f} s"


def run(part, directory, layers, group):
    start = time.perf_counter()
    with Peak() as peak:
        if part == "write":
            told = write(directory, layers, group)
        elif part == "open":
            opened(directory)
            told = "opened"
        else:
            told = {"answer": answer, "step": step}[part](directory)
    spent, most = time.perf_counter() - start, memory("VmHWM")
    print(
        f"{told}; {spent:.1f} s in all, {peak.bytes / 1e9:.2f} GB of its own, "
        f"{most / 1e9:.1f} with mapped files",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--layers", type=int, default=GLM4_32B["num_hidden_layers"])
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--part", choices=["write", "open", "answer", "step"])
    args = parser.parse_args()
    if args.part:
        return run(args.part, args.dir, args.layers, args.group)
    directory = args.dir or Path(tempfile.mkdtemp(prefix="big."))
    directory.mkdir(parents=True, exist_ok=True)
    print(processor(), json.dumps(dict(memory_gib=round(total_memory() / 2**30, 1))), flush=True)
    try:
        for part in ("write", "open", "answer", "step"):
            if part == "write" and (directory / "config.json").exists():
                continue
            words = ["--layers", str(args.layers), "--group", str(args.group)]
            command = [sys.executable, __file__, "--part", part, "--dir", str(directory), *words]
            subprocess.run(command, check=True)
    finally:
        if not args.keep:
            shutil.rmtree(directory)


def total_memory():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


if __name__ == "__main__":
    main()
