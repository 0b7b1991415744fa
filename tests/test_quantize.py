"""`glmlora quantize`: a directory quantized matrix by matrix, on tiny models of each layout."""

import json
import re
import shutil
import weakref
from collections import namedtuple

import numpy as np
import pytest
import tiny
from test_layouts import CONFIG, KINDS, write

import glmlora
from glmlora import cli
from glmlora.files.checkpoint import save_sharded
from glmlora.model import quantization, saving
from glmlora.model.saving import weight_sources
from glmlora.tools import quantize as tool
from glmlora.tools.quantize import quantize

FORMS = [(8, None), (4, None), (4, 32)]


@pytest.fixture(params=["chatglm", *KINDS])
def directory(request, tmp_path):
    """A model with small files beside it."""
    if request.param == "chatglm":
        place = tiny.tiny_model_dir(tmp_path)
    else:
        place = write(tmp_path / "base", request.param)
    (place / "tokenizer_config.json").write_text("{}")
    (place / "generation_config.json").write_text(json.dumps({"top_p": 0.5}))
    return place


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("bits", "group"), FORMS)
def test_bytes_are_those_of_a_model_that_is_quantized_and_saved(directory, tmp_path, bits, group):
    model = glmlora.AutoModel.from_pretrained(directory).quantize(bits, group_size=group)
    model.save_pretrained(tmp_path / "saved")
    nbytes = quantize(directory, tmp_path / "made", bits, group)
    made = files(tmp_path / "made")
    assert made == files(tmp_path / "saved") and "tokenizer_config.json" in made
    assert nbytes == sum(s.nbytes for s in weight_sources(model))


def test_shards_are_filled_one_matrix_at_a_time(directory, tmp_path, monkeypatch):
    alive, most = [], 0

    def counted(*args):
        nonlocal most
        found = usual(*args)
        alive.append(weakref.ref(found.integers.data.base))
        most = max(most, sum(ref() is not None for ref in alive))
        return found

    usual = quantization.quantize
    monkeypatch.setattr(quantization, "quantize", counted)
    monkeypatch.setattr(
        saving,
        "save_sharded",
        lambda *args, **words: save_sharded(args[0], args[1], 20000, **words),
    )
    quantize(directory, tmp_path / "made", 8)
    linears = glmlora.AutoModel.from_pretrained(directory)._linear_shapes()
    assert len(alive) == len(linears) and most == 1
    assert len(list((tmp_path / "made").glob("model-*.safetensors"))) > 1
    again = glmlora.AutoModel.from_pretrained(tmp_path / "made")
    assert again.config.quantization_bit == 8


def test_what_cannot_be_is_told_before_the_work(tmp_path, monkeypatch):
    base, taken = tiny.tiny_model_dir(tmp_path), tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("")
    quantize(base, tmp_path / "four", 4, 32)
    monkeypatch.setattr(tool, "write_model", None)
    for words, kind, message in (
        ((base, tmp_path / "new", 5), ValueError, "expected 0, 4 or 8, got 5"),
        ((base, tmp_path / "new", 0), ValueError, "bits: expected 4 or 8"),
        ((base, tmp_path / "new", 8, 32), ValueError, "quantization_group_size.*got 32"),
        ((tmp_path / "nowhere", tmp_path / "new", 8), OSError, "nowhere"),
        ((base, taken, 8), FileExistsError, "taken exists and is not empty"),
        ((base, taken / "file", 8), FileExistsError, "file is a file"),
        ((tmp_path / "four", tmp_path / "new", 4, 32), ValueError, "four: .* 4 bits already"),
        ((tmp_path / "four", tmp_path / "new", 4), ValueError, "four: .*groups of 32"),
    ):
        with pytest.raises(kind, match=message):
            quantize(*words)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(50 << 20))
    with pytest.raises(OSError, match=r"0.1 GB are needed, 0.1 GB are free: .*new"):
        quantize(base, tmp_path / "new", 8)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_left_of_a_model_that_cannot_be_quantized(tmp_path, there):
    weights = tiny.transformers_weights({**CONFIG, **KINDS["glm"]})
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][3, 1] = np.inf
    base = write(tmp_path / "base", "glm", weights)
    if there:
        (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=re.escape(f"{name}: row 3 has a value")):
        quantize(base, tmp_path / "new", 4)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["base"] + ["new"] * there
    assert not there or not list((tmp_path / "new").iterdir())


def test_command(tmp_path, capsys):
    base = write(tmp_path / "base", "glm4")
    words = ["--model", str(base), "--output", str(tmp_path / "new"), "--bits", "4"]
    assert cli.main(["quantize", *words, "--group-size", "32"]) == 0
    assert "new: 0.00 GB of weights" in capsys.readouterr().out
    config = glmlora.AutoConfig.from_pretrained(tmp_path / "new")
    assert (config.quantization_bit, config.quantization_group_size) == (4, 32)
    assert cli.main(["quantize", *words]) == 1
    assert "new exists and is not empty" in capsys.readouterr().err
