"""Models on a CUDA backend against the cpu: emulated, or a device where there is one.

The golden tests and all others that load models run there too: GLMLORA_TEST_BACKEND=emu."""

import numpy as np
import pytest
import tiny
from ops import backends

import glmlora
from glmlora import _core
from glmlora.modeling import ChatGLMForConditionalGeneration as Model

DEVICES = [name for name in backends() if name in ("emu", "cuda")]
pytestmark = pytest.mark.skipif(not DEVICES, reason="GLMLORA_CUDA_LIBRARY names no CUDA library")
on_devices = pytest.mark.parametrize("device", DEVICES)


def load(directory, backend, monkeypatch, **kwargs):
    monkeypatch.setattr(Model, "backend", backend)
    return glmlora.AutoModel.from_pretrained(directory, **kwargs)


def lora(model, dropout=0.0):
    config = glmlora.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=32, lora_dropout=dropout,
        target_modules=["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    )  # fmt: skip
    return glmlora.get_peft_model(model, config)


def batch(rng, rows=3, length=21):
    ids = rng.integers(3, 90, (rows, length))
    labels = ids.copy()
    labels[:, : length // 2] = -100
    mask = np.ones_like(ids)
    mask[1, : length // 3] = 0
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses_of(model, steps=20):
    """Losses of a few LoRA steps on two batches, from the same adapter every time."""
    rng = np.random.default_rng(1)
    batches = [batch(rng), batch(rng)]
    model.backward(**batches[0])  # takes the adapter into training
    model.zero_grad()
    for name in model.core.trainable():
        shape = model.core.read(name).shape
        size = 0.2 if ".lora_A." in name else 0.02
        model.core.write(name, (size * rng.normal(size=shape)).astype(np.float32))
    optimizer, losses = glmlora.AdamW(model, lr=1e-3, max_grad_norm=1.0), []
    for step in range(steps):
        losses.append(model.backward(**batches[step % 2]))
        optimizer.step()
    return np.array(losses)


# Relative error of each loss of 20 steps; heads of 8 take the 16-bit kernels too.
TYPES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}


@on_devices
@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_twenty_lora_steps(device, type_, stored, tmp_path, monkeypatch):
    directory = tiny.tiny_model_dir(tmp_path, dtype=stored)
    want = losses_of(lora(load(directory, "cpu", monkeypatch)))
    got = losses_of(lora(load(directory, f"{device}/{type_}", monkeypatch)))
    assert want[-1] < 0.8 * want[0]  # it learns
    assert np.abs(got / want - 1).max() <= TYPES[type_], (got, want)


@on_devices
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(device, bits, tmp_path, monkeypatch):
    directory = tiny.tiny_model_dir(tmp_path, dtype="F16")
    results = []
    for backend in ("cpu", device):
        model = load(directory, backend, monkeypatch).quantize(bits)
        inputs = batch(np.random.default_rng(2))
        results.append((model(**inputs).logits, losses_of(lora(model), 5)))
    assert np.abs(results[1][0] - results[0][0]).max() <= 1e-4
    assert np.abs(results[1][1] / results[0][1] - 1).max() <= 1e-4


@on_devices
def test_greedy_answers_are_the_same(device, tmp_path, monkeypatch):
    directory = tiny.tiny_model_dir(tmp_path)
    ids = np.random.default_rng(3).integers(3, 90, (2, 11))
    answers = [
        load(directory, backend, monkeypatch).generate(ids, max_new_tokens=12, eos_token_id=[])
        for backend in ("cpu", device)
    ]
    assert np.array_equal(*answers)


@on_devices
def test_a_repeated_step_allocates_nothing_and_has_the_same_bits(device, tmp_path, monkeypatch):
    model = lora(load(tiny.tiny_model_dir(tmp_path), f"{device}/float16", monkeypatch))
    inputs = batch(np.random.default_rng(4))
    gradients, taken = [], []
    for _ in range(3):
        model.zero_grad()
        model.backward(**inputs)
        gradients.append(model.named_gradients())
        taken.append(model.core.allocations)
    assert taken[1:] == taken[:1] * 2
    for name, gradient in gradients[0].items():
        assert gradient.tobytes() == gradients[2][name].tobytes(), name


@on_devices
def test_names(device):
    assert _core.op_table(device)["cx"] == _core.op_table(f"{device}:0/float32")["cx"]
    assert _core.op_table(device)["cx"] != _core.op_table(f"{device}/float16")["cx"]
    for name, text in {
        f"{device}:99": "CUDA devices",
        f"{device}:x": "expected cpu",
        f"{device}/int8": "expected cpu",
    }.items():
        with pytest.raises(ValueError, match=text):
            _core.op_table(name)
