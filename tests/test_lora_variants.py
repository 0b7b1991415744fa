"""What adapters carry beside A and B: DoRA, lora_bias, modules_to_save, PiSSA and OLoRA.

test_exchange_variants.py holds their numbers to those of peft, where that is installed.
"""

import json

import numpy as np
import pytest
from test_layouts import IDS, write
from tiny import tiny_model_dir
from training import model_dir, records, run

import glmlora
from glmlora import LoraConfig, PeftModel, get_peft_model
from glmlora.files.checkpoint import write_safetensors
from glmlora.model.parameters import is_lora
from glmlora.tools.optable import Dropout, ops_of

QKV = "transformer.encoder.layers.{}.self_attention.query_key_value"
HEAD, EMBEDDING = "transformer.output_layer", "transformer.embedding.word_embeddings"
SAVED = {"modules_to_save": ["output_layer", "word_embeddings"]}
VARIANTS = {
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "bias": {"lora_bias": True},
    "saved": SAVED,
    "dora saved": {"use_dora": True, "target_modules": ["dense"], **SAVED},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", "target_modules": ["dense", "dense_4h_to_h"]},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture
def directory(tmp_path):
    return tiny_model_dir(tmp_path)


def load(directory):
    return glmlora.AutoModel.from_pretrained(directory)


def adapted(model, variant, seed=1, **more):
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, **VARIANTS[variant], **more), seed=seed
    )


def trained(model, steps=3):
    optimizer = glmlora.AdamW(model, lr=1e-2)
    for _ in range(steps):
        model.backward(IDS, labels=IDS)
        optimizer.step()
    return model


def logits(model):
    return model(IDS).logits


def same_weights(a, b):
    """Of the base, without an adapter's."""
    for name, array in a.state_dict().items():
        if not is_lora(name):
            assert np.array_equal(array, b.state_dict()[name]), name


@variants
def test_it_begins_as_the_base_and_comes_back_from_its_files(directory, tmp_path, variant):
    base = load(directory)
    before = logits(base)
    model = adapted(base, variant)
    assert np.abs(logits(model) - before).max() < 2e-5
    trained(model)
    wanted = logits(model)
    assert np.abs(wanted - before).max() > 0.02
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(config[key] == LoraConfig(**VARIANTS[variant]).__dict__[key] for key in
               VARIANTS[variant] if key != "target_modules")  # fmt: skip
    again = PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    exact = variant not in ("pissa", "olora")  # whose base is computed again
    assert np.abs(logits(again) - wanted).max() <= (0 if exact else 1e-5)
    merged = again.merge_and_unload(safe_merge=True)
    assert np.abs(logits(merged) - wanted).max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert np.array_equal(logits(load(tmp_path / "merged")), logits(merged))


@variants
def test_the_base_comes_back(directory, tmp_path, variant):
    model = trained(adapted(load(directory), variant))
    wanted, values = logits(model), model.state_dict()
    with model.disable_adapter():
        assert np.array_equal(logits(model), logits(load(directory)))
        assert all(np.array_equal(a, values[n]) for n, a in model.state_dict().items())
    assert np.array_equal(logits(model), wanted)
    model.backward(IDS, labels=IDS)  # its moments are still there
    base = model.unload()
    same_weights(base, load(directory))
    assert np.array_equal(logits(base), logits(load(directory)))


@variants
def test_one_of_several(directory, variant):
    """Each has base weights of its own, and none is left with another's."""
    model = trained(adapted(load(directory), variant))
    first = logits(model)
    model.add_adapter("plain", LoraConfig(r=2), seed=3)
    model.set_adapter("plain")
    assert np.array_equal(logits(model), logits(load(directory)))
    model.add_adapter("other", LoraConfig(r=2, **VARIANTS[variant]), seed=4)
    model.set_adapter("other")
    assert np.abs(logits(model) - logits(load(directory))).max() < 2e-5
    model.set_adapter("default")
    assert np.array_equal(logits(model), first)
    state = model.adapter_state("default")
    model.set_adapter_state("default", {n: 2 * a for n, a in state.items()})
    assert np.abs(logits(model) - first).max() > 0.01
    model.set_adapter_state("default", state)
    assert np.array_equal(logits(model), first)


