"""int8 and int4 bases: what is stored, what is computed, what trains over them, what is refused."""

import json

import numpy as np
import pytest
from conftest import SHARED
from tiny import TINY_CONFIG, tiny_weights

import glmlora
from glmlora import _core
from glmlora.files.checkpoint import load_checkpoint, read_json, write_json, write_safetensors
from glmlora.files.tensor import Tensor
from glmlora.model.quantization import QuantizedTensor, quantize

FORMS = [(8, None), (4, None), (4, 32)]
QKV = "transformer.encoder.layers.0.self_attention.query_key_value.weight"
EMBEDDING = "transformer.embedding.word_embeddings.weight"
every_form = pytest.mark.parametrize(("bits", "group"), FORMS)


@pytest.fixture
def directory(tmp_path):
    """A tiny float16 model."""
    place = tmp_path / "base"
    place.mkdir()
    write_json(place / "config.json", TINY_CONFIG)
    weights = {n: w.astype(np.float16) for n, w in tiny_weights(TINY_CONFIG).items()}
    write_safetensors(place / "model.safetensors", weights)
    return place


@pytest.fixture
def base(directory):
    return glmlora.AutoModel.from_pretrained(directory)


def ids(rows=2, tokens=9):
    vocabulary = TINY_CONFIG["padded_vocab_size"]
    return np.random.default_rng(1).integers(3, vocabulary, (rows, tokens))


def dequantized(model):
    """A float model of the same values: float32 holds integer * scale exactly."""
    tensors = {name: Tensor(parameter.numpy()) for name, parameter in model.named_parameters()}
    plain = {"quantization_bit": 0, "quantization_group_size": None}
    config = glmlora.ChatGLMConfig(**{**model.config.to_dict(), **plain})
    return glmlora.model.modeling.ChatGLMForConditionalGeneration(config, tensors)


