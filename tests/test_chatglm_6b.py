"""ChatGLM-6B: its numbers against NumPy in double, one published fact at a time; its prompts, which
are read in both directions, in batches and caches; its configurations, of both releases. The golden
fixtures are those of test_golden.py and test_quantization.py."""

import json
from math import erf

import numpy as np
import pytest

import glmlora
from glmlora import _core, families
from glmlora.families.context import Context, row_mask, row_positions
from glmlora.files.checkpoint import write_safetensors
from glmlora.generation import generate as generation
from glmlora.generation.cache import CachedRow
from glmlora.generation.labels import score_ids
from glmlora.model.configuration import ChatGLMConfig
from glmlora.tools.plan import plan
from glmlora.training import methods
from glmlora.training.arguments import FinetuningArguments

SOP, EOP, GMASK, MASK, PAD = 93, 94, 90, 89, 3
CONFIG = {
    "_name_or_path": "THUDM/chatglm-6b",
    "model_type": "chatglm",
    "bos_token_id": SOP,
    "eos_token_id": EOP,
    "mask_token_id": MASK,
    "gmask_token_id": GMASK,
    "pad_token_id": PAD,
    "hidden_size": 32,
    "inner_hidden_size": 48,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 64,
    "num_attention_heads": 4,
    "num_layers": 2,
    "position_encoding_2d": True,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 96,
}
NOT_IN_THE_FIRST = ("mask_token_id", "gmask_token_id", "pad_token_id")
PROMPTS = [[5, 9, 2, 44, GMASK, SOP], [17, 8, MASK, 60, 31, SOP], [7, GMASK, SOP]]
ANSWERS = [[11, 12, 30], [40], [22, 10, 9, 77]]
ROWS = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def weights(seed=0):
    rng = np.random.default_rng(seed)
    H, F, V = CONFIG["hidden_size"], CONFIG["inner_hidden_size"], CONFIG["vocab_size"]
    sizes = dict(zip(LINEARS, ((3 * H, H), (H, H), (F, H), (H, F)), strict=True))
    found = {"transformer.word_embeddings.weight": rng.normal(size=(V, H))}
    for i in range(CONFIG["num_layers"]):
        layer = f"transformer.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{norm}.weight"] = rng.normal(1, 0.2, H)
            found[f"{layer}{norm}.bias"] = rng.normal(0, 0.2, H)
        for name, (rows, columns) in sizes.items():
            found[f"{layer}{name}.weight"] = rng.normal(0, 1.5 / columns**0.5, (rows, columns))
            found[f"{layer}{name}.bias"] = rng.normal(0, 0.3, rows)
    found["transformer.final_layernorm.weight"] = rng.normal(1, 0.2, H)
    found["transformer.final_layernorm.bias"] = rng.normal(0, 0.2, H)
    found["lm_head.weight"] = rng.normal(0, 1.5 / H**0.5, (V, H))
    return {name: array.astype(np.float32) for name, array in found.items()}


def write(directory, first=False, **changes):
    directory.mkdir(exist_ok=True)
    fields = {k: v for k, v in CONFIG.items() if not (first and k in NOT_IN_THE_FIRST)}
    (directory / "config.json").write_text(json.dumps({**fields, **changes}), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", weights())
    return directory


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "base")


def load(directory, **keywords):
    return glmlora.AutoModel.from_pretrained(directory, **keywords)


def core_of(first=False, backend="ref_f64", **changes):
    fields = {k: v for k, v in CONFIG.items() if not (first and k in NOT_IN_THE_FIRST)}
    config = ChatGLMConfig(**fields)
    core = _core.Model(config.arch() | changes, backend, names=config.tensor_names)
    kind = np.float64 if backend == "ref_f64" else np.float32
    for name, array in weights().items():
        core.bind(name, array.astype(kind), "F64" if kind is np.float64 else "F32")
    return core


# ---- the published facts


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))


FACTS = {
    "alpha": 56**0.5,
    "gelu": gelu_tanh,
    "two_sided": True,
    "first_block": 1,
    "halves": True,  # pairs (j, j + quarter), not neighbours
    "round_frequencies": True,
    "by_head": True,
    "residual_after_norm": True,
    "position": None,  # of what follows the context: [gMASK]'s, else [MASK]'s
}


