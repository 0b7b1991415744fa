"""GGUF files: written as ggml's own package reads them, and read back into a model directory."""

import json
import shutil
import struct
import sys

import gguf_models
import numpy as np
import pytest
import tiny
import tiny_chatglm

import glmlora
from glmlora import _core, cli, families
from glmlora.files import gguf as files
from glmlora.files.checkpoint import load_checkpoint, save_sharded
from glmlora.tokenization import AutoTokenizer
from glmlora.tokenization.gguf_vocabulary import TEMPLATE
from glmlora.tools import gguf_export
from glmlora.tools.gguf_export import export
from glmlora.tools.gguf_import import import_gguf

gguf = pytest.importorskip("gguf", reason="files are written by the gguf package")
pytest.importorskip("tiktoken", reason="GLM-4's vocabulary is read by tiktoken")

KINDS = {"Q8_0": 8, "Q4_0": 4}
EMBEDDING = "transformer.embedding.word_embeddings.weight"


@pytest.fixture
def file(tmp_path):
    """A small file that is whole."""
    export(gguf_models.made(tmp_path, "v3"), tmp_path / "model.gguf", "f16")
    return tmp_path / "model.gguf"


def values(folder):
    return {n: (t.dtype, t.shape, t.data.tobytes()) for n, t in load_checkpoint(folder).items()}


# Blocks


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_those_of_ggmls_reference(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.02, (64, 256)).astype(np.float32)
    x[0] = 0
    x[1] = [0.5, -0.5] * 128  # of equal sizes the first says the scale
    x[2] = rng.integers(-127, 128, 256) / 2  # halves away from zero
    x[3] *= 1e-6
    x[4] *= 1e6
    x[5] *= 1e-39  # a scale below what 1 / scale has
    x[6] = np.nextafter(np.float32(0.5), np.float32(0)) * rng.integers(-9, 9, 256)
    x[7, ::2] = -x[7, 1::2]
    wanted = gguf.quants.quantize(x, gguf.GGMLQuantizationType[kind])
    found = _core.ggml_blocks(x, KINDS[kind])
    assert np.array_equal(np.delete(found, 5, 0), np.delete(wanted, 5, 0))
    assert not files.GGUFTensor(kind, (1, 256), found[5]).float_rows(0, 1).any()


# A file


def test_ggmls_package_reads_what_is_written(file):
    reader = gguf.GGUFReader(file)
    metadata, tensors = files.read_gguf(file)
    assert {k for k in reader.fields if not k.startswith("GGUF.")} == set(metadata)
    for key in metadata:
        assert reader.fields[key].contents() == metadata[key]
    assert [t.name for t in reader.tensors] == list(tensors)
    for theirs in reader.tensors:
        ours = tensors[theirs.name]
        assert (theirs.tensor_type.name, theirs.shape.tolist()[::-1]) == (ours.kind, [*ours.shape])
        assert theirs.data.tobytes() == ours.data.tobytes()


def test_a_damaged_file_is_an_error_that_names_it(file, tmp_path):
    whole, damaged = file.read_bytes(), tmp_path / "damaged.gguf"
    header = len(whole) - sum(t.data.size for t in files.read_gguf(file)[1].values())
    rng = np.random.default_rng(0)
    for end in [0, 3, 7, 20, *rng.integers(24, header, 20), len(whole) - 40]:
        damaged.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"damaged\.gguf: "):
            files.read_gguf(damaged)
    for place in rng.integers(4, 400, 30):
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(data)
        try:
            import_gguf(damaged, tmp_path / "out")
        except ValueError as error:
            assert "damaged.gguf: " in str(error)
            assert not (tmp_path / "out").exists()
        else:
            shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, b"GGML", "is no GGUF file"),
        (4, struct.pack("<I", 9), "version 9, expected one of"),
        (8, struct.pack("<Q", 1 << 40), "tensors, expected at most"),
        (16, struct.pack("<Q", 1 << 40), "keys, expected at most"),
        (24, struct.pack("<Q", 1 << 63), "a key: .* bytes, expected at most"),
    ],
)
def test_a_header_that_cannot_be_is_refused(file, at, value, message):
    data = bytearray(file.read_bytes())
    data[at : at + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        files.read_gguf(file)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = gguf_models.made(tmp_path, "v3")

    def fails(part, kind):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_export, "_in_kind", fails)
    with pytest.raises(OSError, match="No space"):
        export(folder, tmp_path / "out.gguf", "f16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-model"]


