"""LoRA and P-Tuning: configs, files, the wrapper, merging, several adapters, refusals."""

import inspect
import json
import pydoc
import random
import re

import numpy as np
import pytest
from tiny import TINY_CONFIG, tiny_model_dir

import glmlora
from glmlora import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from glmlora.families import Family
from glmlora.files.checkpoint import read_json, write_json, write_safetensors, write_torch
from glmlora.model.patterns import Pattern
from glmlora.model.peft import trainable_line

V = TINY_CONFIG["padded_vocab_size"]
LAYER = "transformer.encoder.layers.{}."
QKV = "base_model.model." + LAYER + "self_attention.query_key_value.lora_{}.weight"


@pytest.fixture
def directory(tmp_path):
    return tiny_model_dir(tmp_path)


def load(directory):
    return glmlora.AutoModel.from_pretrained(directory)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, V, (3, 9))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    labels = np.where(np.arange(9) < 5, -100, ids)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model):
    b = batch()
    return model(b["input_ids"], attention_mask=b["attention_mask"]).logits


def trained(model, steps=3, lr=1e-2):
    opt = glmlora.AdamW(model, lr=lr)
    for _ in range(steps):
        model.backward(**batch())
        opt.step()
    return model


def adapter_files(tmp_path, directory, **settings):
    """An adapter directory of a trained adapter, and its logits."""
    model = trained(get_peft_model(load(directory), LoraConfig(r=4, **settings), seed=1))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


# Fresh adapters


def test_a_fresh_adapter_changes_nothing(directory):
    base = load(directory)
    want = logits(base)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        inference_mode=False,
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=list(Family.linears),
    )
    model = get_peft_model(base, config, seed=0)
    assert np.array_equal(logits(model), want)
    assert model.get_base_model() is base and model.base_model.model is base
    state = model.state_dict()
    assert len(state) == 2 * 2 * 4
    for name, array in state.items():
        if ".lora_B." in name:
            assert not array.any()
        else:
            bound = array.shape[1] ** -0.5  # Kaiming-uniform, a = sqrt 5
            assert array.shape[0] == 8 and np.abs(array).max() <= bound
            assert array.std() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_fresh_adapters_follow_the_seed(directory):
    def A(seed=None):
        return get_peft_model(load(directory), LoraConfig(), seed=seed).state_dict()[
            QKV.format(0, "A")
        ]

    assert np.array_equal(A(1), A(1)) and not np.array_equal(A(1), A(2))
    glmlora.set_seed(5)
    first, second = A(), A()
    assert not np.array_equal(first, second)
    glmlora.set_seed(5)
    assert np.array_equal(A(), first)


def test_parameter_counts_and_the_printed_line(directory, capsys):
    model = get_peft_model(load(directory), LoraConfig(r=8), seed=0)
    lora = 2 * 8 * (32 + 64)
    total = lora + load(directory).num_parameters()
    assert model.get_nb_trainable_parameters() == (lora, total)
    model.print_trainable_parameters()
    line = (
        f"trainable params: {lora} || all params: {total} || trainable%: {100 * lora / total:.4f}\n"
    )
    assert capsys.readouterr().out == line == trainable_line(model.get_base_model()) + "\n"
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [
        QKV.format(i, part).replace(".weight", ".default.weight") for i in (0, 1) for part in "AB"
    ]


def test_other_initialisations(directory):
    gaussian = get_peft_model(
        load(directory), LoraConfig(r=8, init_lora_weights="gaussian"), seed=0
    )
    state = gaussian.state_dict()
    assert state[QKV.format(0, "A")].std() == pytest.approx(1 / 8, rel=0.2)
    assert not state[QKV.format(0, "B")].any()
    both = get_peft_model(load(directory), LoraConfig(r=8, init_lora_weights=False), seed=0)
    assert both.state_dict()[QKV.format(0, "B")].any()


def test_scales(directory):
    def scale(**settings):
        return LoraConfig(**settings).targets(load(directory))

    name = LAYER.format(1) + "self_attention.query_key_value"
    assert scale(r=8, lora_alpha=32.0)[name] == (8, 4.0)
    assert scale(r=4, lora_alpha=8, use_rslora=True)[name] == (4, 4.0)
    pattern = dict(rank_pattern={r"layers\.1\..*": 2, "dense": 3}, alpha_pattern={name: 5})
    found = scale(r=8, lora_alpha=16, target_modules="all-linear", **pattern)
    assert found[name] == (2, 2.5)
    assert found[LAYER.format(0) + "self_attention.dense"] == (3, 16 / 3)
    assert found[LAYER.format(0) + "mlp.dense_4h_to_h"] == (8, 2.0)
    with pytest.warns(UserWarning, match="alpha_pattern: 'dense' is none of the modules"):
        scale(r=8, alpha_pattern={"dense": 3})