def logits_of(ids, facts=FACTS, positions=None):
    """The published model in NumPy and double: logits (T, V) of one row."""
    w = {name: array.astype(np.float64) for name, array in weights().items()}
    H, NH = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
    D, T, context = H // NH, len(ids), ids.index(SOP)
    place = np.arange(T)
    mask = facts["position"]
    if mask is None:
        mask = ids.index(GMASK if GMASK in ids else MASK)
    position = np.where(place < context, place, mask) if positions is None else positions
    block = np.where(place < context, 0, place - context + facts["first_block"])
    frequency = (1 / 10000.0 ** (np.arange(0, D // 2, 2) / (D // 2))).astype(np.float32)
    if facts["round_frequencies"]:
        frequency = frequency.astype(np.float16)
    frequency = frequency.astype(np.float64)

    def norm(x, name):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return y * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def rotate(x, at):  # x (T, NH, D / 2)
        angle = (at[:, None] * frequency)[:, None]
        cos, sin = np.cos(angle), np.sin(angle)
        if facts["halves"]:
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
        a, b = x[..., ::2], x[..., 1::2]
        return np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)

    def turn(x):
        one, other = np.split(x, 2, axis=-1)
        return np.concatenate([rotate(one, position), rotate(other, block)], axis=-1)

    seen = place[None] <= place[:, None]
    if facts["two_sided"]:
        seen = seen | (place[None] < context)
    x = w["transformer.word_embeddings.weight"][ids]
    for i in range(CONFIG["num_layers"]):
        layer = f"transformer.layers.{i}."
        n = norm(x, layer + "input_layernorm")
        qkv = linear(n, layer + LINEARS[0])
        if facts["by_head"]:
            q, k, v = np.split(qkv.reshape(T, NH, 3 * D), 3, axis=-1)
        else:
            q, k, v = (part.reshape(T, NH, D) for part in np.split(qkv, 3, axis=-1))
        scores = np.einsum("qhd,khd->hqk", turn(q), turn(k)) / D**0.5
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        attention = linear(np.einsum("hqk,khd->qhd", p, v).reshape(T, H), layer + LINEARS[1])
        x = facts["alpha"] * (n if facts["residual_after_norm"] else x) + attention
        n = norm(x, layer + "post_attention_layernorm")
        mlp = linear(facts["gelu"](linear(n, layer + LINEARS[2])), layer + LINEARS[3])
        x = facts["alpha"] * (n if facts["residual_after_norm"] else x) + mlp
    return norm(x, "transformer.final_layernorm") @ w["lm_head.weight"].T


def flat(rows):
    ids = np.concatenate([np.array(row, np.int32) for row in rows])
    return ids, np.array([len(row) for row in rows], np.int32)


def test_logits_are_those_of_the_published_model():
    """Three rows in one batch; one has [MASK] and no [gMASK]."""
    got, _ = core_of().forward(*flat(ROWS))
    wanted = np.concatenate([logits_of(row) for row in ROWS])
    assert np.abs(got - wanted).max() <= 1e-10 * np.abs(wanted).max()
    narrow, _ = core_of(backend="cpu").forward(*flat(ROWS))
    assert np.abs(narrow - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("fact", "otherwise"),
    [
        ("alpha", 1.0),
        ("alpha", 4**0.5),  # by the number of layers
        ("gelu", gelu_erf),
        ("two_sided", False),
        ("first_block", 0),
        ("first_block", 2),
        ("halves", False),
        ("round_frequencies", False),
        ("by_head", False),
        ("residual_after_norm", False),
        ("position", 0),
    ],
)
def test_a_wrong_fact_shows(fact, otherwise):
    """What the comparison above allows is far below what each of the facts changes."""
    right, wrong = logits_of(ROWS[0]), logits_of(ROWS[0], {**FACTS, fact: otherwise})
    assert np.abs(right - wrong).max() > 1e-7 * np.abs(right).max()


def test_sop_of_a_prompt_has_its_own_place_in_the_first_release():
    """After [gMASK] alone; what is generated stands at the mask in both."""
    core = core_of(first=True)
    got, _ = core.forward(*flat(ROWS))
    wanted = []
    for row in ROWS:
        place, context = np.arange(len(row)), row.index(SOP)
        mask = row.index(GMASK if GMASK in row else MASK)
        position = np.where(place < context, place, mask)
        if GMASK in row:
            position[context] = context
        wanted.append(logits_of(row, positions=position))
    wanted = np.concatenate(wanted)
    assert np.abs(got - wanted).max() <= 1e-10 * np.abs(wanted).max()
    cache = core.cache(3, 32, 0)
    core.extend(cache, [0, 1, 2], *flat(PROMPTS))
    after = core.extend(cache, [0, 1, 2], *flat(ANSWERS))
    ends = np.cumsum([len(row) for row in ROWS]) - 1
    assert np.abs(after - wanted[ends]).max() <= 1e-10 * np.abs(wanted).max()


def test_positions_and_mask_as_arrays():
    context = Context(SOP, GMASK, MASK)
    ids = [5, GMASK, 7, SOP, 9, SOP]
    assert row_positions(ids, context).tolist() == [[0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]]
    first = context._replace(sop_in_place=True)
    assert row_positions(ids, first)[0].tolist() == [0, 1, 2, 3, 1, 1]
    with_mask = [5, MASK, SOP, 9]
    assert row_positions(with_mask, first)[0].tolist() == [0, 1, 1, 1]
    hidden = row_mask(with_mask, context)
    assert hidden.astype(int).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="no id 93"):
        row_positions([5, GMASK], context)
    with pytest.raises(ValueError, match="neither id 90"):
        row_positions([5, SOP], context)


# ---- batches and caches


@pytest.fixture(params=["cpu", "ref_f64"])
def core(request):
    return core_of(backend=request.param)


def test_a_row_is_the_same_alone_in_a_batch_and_in_a_cache(core):
    whole, _ = core.forward(*flat(ROWS))
    parts = np.split(whole, np.cumsum([len(row) for row in ROWS])[:-1])
    for row, part in zip(ROWS, parts, strict=True):
        assert np.array_equal(core.forward(*flat([row]))[0], part)
    cache = core.cache(3, 32, 0)
    core.extend(cache, [2, 0, 1], *flat([PROMPTS[i] for i in (2, 0, 1)]))
    scores = core.extend(cache, [0, 1, 2], *flat(ANSWERS))  # several tokens at once
    for part, got in zip(parts, scores, strict=True):
        assert np.array_equal(got, part[-1])
    cache = core.cache(1, 32, 0)
    core.extend(cache, [0], *flat([PROMPTS[2]]))
    for i, token in enumerate(ANSWERS[2]):  # and one at a time
        got = core.extend(cache, [0], *flat([[token]]))
        assert np.array_equal(got[0], parts[2][len(PROMPTS[2]) + i])


def test_a_row_of_a_cache_takes_its_context_along(core):
    """Through reorder, grow and rewind; and a row that begins anew has its own."""
    cache = core.cache(3, 16, 0)
    core.extend(cache, [0, 1, 2], *flat(PROMPTS))
    cache.reorder([2, 0, 0])
    cache.grow(32)
    got = core.extend(cache, [0, 1, 2], *flat([[50], [51], [52]]))
    cache.rewind(1, len(PROMPTS[0]))
    again = core.extend(cache, [1], *flat([[53]]))
    cache.rewind(0, 0)
    new = core.extend(cache, [0], *flat([ROWS[1]]))
    rows = [PROMPTS[2] + [50], PROMPTS[0] + [51], PROMPTS[0] + [52], PROMPTS[0] + [53], ROWS[1]]
    for row, scores in zip(rows, [*got, *again, *new], strict=True):
        assert np.array_equal(core.forward(*flat([row]))[0][-1], scores)


def test_what_a_context_does_not_allow(core):
    ids, lengths = flat(ROWS)
    with pytest.raises(ValueError, match="positions: this model's follow from the ids"):
        core.forward(ids, lengths, np.zeros_like(ids))
    with pytest.raises(ValueError, match=r"row 0 has neither id 90 \(\[gMASK\]\) nor 89"):
        core.forward(*flat([[5, SOP, 7]]))
    cache = core.cache(2, 32, 0)
    with pytest.raises(ValueError, match=r"row 1 has no id 93 .* in one call"):
        core.extend(cache, [0, 1], *flat([PROMPTS[0], [5, GMASK]]))
    assert list(cache.lengths) == [0, 0]
    core.extend(cache, [0], *flat([ROWS[0]]))
    cache.rewind(0, len(PROMPTS[0]))  # up to <sop>
    with pytest.raises(ValueError, match="first 6 tokens of row 0, its context and <sop>"):
        cache.rewind(0, len(PROMPTS[0]) - 1)
    with pytest.raises(RuntimeError, match="nothing can be shared"):
        core.extend_shared(core.cache(2, 8, 4), np.array([5, 9], np.int32))


def test_callers_may_say_what_follows_from_the_ids(directory):
    """position_ids (rows, 2, tokens) and the mask that published code has, over padding on the
    left; others than those are refused."""
    model, context = load(directory), Context(SOP, GMASK, MASK)
    width = max(map(len, ROWS))
    ids = np.full((3, width), PAD)
    positions, hidden = np.zeros((3, 2, width), int), np.ones((3, 1, width, width), bool)
    for i, row in enumerate(ROWS):
        real = slice(width - len(row), width)
        ids[i, real], positions[i, :, real] = row, row_positions(row, context)
        hidden[i, 0, real, real] = row_mask(row, context)
    out = model(ids, attention_mask=hidden, position_ids=positions, labels=ids)
    plain = model(ids, attention_mask=(ids != PAD).astype(int), labels=ids)
    assert np.array_equal(out.logits, plain.logits) and out.loss == plain.loss
    for i, row in enumerate(ROWS):
        assert np.array_equal(out.logits[i, width - len(row) :], model([row]).logits[0])
    answers = model.generate(ids, attention_mask=hidden, position_ids=positions, max_new_tokens=4)
    alone = [model.generate([row], max_new_tokens=4)[0, len(row) :] for row in ROWS]
    assert np.array_equal(answers[:, width:], alone)
    one = positions.copy()
    one[1, 1, -1] += 1
    with pytest.raises(ValueError, match="position_ids: row 1 has others"):
        model(ids, attention_mask=hidden, position_ids=one)
    with pytest.raises(ValueError, match=r"position_ids: expected shape \(3, 2, 9\)"):
        model(ids, position_ids=positions[:, 0])
    causal = hidden | ~np.tri(width, dtype=bool)
    with pytest.raises(ValueError, match="attention_mask: row 0 hides others .* before id 93"):
        model(ids, attention_mask=causal)
    with pytest.raises(ValueError, match="input_ids: row 0 has no id 93"):
        model([[5, 6, 7]])


def test_nothing_is_shared_between_prompts_and_all_is_right(directory):
    """Prompts that begin alike, and a row that takes on a prompt which begins as its last did."""
    model = load(directory)
    prompts = [[5, 9, 2, 44, word, GMASK, SOP] for word in (7, 8, 9, 8)]
    found = model.generate(prompts, max_new_tokens=5)[:, 7:]
    alone = [model.generate([p], max_new_tokens=5)[0, 7:] for p in prompts]
    assert np.array_equal(found, alone)
    row = CachedRow(model, 1, 32)
    for ids in (ROWS[0], PROMPTS[0], [5, 9, 2, 7, GMASK, SOP], ROWS[0][:7], [*ROWS[0], 7, 8]):
        row.become(0, ids)
        assert np.array_equal(row.extend([0])[0], model([ids]).logits[0, -1])
    assert row.held == [len(ROWS[0]) + 2]


def test_a_long_context_is_fed_in_one_call(tmp_path, monkeypatch):
    model = load(write(tmp_path / "base"))
    monkeypatch.setattr("glmlora.generation.cache.CHUNK", 8)
    prompts = [
        [*range(10, 30), GMASK, SOP],
        PROMPTS[0],
        [*range(40, 53), MASK, SOP, *range(60, 75)],
    ]
    found = model.generate(prompts, max_new_tokens=3)
    monkeypatch.undo()
    for prompt, answer in zip(prompts, found, strict=True):
        assert answer[-3:].tolist() == model.generate([prompt], max_new_tokens=3)[0, -3:].tolist()


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "seed": 3}])
def test_beams_and_samples_fork_rows(directory, settings):
    model = load(directory)
    sampled = {"do_sample": "seed" in settings, "max_new_tokens": 4, **settings}
    together = model.generate(PROMPTS, **sampled)
    assert together.shape[0] == 3 * settings.get("num_return_sequences", 1)
    if "num_beams" not in settings:
        return
    for prompt, answer in zip(PROMPTS, together, strict=True):
        best = model.generate([prompt], **sampled)[0, len(prompt) :]
        assert np.array_equal(answer[-4:], best)


