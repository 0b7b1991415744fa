"""GLM-4-9B in its original layout, whole: the vocabulary of byte pairs, prompts, tools, ends, and
every way of training and answering over a tiny model. The numbers are test_golden.py's."""

import base64
import copy
import csv
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tiny
import training
from emulator import built, needs_compiler
from hypothesis import given, settings
from hypothesis import strategies as st
from test_labels import check as check_labels
from test_workflow import ENV, run_the_documents_notebook

import glmlora
from glmlora import tell
from glmlora.families import glm4
from glmlora.files.checkpoint import write_safetensors
from glmlora.tokenization import AutoTokenizer, ChatGLMTokenizer, TextStream
from glmlora.tools.plan import plan
from glmlora.training.records import encode_records

pytest.importorskip("tiktoken", reason="GLM-4's vocabulary is read by tiktoken")

TEXTS = [
    "",
    " ",
    "你好，世界",
    "We measure\r\n\r\n proteins 12345 ",
    "é́ 👋🏽\t\t𠮷",
    "<|user|>\n[gMASK]<sop>",
]
END, USER, OBSERVATION = "<|endoftext|>", "<|user|>", "<|observation|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_glm4_dir(tmp_path_factory.mktemp("glm4"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return glmlora.AutoModel.from_pretrained(folder)


@pytest.fixture
def published(shared):
    return AutoTokenizer.from_pretrained(shared / "golden/tokenizer-glm4-tiny")


def golden(shared, name):
    return json.loads((shared / "golden" / name / "golden.json").read_text(encoding="utf-8"))


# The vocabulary


@pytest.mark.filterwarnings("error")
def test_texts_have_the_published_ids(shared, published):
    data = golden(shared, "tokenizer-glm4-tiny")
    assert len(data["cases"]) == 192
    for case in data["cases"]:
        text, ids = case["text"], case["ids"]
        assert published.encode(text, add_special_tokens=False) == ids, text
        assert published.encode(text) == [1002, 1004, *ids]
        assert published.decode(ids) == case["decoded"] == text
        assert published.convert_tokens_to_ids(published.tokenize(text)) == ids
    for case in data["decode_partial"]:
        assert published.decode(case["ids"]) == case["text"]
    assert published.special_tokens == data["special"]
    assert published.vocab_size == len(published) == len(published.get_vocab()) == 1014
    assert published.eos_token_id == published.pad_token_id == data["special"][END]
    assert published.bos_token is published.unk_token_id is None
    assert published.convert_tokens_to_ids(["<sop>", "没有", b"\xff"]) == [1004, None, 255]
    assert published.all_special_ids == list(data["special"].values())


@given(st.one_of(st.text(), st.lists(st.sampled_from(TEXTS)).map("".join)))
@settings(max_examples=60, deadline=None)
def test_text_comes_back_and_makes_no_special_token(tokenizer, text):
    if any("\ud800" <= c <= "\udfff" for c in text):
        return
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text and max(ids, default=0) < 376
    starts = tokenizer.text_offsets(text)
    for i, start in zip(ids, starts, strict=True):
        character = text[start].encode()
        assert tokenizer.convert_ids_to_tokens(i)[:1] in [character[j : j + 1] for j in range(4)]


