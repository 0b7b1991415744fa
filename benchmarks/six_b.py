"""A checkpoint of ChatGLM2-6B's exact shapes with random weights: open it, chat, one LoRA step.

    python benchmarks/six_b.py [--dir DIR] [--tokens 1800] [--keep]

Writes 12.5 GB of float16 in 7 safetensors shards into DIR (default: a new temporary one), with
glm-tiny's tokenizer beside them, measures each part in a process of its own, and deletes it all.
Memory is anonymous memory (RssAnon): what a process needs beyond the mapped file.
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
from sides import SIX_B, Peak

import glmlora
from glmlora import _core
from glmlora.files.checkpoint import Source, Tensor, save_sharded, to_bf16
from glmlora.model.parameters import parse_dtype
from glmlora.tools.project import tiny_directory


def random_weights(config):
    """Sources of the weights of a ChatGLMConfig, in its type; matrices are cut from one random
    block at different places."""
    dtype = parse_dtype(config.torch_dtype)
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 22).astype(np.float32)

    def stored(array):
        if dtype == "BF16":
            return to_bf16(array).data
        return array.astype(np.float16) if dtype == "F16" else array

    block = stored(block)

    def values(name, shape, place):
        if len(shape) == 1:
            one = np.full(shape, 0.0 if name.endswith("bias") else 1.0, np.float32)
            return Tensor(stored(one), dtype)
        n, start = shape[0] * shape[1], place % 9973
        return Tensor(np.resize(block[start:], n).reshape(shape), dtype)

    shapes = _core.Model(config.arch(), "plan", names=config.tensor_names).shapes()
    return [
        Source(name, dtype, shape, lambda n=name, s=shape, i=i: values(n, s, 131 * i))
        for i, (name, shape) in enumerate(shapes.items())
    ]


def write_model(directory, config):
    """A checkpoint with random weights; config: the fields of its config.json."""
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    weights = random_weights(glmlora.ChatGLMConfig.from_pretrained(directory))
    save_sharded(directory, weights, max_shard_size=1_900_000_000)


def make(directory, **changes):
    """A checkpoint of ChatGLM2-6B's shapes. changes: of the config, e.g. num_layers=2."""
    own = json.loads((tiny_directory() / "config.json").read_text())
    config = own | SIX_B | {"_name_or_path": "THUDM/chatglm2-6b"} | changes
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(tiny_directory() / name, directory / name)
    write_model(directory, config)


def measure(part, directory, tokens):
    start = time.perf_counter()
    model = glmlora.AutoModel.from_pretrained(directory, trust_remote_code=True)
    opened = time.perf_counter() - start
    if part == "open":
        return print(f"open: {opened:.2f} s")
    tokenizer = glmlora.AutoTokenizer.from_pretrained(directory)
    if part == "chat":
        stream = model.half().stream_chat(tokenizer, "你好", history=[], seed=1, max_length=64)
        times = []
        with Peak() as peak:
            for _ in stream:
                times.append(time.perf_counter())
                if len(times) == 6:
                    break
        rate = (len(times) - 1) / (times[-1] - times[0])
        return print(f"chat: {len(times)} streamed, {rate:.2f} tokens/s, {peak.bytes / 1e9:.2f} GB")
    config = glmlora.LoraConfig(
        r=8, lora_alpha=32.0, lora_dropout=0.1, target_modules=["query_key_value"]
    )
    model = glmlora.get_peft_model(model, config)
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 60000, (4, tokens // 4))
    labels = np.full_like(ids, -100)
    labels[:, -3:] = ids[:, -3:]
    start = time.perf_counter()
    with Peak() as peak:
        loss = model.backward(input_ids=ids, attention_mask=np.ones_like(ids), labels=labels)
        norm = glmlora.AdamW(model, lr=5e-5, max_grad_norm=1.0).step()
    seconds = time.perf_counter() - start
    print(
        f"LoRA step, 4 rows of {tokens // 4} tokens: loss {loss:.3f}, norm {norm:.3f}, "
        f"{seconds:.0f} s, {tokens / seconds:.1f} tokens/s, "
        f"{peak.bytes / 1e9:.2f} GB beyond the mapped file"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir")
    parser.add_argument("--tokens", type=int, default=1800)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--part", choices=["open", "chat", "step"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return measure(args.part, args.dir, args.tokens)
    directory = Path(args.dir or tempfile.mkdtemp(prefix="six_b."))
    directory.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(directory).free < 14 << 30:
        sys.exit(
            f"{directory}: 14 GiB are needed, {shutil.disk_usage(directory).free >> 30} are free"
        )
    try:
        if not (directory / "config.json").exists():
            start = time.perf_counter()
            make(directory)
            print(f"written in {time.perf_counter() - start:.0f} s")
        for part in ("open", "open", "chat", "step"):
            command = [sys.executable, __file__, "--part", part, "--dir", str(directory)]
            subprocess.run([*command, "--tokens", str(args.tokens)], check=True, env=os.environ)
    finally:
        if not args.keep:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
