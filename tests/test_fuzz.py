"""A smoke run of tests/fuzz.py, and one file for each class of published flaw in software that
reads model files.

A reader may refuse a file with ValueError or OSError that names it and nothing else; nothing in a
file is executed.
"""

import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path

import fuzz
import numpy as np
import pytest
from test_checkpoint import Evil, entry, safetensors_bytes, state, stream, tensor, torch_zip

import glmlora
from glmlora.files.checkpoint import load_checkpoint, load_state_dict, read_weights

TINY = Path(glmlora.__file__).parent / "tiny"


@pytest.mark.parametrize("reader", fuzz.TARGETS)
def test_any_input_is_read_or_refused(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "KEPT", tmp_path / "kept")
    counts, failures = fuzz.run(reader, 400, 7, tmp_path, quiet=True)
    assert not failures, failures[0]
    assert min(counts["read"], counts["refused"]) > 4, counts  # both ways are taken


def test_a_wrong_end_is_a_failure(tmp_path):
    """The fuzzer sees what it is there for."""

    def forgets_the_file(folder):
        raise ValueError("something is wrong")

    def breaks(folder):
        return {}["x"]

    for read in forgets_the_file, breaks:
        with pytest.raises(fuzz.Failure):
            fuzz.check(read, tmp_path)
    assert fuzz.check(lambda folder: None, tmp_path) == "read"


def test_every_truncation(tmp_path):
    """A cut file is never taken for a whole one."""
    path = tmp_path / "m"
    torch_zip(path, state(tensor()))
    zipped = path.read_bytes()
    whole = {
        "safetensors": safetensors_bytes({"t": entry()}, bytes(8)),
        "zip": zipped,
        "stream": stream(state(tensor())),
    }
    for name, data in whole.items():
        path.write_bytes(data)
        assert read_weights(path), name
        for length in range(len(data)):
            path.write_bytes(data[:length])
            try:
                read_weights(path)
            except ValueError:
                continue
            raise AssertionError(f"{name}: {length} of {len(data)} bytes were accepted")


# One file for each class of published flaw. `mark` is what a payload would make.


def _call(mark: Path) -> bytes:
    return pickle.dumps({"a": Evil(os.mkdir, str(mark))}, 2)


def _zip_patched(path: Path, old: bytes, new: bytes, **changes: int) -> None:
    """A sound torch file, its bytes replaced, two-byte fields of its directory set."""
    torch_zip(path, state(tensor()))
    data = bytearray(path.read_bytes().replace(old, new)) if old else bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        for offset, value in changes.items():
            struct.pack_into("<H", data, at + int(offset[1:]), value)
        at = data.find(b"PK\x01\x02", at + 1)
    path.write_bytes(data)


def _tar(path: Path, mark: Path) -> None:
    payload = path.with_suffix(".pkl")
    payload.write_bytes(_call(mark))
    with tarfile.open(path, "w") as archive:
        for name in ("pickle", "storages", "tensors", "sys_info"):
            archive.add(payload, name)
    payload.unlink()


def _model(folder: Path, **fields: object) -> Path:
    """glm-tiny with fields of its config.json changed."""
    for name in ("model.safetensors", "tokenizer.model", "tokenizer_config.json"):
        (folder / name).symlink_to(TINY / name)
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