@variants
def test_what_is_trained(directory, variant):
    model = adapted(load(directory), variant)
    names = set(model.trainable_names)
    ends = {name.rpartition(".lora_")[2] for name in names if is_lora(name)}
    assert ("magnitude_vector" in ends) == ("dora" in variant)
    assert ("B.bias" in ends) == (variant == "bias")
    whole = {f"{HEAD}.weight", f"{EMBEDDING}.weight"} if "saved" in variant else set()
    assert {name for name in names if not is_lora(name)} == whole
    before = {n: model.core.read(n) for n in model.core.names()}
    trained(model, 1)
    for name, value in before.items():
        changed = not np.array_equal(model.core.read(name), value)
        assert changed == (name in names and not name.endswith("lora_A.weight")) or (
            variant in ("pissa", "olora") and name in names
        ), name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("variant", ["dora", "bias", "dora saved"])
def test_over_a_quantized_base(directory, variant, bits):
    model = load(directory).quantize(bits)
    before = logits(model)
    model = adapted(model, variant)
    assert np.abs(logits(model) - before).max() < 2e-5
    trained(model)
    assert np.abs(logits(model) - before).max() > 0.02
    with pytest.raises(RuntimeError, match="quantized and cannot be merged into"):
        model.merge_and_unload()
    assert np.array_equal(logits(model.unload()), before)


def test_pissa_needs_float_weights(directory):
    with pytest.raises(ValueError, match=r"'pissa': .*query_key_value.weight is quantized"):
        adapted(load(directory).quantize(8), "pissa")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@variants
def test_over_a_base_of_16_bits(directory, tmp_path, variant, dtype):
    """What is trained is float32; a merged weight has the base's type."""
    base = load(directory).to(dtype)
    model = trained(adapted(base, variant))
    assert model.dtype == dtype
    merged = model.merge_and_unload()
    kinds = {merged.stored_dtype(n) for n in merged.base_names() if len(merged.core.shape(n)) == 2}
    assert kinds == {{"float16": "F16", "bfloat16": "BF16"}[dtype]}
    merged.save_pretrained(tmp_path / "merged")
    assert load(tmp_path / "merged").dtype == dtype


def test_dora_is_equation_5(directory):
    """m (W + s B A) / |W + s B A|, row by row, as one matrix in place of all."""
    model = trained(adapted(load(directory), "dora"))
    wanted, other = logits(model), load(directory)
    for module, (_, scale) in (
        LoraConfig(**VARIANTS["dora"], r=4, lora_alpha=8).targets(other).items()
    ):
        A, B, m = (model.core.read(f"{module}.lora_{p}") for p in
                   ("A.weight", "B.weight", "magnitude_vector"))  # fmt: skip
        V = other.core.read(module + ".weight").astype(np.float64) + scale * B @ A
        V *= (m / np.linalg.norm(V, axis=1))[:, None]
        other.load_state_dict({module + ".weight": V.astype(np.float32)}, strict=False)
    assert np.abs(logits(other) - wanted).max() < 1e-5


def test_a_bias_is_scaled_and_merged_into_one(directory):
    model = adapted(load(directory), "bias")
    name = QKV.format(1)
    model.core.write(name + ".lora_B.bias", np.full(64, 0.25, np.float32))
    wanted, other = logits(model), load(directory)
    bias = other.core.read(name + ".bias") + 2 * 0.25  # alpha / r
    other.load_state_dict({name + ".bias": bias}, strict=False)
    assert np.abs(logits(other) - wanted).max() < 1e-6
    same_weights(model.merge_and_unload(), other)


def test_a_bias_without_one_in_the_base_is_not_merged(directory):
    model = adapted(load(directory), "bias", target_modules=["dense"])
    with pytest.raises(RuntimeError, match=r"dense\.lora_B\.bias cannot be merged: .* has no bias"):
        model.merge_and_unload()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("variant", ["dora", "bias", "dora saved"])
def test_recomputed_layers_and_split_batches_give_the_same_gradients(directory, variant, dropout):
    def gradients(parts, budget=None):
        model = adapted(load(directory), variant, lora_dropout=dropout).train()
        model.get_base_model().dropout_seed = 5
        trained(model, 1)
        if budget is not None:
            model.core.reserve(16, 2, 16, True, budget)
        for rows in parts:
            model.backward(IDS[rows], labels=IDS[rows])
        return model.named_gradients()

    whole = gradients([slice(0, 2)])
    for other in (gradients([slice(0, 1), slice(1, 2)]), gradients([slice(0, 2)], budget=1)):
        for name, gradient in whole.items():
            assert np.abs(other[name] - gradient).max() <= 2e-6 * np.abs(gradient).max(), name
            assert np.abs(gradient).max() > 0, name


