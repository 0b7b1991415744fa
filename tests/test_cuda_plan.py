"""What a 6B model takes of a GPU and does on it, as the plan backend counts it, and that the CUDA
library does just that: its host code run at the same shapes on the emulator, kernels left out."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny
from emulator import built, needs_compiler
from sides import SIX_B

from glmlora import cli
from glmlora.model import peft
from glmlora.model.configuration import ChatGLMConfig
from glmlora.tools import plan as planning
from glmlora.tools.plan import RESERVE, parse_bytes, plan
from glmlora.training import methods
from glmlora.training.arguments import FinetuningArguments

ROOT = Path(__file__).resolve().parent.parent
LEAST = dict(device="cuda", budget=1)  # every layer but the last is recomputed
# ChatGLM-6B's, but for the vocabulary.
FIRST = {
    "model_type": "chatglm",
    "position_encoding_2d": True,
    "hidden_size": SIX_B["hidden_size"],
    "inner_hidden_size": 4 * SIX_B["hidden_size"],
    "num_attention_heads": SIX_B["num_attention_heads"],
    "num_layers": 28,
    "vocab_size": 65024,
    "bos_token_id": 65000,
    "eos_token_id": 65001,
    "max_sequence_length": 2048,
}


@pytest.fixture(scope="module")
def six_b(tmp_path_factory):
    directory = tmp_path_factory.mktemp("six_b")
    (directory / "config.json").write_text(json.dumps(tiny.TINY_CONFIG | SIX_B))
    return directory


@pytest.mark.parametrize(
    "gigabytes, method, more",
    [
        (14.0, "lora", dict(lora_rank=8)),
        (8.5, "lora", dict(lora_rank=8, quantization_bit=8)),
        (5.6, "lora", dict(lora_rank=8, quantization_bit=4)),
        (6.0, "p_tuning", dict(pre_seq_len=128, quantization_bit=4)),
    ],
)
def test_a_step_of_4_rows_of_600_tokens(six_b, gigabytes, method, more):
    planned = plan(six_b, 4, 600, method, **LEAST, **more)
    assert planned.total <= gigabytes * 1e9
    assert planned.total > 0.95 * gigabytes * 1e9 - 0.6e9  # the count is not of something else
    assert planned.work["a step"].syncs == 1


@pytest.mark.parametrize("gigabytes, bits", [(13.1, None), (8.2, 8), (5.5, 4)])
def test_a_chat_of_2048_tokens(six_b, gigabytes, bits):
    planned = plan(six_b, 1, 2048, "chat", quantization_bit=bits, device="cuda")
    assert planned.total <= gigabytes * 1e9
    token, recorded = planned.work["a token"], planned.work["a token, recorded"]
    around = 4  # the embedding and its norm before the layers, the logits and their maximum after
    assert token.launches == 28 * (9 if bits else 6) + around and token.products == 0
    assert (recorded.launches, recorded.products, recorded.graphs) == (0, 0, 1)
    for work in (token, recorded):
        assert work.syncs == 1 and work.downloaded <= 16


@pytest.mark.parametrize(
    "method, more, most",
    [
        ("lora", dict(lora_target="query_key_value,dense"), 1),
        ("p_tuning", dict(pre_seq_len=16, prefix_projection=True), 2),
        ("full", {}, 2),
    ],
)
def test_an_update_is_few_launches(six_b, method, more, most):
    config = ChatGLMConfig.from_pretrained(six_b)
    config.num_layers = 2
    model, _ = planning._build(config, "F16", 0, 0, "plan:cuda/float16")
    arguments = FinetuningArguments(finetuning_type=method, **more)
    trainee = methods.prepare(model, None, arguments, method, seed=0)
    trainee.base.prepare_training()
    core, rows = model.core, np.array([8], np.int32)
    core.backward(np.zeros(9, np.int32), np.full(1, 9, np.int32), rows=rows, targets=rows)
    core.counts()
    core.step(1e-4, 0.9, 0.999, 1e-8, 0.1, 0.0)
    assert core.counts()["calls"]["adamw"] == most


def test_a_token_with_an_adapter(six_b):
    """An adapter on query_key_value that is not merged takes three launches more a layer."""
    config = ChatGLMConfig.from_pretrained(six_b)
    model, _ = planning._build(config, "F16", 0, 0, "plan:cuda/float16")
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8))
    core, one = model.core, np.ones(1, np.int32)
    cache = core.cache(1, 2048, 0)
    core.next(cache, [0], np.ones(1000, np.int32), 1000 * one)
    core.counts()
    core.next(cache, [0], one, one)
    assert core.counts()["launches"] == 28 * 9 + 4


def test_a_token_of_chatglm_6b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FIRST))
    planned = plan(tmp_path, 1, 2048, "chat", device="cuda")
    token, recorded = planned.work["a token"], planned.work["a token, recorded"]
    assert (token.launches, token.products) == (28 * 14 + 4, 0)
    assert (recorded.launches, recorded.products, recorded.graphs) == (0, 0, 1)


def test_a_drawn_token(six_b):
    config = ChatGLMConfig.from_pretrained(six_b)
    model, _ = planning._build(config, "F16", 0, 0, "plan:cuda/float16")
    core, one = model.core, np.ones(1, np.int32)
    cache = core.cache(1, 2048, 0)
    core.next(cache, [0], np.ones(1000, np.int32), 1000 * one)
    choice = dict(draws=np.zeros((1, 3), np.uint64), temperature=0.8, top_k=50, top_p=0.8)
    works = []
    for length in range(1001, 1007):
        choice |= dict(context=np.arange(length, dtype=np.int32), repetition_penalty=1.1)
        core.counts()
        core.next(cache, [0], one, one, choice | {"context_lengths": length * one})
        works.append(planning.Work.of(core.counts()))
    assert works[0].launches <= 260 and works[0].products == 0
    assert all(w.syncs == 1 and w.downloaded <= 16 for w in works)
    assert all((w.launches, w.graphs) == (0, 1) for w in works[1:])


def test_memory_grows_linearly_with_the_length(six_b):
    at = [plan(six_b, 1, T, **LEAST).activations for T in (512, 1024, 2048)]
    assert at[1] < 2.02 * at[0] and at[2] < 2.02 * at[1]


def test_the_memory_decides_how_many_layers_are_recomputed(six_b):
    at = [plan(six_b, 4, 600, device="cuda", memory=m) for m in ("16GB", "18GB", "80GB")]
    kept = [planned.kept_layers for planned in at]
    assert kept[0] < kept[1] < kept[2] == 28
    for planned, memory in zip(at, (16e9, 18e9, 80e9), strict=True):
        assert planned.total + RESERVE <= memory
        assert planned.flops == pytest.approx(
            at[2].flops * (1 + 0.42 * (28 - planned.kept_layers) / 28), rel=0.1
        )
    with pytest.raises(MemoryError, match="quantization_bit 8 or 4"):
        plan(six_b, 4, 600, device="cuda", memory="12GB")


def test_memory_is_said_in_bytes(six_b, capsys):
    assert parse_bytes("16GB") == 16 * 10**9 and parse_bytes("1.5 GiB") == 3 << 29
    for wrong in ("16 apples", "-1GB", "GB"):
        with pytest.raises(ValueError, match="memory: expected bytes"):
            parse_bytes(wrong)
    words = ["plan", "--model", str(six_b), "--batch", "4", "--seq", "600"]
    assert cli.main([*words, "--device", "cuda", "--memory", "16GB"]) == 0
    shown = capsys.readouterr().out
    assert "on the GPU at once" in shown and "an estimate" in shown and "1 waits" in shown
    assert cli.main([*words, "--memory", "16GB"]) == 1
    assert "say device cuda" in capsys.readouterr().err


COUNTED = """
    import ctypes, json, sys
    import numpy as np
    runtime = ctypes.CDLL({runtime!r})
    runtime.emu_mode(1, 0, 0, 0)  # kernels are counted and left out
    from glmlora.training import methods
    from glmlora.model import peft
    from glmlora.tools import plan
    from glmlora.training.arguments import FinetuningArguments
    from glmlora.model.configuration import ChatGLMConfig

    def counted(backend, method, bits, dtype):
        config = ChatGLMConfig.from_pretrained({directory!r})
        model, _ = plan._build(config, dtype, bits, 32 if bits == 4 else 0, backend)
        core, told = model.core, []

        def tell():
            counts = core.counts()
            told.append({{n: v for n, v in counts.items() if n not in ("calls", "flops", "peak")}})

        tell()
        told[0] = told[0]["live"]
        if method == "adapter":
            peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8))
        if method in ("chat", "adapter"):
            cache, one = core.cache(2, 1100, 0), np.ones(1, np.int32)
            tell()
            core.extend(cache, [0], plan._made_up(config, [1024]), one * 1024)
            tell()
            for _ in range(4):
                core.next(cache, [0], one, one)
                tell()
            draws = dict(draws=np.ones((1, 3), np.uint64), temperature=0.8, top_p=0.8)
            context = dict(context=np.arange(1030, dtype=np.int32), repetition_penalty=1.1)
            context["context_lengths"] = one * 1030
            for choice in (draws, draws, draws, draws | context, draws | context, draws | context):
                core.next(cache, [0], one, one, choice)
                tell()
            more = plan._made_up(config, [1, 11])
            for _ in range(3):
                core.next(cache, [0, 1], more, np.array([1, 11], np.int32))
                tell()
            core.extend(cache, [0, 1], np.ones(2, np.int32), np.ones(2, np.int32))
            tell()
            return told
        kind, _, target = method.partition(" of ")
        arguments = FinetuningArguments(
            finetuning_type=kind, lora_target=target or "all-linear", pre_seq_len=64
        )
        trainee = methods.prepare(model, None, arguments, kind, seed=0)
        trainee.base.prepare_training()
        tell()
        rows = np.array([100, 599, 1199], np.int32)
        for budget in (1, 1 << 31):
            core.reserve(1200, 2, 3, True, budget)
            for _ in range(2):
                ids = plan._made_up(config, [600, 600])
                core.backward(ids, np.full(2, 600, np.int32), rows=rows, targets=rows, dropout=True)
                tell()
                core.step(1e-4, 0.9, 0.999, 1e-8, 0.0, 1.0)
                tell()
        return told

    dtype, method, bits = json.loads(sys.argv[1])
    compute = plan._COMPUTE[dtype]
    planned = counted("plan:cuda/" + compute, method, bits, dtype)
    done = counted("emu/" + compute, method, bits, dtype)
    odd = [(i, a, b) for i, (a, b) in enumerate(zip(planned, done)) if a != b]
    assert not odd, odd
    assert len(planned) == len(done) > 8
    print("equal")