WEIGHTS = {
    # a call in a pickle: CVE-2024-11392, CVE-2024-3568
    "call": (lambda f, m: torch_zip(f, _call(m)), "mkdir"),
    # the call comes before the stream breaks, so that scanners give up: CVE-2025-1716
    "call before a broken end": (
        lambda f, m: torch_zip(f, _call(m)[:-1] + b"\xff"),
        "mkdir|opcode",
    ),
    # through protocol 4's names on the stack
    "call by a name from the stack": (
        lambda f, m: torch_zip(f, pickle.dumps(Evil(os.mkdir, str(m)), 4)),
        "mkdir",
    ),
    # callables that "safe" lists let through: CVE-2025-32434
    "rebuilt from a type": (
        lambda f, m: torch_zip(
            f, b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\ntR."
        ),
        "_rebuild_from_type_v2|not on the list",
    ),
    # torch's oldest form, which no check of pickles reached: CVE-2025-32434
    "tar": (_tar, "not a file of torch.save|tar"),
    # a pickle by another name: CVE-2025-10155
    "pickle as safetensors": (lambda f, m: f.write_bytes(_call(m)), ""),
    # a zip whose flag says encrypted, and unpackers differ: CVE-2025-1944, CVE-2025-1945
    "flags": (lambda f, m: _zip_patched(f, b"", b"", _8=1), "encrypted"),
    # a checksum that scanners stop at: CVE-2025-10156
    "checksum": (lambda f, m: _zip_patched(f, b"cpu", b"CPU"), "checksum"),
    # names that leave the folder (zip slip): CVE-2018-1002200
    "way out": (lambda f, m: _zip_patched(f, b"a/data.pkl", b"../ata.pkl"), "data.pkl"),
    # small packed, huge unpacked (zip bomb): CVE-2024-0450
    "bomb": (
        lambda f, m: torch_zip(f, bytes(50_000_000), method=zipfile.ZIP_DEFLATED),
        "compressed|encrypted",
    ),
    # values that grow by reference (billion laughs): CVE-2003-1564
    "doubling": (
        lambda f, m: torch_zip(f, b"\x80\x02]" + b"q\0h\0\x86" * 60 + b"."),
        "more|deeper",
    ),
    # sizes whose product wraps to a small one: CVE-2024-21802, CVE-2024-23496
    "sizes that wrap": (
        lambda f, m: f.write_bytes(
            safetensors_bytes({"t": entry(shape=(1 << 32, 1 << 32), offsets=(0, 0))})
        ),
        "overflow|2\\^",
    ),
    # a length far beyond the file: CVE-2024-23605
    "length": (lambda f, m: f.write_bytes(struct.pack("<Q", 1 << 62) + b"{}"), "header"),
    # two tensors in one place, which a writer then follows: CVE-2024-25665
    "overlap": (
        lambda f, m: f.write_bytes(
            safetensors_bytes({"t": entry(), "u": entry(offsets=(4, 12))}, bytes(12))
        ),
        "overlap",
    ),
    # a view beyond its storage: CVE-2022-45907
    "view beyond": (lambda f, m: torch_zip(f, state(tensor(stride=(1 << 40, 1)))), "reaches item"),
    # a JSON that nests until the stack is gone: CVE-2022-25857
    "nest": (
        lambda f, m: f.write_bytes(struct.pack("<Q", 200_002) + b"{" + b"[" * 200_001),
        "JSON",
    ),
    # a number whose reading takes quadratic time: CVE-2020-10735
    "digits": (
        lambda f, m: f.write_bytes(
            struct.pack("<Q", 1_000_010) + b'{"t":' + b"9" * 1_000_004 + b"}"
        ),
        "JSON",
    ),
}


@pytest.mark.parametrize("flaw", WEIGHTS)
def test_weights_of_every_published_class(flaw, tmp_path):
    write, message = WEIGHTS[flaw]
    mark = tmp_path / "mark"
    for name in ("m.bin", "m.safetensors", "m.pt"):
        path = tmp_path / name
        write(path, mark)
        with pytest.raises(ValueError, match=message if name != "m.safetensors" else "") as caught:
            load_state_dict(path)
        assert name in str(caught.value)
        path.unlink()
    assert not mark.exists()


@pytest.mark.parametrize(
    "file",
    [
        "../m.safetensors",
        "/etc/passwd",
        "a\\b.safetensors",
        "C:m.safetensors",
        "a/../m.safetensors",
        "..",
    ],
)
def test_an_index_names_files_of_its_folder(file, tmp_path):
    """Names that leave the folder: CVE-2024-34072, CVE-2007-4559."""
    index = {"weight_map": {"t": file}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="plain name"):
        load_checkpoint(tmp_path)