def test_targets(directory):
    def targets(wanted, **settings):
        found = LoraConfig(target_modules=wanted, **settings).targets(load(directory))
        return [n.removeprefix("transformer.encoder.layers.") for n in found]

    assert targets(None) == ["0.self_attention.query_key_value", "1.self_attention.query_key_value"]
    assert targets(["dense"]) == ["0.self_attention.dense", "1.self_attention.dense"]
    assert targets(["mlp.dense_4h_to_h"], layers_to_transform=1) == ["1.mlp.dense_4h_to_h"]
    assert targets(["dense"], layers_to_transform=[0]) == ["0.self_attention.dense"]
    assert targets([LAYER.format(0) + "mlp.dense_h_to_4h"]) == ["0.mlp.dense_h_to_4h"]
    assert targets(r".*\.1\.mlp\..*") == ["1.mlp.dense_h_to_4h", "1.mlp.dense_4h_to_h"]
    assert len(targets("all-linear")) == 8
    with pytest.raises(ValueError, match="'query_key_value'.*no module"):  # not a whole name
        targets("query_key_value")
    with pytest.raises(ValueError, match=r"\['q_proj'\].*no module"):
        targets(["q_proj"])
    with pytest.warns(UserWarning, match="q_proj"):
        assert len(targets(["q_proj", "dense"])) == 2
    with pytest.raises(ValueError, match="in layers 7"):
        targets(["dense"], layers_to_transform=7)
    assert targets(["output_layer"]) == ["transformer.output_layer"]
    assert targets(["dense", "output_layer"], layers_to_transform=0) == ["0.self_attention.dense"]
    for other in ("word_embeddings", "input_layernorm"):
        with pytest.raises(ValueError, match=f"{other}.*not supported"):
            targets([other])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: .*0"),
        ({"r": 2.5}, "r: "),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "("}, "target_modules.*regular expression"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": "output_layer"}, "modules_to_save: expected names in a list"),
        ({"modules_to_save": [3]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter_x"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "corda"}, "corda.*path_initial_model_for_weight_conversion"),
        ({"use_dora": 1}, "use_dora: expected True or False"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias: is not supported together with use_do"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias: needs init_lora_weigh"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_modules": ".*dense", "layers_to_transform": 1}, "layers_to_transform"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"),
        ({"rank_pattern": {"dense": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"dense": None}}, "alpha_pattern"),
    ],
)
def test_what_a_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


@pytest.mark.parametrize(
    ("word", "right"),
    [
        ("rank", "r"),
        ("lora_r", "r"),
        ("alpha", "lora_alpha"),
        ("dropout", "lora_dropout"),
        ("target_module", "target_modules"),
        ("targets", "target_modules"),
        ("rslora", "use_rslora"),
        ("layer_to_transform", "layers_to_transform"),
    ],
)
@pytest.mark.parametrize("value", [8, None])
def test_a_misspelt_setting_is_told_the_right_word(word, right, value):
    with pytest.raises(TypeError, match=f"LoraConfig: unknown argument '{word}'.*mean '{right}'"):
        LoraConfig(**{word: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_rslora": "no"}, "use_rslora: expected True or False, got 'no'"),
        ({"inference_mode": "false"}, "inference_mode: expected True or False"),
        ({"rank_pattern": "dense"}, "rank_pattern: expected a dict"),
        ({"target_modules": 3}, "target_modules: expected names, got 3"),
        ({"target_modules": [1, "dense"]}, "target_modules: expected names"),
        ({"exclude_modules": {"dense": 1}}, "exclude_modules: expected names"),
    ],
)
def test_settings_of_another_type(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_settings_of_other_versions():
    """Those that do not change the numbers are taken, whatever they say."""
    config = LoraConfig(
        peft_type="LORA",
        megatron_config={"a": 1},
        megatron_core="other",
        runtime_config={"ephemeral_gpu_offload": True},
        qalora_group_size=32,
        loftq_config={"loftq_bits": 4},
        use_dora=False,
        peft_version="0.99",
    )
    assert config.to_dict() == LoraConfig().to_dict()
    with pytest.warns(UserWarning, match="fan_in_fan_out") as told:
        assert LoraConfig(fan_in_fan_out=True).fan_in_fan_out is False
    assert told[0].filename == __file__
    with pytest.raises(TypeError, match="PrefixTuningConfig.*mean 'num_virtual_tokens'"):
        PrefixTuningConfig(pre_seq_len=3)
    with pytest.raises(ValueError, match="encoder_hidden_size 9"):
        PrefixTuningConfig(num_virtual_tokens=3, encoder_hidden_size=9)
    assert PrefixTuningConfig(num_virtual_tokens=3, num_layers=2, token_dim=32).init_std == 1.0


ALL = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": "All-Linear"}, ALL),
        ({"target_modules": ["all-linear"]}, ALL),
        ({"target_modules": ["all"]}, ALL),
        ({"target_modules": ALL, "exclude_modules": ["dense"]}, [ALL[0], *ALL[2:]]),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, ALL[:2]),
        ({"target_modules": r"(?!.*mlp).*\.(dense|query_.*)"}, ALL[:2]),
    ],
)
def test_which_modules_are_meant(directory, tmp_path, settings, expected):
    model = load(directory)
    found = LoraConfig(**settings).targets(model)
    assert [n.rpartition(".")[2] for n in found] == 2 * expected
    get_peft_model(model, LoraConfig(init_lora_weights=False, **settings)).save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    assert again.targets(model) == found


def test_a_target_that_is_not_there_is_told_the_nearest(directory):
    model = load(directory)
    with pytest.raises(ValueError, match="did you mean 'query_key_value'"):
        LoraConfig(target_modules=["query_key_valu"]).targets(model)
    with pytest.warns(UserWarning, match="did you mean 'dense_h_to_4h'"):
        LoraConfig(target_modules=["dense", "dense_h_to_h4"]).targets(model)
    with pytest.raises(ValueError, match="here it is 'query_key_value'"):
        LoraConfig(target_modules=["q_proj", "v_proj"]).targets(model)
    with pytest.raises(ValueError, match="give names in a list"):
        LoraConfig(target_modules="query_key_value").targets(model)
    with pytest.raises(ValueError, match="layers_pattern"):
        LoraConfig(layers_pattern="layers")
    found = LoraConfig(layers_to_transform=[0, 1], layers_pattern=["h", "layers"]).targets(model)
    assert len(found) == 2
    with pytest.raises(ValueError, match="no module of this model matches in layers"):
        LoraConfig(layers_to_transform=0, layers_pattern="h").targets(model)