# Round trips


@pytest.mark.parametrize("family", gguf_models.MAKERS)
def test_float16_comes_back_bit_for_bit(tmp_path, family):
    folder = gguf_models.made(tmp_path, family)
    export(folder, tmp_path / "model.gguf", "f16")
    config = import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    before = glmlora.AutoConfig.from_pretrained(folder)
    assert config.family == before.family
    assert values(tmp_path / "again") == values(folder)
    after = glmlora.AutoConfig.from_pretrained(tmp_path / "again")
    assert after.arch() == before.arch() and after.family == before.family
    assert set(after.eos_token_ids) == set(before.eos_token_ids)
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in (folder, tmp_path / "again"))
    for text in ("We measure  12345\n\n proteins", "晚上睡不着 é́ 👋🏽", "<|user|>[gMASK]"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(
            text, add_special_tokens=False
        )
    messages = [{"role": "user", "content": "title"}]
    assert theirs.apply_chat_template(messages, True) == ours.apply_chat_template(messages, True)
    assert theirs.special_tokens == ours.special_tokens


@pytest.mark.parametrize("family", [name for name in gguf_models.MAKERS if name != "tiny"])
def test_a_file_that_does_not_name_the_family_is_recognised(tmp_path, family, monkeypatch):
    """As llama.cpp's converter writes them."""
    folder = gguf_models.made(tmp_path, family)
    monkeypatch.setattr(gguf_export, "FAMILY", "of.another.program")
    export(folder, tmp_path / "model.gguf", "f16")
    assert import_gguf(tmp_path / "model.gguf", tmp_path / "again").family == family
    assert glmlora.AutoConfig.from_pretrained(tmp_path / "again").family == family


@pytest.mark.parametrize("family", ["v3", "0414"])
@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
def test_quantized_numbers_are_those_of_the_file(tmp_path, family, form):
    export(gguf_models.made(tmp_path, family), tmp_path / "model.gguf", form)
    config = import_gguf(tmp_path / "model.gguf", tmp_path / "again")
    model = glmlora.AutoModel.from_pretrained(tmp_path / "again")
    tensors = files.read_gguf(tmp_path / "model.gguf")[1]
    name = files.tensor_name(families.of(family).gguf_arch, config.num_layers)
    for own in model.base_names():
        tensor = tensors[name(own)]
        if len(tensor.shape) == 2:
            there = tensor.float_rows(0, tensor.shape[0])
            in_4_bits = own in model._linear_shapes() and form == "q4_0"
            assert tensor.kind == ("Q4_0" if in_4_bits else "Q8_0")
            wanted = there if in_4_bits else there.astype(np.float16)
            assert np.array_equal(model.read_weight(own), wanted)
    export(tmp_path / "again", tmp_path / "second.gguf", form)
    second = files.read_gguf(tmp_path / "second.gguf")[1]
    if form == "q4_0":  # int4 in groups of 32 goes back as it is
        assert all(
            np.array_equal(second[n].data, t.data) for n, t in tensors.items() if t.kind == "Q4_0"
        )


def test_rows_that_are_no_whole_blocks_stay_float16(tmp_path):
    folder = tiny.tiny_model_dir(tmp_path, dtype="BF16")  # ffn_hidden_size 40
    with pytest.warns(UserWarning, match="has no tokenizer"):
        export(folder, tmp_path / "model.gguf", "q4_0")
    kinds = {n: t.kind for n, t in files.read_gguf(tmp_path / "model.gguf")[1].items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["output.weight"] == "Q8_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    with pytest.warns(UserWarning, match="has no tokenizer"):
        assert not import_gguf(tmp_path / "model.gguf", tmp_path / "again").quantization_bit


def test_types_of_other_programs_become_float16(file, tmp_path):
    data = np.random.default_rng(0).normal(0, 0.1, (512, 32)).astype(np.float32)
    metadata, tensors = files.read_gguf(file)
    packed = gguf.quants.quantize(data, gguf.GGMLQuantizationType.Q5_1)
    del metadata["general.architecture"]
    sources = [
        files.GGUFSource(n, t.kind, t.shape, lambda t=t: [t.data]) for n, t in tensors.items()
    ]
    place = next(i for i, s in enumerate(sources) if s.name == "token_embd.weight")
    sources[place] = files.GGUFSource("token_embd.weight", "Q5_1", data.shape, lambda: [packed])
    files.write_gguf(tmp_path / "other.gguf", "chatglm", metadata, sources)
    import_gguf(tmp_path / "other.gguf", tmp_path / "again")
    wanted = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q5_1)
    found = load_checkpoint(tmp_path / "again")[EMBEDDING]
    assert found.dtype == "F16" and np.array_equal(found.data, wanted.astype(np.float16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "llama"}, "general.architecture: expected one of chatglm glm4"),
        ({"general.type": "adapter"}, "general.type: expected model, got 'adapter'"),
        ({"split.count": 2}, "split.count: is one of several files"),
        ({"chatglm.block_count": "2"}, "chatglm.block_count: expected int, got '2'"),
        ({"chatglm.block_count": 3}, "tensor blk.2.attn_norm.weight: is missing"),
        ({"chatglm.block_count": 1 << 31}, "chatglm.block_count: 2147483648 of 17 tensors"),
        ({"chatglm.block_count": 1}, "tensor 'blk.1.attn_norm.weight': is none of a model"),
        ({"chatglm.embedding_length": 64}, "shape .*, expected"),
        ({"chatglm.rope.dimension_count": 8}, "chatglm.rope: 8 of 8 channels turn"),
        ({"chatglm.rope.scaling.type": "yarn"}, "rope.scaling.type: 'yarn' is not supported"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model: expected one of"),
        ({"tokenizer.ggml.model": "gpt2"}, "family: the tensors and tokens are of g4"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens: expected a list of str"),
        ({"tokenizer.ggml.scores": [0.5]}, "expected one of each for an id"),
        ({"glmlora.family": "v9"}, "family: expected one of"),
    ],
)
def test_a_file_of_another_model_is_refused(file, tmp_path, change, message):
    metadata, tensors = files.read_gguf(file)
    metadata |= change
    arch = metadata.pop("general.architecture")
    sources = [
        files.GGUFSource(n, t.kind, t.shape, lambda t=t: [t.data]) for n, t in tensors.items()
    ]
    files.write_gguf(tmp_path / "other.gguf", arch, metadata, sources)
    with pytest.raises(ValueError, match=rf"other\.gguf: .*{message}"):
        import_gguf(tmp_path / "other.gguf", tmp_path / "again")
    assert not (tmp_path / "again").exists()


# Adapters


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_a_merged_export_is_the_export_of_the_merged_model(tmp_path, options):
    folder = gguf_models.made(tmp_path, "v3")
    adapter = gguf_models.adapter_of(folder, tmp_path / "adapter", **options)
    export(folder, tmp_path / "direct.gguf", "q8_0", adapter=adapter)
    assert (
        cli.main(
            ["merge", "--model", str(folder), "--adapter", str(adapter)]
            + ["--output", str(tmp_path / "merged")]
        )
        == 0
    )
    export(tmp_path / "merged", tmp_path / "second.gguf", "q8_0")
    direct, second = (files.read_gguf(tmp_path / f"{n}.gguf")[1] for n in ("direct", "second"))
    assert all(np.array_equal(direct[n].data, second[n].data) for n in second)
    export(folder, tmp_path / "base.gguf", "q8_0")
    base = files.read_gguf(tmp_path / "base.gguf")[1]["blk.1.ffn_down.weight"]
    assert not np.array_equal(base.data, direct["blk.1.ffn_down.weight"].data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora: an adapter file of llama.cpp has A and B alone"),
        ({"modules_to_save": ["output_layer"]}, "modules_to_save: an adapter file"),
    ],
)
def test_what_an_adapter_file_cannot_hold_is_refused(tmp_path, options, message):
    folder = gguf_models.made(tmp_path, "v3")
    adapter = gguf_models.adapter_of(folder, tmp_path / "adapter", **options)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "adapter.gguf", adapter=adapter, adapter_only=True)
    assert not (tmp_path / "adapter.gguf").exists()


