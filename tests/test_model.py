"""AutoModel and its object: loading, casts, weights in and out, forward, backward, optimiser."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from conftest import ROOT
from tiny import TINY_CONFIG, tiny_model_dir, tiny_weights

import glmlora
from glmlora.files.checkpoint import read_json, write_json, write_safetensors, write_torch
from glmlora.model import device as devices
from glmlora.model.configuration import ChatGLMConfig

V = TINY_CONFIG["padded_vocab_size"]
QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"


@pytest.fixture
def directory(tmp_path):
    return tiny_model_dir(tmp_path)


@pytest.fixture
def model(directory):
    return glmlora.AutoModel.from_pretrained(directory)


def ids(rows, length, seed=0):
    return np.random.default_rng(seed).integers(3, V, (rows, length))


def left_padded(lengths, seed=0):
    """(ids, mask, labels) of rows of several lengths, padded on the left; the last half is
    labelled.
    """
    width = max(lengths)
    rng = np.random.default_rng(seed)
    out = np.zeros((len(lengths), width), np.int64)
    mask, labels = np.zeros_like(out), np.full_like(out, -100)
    for row, n in enumerate(lengths):
        out[row, width - n :] = rng.integers(3, V, n)
        mask[row, width - n :] = 1
        labels[row, width - n // 2 :] = out[row, width - n // 2 :]
    return out, mask, labels


# Loading


def test_loads_in_the_stored_type_in_place(tmp_path):
    for dtype, name in (("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")):
        directory = tiny_model_dir(tmp_path / dtype, dtype=dtype)
        model = glmlora.AutoModel.from_pretrained(directory, trust_remote_code=True)
        assert model.dtype == name
        assert model.device == "cpu" and model.device.type == "cpu"
        assert model._stored[QKV].data.base is not None  # a view of the mapped file
        assert not model.training
        assert np.isfinite(model(ids(1, 4)).logits).all()


def test_accepts_what_the_documentation_of_the_models_passes(directory):
    config = glmlora.AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = glmlora.AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        trust_remote_code=True,
        torch_dtype="auto",
        device="cpu",
        device_map="auto",
        revision="main",
        cache_dir="x",
        empty_init=False,
        low_cpu_mem_usage=True,
        load_in_8bit=False,
    )
    assert model.config is config
    with pytest.raises(TypeError, match="use_flash"):
        glmlora.AutoModel.from_pretrained(directory, use_flash=True)


def test_a_directory_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="local directory.*downloads nothing"):
        glmlora.AutoModel.from_pretrained("THUDM/chatglm2-6b")
    with pytest.raises(OSError, match=r"config\.json"):
        glmlora.AutoModel.from_pretrained(tmp_path)


def test_no_code_of_the_directory_runs(directory):
    (directory / "modeling_chatglm.py").write_text("raise SystemExit('executed')")
    (directory / "configuration_chatglm.py").write_text("raise SystemExit('executed')")
    config = read_json(directory / "config.json")
    config["auto_map"] = {"AutoModel": "modeling_chatglm.ChatGLM"}
    write_json(directory / "config.json", config)
    model = glmlora.AutoModel.from_pretrained(directory, trust_remote_code=True)
    assert model.config.auto_map == config["auto_map"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_bit": 3}, "quantization_bit: expected 0, 4 or 8, got 3"),
        ({"quantization_bit": True}, "quantization_bit: expected 0, 4 or 8, got True"),
        ({"quantization_group_size": 32}, "quantization_group_size: expected"),
        ({"quantization_bit": 4, "quantization_group_size": 48}, "quantization_group_size: expe"),
        ({"quantization_embeddings": True}, "quantization_embeddings"),
        ({"multi_query_attention": False}, "multi_query_attention"),
        ({"rmsnorm": False}, "rmsnorm"),
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
        ({"add_bias_linear": True}, "add_bias_linear"),
        ({"post_layer_norm": False}, "post_layer_norm"),
        ({"model_type": "glm4_moe_lite"}, "GLM-4.7-Flash, with experts.*get a dense model"),
        ({"model_type": "glm_moe_dsa"}, "GLM-5, whose smallest published copy has 91 GiB"),
        ({"model_type": "glm4v"}, "a model of images.*get a text model"),
        ({"vision_config": {"hidden_size": 8}}, "vision_config: a model of images"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: 'yarn'"),
        ({"rope_parameters": {"type": "yarn"}}, "rope_parameters: 'yarn'"),
        ({"model_type": "llama"}, "llama"),
        ({"inner_hidden_size": 8}, "bos_token_id: expected an id"),
        ({"num_layers": 0}, "num_layers"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"layernorm_epsilon": -1}, "layernorm_epsilon"),
        ({"pre_seq_len": 0}, "pre_seq_len"),
        ({"eos_token_id": "2"}, "eos_token_id"),
    ],
)
def test_configs_that_are_refused_name_the_field(tmp_path, change, message):
    directory = tiny_model_dir(tmp_path)
    config = {**TINY_CONFIG, **change}
    write_json(directory / "config.json", config)
    with pytest.raises(ValueError, match=message) as error:
        glmlora.AutoModel.from_pretrained(directory)
    assert "config.json" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling .* rope_ratio"),
        ("hidden_dropout", 0.1, "hidden_dropout 0.1 has no effect"),
        ("num_layer", 3, "'num_layer' is not used .did you mean 'num_layers'"),
        ("rope_scaling", None, ""),
        ("hidden_dropout", 0.0, ""),
        ("classifier_dropout", 0.1, ""),
        ("bos_token_id", 1, ""),
    ],
)
def test_keys_without_effect_are_told(tmp_path, key, value, told):
    write_json(tmp_path / "config.json", {**TINY_CONFIG, key: value})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        glmlora.AutoConfig.from_pretrained(tmp_path)
    text = " | ".join(str(w.message) for w in said)
    assert bool(text) == bool(told) and re.search(told, text), text


def test_config_defaults_and_unknown_keys(tmp_path):
    config = ChatGLMConfig(multi_query_attention=True, colour="red")
    assert (config.num_layers, config.padded_vocab_size, config.seq_length) == (28, 65024, 2048)
    assert (config.hidden_size, config.ffn_hidden_size, config.kv_channels) == (4096, 13696, 128)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["colour"] == "red" and "family" not in stored and "_rope_mode" not in stored
    assert ChatGLMConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert (
        ChatGLMConfig(multi_query_attention=True, prefix_projection=[False]).prefix_projection
        is False
    )
    with pytest.raises(ValueError, match="multi_query_attention"):
        ChatGLMConfig()  # the published default, which no checkpoint of the family has


def test_family(tmp_path):
    def family(**fields):
        return ChatGLMConfig(**{**TINY_CONFIG, **fields}).family

    assert family() == "v2"
    assert family(_name_or_path="THUDM/chatglm3-6b") == "v3"
    assert family(_name_or_path="THUDM/glm-4-9b-chat") == "g4"
    assert family(_name_or_path="", padded_vocab_size=151552) == "g4"
    assert family(_name_or_path="", family="v3") == "v3"
    plain = tmp_path / "plain"
    plain.mkdir()
    directory = tiny_model_dir(plain, _name_or_path="")
    assert ChatGLMConfig.from_pretrained(directory).family == "v2"
    (directory / "tokenizer_config.json").write_text('{"chat_template": "<|assistant|>"}')
    assert ChatGLMConfig.from_pretrained(directory).family == "v3"
    assert glmlora.AutoModel.from_pretrained(directory, family="v2").config.family == "v2"
    with pytest.raises(ValueError, match="family"):
        ChatGLMConfig.from_pretrained(directory, family="v9")
    with pytest.warns(UserWarning, match="rope_ratio 4"):
        (directory / "tokenizer_config.json").unlink()
        ChatGLMConfig.from_pretrained(directory, rope_ratio=4)


def rewrite(directory, change):
    weights = tiny_weights(TINY_CONFIG)
    change(weights)
    write_safetensors(directory / "model.safetensors", weights)


def test_missing_surplus_and_misshaped_tensors_are_all_named(directory):
    norm = "transformer.encoder.final_layernorm.weight"
    output = "transformer.output_layer.weight"

    def drop(weights):
        del weights[norm], weights[output]
        weights["transformer.extra.weight"] = np.zeros(3, np.float32)
        weights["lm_head.weight"] = np.zeros(3, np.float32)

    rewrite(directory, drop)
    with pytest.raises(ValueError) as error:
        glmlora.AutoModel.from_pretrained(directory)
    for name in (norm, output, "transformer.extra.weight", "lm_head.weight", str(directory)):
        assert name in str(error.value)

    def reshape(weights):
        weights[norm] = weights[norm][:-1]
        weights[QKV] = weights[QKV].T.copy()

    rewrite(directory, reshape)
    with pytest.raises(ValueError) as error:
        glmlora.AutoModel.from_pretrained(directory)
    for text in (norm, "(32,)", "(31,)", QKV, "(64, 32)", "(32, 64)"):
        assert text in str(error.value)


def test_inv_freq_is_ignored_and_integers_are_refused(directory):
    inv_freq = "transformer.rotary_pos_emb.inv_freq"
    rewrite(directory, lambda w: w.update({inv_freq: np.ones(2, np.float16)}))
    assert inv_freq not in glmlora.AutoModel.from_pretrained(directory).state_dict()
    rewrite(directory, lambda w: w.update({QKV: w[QKV].astype(np.int8)}))
    with pytest.raises(ValueError, match="query_key_value.*I8.*quantized"):
        glmlora.AutoModel.from_pretrained(directory)


def test_checkpoints_of_a_part_say_that_they_need_a_base(directory):
    weights = tiny_weights(TINY_CONFIG)
    (directory / "model.safetensors").unlink()
    part = {n: w for n, w in weights.items() if "layers.1.mlp" in n}
    write_torch(directory / "pytorch_model.bin", part)
    with pytest.raises(ValueError, match=r"over the base model.*load_state_dict"):
        glmlora.AutoModel.from_pretrained(directory)
    prefix = {"transformer.prefix_encoder.embedding.weight": np.zeros((4, 64), np.float32)}
    write_torch(directory / "pytorch_model.bin", prefix)
    with pytest.raises(ValueError, match=r"prefix encoder.*load_prefix"):
        glmlora.AutoModel.from_pretrained(directory)


# Casts and places


def test_casts_return_the_model_and_convert_the_weights(model):
    x = ids(1, 6)
    wide = model(x).logits
    weights = model.state_dict()
    assert model.half() is model and model.dtype == "float16"
    stored = model.state_dict()
    for n, w in weights.items():
        assert stored[n].dtype == np.float16
        assert np.array_equal(stored[n], w.astype(np.float16)), n
    rounded = model(x).logits
    assert 0 < np.abs(rounded - wide).max() < 0.05
    assert model.float() is model and model.dtype == "float32"
    assert np.abs(model(x).logits - rounded).max() < 1e-4
    assert model.bfloat16().dtype == "bfloat16"
    assert model.to("float16").dtype == "float16"
    assert model.to(np.float32).dtype == "float32"
    assert model.to("cpu") is model.cpu() is model.eval() is model.train() is model
    assert model.training and not model.eval().training
    assert model.quantize(0) is model
    with pytest.raises(ValueError, match="int8"):
        model.to(dtype="int8")
    with pytest.raises(ValueError, match="tpu"):
        model.to("tpu")


def test_cuda_without_a_gpu(model, monkeypatch):
    if devices.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(devices, "_warned", set())
    with pytest.warns(UserWarning, match="CPU") as caught:
        assert model.cuda() is model
        model.to("cuda:0").cuda()
    assert len(caught) == 1
    monkeypatch.setenv("GLMLORA_STRICT_DEVICE", "1")
    with pytest.raises(RuntimeError, match="GLMLORA_STRICT_DEVICE"):
        model.cuda()


# Weights in and out


def test_save_and_load_are_equal(model, tmp_path):
    x = ids(2, 7)
    for dtype in ("float32", "float16", "bfloat16"):
        model.to(dtype)
        for safe, size in ((True, "10GB"), (False, "10GB"), (True, "9KB"), (False, "9KB")):
            target = tmp_path / f"{dtype}-{safe}-{size}"
            model.save_pretrained(target, safe_serialization=safe, max_shard_size=size)
            sharded = [p.name for p in target.iterdir() if "-of-" in p.name]
            assert bool(sharded) == (size == "9KB")
            again = glmlora.AutoModel.from_pretrained(target)
            assert again.dtype == dtype
            assert again.config.to_dict() == model.config.to_dict()
            assert np.array_equal(again(x).logits, model(x).logits)


def test_state_dict_round_trip(model, directory):
    state = {n: w + 1 for n, w in model.state_dict().items()}
    other = glmlora.AutoModel.from_pretrained(directory)
    assert other.load_state_dict(state) == ([], [])
    assert all(np.array_equal(w, state[n]) for n, w in other.state_dict().items())
    keys = other.load_state_dict({QKV: state[QKV] * 2, "x": np.ones(2)}, strict=False)
    assert keys.unexpected_keys == ["x"] and len(keys.missing_keys) == len(state) - 1
    assert np.array_equal(other.state_dict()[QKV], state[QKV] * 2)
    for bad, message in (
        ({QKV: state[QKV]}, "missing"),
        ({**state, "x": np.ones(2)}, "unexpected x"),
        ({**state, QKV: np.ones((2, 2))}, r"query_key_value.*\(64, 32\).*\(2, 2\)"),
        ({**state, QKV: np.ones((64, 32), int)}, "floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(bad)


def test_parameters(model):
    named = dict(model.named_parameters())
    assert set(named) == set(model.state_dict())
    p = named[QKV]
    assert p.shape == (64, 32) and p.ndim == 2 and p.numel() == 2048 and p.dtype == "float32"
    assert np.array_equal(p.data, model.state_dict()[QKV]) and p.grad is None
    assert not any(p.requires_grad for p in model.parameters())
    total = sum(w.size for w in model.state_dict().values())
    assert model.num_parameters() == total and model.get_memory_footprint() == 4 * total
    assert model.transformer.output_layer.weight.shape == (V, 32)
    assert model.transformer.embedding.word_embeddings.weight.shape == (V, 32)
    assert model.transformer.pre_seq_len is None
    with pytest.raises(AttributeError, match="pre_seq_len"):
        model.transformer.prefix_encoder  # noqa: B018
    p.requires_grad = True
    assert model.trainable_names == [QKV] and model.num_parameters(only_trainable=True) == 2048
    x, mask, labels = left_padded([6])
    model.backward(x, mask, labels)
    assert list(model.named_gradients()) == [QKV]
    assert np.abs(p.grad).max() > 0
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()


# Forward


def test_a_padded_row_equals_the_row_alone(model):
    x, mask, labels = left_padded([9, 4, 1, 7])
    out = model(x, attention_mask=mask, output_hidden_states=True)
    assert out.logits.dtype == np.float32 and out.logits.shape == (4, 9, V)
    assert len(out.hidden_states) == 3 and out.hidden_states[0].shape == (4, 9, 32)
    assert out.loss is None
    assert not out.logits[mask == 0].any()
    right = [np.roll(a, -5, axis=1) for a in (x[1:2], mask[1:2])]
    for row in range(4):
        n = int(mask[row].sum())
        alone = model(x[row : row + 1, 9 - n :]).logits[0]
        assert np.array_equal(out.logits[row, 9 - n :], alone)
    assert np.array_equal(model(*right).logits[0, :4], out.logits[1, 5:])


def test_forward_takes_lists_and_returns_tuples(model):
    x = ids(2, 5)
    out = model(input_ids=x.tolist(), attention_mask=[[1] * 5] * 2, labels=x.tolist())
    assert np.array_equal(out.logits, model(x).logits)
    assert np.array_equal(out["logits"], out[1]) and out[0] == out.loss
    loss, logits = model(x, labels=x, return_dict=False)
    assert loss == out.loss and np.array_equal(logits, out.logits)
    assert np.array_equal(model(x[0]).logits, model(x[:1]).logits)
    scores = out.logits[:, :-1].astype(np.float64)
    lse = np.log(np.exp(scores).sum(-1))
    picked = np.take_along_axis(scores, x[:, 1:, None], -1)[..., 0]
    assert abs((lse - picked).mean() - out.loss) < 1e-5


def test_positions(model):
    x = ids(1, 6)
    assert np.array_equal(model(x, position_ids=np.arange(6)[None]).logits, model(x).logits)
    # Rotary attention sees distances only.
    shifted = model(x, position_ids=np.arange(6)[None] + 50).logits
    assert np.abs(shifted - model(x).logits).max() < 1e-3
    assert np.abs(model(x, position_ids=[[0, 2, 4, 6, 8, 10]]).logits - shifted).max() > 1e-3
    with pytest.raises(ValueError, match="position_ids: 128"):
        model(x, position_ids=np.arange(6)[None] + 123)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "input_ids.*None"),
        ({"input_ids": [[1, 2], [3]]}, "input_ids.*one length"),
        ({"input_ids": [[1.0, 2.0]]}, "input_ids.*float64"),
        ({"input_ids": np.zeros((0, 3), int)}, "input_ids.*shape"),
        ({"input_ids": [[1, 2], [3, 96]]}, r"id 96 at row 1, column 1.*96 ids"),
        ({"input_ids": [[1, -5]]}, r"id -5 at row 0, column 1"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask.*shape"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 2]]}, "attention_mask"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "row 0 is padding alone"),
        ({"input_ids": [[1, 2, 3]], "attention_mask": [[1, 0, 1]]}, "row 0 has zeros"),
        ({"input_ids": [[1, 2]], "labels": [[1, 96]]}, "labels: id 96 at row 0, column 1"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "labels.*shape"),
        ({"input_ids": [[1] * 129]}, "row 0 has 129 tokens.*128"),
        ({"input_ids": [[1]], "output_attentions": True}, "forward: output_attentions=True"),
        ({"inputs_embeds": [[0.5]]}, "inputs_embeds=.*takes ids"),
        ({"input_ids": [[1]], "logits_to_keep": 1}, "logits of every token are returned"),
    ],
)
def test_bad_input_names_argument_row_and_value(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_names_of_transformers_that_ask_for_nothing(model):
    nothing = {"output_attentions": False, "return_last_logit": False, "inputs_embeds": None}
    assert model([[1, 2]], **nothing, num_logits_to_keep=0, cache_position=[0, 1]).logits.size
    with pytest.raises(TypeError, match="'attention_maks' .did you mean 'attention_mask'"):
        model([[1, 2]], attention_maks=[[1, 1]])


def test_all_labels_masked(model):
    x = ids(1, 4)
    masked = np.full_like(x, -100)
    with pytest.warns(UserWarning, match="masked"):
        assert model(x, labels=masked).loss is None
    model.requires_grad_(True)
    with pytest.raises(ValueError, match="no label is left"):
        model.backward(x, labels=masked)
    with pytest.raises(ValueError, match="labels"):
        model.backward(x)


# Backward and the optimiser


def test_gradients_do_not_depend_on_how_rows_are_split(model):
    x, mask, labels = left_padded([9, 4, 6, 7])
    model.requires_grad_(True)
    whole = model.backward(x, mask, labels)
    assert abs(whole - model(x, mask, labels=labels).loss) < 1e-5
    wanted = model.named_gradients()
    assert set(wanted) == set(model.state_dict())
    model.zero_grad()
    total, tokens = 0.0, 0
    for rows in ([0], [1, 2], [3]):
        loss = model.backward(x[rows], mask[rows], labels[rows])
        n = int((labels[rows] >= 0).sum())
        total, tokens = total + n * loss, tokens + n
    assert abs(total / tokens - whole) < 1e-5
    for n, g in model.named_gradients().items():
        assert np.abs(g - wanted[n]).max() <= 1e-5 * max(1, np.abs(wanted[n]).max()), n


def test_training_lowers_the_loss_and_keeps_the_values(model, directory, tmp_path):
    x, mask, labels = left_padded([9, 4, 6, 7])
    model.requires_grad_(True)
    opt = glmlora.AdamW(model, lr=1e-2, max_grad_norm=1.0)
    losses = []
    for _ in range(12):
        losses.append(model.backward(x, mask, labels))
        assert opt.step() > 0
    assert losses[-1] < 0.5 * losses[0]
    after = model(x, mask, labels=labels).loss
    assert after < losses[-1]
    model.save_pretrained(tmp_path / "trained")
    again = glmlora.AutoModel.from_pretrained(tmp_path / "trained")
    assert np.array_equal(again(x, mask).logits, model(x, mask).logits)
    model.requires_grad_(False)
    assert abs(model(x, mask, labels=labels).loss - after) < 1e-6
    with pytest.raises(RuntimeError, match="nothing is trainable"):
        model.backward(x, mask, labels)
    original = glmlora.AutoModel.from_pretrained(directory)
    assert not np.array_equal(original(x, mask).logits, again(x, mask).logits)


def test_optimiser_arguments(model):
    with pytest.raises(ValueError, match="nothing is trainable"):
        glmlora.AdamW(model)
    model.requires_grad_(True)
    for name, value in (
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", "1e-3"),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("eps", -1),
        ("weight_decay", None),
        ("max_grad_norm", float("inf")),
    ):
        with pytest.raises(ValueError, match=name):
            glmlora.AdamW(model, **{name: value})
    opt = glmlora.AdamW(model)
    with pytest.raises(RuntimeError, match="no gradient was accumulated"):
        opt.step()
    with pytest.raises(ValueError, match="lr"):
        opt.lr = -1
    x, mask, labels = left_padded([5])
    model.backward(x, mask, labels)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="no gradient"):
        opt.step()


def test_one_step_of_adamw(model):
    x, mask, labels = left_padded([5, 8])
    model.requires_grad_(True)
    before = model.state_dict()
    model.backward(x, mask, labels)
    gradients = model.named_gradients()
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    opt = glmlora.AdamW(model, lr=0.01, weight_decay=0.1, max_grad_norm=norm / 2)
    assert abs(opt.step() - norm) < 1e-4 * norm
    after = model.state_dict()
    for n, g in gradients.items():
        g = g.astype(np.float64) * 0.5
        decay = 0.0 if "layernorm" in n or n.endswith("bias") else 0.1
        want = before[n] * (1 - 0.01 * decay) - 0.01 * g / (np.abs(g) + 1e-8)
        assert np.abs(after[n] - want).max() < 2e-5, n


@pytest.mark.parametrize("ratio", [1, 16])
def test_lora_plus(model, ratio):
    """LoRA+ (Hayou et al. 2024): B has `ratio` times A's rate."""
    x, mask, labels = left_padded([5, 8])
    config = glmlora.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    peft = glmlora.get_peft_model(model, config, seed=1)
    before = {n: model.core.read(n) for n in peft.trainable_names}
    peft.backward(x, mask, labels)
    gradients = {n: model.core.read(n, "grad").astype(np.float64) for n in before}
    glmlora.AdamW(peft, lr=0.01, weight_decay=0.1, loraplus_lr_ratio=ratio).step()
    assert len({n.split(".lora_")[0] for n in before}) == len(before) / 2 == 8
    for n, g in gradients.items():
        lr = 0.01 * ratio if n.endswith(".lora_B.weight") else 0.01
        want = before[n] * (1 - lr * 0.1) - lr * g / (np.abs(g) + 1e-8)
        assert np.abs(model.core.read(n) - want).max() < 2e-5, n