@pytest.mark.parametrize("pattern", ["(.+)+x", "(a|a|.)*(.|..)*y", "((.{1,99}){1,99}){1,99999}z"])
def test_regular_expressions_end_in_time(directory, pattern):
    """With Python's own matcher each of these would run for ages."""
    model = load(directory)
    with pytest.raises(ValueError, match="no module of this model matches"):
        LoraConfig(target_modules=pattern).targets(model)
    config = LoraConfig(target_modules=["dense"], rank_pattern={pattern: 2})
    assert {rank for rank, _ in config.targets(model).values()} == {8}


def test_regular_expressions_mean_what_they_mean_in_python():
    rng = random.Random(0)
    atoms = "a b . [ab] [^a-c] \\w (a|b) (ab)* a* a+? b{1,2} (a?b){0,3} (?=a) (?!b) ^ $ \\b (a|)* "
    atoms += "(?:b|ab) (a*)* (b?){2,5} \\d \\. \\B \\A \\Z \\S"
    for _ in range(3000):
        pattern = "".join(rng.choice(atoms.split()) for _ in range(rng.randint(1, 5)))
        if rng.random() < 0.3:
            pattern = f"({pattern})" + rng.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}"])
        text = "".join(rng.choice("ab.1\n") for _ in range(rng.randint(1, 7)))
        try:
            expected = re.fullmatch(pattern, text) is not None
        except re.error:
            continue
        assert Pattern(pattern).fullmatch(text) == expected, (pattern, text)
    for pattern in (r"(a)\1", "(?i)a", "(?<=a)b", "(", "a" * 5000, "(" * 3000):
        with pytest.raises(ValueError, match="regular expression"):
            Pattern(pattern)


# Files


@pytest.mark.parametrize(
    "renamed",
    [
        lambda n: n.replace(".weight", ".default.weight"),
        lambda n: n.replace(".weight", ".my-own_1.weight"),
        lambda n: "_orig_mod." + n,
        lambda n: "module." + n,
        lambda n: "module._orig_mod." + n.replace(".weight", ".default.weight"),
        lambda n: n.replace(".model.", ".model._orig_mod.module."),
        lambda n: n.removeprefix("base_model.model."),
        lambda n: "base_model.model." + n,
        lambda n: "_fsdp_wrapped_module." + n.replace("layers.0.", "layers.0._orig_mod."),
    ],
)
def test_names_that_wrappers_give(directory, tmp_path, renamed):
    path, want = adapter_files(tmp_path, directory)
    arrays = {n: np.array(a) for n, a in glmlora.load_state_dict(path).items()}
    (path / "adapter_model.safetensors").unlink()
    write_torch(path / "adapter_model.bin", {renamed(n): a for n, a in arrays.items()})
    assert np.array_equal(logits(PeftModel.from_pretrained(load(directory), path)), want)
    # a second name of the same tensor is none too many, of another it is
    write_safetensors(
        path / "adapter_model.safetensors", {**arrays, **{renamed(n): a for n, a in arrays.items()}}
    )
    assert np.array_equal(logits(PeftModel.from_pretrained(load(directory), path)), want)
    other = {renamed(n): a + 1 for n, a in arrays.items()}
    write_safetensors(path / "adapter_model.safetensors", {**arrays, **other})
    with pytest.raises(ValueError, match="are the same tensor of two adapters"):
        PeftModel.from_pretrained(load(directory), path)


@pytest.mark.parametrize("safe", [True, False])
def test_save_and_load(directory, tmp_path, safe):
    model = get_peft_model(
        load(directory),
        LoraConfig(r=4, lora_alpha=8.0, target_modules=["dense", "query_key_value"]),
        seed=1,
    )
    trained(model)
    target = tmp_path / "adapter"
    model.save_pretrained(target, safe_serialization=safe)
    name = "adapter_model.safetensors" if safe else "adapter_model.bin"
    assert sorted(p.name for p in target.iterdir()) == sorted(["adapter_config.json", name])
    text = (target / "adapter_config.json").read_text()
    stored = json.loads(text)
    assert text == json.dumps(stored, indent=2, sort_keys=True) + "\n"
    assert stored["peft_type"] == "LORA" and stored["inference_mode"] is True
    assert stored["target_modules"] == ["dense", "query_key_value"]
    assert stored["base_model_name_or_path"] == str(directory)
    assert not {"use_rslora", "rank_pattern", "alpha_pattern", "use_dora"} & set(stored)
    arrays = glmlora.load_state_dict(target)
    assert set(arrays) == set(model.state_dict())
    assert all(a.dtype == np.float32 for a in arrays.values())
    again = PeftModel.from_pretrained(load(directory), target)
    assert np.array_equal(logits(again), logits(model))
    assert again.peft_config["default"].lora_alpha == 8.0
    assert again.active_adapter == "default" and not again.trainable_names
    assert again.half() is again.eval() is again.cpu() is again.to("cpu") is again
    # the other form replaces this one
    model.save_pretrained(target, safe_serialization=not safe)
    assert name not in {p.name for p in target.iterdir()}
    assert np.array_equal(logits(PeftModel.from_pretrained(load(directory), target)), logits(model))