# What is refused, and how it is said


def test_models_that_llama_cpp_has_not_are_refused_by_name(tmp_path, file):
    with pytest.raises(ValueError, match=r"no architecture for ChatGLM-6B, only for ChatGLM2, Ch"):
        export(tiny_chatglm.tiny_chatglm_dir(tmp_path / "one"), tmp_path / "x.gguf", "f16")
    odd = tiny.tiny_model_dir(tmp_path / "odd", kv_channels=16)
    with pytest.raises(ValueError, match="num_attention_heads 4 of kv_channels 16 are 64: .*32"):
        export(odd, tmp_path / "x.gguf", "f16")
    folder = gguf_models.made(tmp_path / "good", "v3")
    with pytest.raises(FileExistsError, match="model.gguf exists, expected a new file"):
        export(folder, file, "f16")
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        export(folder, tmp_path / "nowhere/x.gguf", "f16")
    with pytest.raises(ValueError, match=r"form: expected one of f16 q8_0 q4_0, got 'q8'.*q8_0"):
        export(folder, tmp_path / "x.gguf", "q8")
    with pytest.raises(ValueError, match="adapter_only: expected an adapter, got none"):
        export(folder, tmp_path / "x.gguf", adapter_only=True)
    with pytest.raises(ValueError, match="good: has no adapter_config.json"):
        export(folder, tmp_path / "x.gguf", "f16", adapter=tmp_path / "good")
    with pytest.raises(FileExistsError, match="is not empty, expected a new directory"):
        import_gguf(file, tmp_path / "good")
    with pytest.raises(OSError, match=r"glmlora import FILE\.gguf"):
        glmlora.AutoModel.from_pretrained(file)
    weights = {n: np.array(t.data) for n, t in load_checkpoint(folder).items()}
    weights[EMBEDDING] = weights[EMBEDDING].astype(np.float32)
    for form, size in (("f16", 1e5), ("q8_0", 1e7)):
        weights[EMBEDDING][3] = size
        save_sharded(folder, weights)
        with pytest.raises(ValueError, match=f"tensor {EMBEDDING}: .*too large for float16"):
            export(folder, tmp_path / "x.gguf", form)


