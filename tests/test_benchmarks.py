"""What the figures of benchmarks/ rest on: models of more layers than the file has, the count of
products, the peers' files and the verdict of a row."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench
import make_gguf
import numpy as np
import pytest
import soak
from sides import SIX_B
from worker import Worker

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


def test_flops_of_a_step():
    config = json.loads((tiny_directory() / "config.json").read_text())
    planned = plan_flops(config | SIX_B, 4, 512, 3)
    assert bench.step_flops([512] * 4, 3) == pytest.approx(planned, rel=0.02)


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