def test_rslora_and_patterns_are_written_when_set(directory, tmp_path):
    config = LoraConfig(
        r=4, use_rslora=True, rank_pattern={"dense": 2}, target_modules="all-linear"
    )
    model = trained(get_peft_model(load(directory), config, seed=1))
    model.save_pretrained(tmp_path / "a")
    stored = read_json(tmp_path / "a" / "adapter_config.json")
    assert stored["use_rslora"] is True and stored["rank_pattern"] == {"dense": 2}
    assert stored["target_modules"] == sorted(Family.linears)
    again = PeftModel.from_pretrained(load(directory), tmp_path / "a")
    assert np.array_equal(logits(again), logits(model))


def test_training_continues(directory, tmp_path):
    path, want = adapter_files(tmp_path, directory)
    model = PeftModel.from_pretrained(load(directory), path, is_trainable=True)
    assert np.array_equal(logits(model), want)
    assert len(model.trainable_names) == 4
    first = model.backward(**batch())
    model.zero_grad()
    trained(model)
    assert model.backward(**batch()) < first
    assert set(model.named_gradients()) == set(model.state_dict())


def test_old_and_new_configs_are_read(directory, tmp_path):
    path, want = adapter_files(tmp_path, directory)
    config = read_json(path / "adapter_config.json")
    new = {
        "alora_invocation_tokens": None,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "lora_bias": False,
        "loftq_config": {},
        "peft_version": "0.21.2",
        "use_dora": False,
        "exclude_modules": None,
        "never_heard_of": "",
        "megatron_config": {"num_layers": 2},
        "runtime_config": {"ephemeral_gpu_offload": False},
        "init_lora_weights": "eva",
        "eva_config": {"rho": 2.0},
        "layer_replication": None,
        "use_qalora": False,
    }
    write_json(path / "adapter_config.json", {**config, **new})
    assert np.array_equal(logits(PeftModel.from_pretrained(load(directory), path)), want)
    write_json(path / "adapter_config.json", {**config, "task_type": "SEQ_2_SEQ_LM"})
    with pytest.warns(UserWarning, match="task_type 'SEQ_2_SEQ_LM'"):
        assert np.array_equal(logits(PeftModel.from_pretrained(load(directory), path)), want)
    old = {k: config[k] for k in ("peft_type", "r", "lora_alpha", "target_modules")}
    write_json(path / "adapter_config.json", {**old, "lora_dropout": None})
    assert np.array_equal(logits(PeftModel.from_pretrained(load(directory), path)), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "peft_type"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"use_dora": True}, "missing .*query_key_value.lora_magnitude_vector"),
        ({"lora_bias": True}, r"missing .*query_key_value.lora_B.bias"),
        ({"modules_to_save": ["output_layer"]}, r"missing .*transformer.output_layer.weight"),
        (
            {"modules_to_save": ["outputlayer"]},
            "is named 'outputlayer'.*'output_layer'",
        ),
        ({"never_heard_of": 3}, "never_heard_of 3"),
        ({"modules_to_save": ["x"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"r": "8"}, "r: "),
        ({"target_modules": ["q_proj"]}, "q_proj"),
        ({"target_modules": "query_key_value"}, "query_key_value"),
        ({"r": 3}, r"lora_A.*\(3, 32\).*\(4, 32\)"),
        ({"target_modules": ["query_key_value", "dense"]}, "missing .*dense.lora_A"),
        ({"layers_to_transform": [0]}, "not expected .*layers.1"),
    ],
)
def test_configs_that_do_not_fit(directory, tmp_path, change, message):
    path, _ = adapter_files(tmp_path, directory)
    config = read_json(path / "adapter_config.json")
    write_json(path / "adapter_config.json", {**config, **change})
    with pytest.raises(ValueError, match=message) as error:
        PeftModel.from_pretrained(load(directory), path)
    assert str(path) in str(error.value)


def test_tensors_that_do_not_fit(directory, tmp_path):
    path, _ = adapter_files(tmp_path, directory)
    arrays = {n: np.array(a) for n, a in glmlora.load_state_dict(path).items()}
    A, B = QKV.format(0, "A"), QKV.format(0, "B")

    def attempt(tensors, message):
        write_safetensors(path / "adapter_model.safetensors", tensors)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(load(directory), path)

    attempt({n: a for n, a in arrays.items() if n != A}, f"missing {A}")
    attempt({**arrays, "base_model.model.extra": np.ones(2, np.float32)}, "not expected .*extra")
    attempt({**arrays, B: arrays[B][:-1]}, r"lora_B.*\(64, 4\).*\(63, 4\)")
    attempt({**arrays, A: arrays[A].astype(np.int32)}, "lora_A.*int32")
    attempt({**arrays, A: np.full_like(arrays[A], np.nan)}, "lora_A.*not finite")
    zero = {n: a * 0 if "lora_B" in n else a for n, a in arrays.items()}
    write_safetensors(path / "adapter_model.safetensors", zero)
    with pytest.warns(UserWarning, match="B is all zero in 2 of 2"):
        PeftModel.from_pretrained(load(directory), path)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither"):
        PeftModel.from_pretrained(load(directory), path)