def test_tokens_of_a_cache_meet_the_same_adapter(directory):
    model = trained(adapted(load(directory), "dora saved"))
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": []}
    found = model.generate(IDS, **options)
    for length in range(IDS.shape[1], found.shape[1]):
        mask = np.ones((2, length), int)
        last = model(found[:, :length], attention_mask=mask).logits[:, -1]
        assert np.array_equal(last.argmax(-1), found[:, length])


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_8", "olora"])
def test_what_is_taken_out_of_the_base(directory, how):
    """The largest part that so few ranks can have; or the first columns of Q."""
    base = load(directory)
    name, before = QKV.format(0) + ".weight", base.state_dict()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, init_lora_weights=how), seed=1)
    A, B = (model.core.read(QKV.format(0) + f".lora_{p}.weight") for p in "AB")
    W = before[name].astype(np.float64)
    assert np.abs(base.core.read(name) + 2 * B @ A - W).max() < 1e-5
    if how == "olora":
        assert np.abs(B.T @ B - np.eye(4)).max() < 1e-5 and np.abs(np.tril(A, -1)).max() < 1e-6
        return
    singular = np.linalg.svd(W, compute_uv=False)
    rest = np.linalg.svd(base.core.read(name), compute_uv=False)
    near = 1e-5 if how == "pissa" else 0.05
    assert np.abs(rest[: len(singular) - 4] - singular[4:]).max() < near * singular[0]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_converted_adapter_is_plain_lora_over_the_base(directory, tmp_path, how, rslora):
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=how, use_rslora=rslora)
    model = get_peft_model(load(directory), config, seed=1)
    model.save_pretrained(tmp_path / "begun")
    wanted = logits(trained(model))
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "begun"
    )
    plain = PeftModel.from_pretrained(load(directory), tmp_path / "plain")
    assert plain.peft_config["default"].init_lora_weights is True
    assert plain.peft_config["default"].r == 8
    assert np.abs(logits(plain) - wanted).max() < 1e-5
    other = adapted(load(directory), "dora")
    for of, message in ((model, "nowhere: found neither"), (other, "init_lora_weights True")):
        with pytest.raises(ValueError, match=message):
            of.save_pretrained(
                tmp_path / "x", path_initial_model_for_weight_conversion=tmp_path / "nowhere"
            )


def test_a_randomised_beginning_is_told_when_it_is_read(directory, tmp_path):
    config = LoraConfig(r=4, init_lora_weights="pissa_niter_4")
    get_peft_model(load(directory), config, seed=1).save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="'pissa_niter_4'.*only nearly"):
        PeftModel.from_pretrained(load(directory), tmp_path / "a")


@pytest.mark.parametrize("named", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_modules_is_not_saved_alone(tmp_path, named):
    base = write(tmp_path / "base", "tied")
    with pytest.raises(ValueError, match=f"{named}: in this model model.embed_tokens and lm_head"):
        get_peft_model(load(base), LoraConfig(target_modules=["q_proj"], modules_to_save=[named]))


def test_tied_modules_are_saved_as_both(tmp_path):
    base = write(tmp_path / "base", "tied")
    words = ["embed_tokens", "lm_head"]
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=words)
    model = trained(get_peft_model(load(base), config, seed=0))
    model.save_pretrained(tmp_path / "a")
    stored = glmlora.load_state_dict(tmp_path / "a")
    head, embedding = (f"base_model.model.{n}.weight" for n in ("lm_head", "model.embed_tokens"))
    assert np.array_equal(stored[head], stored[embedding])
    again = PeftModel.from_pretrained(load(base), tmp_path / "a")
    assert np.array_equal(logits(again), logits(model))
    stored[head] = stored[head] + 1
    write_safetensors(tmp_path / "a" / "adapter_model.safetensors", stored)
    with pytest.raises(ValueError, match="differ, but they are one weight of this model"):
        PeftModel.from_pretrained(load(base), tmp_path / "a")


def test_embeddings_that_peft_wrote_beside_an_adapter_must_be_the_bases(tmp_path):
    base = write(tmp_path / "base")
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(load(base), config, seed=0)
    model.save_pretrained(tmp_path / "a")
    stored = glmlora.load_state_dict(tmp_path / "a")
    head = load(base).core.read("lm_head.weight")
    for name in ("lm_head.base_layer", "model.embed_tokens"):
        own = head if name.startswith("lm") else load(base).core.read(name + ".weight")
        for change, fits in ((own, True), (own + 1, False), (own[:-2], False)):
            added = {f"base_model.model.{name}.weight": np.ascontiguousarray(change)}
            write_safetensors(tmp_path / "a" / "adapter_model.safetensors", stored | added)
            if fits:
                again = PeftModel.from_pretrained(load(base), tmp_path / "a")
                assert np.array_equal(logits(again), logits(model))
                continue
            with pytest.raises(ValueError, match="weight of the base that it was trained on"):
                PeftModel.from_pretrained(load(base), tmp_path / "a")


