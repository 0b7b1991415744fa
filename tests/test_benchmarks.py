"""What the figures of benchmarks/ rest on: models of more layers than the file has, the count of
products, the peers' files and the verdict of a row."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bench
import big
import classify
import gpu
import make_gguf
import numpy as np
import pytest
import six_b
import soak
from emulator import built
from sides import EDGE, NINE_B_HF, SIX_B
from test_layouts import CONFIG, KINDS, write
from worker import Worker

import glmlora
from glmlora import _core
from glmlora.files.checkpoint import load_checkpoint
from glmlora.files.tensor import same
from glmlora.generation.cache import CachedRow
from glmlora.model.saving import weight_sources
from glmlora.tools.plan import plan
from glmlora.tools.project import tiny_directory

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def logits(model, ids):
    core = model.core
    lengths = np.array([len(ids)], np.int32)
    return core.extend(core.cache(1, len(ids)), [0], np.array(ids, np.int32), lengths)


@pytest.mark.parametrize("bits, group", [(0, None), (8, None), (4, 32)])
def test_model_of_repeated_layers(bits, group):
    worker = Worker(tiny_directory(), 9, None, bits, group)
    here = worker.here
    same, ids = worker.model(here), [5, 6, 7, 8]
    assert np.array_equal(logits(same, ids), logits(worker.file, ids))
    whole = worker.model(2 * here + 1)
    for i in (0, here, 2 * here):  # each is layer 0
        name = f"transformer.encoder.layers.{i}.self_attention.dense.weight"
        assert np.array_equal(
            whole.read_weight(name),
            worker.file.read_weight("transformer.encoder.layers.0.self_attention.dense.weight"),
        )
    own = sum(t.nbytes for t in worker.file.stored_tensors())
    assert worker.weights == own + (9 - here) * worker.layer


def test_line_is_that_of_equal_layers():
    worker = Worker(tiny_directory(), 28, None, 0, None)
    answer = worker.line(lambda layers: 3.0 + 0.5 * layers)
    assert answer == {"seconds": 17.0, "measured": 3.5 + 4.0}
    for job in (
        dict(job="decode", rows=2, context=5, steps=2, layers=[1, 2]),
        dict(job="lora", lengths=[6, 9], labelled=3, checkpointing=True),
        dict(job="predict", lengths=[6, 9], new=2, opening=3),
        dict(job="classify", lengths=[6, 9, 12], opening=3),
        dict(job="classify", lengths=[6, 9], memory=True),
    ):
        assert getattr(worker, job.pop("job"))(**job)["measured"] > 0


def test_side_answers_a_line_for_a_line():
    jobs = [
        dict(job="decode", rows=1, context=4, steps=2, threads=1),
        dict(job="decode", rows=0, context=4),
        dict(job="bake", tokens=4),
        dict(job="prefill", tokens=4),
    ]
    told = subprocess.run(
        [sys.executable, FOLDER / "worker.py", tiny_directory()],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        capture_output=True,
        text=True,
        check=True,
    )
    ready, *answers = map(json.loads, told.stdout.splitlines())
    assert ready["ready"] and ready["weights"] > ready["read"] > 0
    assert [sorted(a) for a in answers] == [["measured", "seconds"], ["error"], ["error"]] + [
        ["measured", "seconds"]
    ]
    assert "steps" in answers[1]["error"] and "bake" in answers[2]["error"]


@pytest.mark.parametrize("shapes", [SIX_B, NINE_B_HF, EDGE], ids=["6B", "9B", "Edge"])
def test_flops_of_a_step(shapes):
    own = json.loads((tiny_directory() / "config.json").read_text()) if shapes is SIX_B else {}
    planned = plan_flops(own | shapes, 4, 512, 3)
    assert bench.step_flops([512] * 4, 3, shapes) == pytest.approx(planned, rel=0.02)


def test_a_worker_of_a_model_in_the_other_layout(tmp_path):
    """Its head is the embeddings, which a step of decoding reads whole."""
    worker = Worker(write(tmp_path, "tied"), 5, None, 0, None)
    assert worker.read == worker.weights
    assert worker.lora(lengths=[6, 9], labelled=3, checkpointing=False)["tokens"] == 15
    model = worker.trainees[next(iter(worker.trainees))][0]
    assert {n.split(".")[-3] for n in model.core.names() if ".lora_A." in n} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }


@pytest.mark.parametrize("group", [0, 32])
def test_a_big_model_is_that_of_its_weights(tmp_path, monkeypatch, group):
    """Written a matrix at a time it is what quantize() makes of the float model."""
    monkeypatch.setattr(big, "GLM4_32B", CONFIG | KINDS["glm4"] | {"torch_dtype": "bfloat16"})
    fields = big.GLM4_32B | dict(num_hidden_layers=3)
    assert "in bfloat16" in big.write(tmp_path, 3, group)
    config = glmlora.ChatGLMConfig(**fields)
    weights = {s.name: s.get() for s in six_b.random_weights(config)}
    model = type(big.opened(tmp_path))(config, weights, "float32").quantize(4, group_size=group)
    made = load_checkpoint(tmp_path)
    for source in weight_sources(model):
        assert same(source.get(), made[source.name]), source.name
    assert "tokens/s" in big.answer(tmp_path) and "LoRA step" in big.step(tmp_path)


def test_flops_of_rows_that_are_weighed(tmp_path):
    """Against the core's own count of what it does for them."""
    config = json.loads((tiny_directory() / "config.json").read_text()) | SIX_B
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = glmlora.AutoConfig.from_pretrained(tmp_path)
    core = _core.Model(config.arch(), "plan", names=config.tensor_names)
    arrays = {shape: np.empty(shape, np.float16) for shape in core.shapes().values()}
    for name, shape in core.shapes().items():
        core.bind(name, arrays[shape], "F16")
    core.counts()
    lengths, opening = bench.PROMPTS[:4], bench.OPENING
    model = SimpleNamespace(core=core, config=config)
    rows = CachedRow(model, 4, 1024, [5] * opening)
    for row, length in enumerate(lengths):
        rows.become(row, [5] * length)
    rows.extend([0, 1, 2, 3])
    found = core.counts()["flops"]
    assert classify.needed_flops(lengths, opening) == pytest.approx(found, rel=0.01)