def test_dropout_only_in_train_mode(model, directory):
    x, mask, labels = left_padded([9, 4])
    config = glmlora.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, init_lora_weights=False)
    peft = glmlora.get_peft_model(model, config, seed=1)
    still = peft.backward(x, mask, labels)
    assert peft.backward(x, mask, labels) == still
    peft.train()
    assert peft.backward(x, mask, labels) != still
    assert peft.eval().backward(x, mask, labels) == still


def test_a_weight_that_is_not_finite_stops_with_its_place(directory):
    rewrite(directory, lambda w: w[QKV].__setitem__((0, 0), np.nan))
    model = glmlora.AutoModel.from_pretrained(directory).requires_grad_(True)
    x, mask, labels = left_padded([5])
    with pytest.raises(FloatingPointError, match="layer 0"):
        model.backward(x, mask, labels)
    with pytest.raises(FloatingPointError):
        model.generate(x, max_new_tokens=2)


def test_a_second_thread_gets_an_error_not_a_crash(tmp_path):
    directory = tiny_model_dir(tmp_path, num_layers=6, seq_length=2048, hidden_size=64)
    model = glmlora.AutoModel.from_pretrained(directory)
    x = ids(8, 500)
    found = []

    def run():
        for _ in range(3):
            try:
                model(x)
            except RuntimeError as error:
                found.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found and all("busy" in text or "thread" in text for text in found)
    assert np.isfinite(model(x[:1, :4]).logits).all()


