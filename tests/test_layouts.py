"""Models in the transformers layouts (`glm`, `glm4`): names, configurations, adapters and files, on
tiny models of this test's own. Their numbers are those of test_golden.py."""

import json

import numpy as np
import pytest
import tiny

import glmlora
from glmlora.files.checkpoint import write_safetensors
from glmlora.training import methods
from glmlora.training.arguments import FinetuningArguments

CONFIG = {
    "model_type": "glm",
    "attention_bias": True,
    "eos_token_id": [93, 94, 95],
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 93,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 96,
}
KINDS = {
    "glm": {},
    "tied": {"tie_word_embeddings": True, "partial_rotary_factor": 1.0, "attention_bias": False},
    "glm4": {"model_type": "glm4", "head_dim": 12},
}
IDS = np.array([[5, 9, 2, 44, 17, 8, 60, 3], [7, 1, 30, 30, 12, 90, 4, 11]])
PROJECTIONS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
LINEARS = [*PROJECTIONS, "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]


def write(directory, kind="glm", weights=None, **changes):
    """A model directory; None takes a key out."""
    config = {**CONFIG, **KINDS[kind], **changes}
    directory.mkdir(exist_ok=True)
    tensors = tiny.transformers_weights({**CONFIG, **KINDS[kind]}) if weights is None else weights
    write_safetensors(directory / "model.safetensors", tensors)
    fields = {k: v for k, v in config.items() if v is not None}
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def directory(tmp_path, kind):
    return write(tmp_path / "base", kind)


def load(directory, **keywords):
    return glmlora.AutoModel.from_pretrained(directory, **keywords)


def adapted(model, targets, seed=3, **fields):
    """The model with an adapter that changes something."""
    config = glmlora.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **fields)
    config.init_lora_weights = False
    return glmlora.get_peft_model(model, config, seed=seed)


def test_users_see_the_names_of_the_layout(directory, kind):
    model, wanted = load(directory), tiny.transformers_weights({**CONFIG, **KINDS[kind]})
    assert set(model.state_dict()) == set(wanted)
    assert {n for n, _ in model.named_parameters()} == set(wanted)
    for name, array in model.state_dict().items():
        assert np.array_equal(array, wanted[name]), name
    head = "model.embed_tokens.weight" if kind == "tied" else "lm_head.weight"
    assert model.get_output_embeddings().weight.name == head


def test_a_missing_tensor_is_named_as_the_layout_names_it(tmp_path):
    weights = tiny.transformers_weights(CONFIG)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    base = write(tmp_path / "base", weights=weights)
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.self_attn\.k_proj\.weight"):
        load(base)


def test_the_fused_and_the_split_layout_have_the_same_bits(tmp_path):
    """Forward, and the gradients of the weights that only one of them cuts."""
    fused = load(tiny.tiny_model_dir(tmp_path, rope_ratio=1.0))
    split = load(write(tmp_path / "base"))
    assert np.array_equal(fused(IDS).logits, split(IDS).logits)
    found = []
    for model in (fused, split):
        model.requires_grad_(True)
        model.backward(IDS, labels=IDS)
        found.append(model.named_gradients())
    one, other = found
    for i in range(2):
        for part in ("weight", "bias"):
            whole = one[f"transformer.encoder.layers.{i}.self_attention.query_key_value.{part}"]
            parts = [other[f"model.layers.{i}.{module}.{part}"] for module in PROJECTIONS]
            scale = np.abs(whole).max()
            assert np.abs(np.concatenate(parts) - whole).max() <= 1e-6 * scale


def test_a_saved_model_is_of_its_layout(directory, kind, tmp_path):
    model = load(directory)
    model.save_pretrained(tmp_path / "again")
    before, after = (
        json.loads((d / "config.json").read_text(encoding="utf-8"))
        for d in (directory, tmp_path / "again")
    )
    assert {k: v for k, v in after.items() if k in before} == before
    assert set(after) - set(before) == set()
    stored = glmlora.load_state_dict(tmp_path / "again")
    assert set(stored) == set(tiny.transformers_weights({**CONFIG, **KINDS[kind]}))
    assert np.array_equal(load(tmp_path / "again")(IDS).logits, model(IDS).logits)