def test_the_tree_of_labels_is_brute_force(directory):
    model = load(directory)
    answers = [[11, 12, EOP], [11, 13, EOP], [40, EOP]]
    found = dict(score_ids(model, PROMPTS, answers, at_once=2))
    for number, prompt in enumerate(PROMPTS):
        for i, answer in enumerate(answers):
            scores = model([prompt + answer]).logits[0, len(prompt) - 1 : -1].astype(np.float64)
            log = scores - np.log(np.exp(scores).sum(1, keepdims=True))
            wanted = log[np.arange(len(answer)), answer].sum()
            assert abs(found[number][i] - wanted) <= 1e-5


def test_threads_change_no_bit(directory):
    threads, found = _core.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            _core.set_num_threads(n)
            model = adapted(load(directory))
            loss = model.backward(**padded_rows())
            found.append((loss, model.generate(PROMPTS, max_new_tokens=3), model.named_gradients()))
    finally:
        _core.set_num_threads(threads)
    first = found[0]
    for loss, answers, gradients in found[1:]:
        assert loss == first[0] and np.array_equal(answers, first[1])
        assert all(np.array_equal(gradients[name], first[2][name]) for name in first[2])


# ---- configuration and files


@pytest.mark.parametrize("first", [False, True])
def test_a_saved_model_is_the_same_release(tmp_path, first):
    model = load(write(tmp_path / "base", first))
    assert model.config.family == "v1" and model.config.context == (SOP, GMASK, MASK, first)
    model.save_pretrained(tmp_path / "again")
    before, after = (
        json.loads((tmp_path / d / "config.json").read_text(encoding="utf-8"))
        for d in ("base", "again")
    )
    added = {"prefix_projection", "tie_word_embeddings", "pad_token_id"}
    assert {k: v for k, v in after.items() if k in before} == before
    assert set(after) - set(before) <= added | {"mask_token_id"} - {"mask_token_id"}
    again = load(tmp_path / "again")
    assert set(again.state_dict()) == set(weights())
    assert np.array_equal(again([ROWS[0]]).logits, model([ROWS[0]]).logits)
    assert again.config.context == model.config.context