@pytest.mark.parametrize("variant", ["dora", "saved", "bias"])
def test_names_that_wrappers_and_adapters_give(directory, tmp_path, variant):
    """As torch's state_dict() has them, with the base's beside those that are saved whole."""
    model = trained(adapted(load(directory), variant))
    model.save_pretrained(tmp_path / "a")
    renamed = {}
    for name, array in glmlora.load_state_dict(tmp_path / "a").items():
        if name.endswith("magnitude_vector"):
            renamed[name + ".default.weight"] = array
        elif ".lora_" in name:
            head, _, tail = name.rpartition(".")
            renamed[f"{head}.default.{tail}"] = array
        else:
            module = name.removesuffix(".weight")
            renamed[f"{module}.modules_to_save.default.weight"] = array
            renamed[f"{module}.original_module.weight"] = array + 1
    write_safetensors(tmp_path / "a" / "adapter_model.safetensors", renamed)
    again = PeftModel.from_pretrained(load(directory), tmp_path / "a")
    assert np.array_equal(logits(again), logits(model))


def test_magnitudes_and_biases_have_the_rate_of_B(directory):
    """As PEFT's LoRA+ has it: what is no A, and what is saved whole has the plain rate."""
    steps = []
    for ratio in (1, 8):
        model = adapted(load(directory), "dora saved")
        before = {n: model.core.read(n) for n in model.trainable_names}
        optimizer = glmlora.AdamW(model, lr=1e-3, loraplus_lr_ratio=ratio)
        model.backward(IDS, labels=IDS)
        optimizer.step()
        steps.append({n: model.core.read(n) - a for n, a in before.items()})
    for name, step in steps[0].items():
        times = 8 if name.endswith(("lora_B.weight", "magnitude_vector")) else 1
        assert np.allclose(steps[1][name], times * step, atol=2e-6), name


def test_several_with_weights_of_their_own_are_not_merged(directory):
    model = adapted(load(directory), "saved")
    model.add_adapter("other", LoraConfig(r=2), seed=2)
    with pytest.raises(ValueError, match="'default' has base weights of its own"):
        model.merge_and_unload(adapter_names=["default", "other"])


@pytest.mark.parametrize("way", ["to one", "to three"])
@pytest.mark.parametrize("variant", ["dora", "bias", "saved", "dora saved"])
def test_an_adapter_of_the_other_layout(tmp_path, way, variant):
    fused = tiny_model_dir(tmp_path, _name_or_path="THUDM/glm-4-9b", glmlora_family="g4")
    one, other = fused, write(tmp_path / "split")
    settings = {**VARIANTS[variant], "target_modules": "all-linear"}
    if way == "to one":
        one, other = other, one
    if "saved" in variant and way == "to one":
        settings["modules_to_save"] = ["lm_head", "embed_tokens", "input_layernorm"]
    elif "saved" in variant:
        settings["modules_to_save"] = [*SAVED["modules_to_save"], "input_layernorm"]
    model = trained(get_peft_model(load(one), LoraConfig(r=4, **settings), seed=1))
    wanted = logits(model)
    assert np.abs(wanted - logits(load(one))).max() > 0.02
    model.save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="taken for the same linears"):
        brought = PeftModel.from_pretrained(load(other), tmp_path / "a")
    assert np.abs(logits(brought) - wanted).max() < 1e-4
    brought.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(load(other), tmp_path / "b")
    assert np.array_equal(logits(again), logits(brought))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "no magnitudes of key, value"),
        ({"init_lora_weights": "pissa", "target_modules": ["q_proj"]}, "'pissa' took a part"),
        ({"target_modules": ["o_proj"], "modules_to_save": ["k_proj"]}, "'glm' alone"),
    ],
)
def test_what_is_not_brought_from_the_other_layout(tmp_path, settings, message):
    fused = tiny_model_dir(tmp_path, _name_or_path="THUDM/glm-4-9b", glmlora_family="g4")
    model = get_peft_model(load(write(tmp_path / "split")), LoraConfig(**settings), seed=1)
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(load(fused), tmp_path / "a")


# Training by flags, and NEFTune