def test_both_spellings_of_a_config_are_one_model(tmp_path):
    nested = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 1.0}
    one = write(tmp_path / "one", rope_theta=5e6, partial_rotary_factor=1.0)
    other = write(
        tmp_path / "other",
        **{"rope_theta": None, "partial_rotary_factor": None, "rope_parameters": nested},
        **{"torch_dtype": None, "dtype": "float32"},
    )
    models = [load(d) for d in (one, other)]
    assert models[0].config.arch() == models[1].config.arch()
    assert models[0].config.arch()["rope_base"] == 5e6
    assert models[0].config.arch()["rotary_dim"] == 8
    assert np.array_equal(*(m(IDS).logits for m in models))
    models[1].save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert saved["rope_parameters"] == nested and "rope_theta" not in saved


def test_absent_keys_are_those_of_transformers():
    config = glmlora.ChatGLMConfig(model_type="glm4")
    assert config.family == "0414" and config.num_layers == config.num_hidden_layers == 40
    arch = config.arch()
    assert (arch["hidden"], arch["ffn"], arch["vocab"]) == (4096, 13696, 151552)
    assert (arch["heads"], arch["kv_heads"], arch["head_dim"]) == (32, 2, 128)
    assert (arch["eps"], arch["rope_base"], arch["rotary_dim"]) == (1.5625e-07, 10000.0, 64)
    assert arch["qkv_bias"] and arch["branch_norms"] and not arch["tied_head"]
    assert config.eos_token_ids == [151329, 151336, 151338] and config.seq_length == 131072


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling: 'yarn' is not supported",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters: 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: type 'linear' is not supported"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_theta is 10000.0, but 5.0 in rope_param"),
        ({"rope_scaling": 4}, "rope_scaling: expected an object or null, got 4"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"partial_rotary_factor": 0.2}, "0.2 of head_dim 8 turns 1 channels"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected at most 1, got 1.5"),
        ({"rope_theta": "big"}, "rope_theta: expected a positive number, got 'big'"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported.*'glm4', 'glm'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple"),
    ],
)
def test_configs_that_are_refused_name_the_field(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "base", **change))


def test_a_family_of_another_layout_is_refused(directory):
    with pytest.raises(ValueError, match="family: 'v2' has model_type 'chatglm', config.json says"):
        load(directory, family="v2")


@pytest.mark.filterwarnings("error")
def test_a_scaling_that_changes_nothing_is_read(tmp_path):
    plain = load(write(tmp_path / "one"))
    told = load(write(tmp_path / "two", rope_scaling={"rope_type": "default"}))
    assert np.array_equal(plain(IDS).logits, told(IDS).logits)


def test_adapters_change_the_three_projections_where_nobody_says_which(directory):
    model = glmlora.get_peft_model(load(directory), glmlora.LoraConfig(r=2))
    changed = {n.split(".lora_")[0].split(".", 3)[3] for n in model.trainable_names}
    assert changed == set(PROJECTIONS)
    everything = glmlora.get_peft_model(
        load(directory), glmlora.LoraConfig(r=2, target_modules="all-linear")
    )
    changed = {n.split(".lora_")[0].split(".", 3)[3] for n in everything.trainable_names}
    assert changed == set(LINEARS)


def test_the_default_of_the_training_flag_is_that_too(directory):
    trainee = methods.prepare(load(directory), None, FinetuningArguments(), "lora", seed=0)
    assert {n.split(".")[4] for n in trainee.names} == {"q_proj", "k_proj", "v_proj"}


def test_a_target_of_the_other_layout_is_told_in_this_one(directory):
    message = "query_key_value.*here it is 'q_proj', 'k_proj', 'v_proj'"
    with pytest.raises(ValueError, match=message):
        adapted(load(directory), ["query_key_value"])


def test_an_adapter_comes_back_from_its_files_and_is_merged(directory, tmp_path):
    model = adapted(load(directory), "all-linear")
    wanted = model(IDS).logits
    assert np.abs(wanted - load(directory)(IDS).logits).max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    names = set(glmlora.load_state_dict(tmp_path / "adapter"))
    first = "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"
    assert first in names and len(names) == 2 * 2 * len(LINEARS)
    again = glmlora.PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    assert np.array_equal(again(IDS).logits, wanted)
    merged = again.merge_and_unload()
    assert np.abs(merged(IDS).logits - wanted).max() <= 1e-4