def test_float16_adapters_are_read(directory, tmp_path):
    path, want = adapter_files(tmp_path, directory)
    arrays = glmlora.load_state_dict(path)
    (path / "adapter_model.safetensors").unlink()
    write_torch(path / "adapter_model.bin", {n: a.astype(np.float16) for n, a in arrays.items()})
    found = logits(PeftModel.from_pretrained(load(directory), path))
    assert 0 < np.abs(found - want).max() < 0.01


def test_wrong_paths_and_other_models(directory, tmp_path):
    with pytest.raises(ValueError, match="adapter_config.json.*no such directory"):
        PeftModel.from_pretrained(load(directory), tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(load(directory), tmp_path / "empty")
    with pytest.raises(ValueError, match="it is a model's directory: AutoModel"):
        PeftModel.from_pretrained(load(directory), directory)
    path, _ = adapter_files(tmp_path, directory)
    with pytest.raises(ValueError, match=f"not an adapter directory, '{path.name}' in it is one"):
        PeftModel.from_pretrained(load(directory), path.parent)
    other = tiny_model_dir(tmp_path / "wide", hidden_size=40)
    with pytest.raises(ValueError, match=r"does not fit this model.*\(4, 40\).*\(4, 32\)"):
        PeftModel.from_pretrained(load(other), path)
    with pytest.raises(NotADirectoryError):
        get_peft_model(load(directory), LoraConfig()).save_pretrained(directory / "config.json")


def test_a_failed_save_leaves_the_old_adapter(directory, tmp_path, monkeypatch):
    path, want = adapter_files(tmp_path, directory)
    model = trained(PeftModel.from_pretrained(load(directory), path, is_trainable=True))

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="adapter_model.safetensors"):
        model.save_pretrained(path)
    monkeypatch.undo()
    assert not [p for p in path.iterdir() if p.name.endswith(".tmp")]
    assert np.array_equal(logits(PeftModel.from_pretrained(load(directory), path)), want)


# PEFT's parameters and functions


