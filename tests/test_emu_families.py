"""Losses of every family on the emulated device: the golden ones within 1e-3, and those of
quantized models as on the processor. All other golden arrays there: `make test-deep`."""

import numpy as np
import pytest
from emulator import built, needs_compiler
from test_golden import MODELS, Golden, load, with_lora

pytestmark = needs_compiler


@pytest.fixture(autouse=True)
def library(monkeypatch):
    monkeypatch.setenv("GLMLORA_CUDA_LIBRARY", str(built()))


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_golden_ones(name, tmp_path):
    g, model = with_lora(name, "lora", tmp_path)
    loss = model.float().to("emu")(**g.batch()).loss
    assert abs(loss - g["lora/loss"]) <= 1e-3, name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_losses_of_quantized_models_are_those_of_the_processor(name, bits):
    g, losses = Golden(name), []
    row = {"input_ids": g["single/input_ids"], "labels": g["single/labels"]}
    row["attention_mask"] = np.ones_like(row["input_ids"])
    for device in ("cpu", "emu"):
        model = load(name).float().quantize(bits).to(device)
        losses.append(model(**row).loss)
    assert np.isfinite(losses).all() and abs(losses[0] - losses[1]) <= 1e-3, name