def test_an_adapter_on_a_tied_head_trains_and_is_not_merged(tmp_path):
    base = write(tmp_path / "base", "tied")
    model = adapted(load(base), ["lm_head", "q_proj"])
    before = model.state_dict()
    assert before["base_model.model.lm_head.lora_B.weight"].shape == (96, 4)
    model.backward(IDS, labels=IDS)
    assert np.abs(model.named_gradients()["base_model.model.lm_head.lora_A.weight"]).max() > 0
    with pytest.raises(RuntimeError, match=r"lm_head.*shares model\.embed_tokens\.weight"):
        model.merge_and_unload()
    assert np.array_equal(model.core.read("model.embed_tokens.weight"), tiny.transformers_weights(
        {**CONFIG, **KINDS["tied"]})["model.embed_tokens.weight"])  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    again = glmlora.PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    assert np.array_equal(again(IDS).logits, model(IDS).logits)


def test_embeddings_are_no_target(tmp_path):
    with pytest.raises(ValueError, match=r"model\.embed_tokens: adapters on this module"):
        adapted(load(write(tmp_path / "base", "tied")), ["embed_tokens"])


def test_a_tied_head_that_is_in_the_file_must_be_the_embeddings(tmp_path):
    weights = tiny.transformers_weights({**CONFIG, **KINDS["tied"]})
    wanted = load(write(tmp_path / "without", "tied"))(IDS).logits
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    assert np.array_equal(load(write(tmp_path / "equal", "tied", weights))(IDS).logits, wanted)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        load(write(tmp_path / "other", "tied", weights))


def test_a_state_dict_may_have_a_tied_head_twice(tmp_path):
    """As torch's state_dict() has it."""
    model = load(write(tmp_path / "base", "tied"))
    state = {name: array + 0.25 for name, array in model.state_dict().items()}
    other = state["model.embed_tokens.weight"].copy()
    model.load_state_dict({**state, "lm_head.weight": other})
    assert np.array_equal(model.state_dict()["model.embed_tokens.weight"], other)
    with pytest.raises(ValueError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ"):
        model.load_state_dict({**state, "lm_head.weight": other + 1})


def test_full_training_keeps_a_tied_head_one_weight(tmp_path):
    model = load(write(tmp_path / "base", "tied")).requires_grad_(True)
    optimizer = glmlora.AdamW(model, lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model.backward(IDS, labels=IDS))
        optimizer.step()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "again")
    assert np.array_equal(load(tmp_path / "again")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("part", ["qkv", "mlp"])
def test_freeze_tuning_finds_its_part(directory, kind, part):
    names = methods.frozen_but(load(directory), 1, part)
    wanted = PROJECTIONS if part == "qkv" else ["mlp.gate_up_proj", "mlp.down_proj"]
    tails = ["weight"] + ["bias"] * (part == "qkv" and kind != "tied")
    assert set(names) == {f"model.layers.1.{m}.{t}" for m in wanted for t in tails}


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_quantized_linears_are_saved_and_read(directory, tmp_path, bits, group):
    model = load(directory)
    exact = model(IDS).logits
    model.quantize(bits, group_size=group)
    rounded = model(IDS).logits
    off = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < off < (0.03 if bits == 8 else 0.4)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.config.quantization_bit == bits
    assert np.array_equal(again(IDS).logits, rounded)
    model = adapted(again, "all-linear")
    model.backward(IDS, labels=IDS)
    assert all(np.abs(g).max() > 0 for g in model.named_gradients().values())


def test_answers_from_the_cache_are_those_without(directory):
    model = load(directory)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    found = model.generate(IDS, **options)
    for length in range(IDS.shape[1], found.shape[1]):
        logits = model(found[:, :length], attention_mask=np.ones((2, length), int)).logits[:, -1]
        assert np.array_equal(logits.argmax(-1), found[:, length])


def test_a_prefix_trains(directory):
    model = load(directory, pre_seq_len=3)
    model.backward(IDS, labels=IDS)
    assert list(model.core.trainable()) == ["prefix_encoder.embedding.weight"]
    assert np.abs(model.core.read("prefix_encoder.embedding.weight", "grad")).max() > 0


@pytest.fixture
def both(tmp_path):
    """The two layouts of one model."""
    fused = tiny.tiny_model_dir(tmp_path, _name_or_path="THUDM/glm-4-9b", glmlora_family="g4")
    return fused, write(tmp_path / "split")


ONE = "transformer.encoder.layers.1.self_attention.query_key_value"


@pytest.mark.parametrize("targets", ["all-linear", ["query_key_value"], [ONE], r".*\.1\.mlp\..*"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_one_linear_becomes_one_of_three(both, tmp_path, targets, rslora):
    model = adapted(load(both[0]), targets, use_rslora=rslora)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="layout 'chatglm': taken for the same linears in 'glm'"):
        other = glmlora.PeftModel.from_pretrained(load(both[1]), tmp_path / "adapter")
    assert np.abs(other(IDS).logits - model(IDS).logits).max() <= 1e-4
    assert np.abs(model(IDS).logits - load(both[0])(IDS).logits).max() > 0.1
    other.save_pretrained(tmp_path / "again")  # is of this layout from now on
    again = glmlora.PeftModel.from_pretrained(load(both[1]), tmp_path / "again")
    assert np.array_equal(again(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["k_proj", "o_proj"]])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_of_three_linears_becomes_one_of_one(both, tmp_path, targets, rslora):
    model = adapted(load(both[1]), targets, use_rslora=rslora)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match="taken for the same linears"):
        other = glmlora.PeftModel.from_pretrained(load(both[0]), tmp_path / "adapter")
    assert np.abs(other(IDS).logits - model(IDS).logits).max() <= 1e-4
    assert np.abs(model(IDS).logits - load(both[1])(IDS).logits).max() > 0.05
    other.save_pretrained(tmp_path / "again")
    again = glmlora.PeftModel.from_pretrained(load(both[0]), tmp_path / "again")
    assert np.array_equal(again(IDS).logits, other(IDS).logits)


def test_an_adapter_of_another_model_is_refused_naming_both(both, tmp_path):
    model = adapted(load(both[0]), ["query_key_value"])
    model.save_pretrained(tmp_path / "adapter")
    base = load(write(tmp_path / "other", "glm4"))
    with pytest.raises(ValueError, match="layout 'chatglm', the model's of 'glm4': they are diff"):
        glmlora.PeftModel.from_pretrained(base, tmp_path / "adapter")


def test_a_base_of_another_kind_is_named_by_its_adapter(both, tmp_path):
    """The names of GLM-4-0414's modules are those of the layout that can be brought over."""
    model = adapted(load(both[1]), ["q_proj"], base_model_name_or_path="THUDM/GLM-4-9B-0414")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="layout 'glm4', the model's of 'chatglm': they are diff"):
        glmlora.PeftModel.from_pretrained(load(both[0]), tmp_path / "adapter")