def test_without_the_package_it_is_said_how_to_get_it(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (
        lambda: export(tmp_path / "tiny-model", tmp_path / "x.gguf", "f16"),
        lambda: import_gguf(file, tmp_path / "again"),
    ):
        with pytest.raises(ImportError, match=r'pip install "glmlora\[gguf\]"'):
            call()


def test_the_command(tmp_path, capsys):
    folder = gguf_models.made(tmp_path, "tiny")
    out = tmp_path / "out.gguf"
    words = ["export", "--model", str(folder), "--output", str(out)]
    assert cli.main(words) == 1 and "--gguf: expected f16, q8_0 or q4_0" in capsys.readouterr().err
    assert cli.main([*words, "--gguf", "q4_0"]) == 0
    assert cli.main(["import", str(out), str(tmp_path / "again")]) == 0
    assert "ChatGLM2" in capsys.readouterr().out
    assert json.loads((tmp_path / "again/config.json").read_text())["quantization_bit"] == 4


# Templates


@pytest.mark.parametrize("family", [f for f in gguf_models.MAKERS if f != "tiny"])
def test_a_familys_template_writes_the_familys_text(tmp_path, family):
    pytest.importorskip("jinja2", reason="templates are rendered by jinja2")
    from glmlora import rendering

    folder, own = gguf_models.made(tmp_path, family), families.of(family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "q  r"}
    said = {"role": "assistant", "content": "a"}
    prefix = "".join(own.prefix_tokens)
    for messages in ([user], [system, user], [system, user, said, user], [user, said, user]):
        text = own.template_text(tokenizer, messages, True)
        given = {"messages": messages, "add_generation_prompt": True}
        written = rendering.render(own.jinja_template(), given)
        assert written.removeprefix(prefix) == text.removeprefix(prefix)
        assert written.startswith(prefix)


def test_the_checkpoints_template_is_in_the_file(tmp_path):
    export(gguf_models.made(tmp_path, "z1"), tmp_path / "model.gguf", "f16")
    assert files.read_gguf(tmp_path / "model.gguf")[0][TEMPLATE] == gguf_models.THINKS