def test_code_of_a_folder_is_not_run(tmp_path):
    """`auto_map` and code beside the weights (trust_remote_code): CVE-2023-6730, CVE-2025-14920."""
    mark = tmp_path / "mark"
    (tmp_path / "modeling_chatglm.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    (tmp_path / "tokenization_chatglm.py").write_text(f"import os; os.mkdir({str(mark)!r})")
    auto_map = {
        "AutoModel": "modeling_chatglm.X",
        "AutoTokenizer": ["tokenization_chatglm.X", None],
    }
    folder = _model(
        tmp_path, auto_map=auto_map, custom_pipelines={"x": {"impl": "modeling_chatglm.X"}}
    )
    glmlora.AutoModel.from_pretrained(folder, trust_remote_code=True)
    glmlora.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert not mark.exists()


def test_a_template_of_a_folder_does_nothing(tmp_path):
    """A chat template that leaves its sandbox: CVE-2024-34359."""
    mark = tmp_path / "mark"
    folder = _model(tmp_path)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{{ ''.__class__.__base__.__subclasses__()[140].__init__.__globals__['os'].mkdir('"
        + str(mark)
        + "') }}"
    )
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = glmlora.AutoTokenizer.from_pretrained(folder)
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        except ValueError as error:
            assert "template" in str(error)
    assert not mark.exists()


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_attention_heads", 0),
        ("multi_query_group_num", 0),
        ("kv_channels", -2),
        ("num_layers", 1 << 40),
        ("hidden_size", 1 << 62),
        ("seq_length", -1),
        ("layernorm_epsilon", float("nan")),
        ("rope_ratio", 0),
    ],
)
def test_sizes_of_a_config(field, value, tmp_path):
    """Sizes that divide by zero, wrap or ask for all memory: CVE-2024-21825, CVE-2025-23310."""
    with pytest.raises(ValueError, match="arch|" + field):
        glmlora.AutoModel.from_pretrained(_model(tmp_path, **{field: value}))


def test_arguments_by_yaml_make_no_objects(tmp_path):
    """YAML that calls: CVE-2020-14343, CVE-2025-50460."""
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    from glmlora.training.arguments import parse_train_arguments

    mark = tmp_path / "mark"
    (tmp_path / "a.yaml").write_text(
        f"model_name_or_path: !!python/object/apply:os.mkdir ['{mark}']\n"
    )
    with pytest.raises(ValueError, match="a.yaml"):
        parse_train_arguments([str(tmp_path / "a.yaml")])
    assert not mark.exists()


def test_arguments_of_a_checkpoint_are_text(tmp_path):
    """A pickle where a run keeps its arguments: CVE-2024-52803, CVE-2026-1839."""
    import training

    mark, out = tmp_path / "mark", tmp_path / "out"
    model = training.model_dir(tmp_path)
    settings = {"num_train_epochs": 1, "save_steps": 2, "max_steps": 3}
    training.run(model, out, **settings)
    (out / "checkpoint-2" / "training_args.bin").write_bytes(_call(mark))
    (out / "checkpoint-2" / "scheduler.pt").write_bytes(_call(mark))
    try:
        training.run(
            model,
            out,
            resume_from_checkpoint=str(out / "checkpoint-2"),
            overwrite_output_dir=True,
            **settings,
        )
    except ValueError as error:
        assert "training_args.bin" in str(error)
    assert not mark.exists()


def test_a_pattern_of_an_adapter_ends(tmp_path):
    """A regular expression that takes for ever: CVE-2024-12720, CVE-2025-2099."""
    model = glmlora.AutoModel.from_pretrained(TINY)
    tuned = glmlora.get_peft_model(model, glmlora.LoraConfig(r=2, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path)
    base = tuned.unload()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for pattern in (r"(.*)*(.*)*(.*)*!", r"([a-z._0-9]+)+!", r"((transformer|.)*)*x{9}$"):
        config["target_modules"] = pattern
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert (
            fuzz.check(lambda folder: glmlora.PeftModel.from_pretrained(base, folder), tmp_path)
            == "refused"
        )


def test_the_corpus_strikes_at_sound_files(tmp_path):
    """What the files above are made from is itself read."""
    torch_zip(tmp_path / "m.bin", state(tensor()))
    assert load_state_dict(tmp_path / "m.bin")["w"].shape == (2, 3)
    (tmp_path / "m.safetensors").write_bytes(safetensors_bytes({"t": entry()}, bytes(8)))
    assert np.array_equal(load_state_dict(tmp_path / "m.safetensors")["t"], [0, 0])
    assert glmlora.AutoModel.from_pretrained(
        _model(tmp_path / "x" if (tmp_path / "x").mkdir() else tmp_path / "x")
    )


def test_a_family_without_this_tokenizer_names_the_directory(tmp_path):
    """A name in tokenizer_config.json of a family whose tokenizer is another one."""
    for name in ("tokenizer.model", "config.json", "tokenizer_config.json"):
        if (TINY / name).exists():
            (tmp_path / name).write_bytes((TINY / name).read_bytes())
    path = tmp_path / "tokenizer_config.json"
    fields = json.loads(path.read_text()) if path.exists() else {}
    (tmp_path / "config.json").write_text("{}")
    path.write_text(json.dumps(fields | {"glmlora_family": "g4"}))
    with pytest.raises(ValueError, match=rf"{tmp_path}: .*'g4'.*family=\"v2\""):
        glmlora.AutoTokenizer.from_pretrained(tmp_path)
