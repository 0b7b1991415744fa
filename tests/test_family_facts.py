"""One wrong fact of a family at a time, planted on purpose, must fail the golden check that names
the family: what test_golden.py and the tests of prompts would say to it. A family's facts stand in
`FACTS` and `TEXTS`; ChatGLM-6B's belong there, too."""

import json

import numpy as np
import pytest
from conftest import SHARED

import glmlora
from glmlora import families
from glmlora.files.checkpoint import write_safetensors
from glmlora.tokenization import AutoTokenizer, ChatGLMTokenizer

GOLDEN = SHARED / "golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared/golden is absent: it is not part of the project"
)


def names_of(config):
    return config.tensor_names, range(config.num_layers)


# Facts of the architecture: what the core is told


def told(**changes):
    """The core is told something else."""

    def plant(monkeypatch, family, place, tmp_path):
        real = type(family).arch

        def arch(self, config):
            found = real(self, config)
            return found | {k: v(found[k]) for k, v in changes.items()}

        monkeypatch.setattr(type(family), "arch", arch)
        return place

    return plant


# Facts of the weights: what is done with them


def changed(change):
    """Another checkpoint in place of this one; change(state, config) changes its tensors."""

    def plant(monkeypatch, family, place, tmp_path):
        config = glmlora.AutoConfig.from_pretrained(place)
        state = {n: np.array(a) for n, a in glmlora.AutoModel.from_pretrained(place)
                 .float().state_dict().items()}  # fmt: skip
        change(state, config)
        (tmp_path / "config.json").write_bytes((place / "config.json").read_bytes())
        arrays = {n: np.ascontiguousarray(a, np.float32) for n, a in state.items()}
        write_safetensors(tmp_path / "model.safetensors", arrays)
        return tmp_path

    return plant