"""


# The same sizes with queries, keys and values apart, and norms of branches.
SPLIT = {
    "model_type": "glm4",
    "hidden_size": SIX_B["hidden_size"],
    "intermediate_size": SIX_B["ffn_hidden_size"],
    "num_attention_heads": SIX_B["num_attention_heads"],
    "head_dim": SIX_B["kv_channels"],
    "num_hidden_layers": 3,
    "vocab_size": SIX_B["padded_vocab_size"],
    "max_position_embeddings": 2048,
}


@needs_compiler
@pytest.mark.parametrize(
    "method, bits, dtype",
    [
        ("lora first", 0, "F16"),
        ("p_tuning first", 4, "F16"),
        ("full first", 0, "F32"),
        ("adapter first", 8, "F16"),
        ("lora split", 0, "F16"),
        ("full split", 0, "F32"),
        ("adapter split", 4, "F16"),
        ("lora", 0, "F16"),
        ("lora", 4, "F16"),
        ("lora", 8, "BF16"),
        ("lora", 0, "F32"),
        ("lora of query_key_value", 0, "F32"),
        ("lora of query_key_value", 0, "BF16"),
        ("lora of query_key_value", 8, "F16"),
        ("p_tuning", 4, "F16"),
        ("full", 0, "F16"),
        ("chat", 0, "F16"),
        ("chat", 4, "F16"),
        ("chat", 8, "F32"),
        ("adapter", 4, "F16"),
    ],
)
def test_the_library_does_what_the_plan_counts(method, bits, dtype, tmp_path):
    library = built()
    config = tiny.TINY_CONFIG | SIX_B | {"num_layers": 3, "seq_length": 2048}
    other = method.rpartition(" ")[2]
    method = method.removesuffix(" " + other) if other in ("first", "split") else method
    config = {"split": SPLIT, "first": FIRST | {"num_layers": 3}}.get(other, config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    code = COUNTED.format(runtime=str(library.parent / "libcuda_emu.so"), directory=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), json.dumps([dtype, method, bits])],
        env=dict(os.environ, GLMLORA_CUDA_LIBRARY=str(library), EMU_PIECE=str(1 << 24)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == ["equal"], done.stdout[-2000:] + done.stderr[-4000:]