def test_peft_loads_by_its_own_names(directory, tmp_path):
    path, want = adapter_files(tmp_path, directory)
    meaningless = dict(
        autocast_adapter_dtype=False,
        ephemeral_gpu_offload=True,
        low_cpu_mem_usage=True,
        torch_device="cpu",
        device_map="auto",
        torch_dtype="float16",
        local_files_only=True,
        token=None,
    )
    model = PeftModel.from_pretrained(
        model=load(directory), model_id=tmp_path, subfolder="adapter", **meaningless
    )
    assert np.array_equal(logits(model), want) and model.dtype == "float32"
    model.load_adapter(model_id=path, adapter_name="b", is_trainable=True, **meaningless)
    assert model.active_adapters == ["default"]
    config = PeftConfig.from_pretrained(tmp_path, subfolder="adapter", revision="main")
    assert type(config) is LoraConfig and isinstance(config, PeftConfig) and config.r == 4
    again = PeftModel.from_pretrained(load(directory), path, config=config)
    assert again.active_peft_config is config
    for keywords, error in (
        ({"key_mapping": {"a": "b"}}, "key_mapping"),
        ({"adaptor_name": "x"}, "did you mean 'adapter_name'"),
        ({"adapter_name": "a.b"}, "adapter_name: expected a word"),
        ({"config": 3}, "config: expected a LoraConfig"),
        ({"is_trainable": "no"}, "is_trainable: expected True or False, got 'no'"),
        ({"model_id": tmp_path / "adaptor"}, "no such directory; did you mean .*/adapter'"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            PeftModel.from_pretrained(load(directory), **{"model_id": path, **keywords})
    with pytest.raises(TypeError, match="model: expected a model of glmlora"):
        PeftModel.from_pretrained(str(directory), path)


def test_a_model_from_the_adapters_directory_alone(directory, tmp_path):
    path, want = adapter_files(tmp_path, directory, base_model_name_or_path=str(directory))
    model = glmlora.AutoPeftModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    assert np.array_equal(logits(model), want)
    half = glmlora.AutoPeftModelForCausalLM.from_pretrained(path, torch_dtype="float16")
    assert half.dtype == "float16"
    config = read_json(path / "adapter_config.json")
    for base, error in (("THUDM/nowhere", "'THUDM/nowhere': there is no such"), (None, "None")):
        config["base_model_name_or_path"] = base
        write_json(path / "adapter_config.json", config)
        with pytest.raises((OSError, ValueError), match=f"adapter_config.json: base.*{error}"):
            glmlora.AutoPeftModelForCausalLM.from_pretrained(path)


def test_tensors_in_and_out(directory, tmp_path):
    path, want = adapter_files(tmp_path, directory)
    source = PeftModel.from_pretrained(load(directory), path)
    state = glmlora.get_peft_model_state_dict(source)
    assert set(state) == set(glmlora.load_state_dict(path))
    model = get_peft_model(load(directory), LoraConfig(r=4))
    named = {"module." + n.replace(".weight", ".default.weight"): a for n, a in state.items()}
    other = {n.replace(".default.", ".b."): a + 1 for n, a in named.items()}
    glmlora.set_peft_model_state_dict(model, {**named, **other})
    assert np.array_equal(logits(model), want)
    model.add_adapter("b", LoraConfig(r=4))
    glmlora.set_peft_model_state_dict(model, other, adapter_name="b")
    found = glmlora.get_peft_model_state_dict(model, adapter_name="b")
    assert all(np.array_equal(found[n], a + 1) for n, a in state.items())
    found = glmlora.get_peft_model_state_dict(model, {**named, **other}, adapter_name="default")
    assert all(np.array_equal(found[n], a) for n, a in state.items())
    for change, error in (
        (lambda s: s.popitem(), "missing .*lora_B"),
        (lambda s: s.update(x=np.ones(1)), "not expected x"),
        (lambda s: s.update({QKV.format(0, "A"): np.ones((3, 3))}), r".*lora_A.*\(3, 3\)"),
    ):
        wrong = dict(state)
        change(wrong)
        with pytest.raises(ValueError, match=f"state_dict: does not fit this model: {error}"):
            glmlora.set_peft_model_state_dict(model, wrong)
    assert np.array_equal(logits(model), want)


def test_a_base_is_prepared_for_training(directory):
    base = load(directory).requires_grad_(True)
    assert glmlora.prepare_model_for_kbit_training(base) is base
    assert not base.trainable_names and base.gradient_checkpointing
    assert get_peft_model(base, LoraConfig()).trainable_names


def test_adapters_come_and_go(directory, tmp_path):
    path, want = adapter_files(tmp_path, directory)
    model = PeftModel.from_pretrained(load(directory), path)
    plain = logits(load(directory))
    with pytest.raises(ValueError, match="is the only adapter"):
        model.delete_adapter("default")
    model.load_adapter(path, "b")
    with pytest.raises(ValueError, match="did you mean 'default'"):
        model.set_adapter("defalt")
    with pytest.raises(AttributeError):
        model.active_adapter = "b"
    with pytest.raises(ValueError, match="template: expected one of auto, vendored, got 'x'"):
        model.set_prompt_template("x")
    with pytest.raises(ValueError, match="one adapter is active"):
        model.set_adapter(["b", "default"])
    with pytest.warns(UserWarning, match="'default' was active, 'b' is now"):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"] and np.array_equal(logits(model), want)
    model.disable_adapter_layers()
    assert np.array_equal(logits(model), plain)
    model.enable_adapter_layers()
    assert np.array_equal(logits(model), want)
    with pytest.raises(AttributeError, match="did you mean 'merge_and_unload'"):
        model.merge_and_unlod  # noqa: B018
    with pytest.raises(TypeError, match="adapter_names: expected a list"):
        model.merge_and_unload(adapter_names="b")
    with pytest.warns(UserWarning, match="has an adapter already"):
        PeftModel.from_pretrained(model.get_base_model(), path)
    with pytest.raises(TypeError, match="model: expected a PeftModel"):
        glmlora.get_peft_model_state_dict(model.get_base_model())
    for name in ("add_weighted_adapter", "merge_adapter", "push_to_hub"):
        with pytest.raises(AttributeError, match=f"PeftModel.{name} is not supported"):
            getattr(model, name)
    with pytest.raises(ValueError, match="mixed"):
        get_peft_model(load(directory), LoraConfig(), mixed=True)
    assert PeftModel(load(directory), LoraConfig(r=2)).trainable_names


@pytest.mark.parametrize("targets", [["output_layer"], [*ALL, "output_layer"]])
def test_an_adapter_on_the_output_layer(directory, tmp_path, targets):
    settings = {"lora_alpha": 8, "target_modules": targets}
    path, want = adapter_files(tmp_path, directory, **settings)
    state = glmlora.load_state_dict(path)
    head = "base_model.model.transformer.output_layer.lora_{}.weight"
    assert {head.format("A"), head.format("B")} <= set(state)
    model = PeftModel.from_pretrained(load(directory), path)
    assert np.array_equal(logits(model), want)
    ids = batch()["input_ids"][:1]
    greedy = model.generate(ids, max_new_tokens=4, do_sample=False)
    if targets == ["output_layer"]:  # W + s B A there, and the model below as it was
        base = load(directory)
        name = "transformer.output_layer.weight"
        delta = 2 * state[head.format("B")] @ state[head.format("A")]
        base.load_state_dict({name: base.state_dict()[name] + delta}, strict=False)
        assert np.abs(logits(base) - want).max() < 1e-4 * np.abs(want).max()
        with model.disable_adapter():
            assert np.array_equal(logits(model), logits(load(directory)))
    merged = model.merge_and_unload(safe_merge=True)
    assert np.abs(logits(merged) - want).max() < 1e-4 * np.abs(want).max()
    assert np.array_equal(merged.generate(ids, max_new_tokens=4, do_sample=False), greedy)
    embedding = "transformer.embedding.word_embeddings.weight"
    assert np.array_equal(merged.state_dict()[embedding], load(directory).state_dict()[embedding])


def test_several_adapters_are_merged(directory, tmp_path):
    path, want = adapter_files(tmp_path, directory)
    model = PeftModel.from_pretrained(load(directory), path)
    model.load_adapter(path, "b")
    once = PeftModel.from_pretrained(load(directory), path).merge_and_unload(True, safe_merge=True)
    twice = PeftModel.from_pretrained(once, path).merge_and_unload()
    both = model.merge_and_unload(adapter_names=["b", "default"])
    assert np.array_equal(logits(both), logits(twice))
    with pytest.raises(ValueError, match="was merged or unloaded"):
        model.save_pretrained(tmp_path / "merged")
    model = PeftModel.from_pretrained(load(directory).half(), path)
    before = logits(model)
    state = model.state_dict()
    large = {n: np.full_like(a, 300) for n, a in state.items()}
    glmlora.set_peft_model_state_dict(model, large)
    with pytest.raises(ValueError, match="safe_merge: .*query_key_value.weight"):
        model.merge_and_unload(safe_merge=True)
    glmlora.set_peft_model_state_dict(model, state)
    assert np.array_equal(logits(model), before)


def test_what_is_saved_can_be_chosen(directory, tmp_path):
    path, _ = adapter_files(tmp_path, directory)
    model = PeftModel.from_pretrained(load(directory), path)
    model.load_adapter(path, "b")
    model.save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()
    model.save_pretrained(save_directory=tmp_path / "x", selected_adapters=["b"], token=None)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["b"]
    for keywords, error in (
        ({"selected_adapters": ["c"]}, "'c' is not one of"),
        ({"push_to_hub": True}, "push_to_hub"),
        ({"save_embedding_layers": True}, "save_embedding_layers"),
        ({"safe_serialisation": False}, "did you mean 'safe_serialization'"),
    ):
        with pytest.raises((TypeError, ValueError), match=error):
            model.save_pretrained(tmp_path / "y", **keywords)
    assert not (tmp_path / "y").exists()


# The wrapper


def test_merged_equals_unmerged(directory, tmp_path):
    for dtype, atol in (("float32", 1e-4), ("bfloat16", 0.3)):
        base = load(directory).to(dtype)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(Family.linears))
        model = trained(get_peft_model(base, config, seed=1))
        want, before = logits(model), base.state_dict()
        merged = model.merge_and_unload()
        assert merged is base and base.dtype == dtype
        assert not [n for n in base.core.names() if "lora" in n]
        assert np.abs(logits(base) - want).max() < atol
        after = base.state_dict()
        changed = {n for n in after if not np.array_equal(after[n], before[n])}
        assert changed == {
            n
            for n in after
            if n.rpartition(".")[0].rpartition(".")[2] in Family.linears and n.endswith("weight")
        }
        base.save_pretrained(tmp_path / dtype)
        assert np.array_equal(logits(load(tmp_path / dtype)), logits(base))
        # further casts start from the merged weights
        assert np.abs(logits(base.float()) - want).max() < atol


def test_unload_gives_the_base_back(directory):
    base = load(directory)
    want = logits(base)
    model = trained(get_peft_model(base, LoraConfig(), seed=1))
    assert not np.array_equal(logits(model), want)
    with model.disable_adapter():
        assert np.array_equal(logits(model), want)
    assert not np.array_equal(logits(model), want)
    assert np.array_equal(logits(model.unload()), want)


def test_several_adapters(directory, tmp_path):
    first, one = adapter_files(tmp_path / "1", directory)
    second, two = adapter_files(tmp_path / "2", directory, target_modules=["dense"])
    model = PeftModel.from_pretrained(load(directory), first, adapter_name="one")
    model.load_adapter(second, "two")
    assert model.active_adapter == "one" and set(model.peft_config) == {"one", "two"}
    assert np.array_equal(logits(model), one)
    model.set_adapter("two")
    assert np.array_equal(logits(model), two)
    assert any("lora_A.two.weight" in n for n, _ in model.named_parameters())
    model.set_adapter("one")
    assert np.array_equal(logits(model), one)
    model.save_pretrained(tmp_path / "both")
    for path, want in ((tmp_path / "both", one), (tmp_path / "both" / "two", two)):
        assert np.array_equal(logits(PeftModel.from_pretrained(load(directory), path)), want)
    model.load_adapter(first, "three", is_trainable=True)
    model.set_adapter("three")
    trained(model)
    changed = logits(model)
    model.set_adapter("one")
    model.set_adapter("three")  # what was trained was kept
    assert np.array_equal(logits(model), changed) and not np.array_equal(changed, one)
    with pytest.raises(ValueError, match="'four' is not one of one, two, three"):
        model.set_adapter("four")
    with pytest.raises(ValueError, match="'one' is there already"):
        model.load_adapter(first, "one")


def test_attributes_fall_through_to_the_base(directory):
    base = load(directory)
    model = get_peft_model(base, LoraConfig())
    assert model.config is base.config and model.device == "cpu" and model.dtype == "float32"
    assert callable(model.chat) and callable(model.generate) and callable(model.stream_chat)
    with pytest.raises(AttributeError, match="ChatGLMForConditionalGeneration.*nonsense"):
        model.nonsense  # noqa: B018
    assert {"chat", "batch_chat", "generate", "stream_chat", "config"} < set(dir(model))
    page = pydoc.plain(pydoc.render_doc(model))
    for name in ("chat", "batch_chat", "generate", "stream_chat"):
        assert inspect.signature(getattr(PeftModel, name)) == inspect.signature(
            getattr(type(base), name)
        )
        assert f" {name}(" in page
    assert inspect.signature(PeftModel.half).return_annotation == "PeftModel"
    with pytest.raises(TypeError, match="PeftModel"):
        get_peft_model(model, LoraConfig())
    with pytest.raises(ValueError, match="already"):
        get_peft_model(base, LoraConfig())
    with pytest.raises(TypeError, match="LoraConfig"):
        get_peft_model(load(directory), {"r": 8})
    quiet = get_peft_model(load(directory), LoraConfig(inference_mode=True))
    with pytest.raises(RuntimeError, match="nothing is trainable"):
        quiet.backward(**batch())


def test_only_the_adapter_is_trained(directory):
    base = load(directory)
    before = base.state_dict()
    model = trained(get_peft_model(base, LoraConfig(), seed=0))
    after = base.state_dict()
    assert all(np.array_equal(after[n], before[n]) for n in before)
    assert set(model.named_gradients()) == set(model.state_dict())
    assert model.requires_grad_(True) is model
    assert set(base.trainable_names) == set(base.core.names())


# P-Tuning


@pytest.mark.parametrize("projection", [False, True])
def test_prefix_files(directory, tmp_path, projection):
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=projection
    )
    model = get_peft_model(load(directory), config, seed=1)
    assert model.transformer.pre_seq_len == 4
    encoder = model.transformer.prefix_encoder
    assert encoder.float() is encoder.half() is encoder
    state = encoder.state_dict()
    width = 2 * 2 * 2 * 8
    assert state["embedding.weight"].shape == (4, width)
    assert state["embedding.weight"].std() == pytest.approx(1, abs=0.2)
    if projection:
        assert np.abs(state["trans.0.weight"]).max() <= width**-0.5
        assert np.abs(state["trans.2.bias"]).max() <= 32**-0.5
    trained(model, lr=0.1)
    assert all(n.startswith("transformer.prefix_encoder.") for n in model.named_gradients())
    want = logits(model)
    model.save_pretrained(tmp_path / "prefix")
    stored = read_json(tmp_path / "prefix" / "config.json")
    assert (stored["pre_seq_len"], stored["prefix_projection"]) == (4, projection)
    arrays = glmlora.load_state_dict(tmp_path / "prefix" / "pytorch_model.bin")
    assert {n.removeprefix("transformer.prefix_encoder.") for n in arrays} == set(state)
    assert all(a.dtype == np.float32 for a in arrays.values())
    assert np.array_equal(logits(glmlora.load_prefix(load(directory), tmp_path / "prefix")), want)
    # THUDM's way, keys with their whole names
    config = glmlora.AutoConfig.from_pretrained(tmp_path / "prefix")
    again = glmlora.AutoModel.from_pretrained(directory, config=config)
    assert all(p.requires_grad == ("prefix" in n) for n, p in again.named_parameters())
    again.transformer.prefix_encoder.load_state_dict(arrays)
    assert np.array_equal(logits(again), want)
    # a complete directory with the prefix in it
    again.save_pretrained(tmp_path / "whole")
    assert np.array_equal(logits(load(tmp_path / "whole")), want)