def test_defaults_are_those_of_the_published_class():
    config = ChatGLMConfig(model_type="chatglm", inner_hidden_size=16384)
    assert (config.padded_vocab_size, config.seq_length) == (150528, 2048)
    assert (config.kv_channels, config.multi_query_group_num, config.num_layers) == (128, 32, 28)
    assert config.context == (150004, 150001, 150000, True)
    assert (config.eos_token_id, config.pad_token_id) == (150005, 20003)
    later = {"vocab_size": 130528, "bos_token_id": 130004, "eos_token_id": 130005}
    later |= {"mask_token_id": 130000, "gmask_token_id": 130001, "inner_hidden_size": 16384}
    config = ChatGLMConfig(model_type="chatglm", **later)
    assert config.context == (130004, 130001, 130000, False) and config.pad_token_id == 3
    assert config.arch()["residual_scale"] == pytest.approx(56**0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_encoding_2d": False}, "position_encoding_2d False is not supported"),
        ({"quantization_embeddings": True}, "quantization_embeddings"),
        ({"hidden_size": 34}, "hidden_size 34 is no multiple of num_attention_heads 4"),
        ({"bos_token_id": 96}, "bos_token_id: expected an id from 4 to 95"),
        ({"gmask_token_id": "x"}, "gmask_token_id: expected an id"),
        ({"rope_mode": "half"}, "rope_mode: expected base"),
    ],
)
def test_fields_that_no_model_has(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path / "base", **changes))