def test_an_adapter_whose_ranks_are_named_is_refused(both, tmp_path):
    model = adapted(load(both[1]), ["q_proj", "k_proj"], rank_pattern={"q_proj": 2})
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="rank_pattern names modules of the other"):
        glmlora.PeftModel.from_pretrained(load(both[0]), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, a: a[:-1] if ".0.self_attention.query_key_value.lora_B" in name else a,
         r"layers\.0\.self_attention\.query_key_value: expected.*of \(64, 32\).*\(63, 4\)"),
        (lambda name, a: a[0] if ".1.mlp.dense_h_to_4h.lora_A" in name else a,
         r"layers\.1\.mlp\.dense_h_to_4h: expected lora_A \(r, in\)"),
        (lambda name, a: None if ".1.mlp.dense_4h_to_h.lora_B" in name else a,
         r"missing base_model\.model\.transformer\.encoder\.layers\.1\.mlp\.dense_4h_to_h\.lora_B"),
        (lambda name, a: a.astype(np.int32) if ".1.mlp.dense_4h_to_h.lora_B" in name else a,
         r"dense_4h_to_h\.lora_B\.weight: expected floating point"),
    ],
)  # fmt: skip
def test_an_adapter_that_would_not_fit_is_told_before_it_is_brought_over(
    both, tmp_path, change, message
):
    adapted(load(both[0]), "all-linear").save_pretrained(tmp_path / "adapter")
    stored = glmlora.load_state_dict(tmp_path / "adapter")
    changed = {name: change(name, array) for name, array in stored.items()}
    kept = {n: np.ascontiguousarray(a) for n, a in changed.items() if a is not None}
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", kept)
    with pytest.raises(ValueError, match=message):
        glmlora.PeftModel.from_pretrained(load(both[1]), tmp_path / "adapter")


@pytest.mark.filterwarnings("error")
def test_an_adapter_of_more_layers_is_refused(both, tmp_path):
    adapted(load(both[0]), "all-linear").save_pretrained(tmp_path / "adapter")
    stored = glmlora.load_state_dict(tmp_path / "adapter")
    more = {n.replace("layers.1.", "layers.7."): np.asarray(a) for n, a in stored.items()}
    write_safetensors(tmp_path / "adapter" / "adapter_model.safetensors", more)
    with pytest.raises(ValueError, match="in one of 2 layers"):
        glmlora.PeftModel.from_pretrained(load(both[1]), tmp_path / "adapter")
