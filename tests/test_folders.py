"""Model directories as other programs leave them: good ones open, and of others it is said what
they are.
"""

import io
import json
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import training
from tiny import TINY_CONFIG, tiny_model_dir, tiny_weights

import glmlora
from glmlora import cli
from glmlora.files import tokenizer_keywords as of_tokenizers
from glmlora.files.checkpoint import (
    load_checkpoint,
    read_json,
    read_safetensors,
    write_json,
    write_safetensors,
    write_torch,
)
from glmlora.files.hub import NOTHING
from glmlora.model import keywords, saving
from glmlora.model.configuration import is_key

EMBEDDING = "transformer.embedding.word_embeddings.weight"
OUTPUT = "transformer.output_layer.weight"
QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
NORM = "transformer.encoder.layers.0.input_layernorm.weight"
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
IDS = np.arange(3, 15)[None]


@pytest.fixture
def directory(tmp_path):
    return tiny_model_dir(tmp_path)


@pytest.fixture
def folder(tmp_path):
    """One with a tokenizer."""
    return Path(training.model_dir(tmp_path, _name_or_path="THUDM/chatglm2-6b"))


def load(directory, **options):
    return glmlora.AutoModel.from_pretrained(directory, **options)


def rewrite(directory, **changes):
    """Write the weights again: None takes a tensor out, the others are added."""
    tensors = {n: t.data for n, t in load_checkpoint(directory).items()} | changes
    tensors = {n: t for n, t in tensors.items() if t is not None}
    write_safetensors(directory / "model.safetensors", tensors)


def edit(directory, **fields):
    write_json(directory / "config.json", {**read_json(directory / "config.json"), **fields})


# Tensors


@pytest.mark.parametrize("where", ["index", "shard", "both", "another shard"])
def test_rotary_frequencies_may_be_anywhere(directory, where):
    want = load(directory)(IDS).logits
    weights = tiny_weights(TINY_CONFIG)
    names = list(weights)
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    parts = [{n: weights[n] for n in names[:5]}, {n: weights[n] for n in names[5:]}]
    weight_map = {n: file for file, part in zip(files, parts, strict=True) for n in part}
    if where != "shard":
        weight_map[INV_FREQ] = files[0]
    if where != "index":
        parts[where == "another shard"][INV_FREQ] = np.ones(4, np.float32)
    for file, part in zip(files, parts, strict=True):
        write_torch(directory / file, part)
    write_json(directory / "pytorch_model.bin.index.json", {"weight_map": weight_map})
    (directory / "model.safetensors").unlink()
    assert np.array_equal(load(directory)(IDS).logits, want)


@pytest.mark.parametrize(
    "start",
    ["_orig_mod.", "module.", "module._orig_mod.", "model.", "base_model.model.", "model.module."],
)
def test_names_of_a_wrapped_model(directory, start):
    model = load(directory)
    want = model(IDS).logits
    weights = tiny_weights(TINY_CONFIG)
    wrapped = {start + n: a for n, a in weights.items()}
    write_safetensors(directory / "model.safetensors", wrapped)
    assert np.array_equal(load(directory)(IDS).logits, want)
    model.load_state_dict({n: a * 0 for n, a in weights.items()})
    model.load_state_dict(wrapped)
    assert np.array_equal(model(IDS).logits, want)
    with pytest.raises(ValueError, match="is there twice"):
        model.load_state_dict(wrapped | weights)
    write_safetensors(directory / "model.safetensors", wrapped | weights)  # equal, so no matter
    assert np.array_equal(load(directory)(IDS).logits, want)
    write_safetensors(directory / "model.safetensors", wrapped | {QKV: weights[QKV] * 2})
    with pytest.raises(ValueError, match=f"both the tensor {QKV}, and their values differ"):
        load(directory)


def test_parts_of_compiled_and_sharded_modules(directory):
    want = load(directory)(IDS).logits
    weights = tiny_weights(TINY_CONFIG)
    inside = {
        n.replace("encoder.", "encoder._orig_mod.").replace("mlp.", "_fsdp_wrapped_module.mlp."): a
        for n, a in weights.items()
    }
    write_safetensors(directory / "model.safetensors", inside)
    assert np.array_equal(load(directory)(IDS).logits, want)