def test_a_config_of_another_family_is_not_this_one():
    with pytest.raises(ValueError, match="family: config.json has the keys of 'v1', got 'v2'"):
        ChatGLMConfig(family="v2", **CONFIG)
    with pytest.raises(ValueError, match="family: config.json has the keys of '.*', got 'v1'"):
        ChatGLMConfig(family="v1", model_type="chatglm", ffn_hidden_size=40)
    assert families.of("v1").alias == "chatglm"


def test_frequencies_in_a_file_are_ignored(directory):
    model, extra = load(directory), weights()
    for i in range(2):
        extra[f"transformer.layers.{i}.attention.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    write_safetensors(directory / "model.safetensors", extra)
    assert np.array_equal(load(directory)(ROWS[:1]).logits, model(ROWS[:1]).logits)


# ---- training


def padded_rows():
    width = max(map(len, ROWS))
    ids = [[PAD] * (width - len(r)) + r for r in ROWS]
    mask = [[0] * (width - len(r)) + [1] * len(r) for r in ROWS]
    labels = [[-100] * (width - len(a)) + a for a in ANSWERS]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("method", ["lora", "freeze", "full", "p_tuning"])
def test_methods(directory, method):
    """Each trains what it says, and the loss falls."""
    arguments = FinetuningArguments(
        finetuning_type=method, lora_target="all", pre_seq_len=4, num_layer_trainable=1
    )
    trainee = methods.prepare(load(directory), None, arguments, method, seed=0)
    model = trainee.base
    names = model.trainable_names
    expected = {
        "lora": 2 * 4 * 2,
        "freeze": 4,  # the MLP of the last layer, with biases
        "full": len(weights()),
        "p_tuning": 1,
    }
    assert len(names) == expected[method], names
    rates = {"lora": 1e-2, "freeze": 1e-2, "full": 1e-2, "p_tuning": 3e-1}
    opt = glmlora.AdamW(model, lr=rates[method])
    losses = []
    for _ in range(12):
        losses.append(model.backward(**padded_rows()))
        opt.step()
    assert losses[-1] < 0.9 * losses[0], losses


def adapted(model, seed=3):
    config = glmlora.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    config.init_lora_weights = False
    return glmlora.get_peft_model(model, config, seed=seed)


def test_an_adapter_on_all_linears(directory, tmp_path):
    model = adapted(load(directory))
    modules = {n.split(".lora_")[0].rpartition(".layers.0.")[2] for n in model.state_dict()}
    assert set(LINEARS) <= modules
    wanted = model(**padded_rows()).logits
    model.save_pretrained(tmp_path / "adapter")
    names = glmlora.load_state_dict(tmp_path / "adapter")
    assert "base_model.model.transformer.layers.1.attention.dense.lora_A.weight" in names
    again = glmlora.PeftModel.from_pretrained(load(directory), tmp_path / "adapter")
    assert np.array_equal(again(**padded_rows()).logits, wanted)
    merged = again.merge_and_unload()
    assert np.abs(merged(**padded_rows()).logits - wanted).max() <= 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_quantized(directory, tmp_path, bits, group):
    """Trained over, saved and read again; not far from the floats."""
    model = load(directory)
    plain = model(**padded_rows()).logits
    model.quantize(bits, group_size=group)
    got = model(**padded_rows()).logits
    away = np.linalg.norm(got - plain) / np.linalg.norm(plain)
    assert 0 < away < (0.02 if bits == 8 else 0.3)
    model.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small")
    assert np.array_equal(again(**padded_rows()).logits, got)
    trained = adapted(again)
    before = trained.backward(**padded_rows())
    glmlora.AdamW(trained, lr=1e-2).step()
    assert trained.backward(**padded_rows()) < before


def test_a_nan_is_found_in_its_layer(directory):
    model = load(directory)
    name = "transformer.layers.1.mlp.dense_4h_to_h.bias"
    bias = model.core.read(name)
    bias[3] = np.inf
    model.core.bind(name, bias, "F32")
    with pytest.raises(FloatingPointError, match="layer 1 yields NaN or infinity: row 0"):
        model.generate(PROMPTS, max_new_tokens=1)


@pytest.mark.parametrize("method", ["lora", "chat"])
def test_plan_counts_what_runs(directory, method):
    planned = plan(directory, batch=2, seq=16, method=method)
    calls = planned.calls
    assert calls["layernorm_forward"] and calls["gelu_forward"] and calls["rope_2d_forward"] == 2
    assert "rmsnorm_forward" not in calls and "swiglu_forward" not in calls
    H, F, V, tokens, rows = 32, 48, 96, 32, 2
    if (
        method == "chat"
    ):  # each row has a context of 12 tokens and 4 more, the last of which is read
        linears = 2 * tokens * (2 * 3 * H * H) + 2 * (tokens + rows) * (H * H + 2 * H * F)
        pairs = rows * (12 * 12 + 13 + 14 + 15 + 16)
        assert planned.flops == linears + 2 * rows * H * V + 2 * 4 * pairs * H


def test_prompts_of_this_family_share_no_opening(directory):
    assert generation.shared_length(load(directory), [[1, 2, 3], [1, 2, 4]]) == 0