@given(st.lists(st.integers(0, 400), max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stream_shows_whole_characters_and_ends_as_decoding_does(tokenizer, ids, skip):
    stream = TextStream(tokenizer, skip_special_tokens=skip)
    for n, i in enumerate(ids, 1):
        shown = stream.feed(i)
        assert stream.text == tokenizer.decode(ids[:n], skip_special_tokens=skip)
        assert shown in (None, stream.text) and not (shown or "").endswith("\ufffd")


def test_typed_special_tokens_are_text_unless_told(folder, tokenizer):
    telling = AutoTokenizer.from_pretrained(folder, encode_special_tokens=True)
    special = tokenizer.special_tokens
    assert telling.encode("[gMASK]<sop><|user|>a<|endoftext|>", add_special_tokens=False) == [
        *(special["[gMASK]"], special["<sop>"], special[USER], ord("a"), special[END])
    ]
    assert telling.text_ids(USER) == tokenizer.encode(USER, add_special_tokens=False)


def test_padding_pairs_and_copies(tokenizer):
    gmask, sop, end = (tokenizer.get_command(t) for t in ("[gMASK]", "<sop>", "<eos>"))
    assert tokenizer("a", "b").input_ids == [gmask, sop, ord("a"), ord("b"), end]
    batch = tokenizer(["a", "abc"], padding=True, return_tensors="np")
    short = len(tokenizer.encode("abc")) - 3
    assert batch.input_ids[0].tolist() == [end] * short + [gmask, sop, ord("a")]
    assert batch.attention_mask[0].tolist() == [0] * short + [1] * 3
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert [other.encode(t) for t in TEXTS] == [tokenizer.encode(t) for t in TEXTS]


@pytest.mark.filterwarnings("error")
def test_save_and_load(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "a")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).exists()
    assert (tmp_path / "a/tokenizer.model").read_bytes() == (
        folder / "tokenizer.model"
    ).read_bytes()
    # The vocabulary alone tells the family, and the special tokens follow it.
    (tmp_path / "b").mkdir()
    (tmp_path / "b/tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    bare = AutoTokenizer.from_pretrained(tmp_path / "b")
    bare.save_pretrained(tmp_path / "c")
    for place in ("a", "b", "c"):
        again = ChatGLMTokenizer.from_pretrained(tmp_path / place)
        assert again.family == "g4" and again.special_tokens == tokenizer.special_tokens
        assert again.pad_token == again.eos_token == END
    saved = json.loads((tmp_path / "c/tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "ChatGLM4Tokenizer" and "glmlora_family" not in saved
    assert len(saved["added_tokens_decoder"]) == 14


def test_special_tokens_are_those_that_are_listed(folder, tmp_path):
    """CodeGeeX4 has more of them; ids are the file's own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["395"] = {"content": "<|code_prefix|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    more = AutoTokenizer.from_pretrained(tmp_path)
    assert more.special_tokens == {**tokenizer.special_tokens, "<|code_prefix|>": 395}
    assert len(more) == 396 and more.decode([97, 393, 395, 98]) == "a<|code_prefix|>b"
    more.encode_special_tokens = True
    assert more.encode("a<|code_prefix|>", add_special_tokens=False) == [97, 395]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}<|user|>{{ m.content }}"
                         "{% endfor %}"])  # fmt: skip
def test_code_is_filled_in_between_tokens_that_a_message_names(folder, tmp_path, template):
    """CodeGeeX4: what stands behind, in front, and the place to go on; no other token is meant."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    names = ("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>")
    for i, name in enumerate(names, 390):
        config["added_tokens_decoder"][str(i)] = {"content": name, "special": True}
    config["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    query = "###MODE:BLOCK\n<|code_suffix|>b<|code_prefix|>a<|user|><|code_middle|>"
    ids = tokenizer.build_chat_input(query).input_ids[0].tolist()
    assert [i for i in ids if i >= 390] == [392, 390, 391]
    assert ids.count(tokenizer.get_command(USER)) == 1 and query in tokenizer.decode(ids)
    plain = AutoTokenizer.from_pretrained(folder)
    assert max(plain.build_chat_input(query).input_ids[0]) < 390  # these are text there


def lines(**changed):
    """A vocabulary of the 256 bytes, some of its lines changed."""
    found = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    for at, line in changed.items():
        found[int(at[1:])] = line
    return "\n".join(found).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lines(_7="!! 7"), "line 8: expected a new token in base64 and its rank, got '!! 7'"),
        (lines(_7="AA== 7"), "line 8: expected a new token"),
        (lines(_7="Bw== x"), "line 8: expected a new token"),
        (lines(_7="Bw== 9"), "expected ranks 0 to 255, each once"),
        (lines(_255="AAE= 255"), "no token of the byte 0xFF"),
    ],
)
def test_bad_vocabularies_are_named(tmp_path, data, message):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ([], "expected ids and tokens"),
        ({"255": {"content": "<sop>"}}, "ids from 256, behind the vocabulary, got '255': '<sop>'"),
        ({"9999999": {"content": "<sop>"}}, "behind the vocabulary"),
        ({"256": {"content": "<sop>"}, "0256": {"content": "x"}}, "behind the vocabulary"),
        ({"256": {"content": "<sop>"}}, r"has no \[gMASK\] <\|endoftext\|> <\|system\|>"),
    ],
)
def test_bad_special_tokens_are_named(tmp_path, added, message):
    (tmp_path / "tokenizer.model").write_bytes(lines())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(ValueError, match=f"added_tokens_decoder.*{message}"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_other_forms_long_blanks_and_a_missing_library(folder, tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="byte pairs .*, which GLM-4 .* have, not ChatGLM3"):
        AutoTokenizer.from_pretrained(folder, family="v3")
    (tmp_path / "g4").mkdir()
    (tmp_path / "g4/tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "g4/config.json").write_text('{"padded_vocab_size": 151552}')
    with pytest.raises(ValueError, match="git-lfs pointer"):
        AutoTokenizer.from_pretrained(tmp_path / "g4")
    with pytest.raises(ValueError, match="text: has more than 500000 blanks in a row"):
        tokenizer.encode("a" + " \t" * 500_000)
    assert len(tokenizer.text_ids("a \t" * 200_000)) > 400_000
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ImportError, match="pip install tiktoken"):
        AutoTokenizer.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(tiny.tiny_tokenizer_dir(tmp_path), family="v2")


# The same vocabulary as tokenizer.json


def in_front(name):
    parts = [{"SpecialToken": {"id": name}}, {"Sequence": {"id": "A"}}]
    return {"type": "TemplateProcessing", "single": parts}


@pytest.mark.filterwarnings("error")
def test_a_tokenizer_json_has_the_published_ids(shared, tmp_path):
    place, data = shared / "golden/tokenizer-glm4-hf-tiny", golden(shared, "tokenizer-glm4-hf-tiny")
    plain = AutoTokenizer.from_pretrained(place)
    telling = AutoTokenizer.from_pretrained(place, encode_special_tokens=True)
    assert plain.family == "g4" and plain.special_tokens == data["special"]
    assert len(data["cases"]) == 203
    for case in data["cases"]:
        text, ids = case["text"], case["ids"]
        assert telling.encode(text) == ids, text
        assert plain.encode(text) == case.get("ids_as_plain_text", ids)
        assert plain.decode(ids) == case["decoded"]
        assert plain.decode(ids, skip_special_tokens=True) == case["decoded_without_special"]
    batch = plain(data["padded"]["texts"], padding=True)
    for name in ("input_ids", "attention_mask"):
        assert batch[name] == data["padded"][name]
    for name in ("tokenizer_config.json", "tokenizer-prefix.json"):
        target = tmp_path / name.replace("-prefix", "")
        target.write_bytes((place / name).read_bytes())
    prefixed = AutoTokenizer.from_pretrained(tmp_path)
    prefixed.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved/tokenizer.json"
    assert saved.read_bytes() == (place / "tokenizer-prefix.json").read_bytes()
    assert not saved.with_name("tokenizer.model").exists()
    for tokenizer in (prefixed, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for case in data["with_prefix"]:
            assert tokenizer.encode(case["text"]) == case["ids"]
        assert (
            tokenizer(*data["pair_with_prefix"]["texts"]).input_ids
            == data["pair_with_prefix"]["ids"]
        )
        assert tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], True) == [
            *(1002, 1004, 1007, 10, 430, 1008)
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(normalizer={"type": "NFC"}), "normalizer: expected none, got"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(), "pre_tokenizer: expected the expr"),
        (lambda t: t["model"].update(type="Unigram"), "model: type: expected 'BPE', got 'Unigram'"),
        (lambda t: t["model"].update(ignore_merges=False), "ignore_merges: expected True"),
        (lambda t: t["model"].update(byte_fallback=True), "byte_fallback: expected False"),
        (lambda t: t["model"]["merges"].pop(), "merges: expected every cut .* 766 .* got 765"),
        (lambda t: t["model"]["vocab"].update({" ": 1000}), "vocab: expected bytes and an id"),
        (lambda t: t["added_tokens"].pop(4), "added_tokens: has no <sop>, which GLM-4 needs"),
        (
            lambda t: t.update(post_processor=in_front("[X]")),
            r"post_processor: '\[X\]' is not among added_tokens",
        ),
        (lambda t: t.pop("model"), "expected the fields of the tokenizers library's file"),
    ],
)
def test_other_kinds_of_tokenizer_json_are_refused(shared, tmp_path, change, message):
    fields = json.loads((shared / "golden/tokenizer-glm4-hf-tiny/tokenizer.json").read_bytes())
    change(fields)
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}"):
        AutoTokenizer.from_pretrained(tmp_path)