def test_importing_brings_no_framework(directory):
    """`import glmlora` and loading a model import neither torch, transformers, peft nor pandas."""
    script = (
        "import sys, glmlora; light = set(sys.modules)\n"
        f"model = glmlora.AutoModel.from_pretrained({str(directory)!r})\n"
        "glmlora.get_peft_model(model, glmlora.LoraConfig())\n"
        "model.generate([[3, 4]], max_new_tokens=1)\n"
        "names = {n.partition('.')[0] for n in sys.modules}\n"
        "print(sorted(names & {'torch', 'transformers', 'peft', 'pandas', 'datasets'}))\n"
        "print(sorted({n.partition('.')[0] for n in light} & {'numpy', 'tqdm', 'sentencepiece'}))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [sys.executable, "-c", script]
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout
    assert out.split("\n")[:2] == ["[]", "[]"]


def test_every_public_name_is_there():
    for name in glmlora.__all__:
        assert getattr(glmlora, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        glmlora.nonsense  # noqa: B018
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{glmlora.__version__}"' in project


def test_loading_is_quiet_and_leaves_the_directory_alone(directory):
    before = {p.name: p.stat().st_mtime_ns for p in directory.iterdir()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = glmlora.AutoModel.from_pretrained(directory)
        model(ids(1, 3))
    assert {p.name: p.stat().st_mtime_ns for p in directory.iterdir()} == before
    shutil.rmtree(directory)
    assert np.isfinite(model(ids(1, 3)).logits).all()  # mapped files outlive their names