def halves(state, config):
    """Pairs (j, j + n/2) turn, in place of neighbours: rows of queries and keys change places."""
    arch = config.arch()
    size, wide = arch["rotary_dim"], arch["head_dim"]
    order = np.arange(wide)
    order[:size:2], order[1:size:2] = np.arange(size // 2), np.arange(size // 2, size)
    heads = arch["heads"], arch["kv_heads"]
    names, layers = names_of(config)
    for layer in layers:
        for part in ("weight", "bias"):
            if "query" in names:
                for key, n in zip(("query", "key"), heads, strict=True):
                    turn(state, f"{names['layer'].format(layer)}.{names[key]}.{part}", n, order)
            else:
                one = f"{names['layer'].format(layer)}.{names['query_key_value']}.{part}"
                turn(state, one, sum(heads), order)


def turn(state, name, heads, order):
    if name in state:
        rows = state[name][: heads * len(order)].reshape(heads, len(order), -1)[:, order]
        state[name][: heads * len(order)] = rows.reshape(-1, *state[name].shape[1:])


def without_norm(norm):
    def change(state, config):
        names, layers = names_of(config)
        for layer in layers:
            state[f"{names['layer'].format(layer)}.{names[norm]}.weight"][:] = 1

    return change


def without_bias(state, config):
    for name in state:
        if name.endswith(".bias"):
            state[name][:] = 0


def half_of_mlp_swapped(state, config):
    """The other half of the first linear is the gate."""
    names, layers = names_of(config)
    for layer in layers:
        name = f"{names['layer'].format(layer)}.{names['dense_h_to_4h']}.weight"
        state[name] = np.concatenate(np.split(state[name], 2)[::-1])


BRANCH_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")


def without_branch_norms(monkeypatch, family, place, tmp_path):
    def change(state, config):
        for name in [n for n in state if any(norm in n for norm in BRANCH_NORMS)]:
            del state[name]

    place = changed(change)(monkeypatch, family, place, tmp_path)
    names = {k: v for k, v in family.tensor_names.items() if k not in BRANCH_NORMS}
    monkeypatch.setattr(type(family), "tensor_names", names)
    return place


def head_apart(monkeypatch, family, place, tmp_path):
    """A head of its own, as a checkpoint without one would get it."""

    def change(state, config):
        shape = state["model.embed_tokens.weight"].shape
        state["lm_head.weight"] = np.random.default_rng(0).normal(0, 0.02, shape)

    place = changed(change)(monkeypatch, family, place, tmp_path)
    fields = json.loads((place / "config.json").read_text())
    fields |= {"tie_word_embeddings": False, "glmlora_family": family.name}
    (place / "config.json").write_text(json.dumps(fields))
    return place


EVERY = {
    "the rotary base": told(rope_base=lambda base: 2 * base),
    "halves for neighbours": changed(halves),
    "a norm left out": changed(without_norm("post_attention_layernorm")),
    "the gate": changed(half_of_mlp_swapped),
}
EPS = {"the eps": told(eps=lambda eps: 1e-5 if eps < 1e-6 else 1e-6)}
BIAS = {"the bias": changed(without_bias)}
SHARE = {"the rotary share": told(rotary_dim=lambda size: size // 2)}
BRANCHES = {"norms of branches": without_branch_norms}
FACTS = {  # fixture: (family, its facts)
    "chatglm2-tiny": ("v2", {**EVERY, **BIAS, **SHARE}),  # its eps does not show: see its README
    "codegeex2-tiny": ("v2", {**EVERY, **BIAS}),
    "chatglm2-32k-tiny": ("v2", {"positions": told(rope_divisor=lambda ratio: 1.0)}),
    "chatglm3-tiny": ("v3", {**EVERY, **BIAS, **SHARE, **EPS}),
    "glm4-9b-tiny": ("g4", {**EVERY, **BIAS, **SHARE, **EPS}),
    "hf-glm-tiny": ("hf", {**EVERY, **BIAS, **SHARE, **EPS}),
    "glm-edge-tiny": ("edge", {**EVERY, **SHARE, **EPS, "the tied head": head_apart}),
    "glm4-0414-tiny": ("0414", {**EVERY, **BIAS, **SHARE, **EPS, **BRANCHES}),
    "glm4-32b-0414-tiny": ("0414", {**EVERY, **SHARE, **EPS, **BRANCHES}),
}


def off(place, fixture):
    """How far the logits of a fixture's row are from the golden ones, in parts of `atol`."""
    z = np.load(GOLDEN / fixture / "golden.npz")
    info = json.loads((GOLDEN / fixture / "golden.json").read_text(encoding="utf-8"))
    ids = z["single/input_ids"]
    model = glmlora.AutoModel.from_pretrained(place).float()
    got = model(ids, attention_mask=np.ones_like(ids)).logits
    worst = np.abs(got - z["single/logits"]).max()
    return float(worst / info["arrays"]["single/logits"]["atol"])


@pytest.mark.parametrize("fixture", FACTS)
def test_the_facts_of_a_family_are_right(fixture):
    assert glmlora.AutoConfig.from_pretrained(GOLDEN / fixture).family == FACTS[fixture][0]
    assert off(GOLDEN / fixture, fixture) <= 1


@pytest.mark.parametrize(
    ("family", "fixture", "fact"),
    [(family, fixture, fact) for fixture, (family, facts) in FACTS.items() for fact in facts],
)
def test_a_wrong_fact_is_noticed(monkeypatch, tmp_path, family, fixture, fact):
    plant = FACTS[fixture][1][fact]
    place = plant(monkeypatch, families.of(family), GOLDEN / fixture, tmp_path)
    assert off(place, fixture) > 3, f"{family}: nobody notices another {fact}"


# Facts of the text: prompts and ends

PIECES, PAIRS = "tokenizer-chatglm2", "tokenizer-glm4-hf-tiny"
TEXTS = {  # family: its vocabulary, and the golden prompts
    "v2": (PIECES, "golden.json"),
    "v3": (PIECES, "golden-chatglm3.json"),
    "g4": ("tokenizer-glm4-tiny", "glm4_9b"),
    "hf": (PAIRS, "glm4_9b"),
    "0414": (PAIRS, "glm4_0414"),
    "z1": (PAIRS, "glm_z1"),
    "edge": (PAIRS, "glm_edge"),
}
ENDS = {"v2": {"</s>"}, "v3": {"</s>", "<|user|>", "<|observation|>"}}
LATER_ENDS = {"<|endoftext|>", "<|user|>", "<|observation|>"}


def prompts(name):
    """(query, history, ids) of a family's golden prompts that a chat asks."""
    folder, file = TEXTS[name]
    if folder == PIECES:
        data = json.loads((GOLDEN / folder / file).read_text(encoding="utf-8"))
        cases = data["prompts"] if name == "v2" else data["chat"]
        return [(c["query"], c["history"], c["input_ids"]) for c in cases[:2]]
    data = json.loads((GOLDEN / "chat-glm4-tiny/golden.json").read_text(encoding="utf-8"))
    cases = [
        c
        for c in data["prompts"][file]
        if c["case"] in ("one", "two_turns") and c["add_generation_prompt"]
    ]
    return [(c["messages"][-1]["content"], c["messages"][:-1], c["ids"]) for c in cases]


def text_is_right(name):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / TEXTS[name][0], family=name)
    family = families.of(name)
    for query, history, ids in prompts(name):
        if family.chat_ids(tokenizer, query, history, "user") != ids:
            return False
    ends = {str(tokenizer.convert_ids_to_tokens(i)) for i in family.end_ids(tokenizer, [])}
    return ends == ENDS.get(name, LATER_ENDS)


@pytest.fixture(params=TEXTS)
def name(request):
    if request.param not in ENDS:
        pytest.importorskip("tiktoken", reason="this vocabulary is read by tiktoken")
    return request.param


def test_the_text_of_a_family_is_right(name):
    assert text_is_right(name)


def test_a_wrong_newline_is_noticed(name, monkeypatch):
    real = ChatGLMTokenizer.text_ids
    monkeypatch.setattr(
        ChatGLMTokenizer, "text_ids", lambda t, text: real(t, text.replace("\n", "", 1))
    )
    assert not text_is_right(name), f"{name}: nobody notices a newline that is missing"


def test_a_wrong_end_is_noticed(name, monkeypatch):
    if name == "v2":
        monkeypatch.setattr(type(families.of(name)), "end_tokens", ("eop",))
    else:
        monkeypatch.setattr(type(families.of(name)), "end_tokens", ("<|user|>",))
    assert not text_is_right(name), f"{name}: nobody notices another end"


def test_another_opening_is_noticed(name, monkeypatch):
    family = type(families.of(name))
    if name == "edge":
        monkeypatch.setattr(family, "prefix_tokens", ("[gMASK]", "<sop>"))
    else:
        monkeypatch.setattr(family, "prefix_tokens", family.prefix_tokens[:1])
    assert not text_is_right(name), f"{name}: nobody notices another prefix"
