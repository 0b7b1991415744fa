"""The whole model's gradients in double against central differences: LoRA, prefix, full; kept
and recomputed layers."""

import numpy as np
import pytest

from glmlora import _core, families
from glmlora.families.family import PLAIN_ARCH

ARCH = PLAIN_ARCH | dict(
    layers=2,
    hidden=12,
    ffn=10,
    heads=4,
    kv_heads=2,
    head_dim=6,
    vocab=23,
    max_positions=16,
    rotary_dim=4,
    eps=1e-5,
    rope_base=10000.0,
    rope_divisor=1.0,
    qkv_bias=1,
    prefix_input=2 * 2 * 2 * 6,
)
# What a family may have otherwise, and whose names those are.
KINDS = {
    "fused": ({}, families.default()),
    "split": (dict(split_qkv=1), families.of("hf")),
    "split, no bias, tied": (dict(split_qkv=1, qkv_bias=0, tied_head=1), families.of("hf")),
    "branch norms": (dict(split_qkv=1, branch_norms=1, rotary_dim=6), families.of("0414")),
    "wide heads": (
        dict(split_qkv=1, branch_norms=1, head_dim=10, prefix_input=2 * 2 * 2 * 10),
        families.of("0414"),
    ),
    "ChatGLM-6B": (
        dict(
            kv_heads=4,
            head_dim=8,
            layer_norm=1,
            linear_bias=1,
            gelu=1,
            qkv_by_head=1,
            residual_scale=2.5,
            half_rope_frequencies=1,
            prefix_input=12,
            rope_2d=1,
            sop=2,
            gmask=9,
            mask=22,
        ),
        families.of("v1"),
    ),
}
IDS = np.array([3, 7, 1, 22, 0, 5, 9, 11, 2, 8, 4, 6], np.int32)
LENGTHS = np.array([5, 1, 6], np.int32)
ROWS = np.array([2, 3, 7, 9, 10], np.int32)
TARGETS = np.array([4, 21, 0, 6, 17], np.int32)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def head_of(kind):
    return KINDS[kind][1].tensor_names["output_layer"]


def make_model(kind="fused", backend="ref_f64"):
    """A model with random weights of a size that lets every gradient be seen."""
    rng = np.random.default_rng(5)
    arch, family = KINDS[kind]
    model = _core.Model(ARCH | arch, backend, names=family.tensor_names)
    for name, shape in model.shapes().items():
        scale = 1.0 if len(shape) == 1 else 1.5 / np.sqrt(shape[1])
        model.bind(name, rng.normal(0.3 * (len(shape) == 1), scale, shape), "F64")
    return model


def add_lora(model, dropout, kind="fused", only=""):
    """LoRA of rank 3 on all linears of both layers, and of rank 4 on the output layer, or on those
    with a word in their names; the names of its weights."""
    rng = np.random.default_rng(6)
    names, head = [], head_of(kind)
    start = KINDS[kind][1].tensor_names["layer"].partition("{}")[0]
    layers = [n for n, s in model.shapes().items() if n.startswith(start) and len(s) == 2]
    modules = [*(name.removesuffix(".weight") for name in layers), head]
    for module in (module for module in modules if only in module):
        out, inp = (23, 12) if module == head else model.shape(module + ".weight")
        rank = 4 if module == head else 3
        A, B = rng.normal(0, 0.5, (rank, inp)), rng.normal(0, 0.5, (out, rank))
        model.add_lora(module, A, B, 0.7, dropout)
        names += [module + ".lora_A.weight", module + ".lora_B.weight"]
    return names


def add_prefix(model, projection, dropout, kind="fused"):
    """A P-Tuning prefix of 3 rows; the names of its weights."""
    rng = np.random.default_rng(7)
    arch, family = ARCH | KINDS[kind][0], KINDS[kind][1]
    width, hidden = 2 * arch["layers"] * arch["kv_heads"] * arch["head_dim"], arch["hidden"]
    first = arch["prefix_input"] if projection else width
    shapes = {"embedding.weight": (3, first)}
    if projection:
        shapes |= {
            "trans.0.weight": (hidden, first),
            "trans.0.bias": (hidden,),
            "trans.2.weight": (width, hidden),
            "trans.2.bias": (width,),
        }
    start = family.tensor_names["prefix_encoder"] + "."
    arrays = {start + k: rng.normal(0, 0.6, s) for k, s in shapes.items()}
    model.set_prefix(arrays, dropout)
    return list(arrays)


