"""GLM-4-9B's and GLM-Edge-1.5B's shapes beside ChatGLM2-6B's and beside transformers and peft.

    python benchmarks/families.py [--only decode,lora] [--minutes 10] [--torch PYTHON] [--keep DIR]

Random weights in bfloat16 (ChatGLM2's too), 2 threads; seconds are those of all layers, found from
two as worker.py and the peer tell. GLM-4-9B stands there in both of its layouts: one linear for
queries, keys and values (`chatglm`), and three (`glm`). Sides are run in turn, as in bench.py, and
a figure is the median. Two bars a row: how many times transformers' speed (`GlmForCausalLM` in
bfloat16 with its default attention; peft's LoRA step asks for logits at the labelled rows only and
keeps all activations, its fastest settings), and the speed of a byte (decode) or of an operation
(LoRA step) beside ChatGLM2-6B's in the same run. Writes families.json; parts that are not run stay
there as they were.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench import HERE, LAYERS, Bench, Side, interpreter, processor, step_flops, table_line, those
from sides import EDGE, NINE_B, NINE_B_HF, SIX_B
from six_b import make, write_model

SIX = "ChatGLM2-6B"
CONFIGS = {SIX: SIX_B, "GLM-4-9B": NINE_B, "GLM-4-9B-hf": NINE_B_HF, "Edge-1.5B": EDGE}
PEER = {"GLM-4-9B": "GLM-4-9B-hf"}  # has the same shapes
JOBS = {
    "decode, 1 row, context 128": dict(job="decode", rows=1, context=128, steps=6),
    "decode, 8 rows, context 128": dict(job="decode", rows=8, context=128, steps=6),
    "LoRA step, 4 x 512": dict(job="lora", lengths=[512] * 4, labelled=3, checkpointing=False),
}
SECONDS = {"decode": 90, "lora": 200}  # of 10 minutes, for one job
DECODE, STEP, SAME = 2.5, 1.35, 0.95  # bars: times torch's speed twice, share of ChatGLM2's


def layers(config):
    return config.get("num_layers") or config["num_hidden_layers"]


def writer(config):
    """What writes a model of two layers."""
    if "num_layers" in config:
        return lambda directory: make(
            directory, **config | dict(num_layers=LAYERS, torch_dtype="bfloat16")
        )
    return lambda directory: write_model(directory, config | dict(num_hidden_layers=LAYERS))


class Families(Bench):
    """Sides by the names of CONFIGS; with " torch" behind one, the peer."""

    MODELS = {name: writer(config) for name, config in CONFIGS.items()}

    def open(self, name):
        model = name.removesuffix(" torch")
        path, whole = self.folder / model, layers(CONFIGS[model])
        if model == name:
            return Side(sys.executable, "worker.py", path, "--whole", whole)
        if not self.torch:
            return None
        side = Side(self.torch, "peers/torch_peer.py", path, "--whole", whole, *self.options)
        if not side.ready:
            raise RuntimeError(f"{name}: {side.last_words()}")
        return side


def measure(bench, title, job):
    """A row for each model."""
    is_step = job["job"] == "lora"
    jobs = {name: (name, job) for name in CONFIGS}
    for name in set(CONFIGS) - {SIX, *PEER}:
        jobs[f"{name} torch"] = f"{name} torch", job | (dict(scored=True) if is_step else {})
    answers = bench.run(jobs, SECONDS[job["job"]])
    work = {name: bench.side(name).ready["read"] for name in CONFIGS}
    if is_step:
        work = {n: step_flops(job["lengths"], job["labelled"], c) for n, c in CONFIGS.items()}
    first = answers[SIX]
    for name in CONFIGS:
        mine, ratios = answers[name], {}
        if name != SIX:
            speeds = [
                work[name] / here / (work[SIX] / there)
                for here, there in zip(mine["every"], first["every"], strict=True)
            ]
            ratios["ChatGLM2's"] = sorted(speeds)[len(speeds) // 2]
        bench.row(
            3,
            f"{title}, {name}",
            mine,
            rate=work[name] / mine["seconds"] / 1e9,
            unit="GFLOP/s" if is_step else "GB/s",
            limit=bench.product if is_step else "read_gb_s",
            peers=those(answers, {"torch": f"{PEER.get(name, name)} torch"}),
            ratios=ratios,
            bars={"torch": STEP if is_step else DECODE, "ChatGLM2's": SAME},
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="decode,lora")
    parser.add_argument("--minutes", type=float, default=10, help="to plan for")
    parser.add_argument("--torch", help="a Python with torch, transformers and peft")
    parser.add_argument("--dtype", default="bfloat16", help="of the peer, or float32")
    parser.add_argument("--keep", type=Path, help="make the models here, and use them next time")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    begun, bench = time.perf_counter(), None
    folder = args.keep or Path(tempfile.mkdtemp(prefix="families."))
    try:
        bench = Families(folder, args.minutes, [])
        bench.torch = args.torch or interpreter("torch", "transformers", "peft")
        bench.options = ("--dtype", args.dtype)
        print(processor(), "2 threads,", json.dumps(bench.limits.now))
        for title, job in JOBS.items():
            if job["job"] in args.only.split(","):
                measure(bench, title, job)
    finally:
        if bench:
            bench.close()
        if not args.keep:
            shutil.rmtree(folder)
    file, rows = args.out / "families.json", {}
    if file.exists():
        rows = {row["job"]: row for row in json.loads(file.read_text())["rows"]}
    rows |= {row["job"]: row for row in bench.rows}
    facts = dict(machine=processor(), rows=list(rows.values()))
    file.write_text(json.dumps(facts, indent=1) + "\n")
    for row in bench.rows:
        print(table_line(row))
    print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
