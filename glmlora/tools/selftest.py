"""`python -m glmlora.tools.selftest --device cuda`: does this GPU compute what the CPU computes?

Every op beside the reference at odd shapes, two tiny models, one of which reads its prompts in both
directions ("two-way"; logits, steps of LoRA, P-Tuning and full training, greedy answers with and
without cache and recording), the same step twice, and what the plan says beside what the device
counted. Needs no files. Prints a line for each item, ends with
`selftest cuda: PASS` or the first item that failed, and writes a JSON file to send back.
`--device emu` runs the same list on the emulator, which is how the list itself is tested; `--deep`
runs the ops again under compute-sanitizer where that is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .. import _core, families
from ..files.tensor import Tensor
from ..model import device as devices
from ..model import modeling, parameters, peft
from ..model.configuration import ChatGLMConfig
from ..training import optim
from . import plan as plans
from .op_cases import OP_CASES, Case
from .optable import BF16, F16, F32, Ops, ops_of, stored

# Largest difference from the reference, over the largest element of it: float32 products, and
# operands rounded to 16 bits.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
STEPS = 20  # of a training
LOSS = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}  # relative, in STEPS


def _same(got: list[np.ndarray], want: list[np.ndarray], tolerance: float) -> float:
    """The largest difference over the largest element; AssertionError beyond the tolerance."""
    worst = 0.0
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        if not b.size:
            continue
        assert np.isfinite(a).all(), f"output {place} is not finite"
        difference = np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-3)
        assert difference <= tolerance, f"output {place} differs by {difference:.1e}"
        worst = max(worst, float(difference))
    return worst


def check_op(case: Case, backend: str) -> str:
    """Three seeds; the arrays lie between guards that must survive (optable.DeviceOps)."""
    worst = 0.0
    for seed in range(3):
        got = case(ops_of(backend), np.random.default_rng(seed))
        want = case(Ops("cpu"), np.random.default_rng(seed))
        worst = max(worst, _same(got, want, TOLERANCE[backend.rpartition("/")[2]]))
    return f"{worst:.1e}"


# A tiny model


SIZES = dict(
    _name_or_path=families.default().checkpoint,
    model_type="chatglm",
    multi_query_attention=True,
    add_bias_linear=False,
    add_qkv_bias=True,
    apply_residual_connection_post_layernorm=False,
    layernorm_epsilon=1e-5,
    original_rope=True,
    post_layer_norm=True,
    rmsnorm=True,
    torch_dtype="float32",
    hidden_size=64,
    ffn_hidden_size=96,
    num_layers=2,
    num_attention_heads=4,
    multi_query_group_num=2,
    kv_channels=16,
    padded_vocab_size=101,
    seq_length=128,
    eos_token_id=2,
    pad_token_id=0,
)


def _layout_of(module: str) -> str:
    """model_type of the layout whose checkpoints have a module of this name."""
    every = families.all_families().values()
    return next(family.model_type for family in every if module in family.tensor_names)


# One whose prompts are read in both directions, with the ops that only it has.
TWO_WAY = dict(
    model_type="chatglm",
    position_encoding_2d=True,
    layernorm_epsilon=1e-5,
    torch_dtype="float32",
    hidden_size=64,
    inner_hidden_size=96,
    num_layers=2,
    num_attention_heads=4,
    vocab_size=101,
    max_sequence_length=128,
    mask_token_id=97,
    gmask_token_id=98,
    bos_token_id=99,
    eos_token_id=100,
    pad_token_id=0,
)
# Two with queries, keys and values apart: rotary over whole heads and embeddings for a head, and
# norms of what attention and MLP yield.
TIED = dict(
    model_type="glm",
    attention_bias=False,
    eos_token_id=2,
    head_dim=16,
    hidden_size=64,
    intermediate_size=96,
    max_position_embeddings=128,
    num_attention_heads=4,
    num_hidden_layers=2,
    num_key_value_heads=2,
    pad_token_id=0,
    partial_rotary_factor=1.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    torch_dtype="float32",
    vocab_size=101,
)
BRANCHES = TIED | dict(
    model_type=_layout_of("post_mlp_layernorm"),
    attention_bias=True,
    head_dim=24,
    partial_rotary_factor=0.5,
    tie_word_embeddings=False,
)
WORDS = 97  # ids below are words in all of them


def tiny_model(
    backend: str, stored_as: str, sizes: dict[str, Any] = SIZES, prefix: int | None = None
) -> Any:
    """A model of random weights, the same every time, on a backend."""
    config = ChatGLMConfig(**sizes, pre_seq_len=prefix)
    rng = np.random.default_rng(3)
    form = {"F32": F32, "F16": F16, "BF16": BF16}[stored_as]
    tensors = {}
    counted = _core.Model(config.arch(), "plan", names=config.tensor_names)
    for name, shape in counted.shapes().items():
        w = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            w = 0.1 * w + (not name.endswith("bias"))
        elif "embed" not in name:
            w *= 1.5 / np.sqrt(shape[1])
        tensors[name] = Tensor(stored(w, form), stored_as)
    kind = modeling.ChatGLMForConditionalGeneration
    on_backend = type("Model", (kind,), {"backend": backend})
    model = on_backend(config, tensors)
    if prefix:
        shapes = parameters.prefix_shapes(config)
        model.set_prefix(parameters.fresh_prefix(shapes, seed=4, std=0.3))
    return model


def _prompts(seed: int, sizes: dict[str, Any], rows: int, length: int, cut: int) -> np.ndarray:
    """Ids (rows, length) whose prompts end before place `cut`."""
    ids = np.random.default_rng(seed).integers(3, WORDS, (rows, length))
    context = ChatGLMConfig(**sizes).context
    if context is not None:
        ids[:, cut - 2 : cut] = context.gmask, context.sop
    return ids


def _batch(seed: int, sizes: dict[str, Any]) -> dict[str, np.ndarray]:
    ids = _prompts(seed, sizes, 3, 23, 11)
    mask = np.ones_like(ids)
    mask[1, :7] = 0  # rows of several lengths
    labels = np.where(mask == 1, ids, -100)
    labels[:, :11] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _trained(
    backend: str, stored_as: str, sizes: dict[str, Any], method: str, steps: int
) -> list[float]:
    model = tiny_model(backend, stored_as, sizes, 6 if method == "p_tuning" else None)
    trained = model
    if method == "lora":
        names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=names)
        trained = peft.get_peft_model(model, config)
    elif method == "full":
        model.requires_grad_(True)
    batches = [_batch(1, sizes), _batch(2, sizes)]
    trained.backward(**batches[0])
    trained.zero_grad()
    rng = np.random.default_rng(5)
    for name in model.core.trainable() if method == "lora" else ():  # the same on every device
        size = 0.2 if ".lora_A." in name else 0.02
        values = size * rng.standard_normal(model.core.shape(name))
        model.core.write(name, values.astype(np.float32))
    lr = 3e-2 if method == "p_tuning" else 1e-3
    optimizer, losses = optim.AdamW(trained, lr=lr, max_grad_norm=1.0), []
    for step in range(steps):
        losses.append(trained.backward(**batches[step % 2]))
        optimizer.step()
    return losses


def check_logits(backend: str, stored_as: str, sizes: dict[str, Any]) -> str:
    """Logits of rows of several lengths."""
    inputs = {k: v for k, v in _batch(0, sizes).items() if k != "labels"}
    got, want = (tiny_model(b, stored_as, sizes)(**inputs).logits for b in (backend, "cpu"))
    limit = 10 * TOLERANCE[backend.rpartition("/")[2]]  # two layers of products
    return f"{_same([got], [want], limit):.1e}"


def check_training(backend: str, stored_as: str, sizes: dict[str, Any], method: str) -> str:
    """Losses of STEPS steps."""
    got, want = (np.array(_trained(b, stored_as, sizes, method, STEPS)) for b in (backend, "cpu"))
    worst = float(np.abs(got / want - 1).max())
    limit = LOSS[backend.rpartition("/")[2]]
    assert worst <= limit, f"losses differ by {worst:.1e}: {got} {want}"
    assert want[-1] < want[1], "nothing was learnt"  # of the same batch
    return f"{worst:.1e}"


def check_answers(backend: str, stored_as: str, sizes: dict[str, Any]) -> str:
    """Greedy answers: the CPU's, with the cache and recordings, with the cache alone, without; and
    drawn ones."""
    ids, new = _prompts(6, sizes, 2, 9, 9), 10
    model = tiny_model(backend, stored_as, sizes)
    answers = [model.generate(ids, max_new_tokens=new, eos_token_id=[]) for _ in range(2)]
    # a processor wants the scores, so they come to the host, and nothing is recorded
    seen = model.generate(
        ids, max_new_tokens=new, eos_token_id=[], logits_processor=lambda _, scores: scores
    )
    plain = ids
    for _ in range(new):
        best = model(plain).logits[:, -1].argmax(1)
        plain = np.concatenate((plain, best[:, None]), axis=1)
    cpu = tiny_model("cpu", stored_as, sizes).generate(ids, max_new_tokens=new, eos_token_id=[])
    for name, other in (("again", answers[1]), ("scores", seen), ("no cache", plain), ("cpu", cpu)):
        assert np.array_equal(answers[0], other), f"{name}: {answers[0]} {other}"
    drawn = dict(do_sample=True, temperature=1.1, top_p=0.9, repetition_penalty=1.2, seed=3)
    got, want = (
        tiny_model(b, stored_as, sizes).generate(ids, max_new_tokens=new, eos_token_id=[], **drawn)
        for b in (backend, "cpu")
    )
    assert np.array_equal(got, want), f"drawn: {got} {want}"
    graphs = model.core.counts()["graphs"]
    assert graphs > new, f"{graphs} recordings were used"
    return f"{graphs} from recordings"


def check_bits(backend: str, stored_as: str, sizes: dict[str, Any]) -> str:
    """The same step twice is the same, bit for bit."""
    first, second = (_trained(backend, stored_as, sizes, "lora", 3) for _ in range(2))
    assert first == second, f"{first} {second}"
    return "equal"


def check_plan(backend: str, stored_as: str, sizes: dict[str, Any]) -> str:
    """Launches, products, waits, transfers and bytes of a step and of tokens, as planned."""

    def counted(name: str) -> list[dict[str, int]]:
        model, counts = tiny_model(name, stored_as, sizes), []
        core, one = model.core, np.ones(1, np.int32)

        def count() -> None:
            kept = {k: v for k, v in core.counts().items() if k not in ("calls", "flops", "peak")}
            counts.append(kept)

        core.counts()
        model.requires_grad_(True)
        for _ in range(2):
            model.backward(**_batch(1, sizes))
            core.step(1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0)
            count()
        cache = core.cache(1, 40, 0)
        core.extend(cache, [0], _prompts(3, sizes, 1, 20, 20)[0].astype(np.int32), 20 * one)
        count()
        for _ in range(4):
            core.next(cache, [0], one, one)
            count()
        for earlier in counts:  # other models may share the device
            earlier["live"] -= counts[0]["live"]
        return counts

    planned, done = counted(f"plan:{backend}"), counted(backend)
    before = 0
    for place, (a, b) in enumerate(zip(planned, done, strict=True)):
        # scratch that grows is waited for, and what items before this one took need not grow here
        free = ("scratch", "live", "syncs") if a["scratch"] > before else ("scratch", "live")
        before = a["scratch"]
        odd = {k: (a[k], b[k]) for k in a if a[k] != b[k] and k not in free}
        assert not odd, f"call {place}: planned and done {odd}"
    return f"a token: {plans.Work.of(done[3])}"


def readings(backend: str) -> dict[str, Any]:
    """Of a GPU only, for whoever reads the JSON file: bytes that the context takes beside what is
    counted, seconds and bytes a second of an op that only moves memory."""
    found = devices.info(backend.partition("/")[0])
    measured: dict[str, Any] = {"total_bytes": found["total"], "free_bytes": found["free"]}
    o, n = ops_of(backend), 1 << 24
    x, y = np.ones(n, np.float32), np.ones(n, np.float32)
    out = np.empty_like(x)
    at = [o._put(a, 0) for a in (out, x, y)]
    counts = tiny_model(backend, "F32").core
    for repeat in (1, 20):
        counts.counts()
        begin = time.perf_counter()
        for _ in range(repeat):
            o._functions["add"](o._cx, at[0], at[1], at[2], n)
        o._download(o._be, out.ctypes.data, at[0], 4)  # waits
        seconds = (time.perf_counter() - begin) / repeat
    for address in at:
        o._free(o._be, address - o.GUARD)
    o._held = {}
    measured["add"] = {"bytes": 12 * n, "seconds": seconds, "bytes_per_second": 12 * n / seconds}
    return measured


def items(device: str, types: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, what to run) in order; an item fails by raising."""
    stored_as = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    for type_ in types:
        for name, case in OP_CASES.items():
            # what does not multiply does not depend on the type
            if type_ == "float32" or name.startswith(("linear", "attention")):
                backend = f"{device}/{type_}"
                yield f"{type_} {name}", lambda case=case, b=backend: check_op(case, b)
    for type_ in types:
        few = ("full",) if type_ == "float32" else ("lora",)  # what differs is in the layers
        for kind, sizes, methods in (
            ("", SIZES, ("lora", "p_tuning", "full")),
            (" two-way", TWO_WAY, few),
        ):
            of, name = (f"{device}/{type_}", stored_as[type_], sizes), type_ + kind
            yield f"{name} logits", lambda of=of: check_logits(*of)
            for method in methods:
                item = f"{name} {method} {STEPS} steps"
                yield item, lambda of=of, m=method: check_training(*of, m)
            if type_ == "float32":
                yield f"{name} answers", lambda of=of: check_answers(*of)
            if not kind:
                yield f"{name} twice the same bits", lambda of=of: check_bits(*of)
            yield f"{name} counts as planned", lambda of=of: check_plan(*of)
        for kind, sizes in (("tied", TIED), ("branch norms", BRANCHES)):
            of, name = (f"{device}/{type_}", stored_as[type_], sizes), f"{type_} {kind}"
            yield f"{name} logits", lambda of=of: check_logits(*of)
            if type_ == "float32":
                yield f"{name} full {STEPS} steps", lambda of=of: check_training(*of, "full")


TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def deep(device: str, only: str = "float16") -> str:
    """Items whose names begin so, under each tool of compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if device.startswith("emu") or tool is None:
        return "skipped: compute-sanitizer is not installed, or there is no GPU"
    for check in TOOLS:
        words = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m"]
        words += [
            "glmlora.tools.selftest",
            "--device",
            device,
            "--only",
            only,
            "--output",
            os.devnull,
        ]
        done = subprocess.run(words, capture_output=True, text=True)
        printed = done.stdout[-1500:] + done.stderr[-500:]
        assert done.returncode == 0, f"{check}: exit status {done.returncode}: {printed}"
    return ", ".join(TOOLS)


def run(device: str, only: str = "", deeply: bool = False, output: str | None = None) -> int:
    """Run the list; 0 when all items pass. The JSON file has every item and where it ran."""
    started = time.perf_counter()
    kind = device.partition(":")[0]
    if kind == "emu":
        os.environ.setdefault("EMU_PIECE", str(1 << 24))  # as on a GPU; read when it is opened
    report: dict[str, Any] = {"device": devices.info(device), "items": [], "python": sys.version}
    report["core"] = os.path.basename(_core.__file__)
    failed = None
    if not report["device"]["count"]:
        failed = f"environment: {report['device']['why']}"
    else:
        if kind == "cuda":
            report["cublas"] = str(devices.preload_cublas() or "found by the process or the system")
        types = ["float32", "float16", "bfloat16"]
        if report["device"]["capability"] < (8, 0):
            types.remove("bfloat16")
        listed = [(n, f) for n, f in items(device, types) if n.startswith(only)]
        if deeply:
            listed.append(("compute-sanitizer", lambda: deep(device)))
        if kind == "cuda":
            listed.append(("readings", lambda: readings(f"{device}/float32")))
        for name, check in listed:
            begin = time.perf_counter()
            try:
                note, passed = check(), True
            except Exception as error:  # an item that fails must not hide the others
                note, passed = f"{type(error).__name__}: {error}", False
                failed = failed or f"{name}: {note}"
            seconds = round(time.perf_counter() - begin, 3)
            report["items"].append(
                {"name": name, "passed": passed, "note": note, "seconds": seconds}
            )
            print(f"{'ok  ' if passed else 'FAIL'}  {name}: {note}", flush=True)
    report["result"] = failed or "PASS"
    report["seconds"] = round(time.perf_counter() - started, 1)
    output = output or f"selftest-{kind}.json"
    if output != os.devnull:
        with open(output, "w") as file:
            json.dump(report, file, indent=1, default=str)
        print(
            f"{len(report['items'])} items in {report['seconds']} s; {output} is what to send back"
        )
    print(f"selftest {kind}: {report['result']}")
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m glmlora.tools.selftest", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or emu")
    parser.add_argument("--only", default="", help="items whose names begin so")
    parser.add_argument("--deep", action="store_true", help="also under compute-sanitizer")
    parser.add_argument("--output", help="the JSON file, default selftest-DEVICE.json")
    args = parser.parse_args(argv)
    try:
        device = devices.parse(args.device)
    except ValueError as error:
        parser.error(str(error))
    if device is None or device == "cpu":
        parser.error("--device: expected cuda, cuda:N or emu")
    return run(str(device), args.only, args.deep, args.output)


if __name__ == "__main__":
    sys.exit(main())