def plan_flops(config, rows, tokens, labels):
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return plan(folder, rows, tokens, "lora", labels, budget=1 << 40).flops


def test_gguf_blocks():
    x = np.random.default_rng(3).normal(0, 0.02, 64 * 32).astype(np.float32)
    x[:32] = 0
    blocks = x.reshape(-1, 32)
    for kind, per_block in (("Q8_0", 34), ("Q4_0", 18)):
        data = make_gguf.encode(x, kind).reshape(-1, per_block)
        assert data.nbytes == make_gguf.nbytes(x.size, kind)
        scale = data[:, :2].copy().view(np.float16).astype(np.float32)
        if kind == "Q8_0":
            values = data[:, 2:].view(np.int8).astype(np.float32)
        else:
            values = np.concatenate([data[:, 2:] & 15, data[:, 2:] >> 4], 1).astype(np.float32) - 8
        # half a step, a whole one at the end that Q4_0 lacks, and the scale's own rounding
        allowed = np.abs(scale) * (1.0 if kind == "Q4_0" else 0.5) + np.abs(blocks) / 1000
        assert (np.abs(values * scale - blocks) <= allowed).all()
        assert np.abs(values * scale - blocks).max() > 0


def test_gguf_file(tmp_path):
    config = json.loads((tiny_directory() / "config.json").read_text())
    config |= dict(hidden_size=64, ffn_hidden_size=96, kv_channels=32, num_attention_heads=2)
    config |= dict(multi_query_group_num=1, padded_vocab_size=96, num_layers=2)
    for kind in ("F16", "Q8_0", "Q4_0"):
        make_gguf.make(config, tmp_path / kind, kind)
        tensors = list(make_gguf.shapes(config))
        sizes = [
            make_gguf.nbytes(int(np.prod(s)), kind if len(s) == 2 else "F32") for _, s in tensors
        ]
        data = sum(-(-n // 32) * 32 for n in sizes)
        header = (tmp_path / kind).stat().st_size - data
        assert 0 < header < 4096 and header % 32 == 0
        assert (tmp_path / kind).read_bytes()[:8] == b"GGUF\x03\0\0\0"


def test_row_is_judged_run_by_run(capsys):
    some = SimpleNamespace(limits=SimpleNamespace(now={"fma_gflop_s": 1}), rows=[])
    # the machine halves its speed in the last run: the ratios are those of before
    limits = [{"fma_gflop_s": v} for v in (210.0, 200.0, 200.0, 100.0)]
    mine = dict(seconds=2.0, runs=3, every=[2.0, 2.0, 4.0], limits=limits)
    peer = dict(seconds=3.0, runs=3, every=[3.0, 3.0, 6.0])
    told = dict(rate=170.0, unit="GFLOP/s", limit="fma_gflop_s", peers={"torch": peer})
    for bars, met in (
        (dict(limit=0.85, torch=1.5), True),
        (dict(limit=0.86, torch=1.5), False),
        (dict(limit=0.85, torch=1.51), False),
        (dict(memory=2.0), True),
        (dict(absent=1.0), None),
        ({}, None),
    ):
        bench.Bench.row(some, 4, "a job", mine, **told, ratios={"memory": 2.0}, bars=bars)
        row = some.rows[-1]
        assert row["met"] is met
        assert row["ratios"] == pytest.approx({"limit": 0.85, "torch": 1.5, "memory": 2.0})
        assert ("NOT MET" in capsys.readouterr().err) is (met is False)


def test_a_round_of_the_soak(tmp_path):
    """Every kind of work, and what is not as it should be is found."""
    work = soak.Soak(tmp_path, seed=1)
    work.round()
    assert work.wrong == [] and sum(work.done.values()) == 7
    (tmp_path / "whole-full/.1-0123456789ab.tmp").write_text("")  # nobody writes here again
    work.answers = dict.fromkeys(work.answers, "another")
    work.whole = dict.fromkeys(work.whole, {})
    for again in (work.interrupted, work.chat, work.batch, work.merge, work.look_for_litter):
        again()
    wrong = "\n".join(work.wrong)
    for text in ("chat We measure", "batch", "merged", "other weights", "0123456789ab.tmp is left"):
        assert text in wrong


# benchmarks/gpu.py on the emulator: what was measured is there whatever happens afterwards

STUB = """
import atexit, os, sys, time
sys.path.insert(0, {benchmarks!r})
import gpu

class Stub(gpu.Side):
    facts = {{"peft": "1.0"}}

    def items(self):
        def dies():
            print("dying", flush=True)
            os.kill(os.getpid(), 9)

        def hangs():
            open({folder!r} + "/pid", "w").write(str(os.getpid()))
            time.sleep(1000)

        def faulty():
            raise RuntimeError("CUDA error")

        yield "good", lambda: {{"seconds": 1.0}}
        yield "fails", lambda: 1 / 0
        yield "faulty", faulty
        yield "dies", dies
        yield "hangs", hangs
        yield "last", lambda: {{"seconds": 2.0}}

class Broken(Stub):
    def __init__(self, device):
        raise ImportError("no torch here")

class Stuck(Stub):
    def items(self):
        yield "only", lambda: {{"seconds": 3.0}}
        atexit.register(time.sleep, 1000)

gpu.SIDES = {{"broken": Broken, "stub": Stub, "stuck": Stuck}}
gpu.LIMIT = {limit}
gpu.main()
"""


@pytest.fixture
def gpu_run(tmp_path, monkeypatch):
    """Begins gpu.py with sides that are stubs: a process, and what its file holds."""
    if not shutil.which("g++") or "GLMLORA_SANITIZED" in os.environ:
        pytest.skip("the emulator needs g++ and a plain build")
    monkeypatch.setenv("GLMLORA_CUDA_LIBRARY", str(built()))
    words = ["--device", "emu", "--json", str(tmp_path / "gpu.json"), "--skip", "self-test"]

    def begin(*more, limit=3.0):
        text = STUB.format(benchmarks=str(FOLDER), folder=str(tmp_path), limit=limit)
        (tmp_path / "stub.py").write_text(text)
        return subprocess.Popen(
            [sys.executable, tmp_path / "stub.py", *words, *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def file():
        path = tmp_path / "gpu.json"
        return json.loads(path.read_text())["sides"] if path.exists() else {}

    return begin, file


def test_gpu_items_that_fail_hang_or_die_cost_no_other(gpu_run):
    begin, file = gpu_run
    told, _ = begin().communicate(timeout=120)
    sides = file()
    assert sides["broken"] == {"items": {}, "ended": sides["broken"]["ended"]}
    assert "no torch here" in sides["broken"]["ended"][0]
    items = sides["stub"]["items"]
    assert list(items) == ["good", "fails", "faulty", "dies", "hangs", "last"]
    assert items["good"]["seconds"] == 1.0 and items["last"]["seconds"] == 2.0
    assert items["fails"]["failed"] == "ZeroDivisionError: division by zero"
    assert items["faulty"]["failed"] == "RuntimeError: CUDA error"
    assert items["dies"] == {"failed": "its process ended with status -9", "printed": ["dying"]}
    assert items["hangs"]["failed"] == "no answer in 3 s"
    ended = sides["stub"]["ended"]
    assert [how.split(" | ")[0] for how in ended] == [
        "its process ended with status 1",  # by itself, after an error of the device
        "its process ended with status -9",
        "no answer in 3 s",
    ]
    assert sides["stub"]["peft"] == "1.0" and sides["stuck"]["items"]["only"]["seconds"] == 3.0
    assert "ended" not in sides["stuck"]  # all was told before it got stuck
    assert "stub, last: {'seconds': 2.0" in told


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_gpu_run_that_is_killed_leaves_what_it_has(gpu_run, tmp_path, how):
    """And no process."""
    begin, file = gpu_run
    run, deadline = begin(limit=100.0), time.time() + 60
    while not (tmp_path / "pid").exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    run.send_signal(how)
    assert run.wait(60) == (-9 if how == signal.SIGKILL else 143)
    items = file()["stub"]["items"]
    assert items["good"]["seconds"] == 1.0 and "status -9" in items["dies"]["failed"]
    time.sleep(0.2)
    state = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    assert not state.exists() or " Z " in state.read_text()


def test_a_gpu_run_ends_in_its_time(gpu_run):
    begin, file = gpu_run
    begin("--minutes", "0.05", "--only", "stub", limit=100.0).communicate(timeout=60)
    [(side, about)] = file().items()
    assert side == "stub" and about["items"]["good"]["seconds"] == 1.0
    assert "left out" in about or about["items"]["hangs"]["failed"] == "no time left"


def test_gpu_sides_on_the_emulator(gpu_run, tmp_path):
    """Ours, as they run on a GPU."""
    words = ["--device", "emu", "--json", str(tmp_path / "gpu.json"), "--only", "chat", "train"]
    told = subprocess.run(
        [sys.executable, FOLDER / "gpu.py", *words], capture_output=True, text=True, timeout=120
    ).stdout
    sides = gpu_run[1]()
    assert list(sides) == ["chat", "train", "chat int4", "chat int8", "train int4"]
    for side, about in sides.items():
        assert "ended" not in about and len(about["items"]) == (5 if "chat" in side else 2)
        assert all(item["seconds"] > 0 for item in about["items"].values())
    assert "chat, token of 1 row at 24: not known, something was not measured" in told


def test_goals_on_a_gpu():
    row = {"seconds": 1.0, "peer": 3.0, "share": 0.8, "memory": (10, 10)}
    assert gpu.verdict_on(row, 0.8, 3.0, True).startswith("MET: 0.80 of the card (goal 0.8), 3.00")
    for change in ({"share": 0.79}, {"peer": 2.9}, {"memory": (11, 10)}):
        assert gpu.verdict_on(row | change, 0.8, 3.0, True).startswith("NOT MET")
    assert gpu.verdict_on(row | {"share": None}, None, 3.0, False).startswith("MET")
    assert gpu.verdict_on(row | {"peer": None}, None, 3.0, False).startswith("not known")