def test_flags_of_training_reach_the_adapter(tmp_path):
    result = run(
        model_dir(tmp_path),
        tmp_path / "out",
        records(4),
        max_steps=2,
        use_dora=True,
        init_lora_weights="gaussian",
        modules_to_save="output_layer,word_embeddings",
    )
    config = result.model.peft_config["default"]
    assert config.use_dora and config.init_lora_weights == "gaussian"
    stored = glmlora.load_state_dict(tmp_path / "out")
    assert {f"base_model.model.{n}.weight" for n in (HEAD, EMBEDDING)} < set(stored)
    assert sum(n.endswith("lora_magnitude_vector") for n in stored) == 2
    again = PeftModel.from_pretrained(load(tmp_path / "tiny-model"), tmp_path / "out")
    assert np.array_equal(logits(again), logits(result.model))


def test_what_the_original_does_not_know_is_written_only_where_it_is_used(tmp_path):
    run(model_dir(tmp_path), tmp_path / "out", records(4), max_steps=1)
    written = json.loads((tmp_path / "out" / "finetuning_args.json").read_text())
    assert not {"use_dora", "init_lora_weights", "modules_to_save"} & set(written)


def test_noise_follows_seed_update_row_and_position(directory):
    """So 2 x 1, 1 x 2 and a resumed run have the same; not where nobody trains."""

    def gradients(parts, alpha=5.0, seed=3, training=True, steps=0):
        model = get_peft_model(load(directory), LoraConfig(r=4, init_lora_weights=False), seed=1)
        base = model.train(training).get_base_model()
        base.dropout_seed, base.neftune_noise_alpha = seed, alpha
        base.prepare_training()
        model.core.steps = steps
        losses = [model.backward(IDS[rows], labels=IDS[rows]) for rows in parts]
        return np.mean(losses), model.named_gradients()

    whole, split = [slice(0, 2)], [slice(0, 1), slice(1, 2)]
    loss, wanted = gradients(whole)
    apart, found = gradients(split)
    assert apart == pytest.approx(loss, rel=1e-6)
    for name, gradient in wanted.items():
        assert np.abs(found[name] - gradient).max() <= 2e-6 * np.abs(gradient).max(), name
    plain, _ = gradients(whole, alpha=None)
    for change in ({"alpha": None}, {"seed": 4}, {"steps": 1}, {"alpha": 6.0}):
        assert abs(gradients(whole, **change)[0] - loss) > 1e-4
    assert gradients(whole, training=False)[0] == plain
    assert np.abs(gradients([slice(1, 2)], alpha=None)[0] - gradients([slice(1, 2)])[0]) > 1e-4


@pytest.mark.parametrize("budget", [None, 1])
def test_noise_is_that_of_the_paper(directory, budget):
    """alpha / sqrt(L H) times numbers in [-1, 1), in both passes: as embeddings that have it."""
    ids, H = np.arange(3, 19).reshape(2, 8), 32
    rows = np.repeat([0, 1], 8)
    draw = Dropout(0, rows, np.tile(np.arange(8), 2), seed=5, site=2**32 - 1)
    drawn = np.zeros((16, H), np.float32)
    ops_of("cpu").noise(drawn, 16, H, 7 / (8 * H) ** 0.5, draw)
    base = load(directory).core.read(f"{EMBEDDING}.weight")
    base[ids.ravel()] += drawn
    found = []
    for noise in (True, False):
        model = load(directory)
        if not noise:
            model.load_state_dict({f"{EMBEDDING}.weight": base}, strict=False)
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False), seed=1).train()
        model.get_base_model().dropout_seed = 5
        model.get_base_model().neftune_noise_alpha = 7.0 if noise else None
        model.get_base_model().prepare_training()
        if budget:
            model.core.reserve(16, 2, 16, True, budget)
        found.append((model.backward(ids, labels=ids), model.named_gradients()))
    (loss, gradients), (wanted, others) = found
    assert loss == pytest.approx(wanted, rel=1e-6)
    for name, gradient in gradients.items():
        assert np.abs(others[name] - gradient).max() <= 1e-5 * np.abs(gradient).max(), name


@pytest.mark.parametrize("alpha", [-1.0, float("nan")])
def test_a_size_that_is_none_is_refused(directory, alpha):
    model = get_peft_model(load(directory), LoraConfig()).train()
    model.get_base_model().neftune_noise_alpha = alpha
    with pytest.raises(ValueError, match="noise: expected 0"):
        model.backward(IDS, labels=IDS)