def test_the_second_name_of_a_tensor(directory, tmp_path):
    weights = tiny_weights(TINY_CONFIG)
    want = load(directory)(IDS).logits
    rewrite(directory, **{"lm_head.weight": weights[OUTPUT]})
    assert np.array_equal(load(directory)(IDS).logits, want)
    rewrite(directory, **{"lm_head.weight": weights[OUTPUT] + 1})
    with pytest.raises(ValueError, match=r"1 tensors are not of this model: lm_head.weight"):
        load(directory)
    # norms begin as ones everywhere: an equal one is no second name
    rewrite(directory, **{"lm_head.weight": None, "extra.weight": weights[NORM]})
    with pytest.raises(ValueError, match=r"not of this model: extra.weight"):
        load(directory)
    # the form's own library writes a shared tensor once, and its other names as metadata
    write_safetensors(tmp_path / "t", {"a": np.ones(2)}, {"b": "a", "format": "pt", "x": "y"})
    assert {n: t.data.tolist() for n, t in read_safetensors(tmp_path / "t").items()} == {
        "a": [1, 1],
        "b": [1, 1],
    }


@pytest.mark.parametrize("key", ["state_dict", "module", "model", "model_state_dict"])
def test_the_state_dict_in_a_training_programs_file(directory, key):
    """As Lightning, DeepSpeed or a script saves it: other things stand beside it."""
    want = load(directory)(IDS).logits
    weights = list(tiny_weights(TINY_CONFIG).items())
    # a pickle of {key: {name: tensor, ..}, "step": 3} over the storages of our own file
    write_torch(directory / "pytorch_model.bin", dict(weights))
    with zipfile.ZipFile(directory / "pytorch_model.bin") as archive:
        entries = {i.filename: archive.read(i) for i in archive.infolist()}
    inner = entries["archive/data.pkl"].removeprefix(b"\x80\x02").removesuffix(b".")
    word = b"X" + len(key).to_bytes(4, "little") + key.encode()
    entries["archive/data.pkl"] = b"\x80\x02}(" + word + inner + b"X\4\0\0\0stepK\3u."
    with zipfile.ZipFile(directory / "pytorch_model.bin", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    (directory / "model.safetensors").unlink()
    assert np.array_equal(load(directory)(IDS).logits, want)


def test_a_prefix_that_is_not_used_is_told(directory, tmp_path):
    load(directory, pre_seq_len=2).save_pretrained(tmp_path / "both")
    assert load(tmp_path / "both").has_prefix
    with pytest.warns(UserWarning, match="prefix .* is not used: open the model with pre_seq_len"):
        assert not load(tmp_path / "both", pre_seq_len=None).has_prefix


def test_tied_embeddings(directory):
    weights = tiny_weights(TINY_CONFIG)
    rewrite(directory, **{OUTPUT: weights[EMBEDDING]})
    want = load(directory)(IDS).logits
    edit(directory, tie_word_embeddings=True)
    for output in (weights[EMBEDDING], None):
        rewrite(directory, **{OUTPUT: output})
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            model = load(directory)
        assert np.array_equal(model(IDS).logits, want)
    model.save_pretrained(directory.parent / "saved")
    assert np.array_equal(load(directory.parent / "saved")(IDS).logits, want)
    rewrite(directory, **{OUTPUT: weights[OUTPUT]})
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but .* differ"):
        load(directory)
    edit(directory, tie_word_embeddings=False)
    rewrite(directory, **{OUTPUT: None})
    with pytest.raises(ValueError, match=f"1 tensors are missing: {OUTPUT}"):
        load(directory)


# config.json


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ({"prefix_projection": [[False]]}, "prefix_projection", False),
        ({"prefix_projection": [[[True]]]}, "prefix_projection", True),
        ({"prefix_projection": None}, "prefix_projection", False),
        ({"rope_ratio": None}, "rope_ratio", 1),
        ({"num_layers": [2], "add_qkv_bias": [[True]]}, "add_qkv_bias", True),
        ({"quantization_bit": None}, "quantization_bit", 0),
        ({"quantization_config": None}, "quantization_bit", 0),
        ({"num_layers": 2.0, "hidden_size": 32.0}, "num_layers", 2),
        ({"num_layers": None, "num_hidden_layers": 2}, "num_layers", 2),
        ({"padded_vocab_size": None, "vocab_size": 96}, "padded_vocab_size", 96),
        ({"torch_dtype": None, "dtype": "float16"}, "torch_dtype", "float16"),
        ({"pad_token_id": None}, "pad_token_id", None),
        ({"tie_word_embeddings": None}, "tie_word_embeddings", False),
    ],
)
def test_forms_of_config_values(directory, written, name, value):
    edit(directory, **written)
    got = getattr(load(directory).config, name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "fields",
    [
        {"multi_query_attention": "false"},
        {"add_qkv_bias": "no"},
        {"tie_word_embeddings": "false"},
        {"layernorm_epsilon": float("nan")},
        {"rope_ratio": float("inf")},
        {"num_layers": 2.5},
        {"prefix_projection": [False, True]},
        {"prefix_projection": "false"},
        {"family": "bert"},
        {"pad_token_id": "<pad>"},
        {"num_layers": 10**30},
    ],
)
def test_config_values_that_mean_nothing_are_named(directory, fields):
    edit(directory, **fields)
    with pytest.raises(ValueError, match=f"config.json: {next(iter(fields))}: expected"):
        load(directory)


