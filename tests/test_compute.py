"""The type of the large products: chosen, named, overridden; close to float32."""

import os
import warnings

import numpy as np
import pytest

from glmlora import AutoModel, LoraConfig, _core, get_peft_model, train
from glmlora.model.configuration import ChatGLMConfig
from glmlora.model.device import BFLOAT16_SETS, compute_dtype
from glmlora.tools.project import tiny_directory

HAS = bool(set(BFLOAT16_SETS) & set(_core.cpu_variants().split(",")))
USED = os.environ.get("GLMLORA_ISA") or _core.cpu_variants().split(",")[0]
fast = pytest.mark.skipif(
    not HAS or USED not in BFLOAT16_SETS, reason="this processor has no bfloat16 products"
)


@pytest.mark.parametrize("isa", _core.cpu_variants().split(","))
def test_the_sets_with_bfloat16_are_those_of_the_core(isa):
    config = ChatGLMConfig.from_pretrained(tiny_directory())
    try:
        _core.Model(config.arch(), f"cpu:{isa}/bfloat16", names=config.tensor_names)
    except ValueError:
        assert isa not in BFLOAT16_SETS
    else:
        assert isa in BFLOAT16_SETS


def test_auto_is_bfloat16_where_it_is_fast_and_the_weights_are_narrow(monkeypatch):
    monkeypatch.delenv("GLMLORA_COMPUTE_DTYPE")
    monkeypatch.delenv("GLMLORA_ISA", raising=False)
    narrow = "bfloat16" if HAS else "int16"
    assert compute_dtype("auto", {"I4"}) == narrow
    assert compute_dtype(None, {"F16", "F32"}) == ("bfloat16" if HAS else "float32")
    assert compute_dtype(None, {"F32"}) == compute_dtype("float32", {"F16"}) == "float32"
    monkeypatch.setenv("GLMLORA_ISA", "generic")
    assert compute_dtype(None, {"F16"}) == "float32"
    with pytest.raises(ValueError, match="this processor does not multiply bfloat16"):
        compute_dtype("bfloat16", {"F16"})
    assert compute_dtype("int8", {"I8"}) == "int8"  # every set has bytes
    with pytest.raises(ValueError, match="bfloat16, int16, int8, got 'half'"):
        compute_dtype("half", {"F16"})


@fast
def test_a_cast_to_float32_ends_narrow_products_and_half_brings_them_back(monkeypatch, capsys):
    monkeypatch.delenv("GLMLORA_COMPUTE_DTYPE")
    model = AutoModel.from_pretrained(tiny_directory())
    assert model.compute_dtype == "bfloat16"
    ids = np.arange(3, 60)[None]
    narrow = model(input_ids=ids).logits
    wide = model.float()(input_ids=ids).logits
    assert model.compute_dtype == "float32"
    assert (model.half()(input_ids=ids).logits == narrow).all()
    assert not (narrow == wide).all()
    exact = AutoModel.from_pretrained(tiny_directory(), compute_dtype="float32")
    assert np.allclose(exact(input_ids=ids).logits, wide, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "bits", "group"),
    [
        *(pytest.param("bfloat16", bits, group, marks=fast) for bits, group in ((0, 0), (4, 32))),
        *(("int8", bits, group) for bits, group in ((8, 0), (4, 0), (4, 32))),
    ],
)
def test_losses_and_gradients_are_near_those_of_float32(kind, bits, group):
    rng, found = np.random.default_rng(0), {}
    ids = rng.integers(3, 500, (3, 90))
    labels = np.full_like(ids, -100)
    labels[:, -8:] = ids[:, -8:]
    for name in ("float32", kind):
        model = AutoModel.from_pretrained(tiny_directory(), compute_dtype=name)
        if bits:
            model.quantize(bits, group_size=group)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["query_key_value"]))
        first = np.random.default_rng(1)
        core = model.base_model.core
        for lora in core.names():
            if "lora" in lora:
                core.write(lora, first.normal(0, 0.02, core.shape(lora)).astype(np.float32))
        loss = model.backward(input_ids=ids, attention_mask=np.ones_like(ids), labels=labels)
        found[name] = loss, model.named_gradients()
    (want, exact), (got, near) = found["float32"], found[kind]
    assert got != want and abs(got - want) < 0.02 * abs(want)
    for key, gradient in exact.items():
        error = np.linalg.norm(near[key] - gradient) / np.linalg.norm(gradient)
        assert error < (0.05 if kind == "bfloat16" else 0.12), key


@pytest.mark.parametrize(
    ("kind", "bits"), [pytest.param("bfloat16", 0, marks=fast), ("int8", 8), ("int8", 4)]
)
def test_a_row_answers_alike_alone_and_in_a_batch(kind, bits):
    model = AutoModel.from_pretrained(tiny_directory(), compute_dtype=kind)
    if bits:
        model.quantize(bits, group_size=32 if bits == 4 else 0)
    rng = np.random.default_rng(3)
    rows = [rng.integers(3, 500, n).tolist() for n in (5, 40, 17, 60, 33)]
    together = model(input_ids=np.array([rows[1], [*rows[1][:39], 7]])).logits[0]
    assert (model(input_ids=np.array([rows[1]])).logits[0] == together).all()


@fast
def test_layers_kept_and_layers_recomputed_have_the_same_gradients():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 500, (2, 40))
    flat, rows = ids.astype(np.int32).ravel(), np.arange(30, 79, 4, dtype=np.int32)
    found, kept = [], []
    for budget in (1, 1 << 40):
        model = AutoModel.from_pretrained(tiny_directory(), compute_dtype="bfloat16")
        config = LoraConfig(r=4, target_modules=["query_key_value", "dense_4h_to_h"])
        model = get_peft_model(model, config)
        core, first = model.base_model.core, np.random.default_rng(1)
        for lora in core.names():
            if "lora" in lora:
                core.write(lora, first.normal(0, 0.02, core.shape(lora)).astype(np.float32))
        core.set_trainable([n for n in core.names() if "lora" in n])
        core.reserve(80, 2, len(rows), True, budget)
        kept.append(core.plan(80, 2, len(rows), True, budget)["kept_layers"])
        core.backward(flat, np.array([40, 40], np.int32), rows, flat[rows + 1])
        found.append(model.named_gradients())
    assert kept[0] < kept[1] == model.config.num_layers
    assert found[0].keys() == found[1].keys() and len(found[0]) > 0
    for name, gradient in found[0].items():
        assert gradient.any() and (gradient == found[1][name]).all(), name


@pytest.mark.parametrize(("bits", "told"), [(None, True), (4, False), (8, False)])
def test_int8_products_over_another_base_are_told(bits, told, tmp_path, monkeypatch):
    """16 bits have none, in training and in chats."""
    monkeypatch.setattr("glmlora.tell._told", set())
    rows = [{"instruction": "a", "output": "b"}]
    settings = {"output_dir": tmp_path, "max_steps": 1, "disable_tqdm": True, "plot_loss": False}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = train(
            tiny_directory(), rows, compute_dtype="int8", quantization_bit=bits, **settings
        )
        train(result.model, rows, **settings)
        texts = [str(w.message) for w in said if "compute_dtype 'int8' has no effect" in str(w)]
    assert len(texts) == told
    monkeypatch.setattr("glmlora.tell._told", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result.model.generate([[5, 9]], max_new_tokens=1)
    assert any("compute_dtype 'int8' has no effect" in str(w.message) for w in said) == told
    if bits is None:
        result.model.base_model.quantize(4)
        monkeypatch.setattr("glmlora.tell._told", set())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result.model.generate([[5, 9]], max_new_tokens=1)