def test_prefixes_that_do_not_fit(directory, tmp_path):
    model = get_peft_model(load(directory), PrefixTuningConfig(num_virtual_tokens=4), seed=0)
    glmlora.save_prefix(model, tmp_path / "p")
    encoder = model.transformer.prefix_encoder
    with pytest.raises(ValueError, match="pre_seq_len is 4, but .* has 6 rows"):
        encoder.load_state_dict({"embedding.weight": np.zeros((6, 64), np.float32)})
    with pytest.raises(ValueError, match=r"embedding.weight: expected \(4, 64\), got \(4, 60\)"):
        encoder.load_state_dict({"embedding.weight": np.zeros((4, 60), np.float32)})
    projected = {"embedding.weight": np.zeros((4, 64)), "trans.0.weight": np.zeros((32, 64))}
    with pytest.raises(ValueError, match="prefix_projection is false.*with projection"):
        encoder.load_state_dict(projected)
    with pytest.raises(ValueError, match="missing embedding.weight"):
        encoder.load_state_dict({})
    config = glmlora.AutoConfig.from_pretrained(directory, pre_seq_len=6)
    other = glmlora.AutoModel.from_pretrained(directory, config=config)
    with pytest.raises(ValueError, match="pre_seq_len is 4, the model was built with 6"):
        glmlora.load_prefix(other, tmp_path / "p")
    stored = read_json(tmp_path / "p" / "config.json")
    write_json(tmp_path / "p" / "config.json", {**stored, "pre_seq_len": 5})
    plain = load(directory)
    want = logits(plain)
    with pytest.raises(ValueError, match="pre_seq_len is 5, but .* has 4 rows"):
        glmlora.load_prefix(plain, tmp_path / "p")
    assert np.array_equal(logits(plain), want)  # nothing is left half attached
    assert plain.config.pre_seq_len is None and plain.transformer.pre_seq_len is None
    with pytest.raises(ValueError, match="not a P-Tuning checkpoint"):
        glmlora.load_prefix(load(directory), directory)
    with pytest.raises(ValueError, match="no P-Tuning prefix"):
        glmlora.save_prefix(load(directory), tmp_path / "q")
    with pytest.raises(ValueError, match="num_virtual_tokens"):
        PrefixTuningConfig(num_virtual_tokens=0)


def test_a_padded_row_with_a_prefix_equals_the_row_alone(directory):
    model = get_peft_model(load(directory), PrefixTuningConfig(num_virtual_tokens=4), seed=0)
    b = batch()
    together = logits(model)
    alone = model(b["input_ids"][1:2, 4:]).logits
    assert np.array_equal(together[1, 4:], alone[0])
    with pytest.warns(UserWarning, match="neither trained nor loaded"):
        out = model.generate(b["input_ids"][:1], max_new_tokens=5, eos_token_id=[])
    again = model(out).logits[0, 8:-1].argmax(-1)
    assert np.array_equal(
        out[0, 9:], again
    )  # the cache holds the prefix, positions do not count it