def test_config_keys_without_effect_are_told(directory):
    edit(directory, hidden_dropout=0.0, attention_dropout=0, rope_scaling=None, num_hidden_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(directory, family="v2")
    edit(directory, hidden_dropout=0.1, rope_scaling={"factor": 2.0}, num_hidden_layers=4)
    with pytest.warns(UserWarning, match="hidden_dropout 0.1 has no effect") as told:
        load(directory)
    said = " ".join(str(one.message) for one in told)
    assert "rope_scaling" in said and "num_hidden_layers 4 has no effect" in said


def test_keys_that_are_names_of_ours(directory):
    """They must not take the place of a method."""
    edit(directory, family="chatglm3", rope_mode="half")
    config = load(directory).config
    assert (config.family, config.rope_mode) == ("v3", "half")
    for name in ("check", "arch", "self", "to_dict"):
        edit(directory, **{name: 1})
        with pytest.raises(ValueError, match=f"config.json: '{name}': no config has a key"):
            load(directory)
        edit(directory, **{name: None})
        rest = read_json(directory / "config.json")
        del rest[name]
        write_json(directory / "config.json", rest)


@pytest.mark.parametrize("tokens", [7777777, [[1]], ["\ud800"], [None], "text", {"a": {"b": 1}}])
def test_tokens_of_a_tokenizer_that_are_no_texts(folder, tokens):
    text = json.dumps({"additional_special_tokens": tokens})
    (folder / "special_tokens_map.json").write_text(text)
    with pytest.warns(UserWarning, match="is not used: additional_special_tokens"):
        glmlora.AutoTokenizer.from_pretrained(folder)


# Which family it is


def family_of(directory, **options):
    """(family, the warnings' texts) of a model and, which must agree, of its tokenizer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = glmlora.AutoConfig.from_pretrained(directory, **options)
        told = [str(w.message) for w in caught if "family" in str(w.message)]
        tokenizer = glmlora.AutoTokenizer.from_pretrained(directory, **options)
    assert tokenizer.family == config.family
    assert len({w.filename for w in caught} - {__file__}) == 0  # at the user's line
    return config.family, told


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("THUDM/chatglm2-6b", "v2"),
        ("/mnt/chatglm3_finetune/chatglm2-6b", "v2"),
        ("/root/ChatGLM2-6B/THUDM/chatglm3-6b/", "v3"),
        ("/root/glm4-work/chatglm3-6b", "v3"),
        ("F:\\ChatGLM2\\chatglm3-6b-32k", "v3"),
        ("/cache/models--THUDM--chatglm3-6b/snapshots/0f1e2d", "v3"),
        ("THUDM/codegeex2-6b", "v2"),
        ("me/chatglm3-6b-4bit", "v3"),
    ],
)
def test_the_last_part_of_the_name_decides(folder, name, family):
    edit(folder, _name_or_path=name)
    assert family_of(folder) == (family, [])


@pytest.mark.parametrize(
    ("fields", "file", "text", "family"),
    [
        ({}, "tokenizer_config.json", '{"chat_template": "<|assistant|>"}', "v3"),
        ({}, "tokenizer_config.json", '{"name_or_path": "/x/chatglm3-6b"}', "v3"),
        ({}, "tokenization_chatglm.py", 'special = ["<|user|>", "<|assistant|>"]', "v3"),
        ({}, "tokenization_chatglm.py", 'prompt += "[Round {}]"', "v2"),
        ({}, "chat_template.jinja", "{{ '<|assistant|>' }}", "v3"),
        ({"glmlora_family": "v3"}, "config2.json", "", "v3"),
        ({"_name_or_path": "glmlora/glm-tiny"}, "config2.json", "", "v2"),
    ],
)
def test_other_evidence_of_the_family(folder, fields, file, text, family):
    edit(folder, **{"_name_or_path": "/data/chatglm3/my-model", **fields})
    (folder / file).write_text(text)
    assert family_of(folder) == (family, [])


def test_the_directory_names_the_family(folder):
    edit(folder, _name_or_path="")
    assert family_of(folder.rename(folder.parent / "chatglm3-6b")) == ("v3", [])


def test_a_guess_is_told(folder):
    edit(folder, _name_or_path="/data/chatglm2-to-chatglm3/merged")
    family, told = family_of(folder)
    assert family == "v2" and len(told) == 1
    assert re.search('a guess: .*ChatGLM3.* Say family="v2" or family="v3"', told[0])
    assert family_of(folder, family="v3") == ("v3", [])
    # what was said is kept
    glmlora.AutoConfig.from_pretrained(folder, family="chatglm3").save_pretrained(folder)
    assert family_of(folder) == ("v3", [])
    config = glmlora.AutoConfig.from_pretrained(folder, family="v2", rope_ratio=2, rope_mode="base")
    config.save_pretrained(folder)
    assert glmlora.AutoConfig.from_pretrained(folder).rope_mode == "base"
    (folder / "config.json").rename(folder / "else.json")
    tokenizer = glmlora.AutoTokenizer.from_pretrained(folder, family="v2")
    tokenizer.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert glmlora.AutoTokenizer.from_pretrained(folder).family == "v2"


def test_evidence_that_disagrees_is_told(folder):
    edit(folder, _name_or_path="THUDM/chatglm2-6b")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "<|assistant|>"}')
    family, told = family_of(folder)
    assert family == "v2" and len(told) == 1
    assert "'THUDM/chatglm2-6b' in config.json says ChatGLM2" in told[0]
    assert "tokenizer_config.json says ChatGLM3: taken as ChatGLM2" in told[0]
    with pytest.raises(ValueError, match=r"one of v1 v2 v3 g4.*did you mean 'chatglm3'"):
        glmlora.AutoConfig.from_pretrained(folder, family="chatgml3")
    with pytest.raises(ValueError, match="one of v1 v2 v3 g4 0414 rumination z1 edge hf, got 'v9'"):
        load(folder, family="v9")


def test_a_tokenizer_of_another_model(folder, tmp_path):
    model = load(folder)
    settings = {"history": [], "max_length": 60, "do_sample": False}
    other = glmlora.AutoTokenizer.from_pretrained(folder, family="v3")
    with pytest.warns(UserWarning, match="tokenizer is of family ChatGLM3, the model of ChatGLM2"):
        model.chat(other, "hello", **settings)
    small = load(tiny_model_dir(tmp_path / "small"))
    match = f"tokenizer: has {len(other)} ids, the model's vocabulary has 96"
    with pytest.raises(ValueError, match=match):
        small.chat(other, "hello", **settings)
    with pytest.raises(ValueError, match=match):
        training.run(small, tmp_path / "out", tokenizer=other)


def test_an_adapter_of_another_family_is_told(folder, tmp_path):
    config = glmlora.LoraConfig(r=2, base_model_name_or_path="THUDM/chatglm3-6b")
    glmlora.get_peft_model(load(folder), config, seed=0).save_pretrained(tmp_path / "lora")
    prefixed = load(folder, pre_seq_len=2, family="v3")
    glmlora.save_prefix(prefixed, tmp_path / "prefix")
    for family in ("v2", "v3"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            glmlora.PeftModel.from_pretrained(load(folder, family=family), tmp_path / "lora")
            glmlora.load_prefix(load(folder, family=family), tmp_path / "prefix")
        told = [str(w.message) for w in caught if "was trained on a ChatGLM3 model" in str(w)]
        assert len(told) == (2 if family == "v2" else 0)


def test_the_family_can_be_said_to_the_command(folder, tmp_path, monkeypatch, capsys):
    edit(folder, _name_or_path="")
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    words = ["--model", str(folder), "--family", "chatglm3", "--max-length", "20"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["chat", *words]) == 0


# What is not read


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, "awq, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes, 4 bits"),
        ({"compression_config": {"format": "int"}}, "another program"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "mlx, 4 bits"),
        ({"quantization_config": "gptq"}, "another program"),
    ],
)
def test_foreign_quantization_is_named(directory, fields, said):
    edit(directory, **fields)
    with pytest.raises(ValueError, match=f"quantized by {said}, .*get the unquantized") as error:
        load(directory)
    assert "quantization_bit" not in str(error.value)
    edit(directory, **(dict.fromkeys(fields) | {"quantization_config": {"load_in_8bit": False}}))
    load(directory)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("qweight", "gptq or awq"),
        ("weight.absmax", "bitsandbytes, 4 bits"),
        ("SCB", "bitsandbytes, 8 bits"),
        ("weight_packed", "compressed-tensors"),
        ("weight_scale_inv", "fp8"),
        ("scales", "gptq, awq or mlx"),
    ],
)
def test_tensors_of_a_foreign_quantization_are_named(directory, end, said):
    rewrite(directory, **{QKV.replace("weight", end): np.ones((4, 4), np.int32)})
    with pytest.raises(ValueError, match=f"{end}: the weights are quantized by {said}"):
        load(directory)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chatglm2-q4_0.gguf", "GGUF weights.*safetensors"),
        ("chatglm2-ggml-q4_0.bin", "GGML"),
        ("consolidated.00.pth", "a training program"),
        ("adapter_model.safetensors", "an adapter .*PeftModel.from_pretrained"),
        ("model-00001-of-00003.safetensors", "without their index"),
        ("model.fp16.safetensors", "a variant"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("weights.safetensors", "under another name"),
    ],
)
def test_weights_of_another_kind_are_named(directory, name, said):
    (directory / "model.safetensors").rename(directory / name)
    with pytest.raises(FileNotFoundError, match=f"no weights: .*{name} is there, .*{said}"):
        load(directory)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x1f\x8b\x08\0", "packed by gzip"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_files_that_are_something_else(directory, name, head, said):
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(head + b"\xff" * 100)
    with pytest.raises(ValueError, match=f"{name}: is {said}"):
        load(directory)


def test_quantizing_what_is_quantized(directory):
    load(directory).quantize(4).save_pretrained(directory.parent / "four")
    four = load(directory.parent / "four")
    assert four.quantize(4) is four
    with pytest.raises(ValueError, match=r"stored in 4 bits \(row-wise\) already, 8 bits were"):
        four.quantize(8)
    with pytest.raises(ValueError, match="in groups of 32 columns were asked"):
        four.quantize(4, group_size=32)
    with pytest.raises(ValueError, match="stored in 4 bits"):
        load(directory.parent / "four", load_in_8bit=True)
    assert not load(directory.parent / "four", load_in_4bit=True).config.quantization_group_size


# What is saved

SMALL = {
    "generation_config.json": '{"do_sample": true, "top_p": 0.3, "eos_token_id": [2, 5], "x": 1}',
    "chat_template.jinja": "{{ messages }}",
    "MODEL_LICENSE": "terms",
    "configuration_chatglm.py": "raise SystemExit\n",
    "modeling_chatglm.py": "from .configuration_chatglm import A\nfrom .quantization import B\n",
    "quantization.py": "import os\n",
    "tokenization_chatglm.py": 'prompt = "[Round {}]"\n',
    "README.md": "not copied",
    "web_demo.py": "not copied",
}
AUTO_MAP = {
    "AutoConfig": "configuration_chatglm.ChatGLMConfig",
    "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    "AutoModelForSequenceClassification": "gone.Classifier",
}
COPIED = {n: t for n, t in SMALL.items() if t != "not copied"}


@pytest.fixture
def base(folder):
    """A model directory with everything a published one has."""
    for name, text in SMALL.items():
        (folder / name).write_text(text)
    edit(folder, auto_map=AUTO_MAP, pad_token_id=0)
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    write_json(folder / "tokenizer_config.json", {"auto_map": auto_map, "remove_space": False})
    return folder


def check_whole(saved, names=COPIED):
    for name in names:
        text = (saved / name).read_text()
        assert text == SMALL[name] or json.loads(text) == json.loads(SMALL[name]), name
    assert not [p.name for p in saved.iterdir() if p.read_bytes() == b"not copied"]
    config = read_json(saved / "config.json")
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel"}
    assert read_json(saved / "tokenizer_config.json")["auto_map"]["AutoTokenizer"]
    glmlora.AutoTokenizer.from_pretrained(saved)


def test_a_saved_model_is_whole(base, tmp_path):
    model = load(base)
    model.save_pretrained(tmp_path / "saved")
    check_whole(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    again.generation_config.top_p = 0.5
    again.generation_config.eos_token_id = np.array([7])
    again.save_pretrained(tmp_path / "edited")
    want = {"do_sample": True, "top_p": 0.5, "eos_token_id": [7], "x": 1}
    assert read_json(tmp_path / "edited/generation_config.json") == want
    # over another model: its own generation goes, what a user has put there stays
    (tmp_path / "edited/special_tokens_map.json").write_text('{"mine": 1}')
    (base / "generation_config.json").unlink()
    load(base).save_pretrained(tmp_path / "edited")
    assert not (tmp_path / "edited/generation_config.json").exists()
    assert read_json(tmp_path / "edited/special_tokens_map.json") == {"mine": 1}
    model.save_pretrained(base)  # over itself
    assert set(read_json(base / "config.json")["auto_map"]) == {"AutoConfig", "AutoModel"}


@pytest.mark.parametrize("kind", ["merge", "lora", "p_tuning", "freeze", "full"])
def test_what_training_leaves_is_whole(base, tmp_path, kind):
    out = tmp_path / "out"
    training.run(str(base), out, finetuning_type="lora" if kind == "merge" else kind, max_steps=1,
                 save_steps=100, num_layer_trainable=1, pre_seq_len=2)  # fmt: skip
    if kind in ("merge", "lora"):
        named = read_json(out / "adapter_config.json")["base_model_name_or_path"]
        assert named == str(base)
    if kind == "merge":
        words = ["--model", str(base), "--adapter", str(out), "--output", str(tmp_path / "merged")]
        assert cli.main(["merge", *words]) == 0
        out = tmp_path / "merged"
    if kind != "lora":
        check_whole(out)
        assert list(out.glob(".*")) == []


def test_references_to_absent_code_are_dropped(base, tmp_path):
    (base / "tokenization_chatglm.py").unlink()
    (base / "modeling_chatglm.py").unlink()
    hub = {"AutoModelForCausalLM": "someone/model--modeling.Model"}
    edit(base, auto_map={**AUTO_MAP, **hub})
    load(base).save_pretrained(tmp_path / "saved")
    glmlora.AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "saved")
    kept = read_json(tmp_path / "saved/config.json")["auto_map"]
    assert kept == {"AutoConfig": AUTO_MAP["AutoConfig"], **hub}
    assert "auto_map" not in read_json(tmp_path / "saved/tokenizer_config.json")
    glmlora.AutoConfig.from_pretrained(base).save_pretrained(tmp_path / "alone")
    assert read_json(tmp_path / "alone/config.json")["auto_map"] == hub


def test_a_failing_save_leaves_the_old_directory(base, tmp_path, monkeypatch):
    model = load(base)
    model.save_pretrained(tmp_path / "saved")
    before = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    model.load_state_dict({n: a * 2 for n, a in model.state_dict().items()})
    model.config.seq_length = 64
    model.generation_config.top_p = 0.9
    monkeypatch.setattr(saving, "generation_fields", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "saved")
    assert {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()} == before


def test_saving_without_the_directory_that_was_opened_is_told(base, tmp_path):
    model = load(base)
    base.rename(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="saved without the tokenizer's files"):
        model.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in read_json(tmp_path / "saved/config.json")
    assert load(tmp_path / "saved").generation_config.top_p == 0.3


# How it is asked for

MEANINGLESS = {
    "trust_remote_code": True,
    "revision": "main",
    "cache_dir": "x",
    "token": "secret",
    "use_auth_token": False,
    "local_files_only": True,
    "force_download": True,
    "resume_download": True,
    "proxies": {},
}


@pytest.mark.parametrize(
    "given",
    [
        *({k: v} for k, v in MEANINGLESS.items()),
        {"torch_dtype": "float16"},
        {"dtype": "torch.bfloat16"},
        {"torch_dtype": "auto", "dtype": None},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": False},
        {"empty_init": False},
        {"attn_implementation": "sdpa"},
        {"quantization_config": None},
        {"use_safetensors": True},
        {"ignore_mismatched_sizes": False},
        {"variant": None, "max_memory": None},
        {"seq_length": 64},
        {"use_cache": True},
    ],
)
def test_keywords_of_from_pretrained(directory, given):
    model = load(directory, **given)
    dtype = str(given.get("torch_dtype") or given.get("dtype") or "float32")
    assert model.dtype == dtype.replace("torch.", "").replace("auto", "float32")
    assert model.config.seq_length == given.get("seq_length", 128)


def test_keywords_that_have_an_effect(directory, tmp_path):
    model = load(directory, pre_seq_len=3, prefix_projection=True)
    assert model.has_prefix and model.config.prefix_projection is True
    given = glmlora.GenerationConfig(top_p=0.5)
    assert load(directory, generation_config=given).generation_config is given
    config = glmlora.AutoConfig.from_pretrained(directory)
    assert load(directory, config=config, pre_seq_len=2).config.pre_seq_len == 2
    (tmp_path / "repo").mkdir()
    directory.rename(tmp_path / "repo/inner")
    model = load(tmp_path / "repo", subfolder="inner")
    assert Path(model.name_or_path) == tmp_path / "repo/inner"
    assert load(str(tmp_path / "repo/inner"), use_safetensors=True).config.hidden_size == 32
    with pytest.raises(FileNotFoundError, match="found none of pytorch_model.bin"):
        load(tmp_path / "repo/inner", use_safetensors=False)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"quantization_config": object()}, ValueError, "quantization_config=.*load_in_4bit"),
        ({"variant": "fp16"}, ValueError, "variant='fp16': .*rename"),
        ({"max_memory": {0: "10GB"}}, ValueError, "max_memory.*on one device"),
        ({"ignore_mismatched_sizes": True}, ValueError, "every weight must fit"),
        ({"attn_implementation": "fast"}, ValueError, "attn_implementation='fast': expected"),
        ({"gguf_file": "x.gguf"}, ValueError, "GGUF"),
        ({"output_loading_info": True}, ValueError, "output_loading_info"),
        ({"output_hidden_states": True}, ValueError, "argument of the call"),
        ({"device_map": {"a": 0, "b": "cpu"}}, ValueError, "device_map: names 0, cpu"),
        ({"torch_dtype": "float16", "dtype": "float32"}, ValueError, "torch_dtype is 'float16'"),
        ({"generation_config": {"top_p": 1}}, TypeError, "generation_config: got a dict"),
        ({"config": {"num_layers": 2}}, TypeError, "config: expected a ChatGLMConfig, got dict"),
        ({"disable_mmap": True}, ValueError, "always mapped"),
        ({"load_in_8bit": "False"}, ValueError, "load_in_8bit: expected True or False"),
        ({"use_safetensors": "no"}, ValueError, "use_safetensors: expected True or False"),
        ({"torch_dtype": "int8"}, ValueError, "dtype: expected"),
        ({"torch_dtyp": "float16"}, TypeError, "'torch_dtyp' .did you mean 'torch_dtype'"),
        ({"pre_seq_length": 8}, TypeError, "'pre_seq_length' .did you mean 'pre_seq_len'"),
        ({"famly": "v2"}, TypeError, "'famly' .did you mean 'family'"),
    ],
)
def test_keywords_that_are_refused(directory, given, error, message):
    with pytest.raises(error, match=message):
        load(directory, **given)


def test_keywords_of_configs_and_tokenizers(folder):
    for auto in (glmlora.AutoConfig, glmlora.AutoTokenizer):
        assert auto.from_pretrained(pretrained_model_name_or_path=folder, **MEANINGLESS)
        assert auto.from_pretrained(folder.parent, subfolder=folder.name)
        with pytest.raises(TypeError, match="'famly' .did you mean 'family'"):
            auto.from_pretrained(folder, famly="v2")
    assert glmlora.AutoConfig.from_pretrained(folder, pre_seq_len=4).pre_seq_len == 4
    with pytest.raises(TypeError, match="did you mean 'pre_seq_len'"):
        glmlora.AutoConfig.from_pretrained(folder, pre_seqlen=4)
    load = glmlora.AutoTokenizer.from_pretrained
    load(folder, use_fast=False, legacy=True, add_bos_token=False, eos_token=None)
    for refused in ({"add_bos_token": True}, {"eos_token": "</x>"}, {"chat_template": "x"}):
        with pytest.raises(ValueError, match=next(iter(refused))):
            load(folder, **refused)


def test_checkers_see_every_keyword():
    """The types of keywords name those that are passed over or refused, and keys of configs."""
    for types, *tables in (
        (keywords.ConfigKeywords, keywords.CONFIG_NEUTRAL, keywords.CONFIG_REASONS),
        (keywords.ModelKeywords, keywords.MODEL_NEUTRAL, keywords.MODEL_REASONS),
        (keywords.SaveKeywords, keywords.SAVE_NEUTRAL, keywords.SAVE_REASONS),
        (
            of_tokenizers.TokenizerSaveKeywords,
            of_tokenizers.SAVE_NEUTRAL,
            of_tokenizers.SAVE_REASONS,
        ),
        (
            of_tokenizers.TokenizerKeywords,
            of_tokenizers.NEUTRAL,
            of_tokenizers.REASONS,
        ),
    ):
        typed = set(get_type_hints(types)) - NOTHING - {"padding_side"}
        said = {name for table in tables for name in table} - {"padding_side"}
        assert said <= typed
        assert all(is_key(name) for name in typed - said)


def test_keywords_of_save_pretrained(directory, folder, tmp_path):
    model = load(directory)
    model.save_pretrained(save_directory=tmp_path / "a", push_to_hub=False, variant=None)
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert (tmp_path / "a/config.json").exists() and not (tmp_path / "b").exists()
    for saved in (model, model.config, glmlora.AutoTokenizer.from_pretrained(folder)):
        with pytest.raises(ValueError, match="push_to_hub=True: nothing is uploaded"):
            saved.save_pretrained(tmp_path / "b", push_to_hub=True)
        with pytest.raises(TypeError, match="'comit_message' .did you mean 'commit_message'"):
            saved.save_pretrained(tmp_path / "b", comit_message="")
        saved.save_pretrained(save_directory=tmp_path / "c", push_to_hub=False, repo_id="x")
    with pytest.raises(TypeError, match="'safe_serialisation' .did you mean 'safe_serialization'"):
        model.save_pretrained(tmp_path / "b", safe_serialisation=False)


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModel", "AutoTokenizer"])
def test_a_directory_that_is_not_there(folder, auto, monkeypatch):
    load = getattr(glmlora, auto).from_pretrained
    monkeypatch.chdir(folder.parent)
    with pytest.raises(OSError, match="looked for a local directory .*did you mean '.*tiny-model'"):
        load("tiny-modle")
    with pytest.raises(OSError, match="did you mean '.*tiny-model'"):
        load(folder.parent / "Tiny-Model")
    match = "name on a hub.*modelscope download --model THUDM/chatglm2-6b --local_dir chatglm2-6b"
    with pytest.raises(OSError, match=match):
        load("THUDM/chatglm2-6b")
    with pytest.raises(NotADirectoryError, match="config.json.*is a file, expected the directory"):
        load(folder / "config.json")


def test_an_adapter_in_place_of_a_model(folder, tmp_path):
    adapter = glmlora.get_peft_model(load(folder), glmlora.LoraConfig(r=2))
    assert adapter.peft_config["default"].base_model_name_or_path == str(folder)
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(OSError, match="an adapter's directory.*PeftModel.from_pretrained"):
        load(tmp_path / "adapter")