# Prompts


@pytest.mark.filterwarnings("error")
def test_prompts_are_the_published_template(shared, published):
    cases = golden(shared, "chat-glm4-tiny")["prompts"]["glm4_9b"]
    assert len(cases) == 24
    for case in cases:
        messages, prompt = case["messages"], case["add_generation_prompt"]
        assert published.apply_chat_template(messages, prompt, tokenize=False) == case["text"]
        ids = published.apply_chat_template(messages, prompt)
        assert published.decode(ids) == case["text"]
        if case["case"] in ("one", "system", "two_turns", "tools", "tool_round", "empty"):
            assert ids == case["ids"]  # elsewhere the text merges over seams, or types a token
    for case in golden(shared, "tokenizer-glm4-tiny")["chat"]:
        *history, last = case["messages"]
        asked = published.build_chat_input(last["content"], history, last["role"]).input_ids
        assert asked.tolist() == [case["input_ids"]]


PYTHON = "\n\n## python\n\nSend code.{% elif tool['type'] == 'cogview' %}\n\n## cogview\n\nDraw."
TEMPLATE = (
    "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\nYou are X."
    "\n\n# Tools{% set tools = item['tools'] %}{% for tool in tools %}"
    "{% if tool['type'] == 'function' %}\n\n## {{ tool['function']['name'] }}\n\n"
    "{{ tool['function'] | tojson(indent=4) }}\nUse JSON.{% elif tool['type'] == 'python' %}"
    + PYTHON
    + "{% endif %}{% endfor %}{% endif %}{% if item['content'] %}<|{{ item['role'] }}|>"
    "{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FUNCTION = {"type": "function", "function": {"name": "f", "description": "天"}}


@pytest.mark.filterwarnings("error")
def test_texts_of_tools_are_the_checkpoints(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    own = AutoTokenizer.from_pretrained(tmp_path)
    message = {"role": "user", "content": "q", "tools": [FUNCTION, {"type": "python"}]}
    assert own.apply_chat_template([message], True, tokenize=False) == (
        '[gMASK]<sop><|system|>\nYou are X.\n\n# Tools\n## f\n\n{\n    "name": "f",\n'
        '    "description": "天"\n}\nUse JSON.\n## python\n\nSend code.<|user|>\nq<|assistant|>'
    )
    text = own.apply_chat_template([message], True, tokenize=False)
    config["chat_template"] = None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.apply_chat_template([message], True, tokenize=False) == text
    for tools, error in (
        ([FUNCTION, {"type": "browser"}], r"tools\[1\]: expected"),
        ([{"type": "function"}], r"tools\[0\]: function: expected"),
        ({"type": "python"}, "tools: expected a list"),
    ):
        with pytest.raises(ValueError, match=error):
            own.apply_chat_template([{**message, "tools": tools}])
    with pytest.raises(ValueError, match=r"tools\[0\].*chat_template of tokenizer_config.json"):
        tokenizer.apply_chat_template([{**message, "tools": [{"type": "python"}]}])


# Answers

TOOLS = [{"role": "system", "content": "", "tools": [FUNCTION]}]


@pytest.mark.parametrize(
    ("text", "history", "answer"),
    [
        ("\n hi [[训练时间]]\n", [], "hi 2023年"),
        ("hi", [], "hi"),
        (
            'f\n{"city": "北京", "days": 2}',
            TOOLS,
            {"name": "f", "parameters": {"city": "北京", "days": 2}},
        ),
        ('f\n{"city": "北', TOOLS, {"name": "f", "content": '{"city": "北'}),
        ("f\n[1]", TOOLS, {"name": "f", "content": "[1]"}),
        ("f\n" + "[" * 60_000, TOOLS, {"name": "f", "content": "[" * 60_000}),
        ('f\n{"a": 1}', [], {"name": "f", "content": '{"a": 1}'}),
        ('\nlook<|assistant|>f\n{"a": 1}', TOOLS, {"name": "f", "parameters": {"a": 1}}),
    ],
)
def test_answers_and_calls_of_tools(text, history, answer):
    asked = [*history, {"role": "user", "content": "q"}]
    before = copy.deepcopy(asked)
    got, after = glm4.FAMILY.answer(text, asked)
    assert got == answer and asked == before and after[: len(asked)] == asked
    assert [m["role"] for m in after[len(asked) :]] == ["assistant"] * (1 + ("<|" in text))


def chained(folder, *texts):
    """Weights that say what follows each token: a token's own channel, and the next one's score."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = tiny.tiny_weights(config)
    ids = [tokenizer.convert_tokens_to_ids(text) for text in texts]
    names = ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight")
    embedding, output = (weights[name] for name in names)
    embedding[:, : len(ids)] = output[:, : len(ids)] = 0
    for channel, (i, following) in enumerate(zip(ids, ids[1:], strict=False)):
        embedding[i] = np.eye(32)[channel]
        output[following, channel] = 5
    for name in weights:
        if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
            weights[name] *= 0.01
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def test_the_end_of_the_original_trainers_text_is_the_familys(tokenizer):
    """Its prompts are ChatGLM2's; `<|endoftext|>`, the pad id, would be no label at all."""
    row = {"prompt": "p", "query": "", "response": "1", "history": []}
    data = encode_records([row], tokenizer, template="vendored")
    assert tokenizer.decode(data.source(0).tolist()).startswith("[gMASK]<sop>[Round 1]")
    assert data.target(0).tolist() == [*tokenizer.text_ids("1"), tokenizer.get_command(USER)]
    assert tokenizer.pad_token_id not in data.target(0)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A model that answers "1" to everything."""
    folder = tiny.tiny_glm4_dir(tmp_path_factory.mktemp("speaking"))
    return chained(folder, "<|assistant|>", "\n", "1", USER)


@pytest.mark.parametrize("end", [END, USER, OBSERVATION])
def test_each_end_ends_an_answer(tmp_path, end):
    folder = chained(
        tiny.tiny_glm4_dir(tmp_path, eos_token_id=None), "<|assistant|>", "\n", "1", end
    )
    model, tokenizer = (c.from_pretrained(folder) for c in (glmlora.AutoModel, AutoTokenizer))
    answer, history = model.chat(tokenizer, "q", do_sample=False, max_new_tokens=9)
    assert answer == "1" and history[-1] == {"role": "assistant", "metadata": "", "content": "1"}
    assert history[0] == {"role": "user", "content": "q"}


def test_a_conversation(speaking):
    model, tokenizer = (c.from_pretrained(speaking) for c in (glmlora.AutoModel, AutoTokenizer))
    *_, (answer, history) = model.stream_chat(tokenizer, "你好", [], do_sample=False)
    assert answer == "1"
    first, past = list(
        model.stream_chat(tokenizer, "你好", do_sample=False, return_past_key_values=True)
    )[-1][1:]
    assert first == history
    asked = tokenizer.build_chat_input("25 C", history, "observation").input_ids[0].tolist()
    assert model.chat(tokenizer, "25 C", history, "observation", do_sample=False)[0] == "1"
    assert model.cached_row.ids[0][: len(asked)] == asked
    later = list(
        model.stream_chat(
            *(tokenizer, "25 C", first, "observation", past),
            **dict(do_sample=False, return_past_key_values=True),
        )
    )[-1]
    assert later[2].ids[: len(asked)] == asked and later[1][-2]["role"] == "observation"
    queries = ["你好", "a" * 20, ""]
    assert model.batch_chat(tokenizer, queries, do_sample=False) == ["1"] * 3


def test_a_base_model_says_so_and_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(tell, "_told", set())
    folder = tiny.tiny_glm4_dir(tmp_path, _name_or_path="THUDM/glm-4-9b")
    model, tokenizer = (c.from_pretrained(folder) for c in (glmlora.AutoModel, AutoTokenizer))
    with pytest.warns(UserWarning, match="glm-4-9b is a base model, which continues texts"):
        model.chat(tokenizer, "q", max_new_tokens=2)
    inputs = tokenizer("def f(", return_tensors="np")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs.input_ids.shape[1]


@pytest.mark.filterwarnings("error")
def test_a_chat_model_and_a_tuned_base_do_not(tmp_path, monkeypatch, speaking):
    monkeypatch.setattr(tell, "_told", set())
    tokenizer = AutoTokenizer.from_pretrained(speaking)
    glmlora.AutoModel.from_pretrained(speaking).chat(tokenizer, "q")
    folder = tiny.tiny_glm4_dir(tmp_path, _name_or_path="THUDM/glm-4-9b")
    base = glmlora.AutoModel.from_pretrained(folder)
    tuned = glmlora.get_peft_model(base, glmlora.LoraConfig(r=2, inference_mode=True))
    tuned.chat(tokenizer, "q", max_new_tokens=2)


# Training


def test_a_record_is_the_chat_and_its_labels_are_answer_and_end(tokenizer):
    row = {
        "prompt": "判断",
        "query": "title:T",
        "response": "1 你好",
        "history": [["q", "a"], ["", "b"]],
    }
    messages = [{"role": "system", "content": "be kind"}]
    for question, answer in row["history"]:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": "判断title:T"}]
    data = encode_records([{**row, "system": "be kind"}], tokenizer)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert data.source(0).tolist() == prompt
    labels = data.target(0).tolist()
    answer = [*tokenizer.text_ids("\n"), *tokenizer.text_ids("1 你好")]
    assert labels == [*answer, tokenizer.get_command(USER)]
    # What a chat goes on from: the same text, and the end is what the next question begins with.
    messages += [{"role": "assistant", "content": "1 你好"}, {"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(messages)[: len(prompt + labels)] == prompt + labels
    cut = encode_records([{**row, "query": "title " * 90}], tokenizer, 60).source(0).tolist()
    assert len(cut) <= 60 and cut[-1] == tokenizer.get_command("<|assistant|>")
    assert "判断title" in tokenizer.decode(cut)


METHODS = {
    "lora": {"lora_target": "all"},
    "p_tuning": {"pre_seq_len": 4},
    "freeze": {"num_layer_trainable": 1},
    "full": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_training_by_every_method_and_going_on(folder, tmp_path, method):
    words = {"finetuning_type": method, "learning_rate": 5e-3, "save_steps": 5, **METHODS[method]}
    whole = training.run(str(folder), tmp_path / "a", **words)
    logged = training.losses(whole)
    assert logged[-1][1] < logged[0][1] - 0.1
    training.run(str(folder), tmp_path / "b", **words, max_steps=5, num_train_epochs=2)
    words |= {"resume_from_checkpoint": str(tmp_path / "a/checkpoint-5")}
    again = training.run(str(folder), tmp_path / "c", **words)
    assert training.losses(again) == logged


def test_a_trained_model_answers_merged_quantized_and_in_tables(folder, tmp_path, model, tokenizer):
    data = [{"instruction": f"paper {i}", "output": str(i % 2)} for i in range(4)]
    training.run(
        *(model, tmp_path / "out", data),
        **dict(lora_rank=16, lora_target="all", max_steps=60, learning_rate=2e-2, save_steps=100),
        tokenizer=tokenizer,
    )
    queries, answers = [row["instruction"] for row in data], [row["output"] for row in data]
    base = glmlora.AutoModel.from_pretrained(folder)
    tuned = glmlora.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert tuned.batch_chat(tokenizer, queries, do_sample=False, max_new_tokens=9) == answers
    weighed = check_labels(tuned, tokenizer, queries, ["0", "1", "01", "你好"])
    assert weighed.label == answers and weighed.mass.min() > 0.2
    frame = {"title": queries}
    rows = [dict(zip(frame, values, strict=True)) for values in zip(*frame.values(), strict=True)]
    table = tuned.predict_table(tokenizer, rows, "{title}", output=tmp_path / "o.csv")
    assert len(table) == 4
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as f:
        assert [row[-1] for row in csv.reader(f)][1:] == answers
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    saved = glmlora.AutoModel.from_pretrained(tmp_path / "merged")
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (saved.config.family, saved.config.eos_token_ids) == ("g4", [376, 383, 385])
    for bits in (None, 8, 4):
        if bits:
            saved = glmlora.AutoModel.from_pretrained(tmp_path / "merged").quantize(bits)
        found = saved.batch_chat(saved_tokenizer, queries, do_sample=False, max_new_tokens=9)
        assert sum(a == b for a, b in zip(found, answers, strict=True)) >= (2 if bits == 4 else 4)


def test_the_command_line_and_the_plan(speaking, tmp_path):
    (tmp_path / "t.csv").write_text("title\nHeart failure\nRouting\n")
    words = ["predict", "--model", speaking, "--input", tmp_path / "t.csv"]
    words += ["--output", tmp_path / "o.csv", "--labels", "0,1", "--template", "Medical? {title}"]
    done = subprocess.run(
        [sys.executable, "-m", "glmlora", *map(str, words)], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as f:
        assert [row[-1] for row in csv.reader(f)][1:] == ["1", "1"]
    planned = plan(speaking, 2, 64, labels=3, lora_rank=8)
    assert planned.layers == 2 and planned.total > 0


def test_the_documents_notebook_untouched(speaking, tmp_path, shared):
    """As in test_workflow.py, over this family; its last cell wants 2,000 rows."""
    run_the_documents_notebook(speaking, tmp_path, shared)


@needs_compiler
def test_on_the_emulator(speaking, folder, tokenizer, monkeypatch):
    """Answers, probabilities and losses are the processor's."""
    monkeypatch.setenv("GLMLORA_CUDA_LIBRARY", str(built()))
    model = glmlora.AutoModel.from_pretrained(speaking).to("emu")
    assert model.chat(AutoTokenizer.from_pretrained(speaking), "你好", do_sample=False)[0] == "1"
    found = []
    for device in ("cpu", "emu"):
        glmlora.set_seed(1)
        model = glmlora.AutoModel.from_pretrained(folder).to(device)
        tuned = glmlora.get_peft_model(model, glmlora.LoraConfig(r=4, target_modules="all-linear"))
        optimizer, losses = glmlora.AdamW(tuned, lr=1e-2), []
        rows = encode_records(
            [{"prompt": "p", "query": "q", "response": "1", "history": []}], tokenizer
        )
        ids = [*rows.source(0).tolist(), *rows.target(0).tolist()]
        labels = [-100] * len(rows.source(0)) + rows.target(0).tolist()
        for _ in range(3):
            losses.append(tuned.backward(input_ids=[ids], labels=[labels]))
            optimizer.step()
        found.append([*losses, *tuned.classify(tokenizer, ["a", "b"], ["0", "你好"]).proba.ravel()])
    assert np.abs(np.subtract(*found)).max() <= 1e-3 and found[0][2] < found[0][0]