def loss_of(model):
    model.zero_grad()
    return model.backward(IDS, LENGTHS, ROWS, TARGETS, dropout_seed=9)


def check(model, names, picks=6):
    """Every named weight's gradient at its largest and some random entries, relative to its
    largest entry."""
    model.set_trainable(names)
    loss_of(model)
    gradients = {name: model.read(name, "grad") for name in names}
    rng = np.random.default_rng(8)
    for name, gradient in gradients.items():
        value, scale = model.read(name), np.abs(gradient).max()
        assert scale > 1e-9, f"{name}: the gradient vanishes, nothing is tested"
        flat = [int(np.abs(gradient).argmax()), *rng.integers(0, gradient.size, picks)]
        for i in flat:
            at = np.unravel_index(i, value.shape)
            slopes = []
            for h in (2e-4, 1e-4):  # Richardson: the h^2 term cancels
                ends = []
                for sign in (1, -1):
                    moved = value.copy()
                    moved[at] += sign * h
                    model.write(name, moved)
                    ends.append(loss_of(model))
                slopes.append((ends[0] - ends[1]) / (2 * h))
            model.write(name, value)
            numeric = (4 * slopes[1] - slopes[0]) / 3
            error = abs(numeric - gradient[at]) / scale
            assert error <= 1e-7, f"{name}{at}: {gradient[at]} against {numeric}, error {error:.1e}"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora(kind, dropout):
    model = make_model(kind)
    check(model, add_lora(model, dropout, kind), picks=3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora_on_query_key_value_alone(dropout):
    """Of the first layer all before MLP is one op."""
    model = make_model("fused")
    check(model, add_lora(model, dropout, only="query_key_value"))


def test_lora_on_the_output_layer_alone(kind):
    """Nothing below it trains, so backward ends above the layers."""
    model = make_model(kind)
    names = [n for n in add_lora(model, 0.3, kind) if n.startswith(head_of(kind))]
    assert len(names) == 2
    check(model, names)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["fused", "ChatGLM-6B"])
def test_prefix(kind, projection, dropout):
    model = make_model(kind)
    check(model, add_prefix(model, projection, dropout, kind))


def test_full(kind):
    model = make_model(kind)
    check(model, list(model.shapes()), picks=3)


def test_everything_at_once(kind):
    model = make_model(kind)
    names = list(model.shapes()) + add_lora(model, 0.2, kind) + add_prefix(model, True, 0.2, kind)
    check(model, names, picks=2)


def test_freeze_only_last_layer(kind):
    model = make_model(kind)
    names = [n for n in model.shapes() if ".layers.1.mlp." in n]
    check(model, names)


@pytest.mark.parametrize("part", ["k_proj", "v_proj", "post_self_attn_layernorm", "post_mlp_layer"])
def test_a_part_of_a_layer_alone(part):
    """Of queries, keys and values one trains, or one norm of a branch."""
    model = make_model("wide heads")
    names = [n for n in model.shapes() if f".0.self_attn.{part}" in n or f".0.{part}" in n]
    check(model, names)


@pytest.mark.parametrize("all_rows", [False, True])
def test_recomputed_layers_give_the_same_bits(kind, all_rows):
    """A budget of one byte recomputes every layer that may be."""
    rows = np.delete(np.arange(12, dtype=np.int32), [4, 5, 11]) if all_rows else ROWS
    targets = IDS[rows + 1] if all_rows else TARGETS
    results = []
    for budget in (0, 1):
        model = make_model(kind)
        names = add_lora(model, 0.2, kind)
        model.set_trainable(names)
        plan = model.plan(12, 3, len(rows), True, budget)
        model.reserve(12, 3, len(rows), True, budget)
        before = model.allocations
        loss = model.backward(IDS, LENGTHS, rows, targets)
        assert model.allocations == before
        results.append((plan["kept_layers"], loss, [model.read(n, "grad") for n in names]))
    assert results[0][0] > results[1][0]
    assert results[0][1] == results[1][1]
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert np.array_equal(a, b)