@every_form
def test_quantize_replaces_the_linears_and_nothing_else(base, bits, group):
    before = base.state_dict()
    footprint = base.get_memory_footprint()
    assert base.quantize(bits, group_size=group) is base
    state = base.state_dict()
    linears = [n for n in before if ".layers." in n and before[n].ndim == 2]
    assert len(linears) == 4 * TINY_CONFIG["num_layers"]
    assert set(state) == set(before) | {n + "_scale" for n in linears}
    for name, array in before.items():
        if name not in linears:
            assert np.array_equal(state[name], array) and state[name].dtype == array.dtype
            continue
        rows, columns = array.shape
        assert state[name].dtype == np.int8
        assert state[name].shape == (rows, columns if bits == 8 else columns // 2)
        scale = state[name + "_scale"]
        assert scale.dtype == np.float16
        assert scale.shape == ((rows, -(-columns // group)) if group else (rows,))
        value = dict(base.named_parameters())[name].numpy()
        top = np.abs(array.astype(np.float64)).max(1, keepdims=True)
        # a group has integers -8 to 7 for a largest element of either sign
        step = 1.1 * top / 7 if group else 0.56 * top / (127 if bits == 8 else 7)
        assert (np.abs(value - array) <= step).all()
    assert base.config.quantization_bit == bits
    assert base.config.quantization_group_size == group
    assert base.get_memory_footprint() < footprint
    assert dict(base.named_parameters())[QKV].dtype == f"int{bits}"
    with pytest.raises(ValueError, match=f"stored in {bits} bits"):
        base.quantize(4 if bits == 8 else 8)
    again = base.quantize(bits)
    assert again is base and base.config.quantization_bit == bits
    assert np.array_equal(base.state_dict()[QKV], state[QKV])


def test_groups_are_nearer_to_the_weights(directory):
    def error(group):
        model = glmlora.AutoModel.from_pretrained(directory)
        exact = model.read_weight(QKV)
        return np.linalg.norm(model.quantize(4, group_size=group).read_weight(QKV) - exact)

    assert error(32) < 0.9 * error(None)


@every_form
def test_arithmetic_is_that_of_the_dequantized_weights(base, bits, group):
    model = base.quantize(bits, group_size=group)
    other = dequantized(model)
    x = ids()
    assert np.abs(model(x).logits - other(x).logits).max() < 1e-5
    answers = [m.generate(x, max_new_tokens=8, eos_token_id=[]) for m in (model, other)]
    assert np.array_equal(*answers)


@every_form
def test_saved_and_loaded_again(base, tmp_path, bits, group):
    model = base.quantize(bits, group_size=group)
    model.save_pretrained(tmp_path / "saved")
    config = read_json(tmp_path / "saved" / "config.json")
    assert config["quantization_bit"] == bits
    loaded = glmlora.AutoModel.from_pretrained(tmp_path / "saved")
    assert np.array_equal(loaded(ids()).logits, model(ids()).logits)
    loaded.save_pretrained(tmp_path / "bin", safe_serialization=False)
    third = glmlora.AutoModel.from_pretrained(tmp_path / "bin")
    a, b = third.state_dict(), model.state_dict()
    assert set(a) == set(b) and all(np.array_equal(a[n], b[n]) for n in a)
    other = glmlora.AutoModel.from_pretrained(tmp_path / "saved")
    state = {n: np.array(w) for n, w in model.state_dict().items()}
    state[QKV] = state[QKV][::-1].copy()
    other.load_state_dict(state)
    assert np.array_equal(other.state_dict()[QKV], state[QKV])
    assert not np.array_equal(other(ids()).logits, model(ids()).logits)
    assert other.half() is other and other.float().dtype == "float32"
    assert np.array_equal(other.state_dict()[QKV], state[QKV])


def train_steps(model, steps=5):
    opt = glmlora.AdamW(model, lr=1e-2)
    batch = {"input_ids": ids(3, 12), "labels": ids(3, 12)}
    losses = []
    for _ in range(steps):
        losses.append(model.backward(**batch))
        opt.step()
    return np.array(losses)


@every_form
@pytest.mark.parametrize("method", ["lora", "p_tuning"])
def test_lora_and_p_tuning_train_over_it_as_over_the_same_values(directory, bits, group, method):
    losses = []
    for exact in (False, True):
        config = glmlora.ChatGLMConfig.from_pretrained(directory)
        if method == "p_tuning":
            config.pre_seq_len = 4
        glmlora.set_seed(5)
        model = glmlora.AutoModel.from_pretrained(directory, config=config)
        model.quantize(bits, group_size=group)
        if exact:
            model = dequantized(model)
        if method == "lora":
            glmlora.set_seed(5)
            targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
            model = glmlora.get_peft_model(
                model, glmlora.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
            )
        losses.append(train_steps(model))
    assert losses[0][-1] < 0.99 * losses[0][0]
    assert np.abs(losses[0] - losses[1]).max() < 1e-4


def test_what_would_change_the_integers_is_refused(base):
    model = base.quantize(8)
    with pytest.raises(RuntimeError, match="quantized and cannot be trained: use lora"):
        model.requires_grad_(True).prepare_training()
    model.requires_grad_(False)
    peft = glmlora.get_peft_model(model, glmlora.LoraConfig(r=2, target_modules=["dense"]))
    with pytest.raises(RuntimeError, match="quantized and cannot be merged into"):
        peft.merge_and_unload()
    peft(ids())  # still there and whole


def test_weights_that_are_trained_are_not_quantized(base):
    base.requires_grad_(True)
    base.prepare_training()
    with pytest.raises(RuntimeError, match="is being trained"):
        base.quantize(8)
    assert not base.config.quantization_bit


@every_form
def test_a_weight_that_is_not_finite_leaves_the_model_as_it_was(directory, bits, group):
    tensors = dict(load_checkpoint(directory))
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    bad = tensors[name].numpy().copy()
    bad[3, 1] = np.inf
    write_safetensors(
        directory / "model.safetensors", {n: t.numpy() for n, t in tensors.items()} | {name: bad}
    )
    model = glmlora.AutoModel.from_pretrained(directory)
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.dense_4h_to_h.*row 3.*not finite"):
        model.quantize(bits, group_size=group)
    after = model.state_dict()
    assert set(after) == set(before) and not model.config.quantization_bit
    assert all(np.array_equal(after[n], before[n]) for n in before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((3,), "quantization_bit: expected 0, 4 or 8, got 3"),
        (("4",), "quantization_bit: expected"),
        ((8, 32), "quantization_group_size: expected a multiple of 32 with 4 bits, got 32 with 8"),
        ((4, 33), "quantization_group_size"),
        ((4, 16), "quantization_group_size"),
    ],
)
def test_other_forms_are_refused(base, args, message):
    with pytest.raises(ValueError, match=message):
        base.quantize(args[0], group_size=args[1] if len(args) > 1 else None)


def test_files_that_are_not_what_config_says(directory, base, tmp_path):
    quantized = tmp_path / "quantized"
    base.quantize(4).save_pretrained(quantized)
    config = read_json(quantized / "config.json")

    def refused(fields, change, message):
        write_json(quantized / "config.json", {**config, **fields})
        tensors = {n: t.numpy().copy() for n, t in load_checkpoint(quantized).items()}
        kept = dict(tensors)
        change(tensors)
        write_safetensors(quantized / "model.safetensors", tensors)
        with pytest.raises(ValueError, match=message):
            glmlora.AutoModel.from_pretrained(quantized)
        write_safetensors(quantized / "model.safetensors", kept)

    refused({"quantization_bit": 8}, lambda t: None, f"{QKV}: expected I8 .64, 32.*got I8 .64, 16")
    refused({"quantization_bit": 0}, lambda t: None, "type I8.*quantization_bit 4 or 8")
    refused({"quantization_group_size": 32}, lambda t: None, f"{QKV}_scale: expected F16 .64, 1")
    refused({}, lambda t: t.pop(QKV + "_scale"), f"no {QKV}_scale")
    refused({}, lambda t: t.pop(QKV), "query_key_value.weight")
    refused({}, lambda t: t.update({QKV: np.zeros((64, 32), np.float16)}), "type F16.*quantize")
    refused(
        {},
        lambda t: t.update({QKV + "_scale": np.full(64, np.nan, np.float16)}),
        f"{QKV}_scale: a scale is not finite",
    )
    write_json(quantized / "config.json", config)
    assert glmlora.AutoModel.from_pretrained(quantized).config.quantization_bit == 4
    write_json(directory / "config.json", {**TINY_CONFIG, "quantization_bit": 8})
    with pytest.raises(ValueError, match="type F16, but config.json says quantization_bit 8"):
        glmlora.AutoModel.from_pretrained(directory)


def test_scales_of_other_types_are_read(base, tmp_path):
    base.quantize(8).save_pretrained(tmp_path)
    tensors = {n: t.numpy().copy() for n, t in load_checkpoint(tmp_path).items()}
    wide = {n: w.astype(np.float32) if n.endswith("_scale") else w for n, w in tensors.items()}
    write_safetensors(tmp_path / "model.safetensors", wide)
    loaded = glmlora.AutoModel.from_pretrained(tmp_path)
    assert np.array_equal(loaded(ids()).logits, base(ids()).logits)


def test_load_in_bits(directory):
    eight = glmlora.AutoModel.from_pretrained(directory, load_in_8bit=True)
    assert eight.config.quantization_bit == 8 and eight.stored_dtype(QKV) == "I8"
    four = glmlora.AutoModel.from_pretrained(directory, load_in_4bit=True, torch_dtype="float32")
    assert four.config.quantization_group_size == 32
    assert four.stored_dtype(QKV) == "I4" and four.stored_dtype(EMBEDDING) == "F32"
    with pytest.raises(ValueError, match="load_in_8bit, load_in_4bit"):
        glmlora.AutoModel.from_pretrained(directory, load_in_8bit=True, load_in_4bit=True)


def test_the_core_refuses_what_it_cannot_read(base):
    core = base.core
    integers, scale = _core.quantize(np.ones((64, 32), np.float16), "F16", 8)
    for args, message in (
        ((QKV, integers, "I8"), "integers without scales"),
        ((QKV, integers, "I8", scale[:3]), "scale: expected 64 rows of 1, got 3"),
        ((QKV, integers, "I8", np.tile(scale[:, None], (1, 1)), 32), "group: expected"),
        ((QKV, integers, "I4", scale), r"expected shape \(64, 32\), got rank 2, \(64, 64\)"),
        ((EMBEDDING, integers, "I8", scale), "expected shape|only linear layers"),
    ):
        with pytest.raises(ValueError, match=message):
            core.bind(*args)
    with pytest.raises(ValueError, match="bits: expected 8 or 4, got 5"):
        _core.quantize(np.ones((2, 2), np.float32), "F32", 5)
    with pytest.raises(ValueError, match="even number"):
        _core.quantize(np.ones((2, 3), np.float32), "F32", 4)
    with pytest.raises(ValueError, match="no conversion of numbers"):
        _core.convert(integers, "I8", "F32")
    base(ids())


def test_numpy_of_a_quantized_tensor():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 70)).astype(np.float32)
    for bits, group in FORMS:
        t = quantize("w", Tensor(w), bits, group or 0)
        assert isinstance(t, QuantizedTensor) and t.shape == (5, 70) and t.nbytes > 0
        error = np.abs(t.numpy() - w).max()
        assert error < np.abs(w).max() * (0.005 if bits == 8 else 0.1)


# The published layout: golden fixtures

GOLDEN = SHARED / "golden"


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is not part of the project")
@pytest.mark.parametrize(
    ("name", "base_name", "bits"),
    [
        ("chatglm2-tiny-int8", "chatglm2-tiny-bin", 8),
        ("chatglm2-tiny-int4", "chatglm2-tiny-bin", 4),
        ("chatglm-v1-tiny-int4", "chatglm-v1-tiny", 4),
    ],
)
def test_golden(name, base_name, bits, tmp_path):
    place = GOLDEN / name
    arrays = np.load(place / "golden.npz")
    info = json.loads((place / "golden.json").read_text(encoding="utf-8"))["arrays"]
    model = glmlora.AutoModel.from_pretrained(place)

    def check(name, got):
        worst = np.abs(np.asarray(got, np.float64) - arrays[name]).max()
        assert worst <= (info[name].get("atol") or 0), f"{name}: off by {worst}"

    parameters = dict(model.named_parameters())
    for name in arrays.files:
        kind, _, weight = name.partition("/")
        if kind == "dequantised":
            check(name, parameters[weight].numpy())
        if kind == "integers":
            tensor = model._stored[weight]
            ones = Tensor(np.ones(tensor.shape[0], np.float16))
            check(name, QuantizedTensor(tensor.integers, ones, bits).numpy())
    base = glmlora.AutoModel.from_pretrained(GOLDEN / base_name).quantize(bits)
    ours, theirs = base.state_dict(), model.state_dict()
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[n], theirs[n]) for n in ours)  # bit for bit
    names = ("input_ids", "attention_mask", "position_ids", "labels")
    batch = {n: arrays["batch/" + n] for n in names}
    out = model(**batch)
    check("logits", out.logits)
    check("loss", out.loss)
    prompt, steps = arrays["greedy/prompt_ids"], arrays["greedy/tokens"].shape[1]
    answer = model.generate(prompt, max_new_tokens=steps, eos_token_id=[])
    assert np.array_equal(answer[:, prompt.shape[1] :], arrays["greedy/tokens"])
    prefix = "lora/adapter/"
    tensors = {n[len(prefix) :]: arrays[n] for n in arrays.files if n.startswith(prefix)}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 32.0}
    write_json(adapter / "adapter_config.json", {**config, "target_modules": ["query_key_value"]})
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    peft = glmlora.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    check("lora/logits", peft(**batch).logits)
    check("lora/loss", peft.backward(**batch))
    found = peft.named_gradients()
    wanted = {n for n in arrays.files if n.startswith("lora/grad/")}
    assert {"lora/grad/" + n for n in found} == wanted
    for name, got in found.items():
        check("lora/grad/" + name, got)
