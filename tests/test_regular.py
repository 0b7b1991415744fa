"""Only regular files are read; everything else is refused by name, at once."""

import os
import shutil
import socket

import pytest
from training import model_dir, run

import glmlora
from glmlora.files.checkpoint import read_weights
from glmlora.files.regular import read_bytes
from glmlora.files.rows import read_rows
from glmlora.files.write import atomic_file, read_json


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_dir(tmp_path_factory.mktemp("base"))


def make(kind, path):
    """Something under `path` that is no file; what it is called."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "directory"])
@pytest.mark.parametrize("read", [read_bytes, read_json, read_rows, read_weights])
def test_readers_take_only_files(tmp_path, kind, read):
    path = tmp_path / ("x.csv" if read is read_rows else "x.safetensors")
    make(kind, path)
    if kind == "directory" and read is read_weights:
        pytest.skip("a folder of weights is read")
    with pytest.raises((ValueError, OSError), match=f"{path}: is a .*{kind}"):
        read(path)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json",
     "tokenizer.model", "tokenizer_config.json"],
)  # fmt: skip
def test_a_fifo_in_a_model_directory(tmp_path, model, name):
    folder = tmp_path / "m"
    shutil.copytree(model, folder)
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises((ValueError, OSError), match=f"{name}: is a FIFO"):
        glmlora.AutoModel.from_pretrained(folder)
        glmlora.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_fifo_in_an_adapter(tmp_path, model, name):
    run(model, tmp_path / "a", max_steps=1)
    (tmp_path / "a" / name).unlink()
    os.mkfifo(tmp_path / "a" / name)
    base = glmlora.AutoModel.from_pretrained(model)
    with pytest.raises((ValueError, OSError), match=f"{name}: is a FIFO"):
        glmlora.PeftModel.from_pretrained(base, tmp_path / "a")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "directory"])
@pytest.mark.parametrize("mode", ["w", "wb"])
def test_only_files_are_replaced(tmp_path, kind, mode):
    """Not /dev/null, by a file of predictions."""
    path = tmp_path / "out"
    make(kind, path)
    with pytest.raises((ValueError, OSError), match=f"{path}: is a .*{kind}"):
        with atomic_file(path, mode):
            pass
    assert os.listdir(tmp_path) == ["out"] and not path.is_file()


def test_a_log_that_is_a_fifo_is_told(tmp_path, model):
    class Swap:
        def on_step_end(self, state):
            (tmp_path / "trainer_log.jsonl").unlink(missing_ok=True)
            os.mkfifo(tmp_path / "trainer_log.jsonl")

    with pytest.warns(UserWarning, match="trainer_log.jsonl: is a FIFO"):
        run(model, tmp_path, max_steps=2, callbacks=[Swap()])


def test_a_file_that_becomes_a_fifo_is_not_waited_for(tmp_path, monkeypatch):
    """Between the look and the opening."""
    from glmlora.files import regular

    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(regular.os, "stat", lambda path: os.lstat(__file__))
    with pytest.raises(ValueError, match="is a FIFO"):
        read_bytes(tmp_path / "x")
