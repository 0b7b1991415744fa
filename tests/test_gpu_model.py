"""benchmarks/gpu_model.py: what it says of an H100 beside what one measured, and that it knows what
each kernel costs that the library launches."""

import json

import gpu_model
import pytest
from emulator import built, needs_compiler

H100 = gpu_model.GPUS["H100"]


def test_modelled_times_are_within_the_band_of_those_measured(capsys):
    rows = gpu_model.checked()
    off = {(side, item): cost.seconds / measured - 1 for side, item, cost, measured in rows}
    assert len(off) == 19
    assert all(abs(value) <= gpu_model.BAND for value in off.values()), off
    gpu_model.show_checked(rows)
    shown = capsys.readouterr().out
    assert "measured on an H100" in shown and "an assumption is from it" in shown


def test_memory_was_counted_to_the_byte():
    measured = json.loads((gpu_model.FOLDER / "gpu_h100.json").read_text())["sides"]
    for side, item, cost, _ in gpu_model.checked():
        assert measured[side]["items"][item].get("peak", cost.live) == cost.live, (side, item)


@needs_compiler
def test_what_the_code_does_today(capsys):
    asked = dict(contexts=[(1, 1024)], steps=gpu_model.EVEN, dropout=0.1)
    found = gpu_model.costs("ChatGLM2-6B", H100, built(), **asked)
    prefill, token, step = found.values()
    assert token.counts()["launches"] == 28 * 6 + 4 and token.counts()["products"] == 0
    least = gpu_model.read_at_least("ChatGLM2-6B", token.item)
    assert least < token.bytes < 1.01 * least  # each weight once
    assert step.flops == pytest.approx(47.66e12, rel=0.05)  # gpu.py's, by hand
    gpu_model.show("ChatGLM2-6B", H100, found, kernels=True)
    shown = capsys.readouterr().out
    assert "x its FLOPs" in shown and "% of bandwidth" in shown and "cuBLAS: " in shown
    assert "(1.25)" in shown or "| met |" in shown


def test_a_kernel_without_a_cost_is_refused():
    with pytest.raises(KeyError, match="k_new: benchmarks/gpu_model.py does not say what it costs"):
        gpu_model.launch_of("k_new 1 32 1 1", gpu_model.Batch([1]))
