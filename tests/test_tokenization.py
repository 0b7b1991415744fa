"""The tokenizers against ids of the published ones, and their properties on a small vocabulary."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer_dir

from glmlora import tell
from glmlora.interrupts import interruptible
from glmlora.tokenization import Array, AutoTokenizer, BatchEncoding, ChatGLMTokenizer, TextStream


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    return tiny_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.fixture(scope="session")
def tiny3(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir, family="chatglm3")


@pytest.fixture
def real(shared):
    return AutoTokenizer.from_pretrained(shared / "golden/tokenizer-chatglm2")


@pytest.fixture
def real3(shared):
    return AutoTokenizer.from_pretrained(shared / "golden/tokenizer-chatglm2", family="v3")


def golden(shared, name="golden.json"):
    return json.loads((shared / "golden/tokenizer-chatglm2" / name).read_text(encoding="utf-8"))


# Against the published tokenizers


def check_cases(tokenizer, cases):
    assert len(cases) > 100
    for case in cases:
        text = case["text"]
        assert tokenizer.encode(text, add_special_tokens=False) == case["ids"], text
        assert tokenizer.encode(text) == case["ids_with_special"], text
        assert tokenizer.decode(case["ids"]) == case["decoded"], text
        assert tokenizer.decode(case["ids_with_special"]) == case["decoded_with_special"], text
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == case["ids"], text


def test_chatglm2_cases(shared, real):
    data = golden(shared)
    check_cases(real, data["cases"])
    for case in data["decode_cases"]:
        assert real.decode(case["ids"]) == case["text"]
        assert real.decode(case["ids"], skip_special_tokens=True) == case["text_skip_special"]
        tokens = real.convert_ids_to_tokens(case["ids"])
        assert real.convert_tokens_to_string(tokens) == case["text"]
        assert real.convert_tokens_to_ids(tokens) == case["ids"]


def test_chatglm3_cases(shared, real3):
    data = golden(shared, "golden-chatglm3.json")
    check_cases(real3, data["cases"])
    for case in data["decode_cases"]:
        assert real3.decode(case["ids"]) == case["text"]
        assert (
            real3.convert_tokens_to_string(real3.convert_ids_to_tokens(case["ids"]))
            == (case["text"])
        )
    assert real3.decode([64790, 64792, 64795, 30910, 30939], skip_special_tokens=True) == "1"


def test_chatglm3_recognises_roles_only_when_told(shared, real3):
    folder = shared / "golden/tokenizer-chatglm2"
    telling = AutoTokenizer.from_pretrained(folder, family="v3", encode_special_tokens=True)
    for case in golden(shared, "golden-chatglm3.json")["encode_special"]:
        assert telling.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
    assert max(real3.encode("<|user|>", add_special_tokens=False)) < 64789
    assert telling.text_ids("<|user|>") == real3.text_ids("<|user|>")


def test_special_ids(shared, real, real3):
    for tokenizer, name in ((real, "golden.json"), (real3, "golden-chatglm3.json")):
        for token, i in golden(shared, name)["special"].items():
            if token == "vocab_size":
                assert tokenizer.vocab_size == len(tokenizer) == len(tokenizer.get_vocab()) == i
            elif token in ("bos", "eos", "pad"):
                assert getattr(tokenizer, f"{token}_token_id") == tokenizer.get_command(
                    f"<{token}>"
                )
                assert tokenizer.get_command(f"<{token}>") == i
            elif token in tokenizer.special_tokens:
                assert tokenizer.get_command(token) == tokenizer.convert_tokens_to_ids(token) == i
                assert tokenizer.convert_ids_to_tokens(i) == token
                assert tokenizer.get_vocab()[token] == i
    assert real.get_prefix_tokens() == [64790, 64792]
    with pytest.raises(ValueError, match="bogus"):
        real.get_command("bogus")


def test_vectors(shared, real, real3):
    vectors = json.loads((shared / "spec/vectors.json").read_text(encoding="utf-8"))
    for case in vectors["encode"]:
        assert real.encode(case["text"], add_special_tokens=False) == case["ids"]
        assert real.decode(case["ids"]) == case["decoded"]
    for case in vectors["decode"]:
        assert real.decode(case["ids"]) == case["text"]
    for case in vectors["decode_v3"]:
        assert real3.decode(case["ids"]) == case["text"]


def test_padding_as_published(shared, real):
    for case in golden(shared)["padding"]:
        fields = ("input_ids", "attention_mask", "position_ids")
        for kind in ("np", "pt"):
            batch = real(case["texts"], padding=True, return_tensors=kind)
            assert set(batch) == set(fields)
            for name in fields:
                assert isinstance(batch[name], Array)
                assert batch[name].dtype == np.int64
                assert batch[name].tolist() == case[name]
        rows = [real(text) for text in case["texts"]]
        assert dict(real.pad(rows)) == {name: case[name] for name in fields}
        assert dict(real.pad(real(case["texts"]))) == {name: case[name] for name in fields}


def test_family_is_found(shared, tmp_path):
    def found(name, tokenizer_config=None, config=None):
        folder = tiny_tokenizer_dir(tmp_path / name)
        if tokenizer_config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return AutoTokenizer.from_pretrained(folder).family

    assert found("a") == "v2"
    assert found("b", {"added_tokens_decoder": {"64795": {"content": "<|user|>"}}}) == "v3"
    assert found("c", {"chat_template": "...<|assistant|>"}) == "v3"
    assert found("d", {"name_or_path": "THUDM/chatglm3-6b"}) == "v3"
    assert found("e", None, {"model_type": "chatglm", "_name_or_path": "x/chatglm3-6b"}) == "v3"
    assert found("f", None, {"model_type": "chatglm", "_name_or_path": "x/chatglm2-6b"}) == "v2"
    assert found("chatglm3-6b", {"name_or_path": "THUDM/chatglm2-6b"}) == "v2"
    assert AutoTokenizer.from_pretrained(tmp_path / "b", family="chatglm2").family == "v2"


# Calls


def test_encode_adds_specials_and_truncates(tiny):
    gmask, sop = tiny.get_prefix_tokens()
    ids = tiny.encode("title of a paper", add_special_tokens=False)
    assert tiny.encode("title of a paper") == [gmask, sop, *ids]
    cut = tiny("title of a paper", truncation=True, max_length=4)
    assert cut.input_ids == [gmask, sop, *ids[:2]]
    assert cut["position_ids"] == [0, 1, 2, 3] and cut.attention_mask == [1] * 4
    assert tiny.encode("title of a paper", max_length=4) == cut.input_ids
    assert tiny.encode("title of a paper", max_length=4, truncation=False) == [gmask, sop, *ids]
    assert tiny.encode("title of a paper", truncation=True) == [gmask, sop, *ids]
    assert tiny.encode("title of a paper", return_tensors="pt").shape == (1, len(ids) + 2)
    with pytest.raises(ValueError, match="max_length"):
        tiny.encode("a", max_length=1)


def test_pairs(tiny):
    a, b = tiny.text_ids("title of a graph algorithm"), tiny.text_ids("paper")
    prefix = tiny.get_prefix_tokens()
    assert tiny.build_inputs_with_special_tokens(a, b) == [*prefix, *a, *b, 2]
    assert tiny("title of a graph algorithm", "paper").input_ids == [*prefix, *a, *b, 2]
    assert tiny.num_special_tokens_to_add() == 2 and tiny.num_special_tokens_to_add(pair=True) == 3
    n = len(a) + len(b) + 2
    assert tiny("title of a graph algorithm", "paper", max_length=n).input_ids == [
        *prefix,
        *a[:-1],
        *b,
        2,
    ]
    assert len(tiny("title of a graph algorithm", "paper", max_length=5).input_ids) == 5


def test_padding_on_the_left(tiny):
    batch = tiny(["a", "title of"], padding="max_length", max_length=9, return_tensors="np")
    assert batch.input_ids.shape == (2, 9)
    n = len(tiny.encode("a"))
    assert batch.input_ids[0].tolist() == [0] * (9 - n) + tiny.encode("a")
    assert batch.position_ids[0].tolist() == [0] * (9 - n) + list(range(n))
    assert batch.attention_mask[0].tolist() == [0] * (9 - n) + [1] * n
    assert "attention_mask" not in tiny("a", return_attention_mask=False)
    with pytest.raises(ValueError, match="padding=True"):
        tiny(["a", "title of"], return_tensors="np")
    with pytest.raises(ValueError, match="max_length"):
        tiny("a", padding="max_length")
    with pytest.raises(ValueError, match="padding_side"):
        tiny.padding_side = "right"
    with pytest.raises(ValueError, match="labels"):
        tiny.pad([{"input_ids": [1], "labels": [1]}])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda t: t(5), TypeError, "text"),
        (lambda t: t(["a", None]), TypeError, r"text\[1\]"),
        (lambda t: t("a", return_tensors="tf"), ValueError, "return_tensors"),
        (lambda t: t("a", padding="right"), ValueError, "padding"),
        (lambda t: t("a", truncation="no"), ValueError, "truncation"),
        (lambda t: t("a", truncation=True, max_length="8"), ValueError, "max_length: .*whole"),
        (lambda t: t.encode("x\ud800"), ValueError, "character 1 is a lone surrogate"),
        (lambda t: t.decode([5, -1]), ValueError, r"ids\[1\].*-1"),
        (lambda t: t.decode([5, 1.5]), ValueError, r"ids\[1\].*1.5"),
        (lambda t: t.decode(None), ValueError, "None"),
        (lambda t: t.decode([[5]]), ValueError, r"ids\[0\]"),
        (lambda t: t.decode(np.zeros((2, 2), int)), ValueError, "batch_decode"),
    ],
)
def test_wrong_arguments(tiny, call, error, match):
    with pytest.raises(error, match=match):
        call(tiny)


def test_array_and_encoding_stand_in_for_tensors(tiny):
    batch = tiny(["a", "a"], return_tensors="pt")
    assert isinstance(batch, BatchEncoding) and batch.to("cuda") is batch
    ids = batch.input_ids
    assert ids.to("cuda:0") is ids and ids.cuda() is ids and ids.cpu() is ids
    assert ids.size() == ids.shape == (2, ids.size(1)) and ids.size == 2 * ids.size(1)
    assert type(ids.numpy()) is np.ndarray and len(ids) == 2 and ids[0, 0] == ids[0][0]
    assert "Array" in repr(ids) and ids.mean() > 0 and tiny.decode(ids[0]) == "a"
    assert tiny.batch_decode(ids) == ["a", "a"]
    assert list({**batch}) == ["input_ids", "attention_mask", "position_ids"]
    assert pickle.loads(pickle.dumps(batch)).input_ids.tolist() == ids.tolist()
    with pytest.raises(AttributeError, match="labels"):
        _ = batch.labels


def test_ids_tokens_and_pairs_are_texts(tiny, tiny3):
    a, b, prefix = tiny.text_ids("title of"), tiny.text_ids("paper"), tiny.get_prefix_tokens()
    assert tiny.encode(a) == tiny.encode(np.array(a)) == tiny.encode("title of") == [*prefix, *a]
    assert tiny.encode(tiny.convert_ids_to_tokens(a)) == [*prefix, *a]
    assert tiny.encode_plus("title of", "paper").input_ids == [*prefix, *a, *b, 2]
    assert tiny.prepare_for_model(a, b).input_ids == [*prefix, *a, *b, 2]
    assert tiny.encode_plus("paper", return_tensors="pt").input_ids.shape == (1, len(b) + 2)
    for batch in (["title of", "paper"], [a, b], ("title of", b)):
        found = tiny.batch_encode_plus(batch, padding=True, return_tensors="np")
        assert found.input_ids.tolist() == tiny(["title of", "paper"], padding=True).input_ids
    assert tiny.batch_encode_plus([("title of", "paper")]).input_ids == [[*prefix, *a, *b, 2]]
    assert tiny([("title of", "paper")]).input_ids == [[*prefix, *a, *b, 2]]
    both = tiny("title of", text_target="paper", max_length=9, truncation=True)
    assert both.input_ids == [*prefix, *a] and both.labels == [*prefix, *b]
    assert tiny(text_target=["paper"]).input_ids == [[*prefix, *b]]
    assert tiny.tokenize("paper", add_special_tokens=True)[:2] == ["[gMASK]", "sop"]
    message = tiny3.build_single_message("system", "", "paper")
    assert message == [tiny3.get_command("<|system|>"), *tiny3.text_ids("\n"), *b]
    with pytest.raises(ValueError, match="no messages"):
        tiny.build_single_message("system", "", "paper")


def test_settings_of_truncation_and_padding(tiny_dir):
    tiny = AutoTokenizer.from_pretrained(tiny_dir, truncation_side="left", model_max_length=5)
    a, b = tiny.text_ids("title of a paper"), tiny.text_ids("paper")
    prefix = tiny.get_prefix_tokens()
    assert tiny("title of a paper", truncation=True).input_ids == [*prefix, *a[-3:]]
    assert tiny("a", padding="max_length").input_ids == [0] * 2 + tiny.encode("a")
    pair = tiny("title of a paper", "paper", truncation="only_first", max_length=4 + len(b))
    assert pair.input_ids == [*prefix, a[-1], *b, 2]
    tiny.truncation_side, tiny.model_max_length = "right", None
    pair = tiny("title of", "a paper", truncation="only_second", max_length=4 + len(a[:3]))
    assert pair.input_ids[-1] == 2 and pair.input_ids[2:].count(a[0]) == 1
    rows = tiny(["a", "title of a paper"], padding=True, pad_to_multiple_of=8).input_ids
    assert {len(row) for row in rows} == {8 * -(-len(tiny.encode("title of a paper")) // 8)}
    assert len(tiny.pad({"input_ids": [[5], [6, 7]]}, pad_to_multiple_of=4).input_ids[0]) == 4
    with pytest.raises(ValueError, match="only_first.*no room"):
        tiny("a", "title of a paper", truncation="only_first", max_length=5)


@pytest.fixture
def anew(monkeypatch):
    """What is told once is told again."""
    monkeypatch.setattr(tell, "_told", set())


def test_what_is_not_cut_is_told(tiny_dir, anew):
    tiny = AutoTokenizer.from_pretrained(tiny_dir)
    with pytest.warns(UserWarning, match="neither max_length nor .* model_max_length") as found:
        tiny("title", truncation=True)
    tiny.model_max_length = 4
    with pytest.warns(UserWarning, match="ids, more than its model_max_length 4") as later:
        tiny("title of a paper")
    assert [w.filename for w in (*found, *later)] == [__file__] * 2


OPTIONS = {
    **dict(stride=3, is_split_into_words=True, padding_side="right", return_length=True),
    **dict(return_token_type_ids=True, return_overflowing_tokens=True),
    **dict(return_special_tokens_mask=True, return_offsets_mapping=True),
    **dict(split_special_tokens=True, prepend_batch_axis=True, tokenizer_kwargs={"a": 1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_refused_where_they_would_change_something(tiny, name):
    neutral = "left" if name == "padding_side" else None
    for call in (
        tiny,
        tiny.encode,
        tiny.encode_plus,
        lambda t, **o: tiny.batch_encode_plus([t], **o),
    ):
        call("a", **{name: neutral}, verbose=False)
        with pytest.raises(ValueError, match=f"{name}: is not supported"):
            call("a", **{name: OPTIONS[name]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t("a", retrun_tensors="pt"), "'retrun_tensors'.*'return_tensors'"),
        (lambda t: t.encode("a", add_special_token=True), "encode.*'add_special_tokens'"),
        (lambda t: t.batch_encode_plus(["a"], paddin=True), "batch_encode_plus.*'padding'"),
        (lambda t: t.decode([5], skip_special_token=True), "decode.*'skip_special_tokens'"),
        (lambda t: t.apply_chat_template([], tokenise=True), "apply_chat_template.*'tokenize'"),
    ],
)
def test_misspelt_options_name_the_nearest(tiny, call, message):
    with pytest.raises(TypeError, match=message):
        call(tiny)


def test_special_tokens_by_transformers_names(tiny_dir, tiny3):
    tiny = AutoTokenizer.from_pretrained(tiny_dir)
    assert tiny3.additional_special_tokens == list(tiny3.special_tokens)
    assert tiny3.all_special_ids[:3] == [1, 2, 0] and tiny.get_added_vocab()["sop"] > 2
    assert tiny.special_tokens_map["pad_token"] == tiny.pad_token == "<unk>"
    assert tiny.cls_token is None and tiny.mask_token_id is None and not tiny.is_fast
    assert tiny.get_special_tokens_mask([5, 6]) == [1, 1, 0, 0]
    assert tiny.get_special_tokens_mask([5, 2], already_has_special_tokens=True) == [0, 1]
    tiny.pad_token = tiny.eos_token
    assert tiny.pad_token_id == 2 and tiny(["a", "title of"], padding=True).input_ids[0][0] == 2
    assert pickle.loads(pickle.dumps(tiny)).pad_token_id == 2
    assert (
        tiny.add_special_tokens({"pad_token": "<unk>", "additional_special_tokens": ["sop"]}) == 0
    )
    assert tiny.pad_token_id == 0 and tiny.add_tokens(["sop", "</s>"]) == 0
    for call, match in (
        (lambda: tiny.add_tokens(["newword"]), "fixed.*newword"),
        (lambda: tiny.add_special_tokens({"pad_token": "[PAD]"}), r"fixed.*\[PAD\]"),
        (lambda: tiny.add_special_tokens({"eos_token": "sop"}), "eos_token"),
        (lambda: setattr(tiny, "pad_token", "[PAD]"), r"pad_token: '\[PAD\]'"),
        (lambda: setattr(tiny, "pad_token_id", "[PAD]"), "pad_token_id.*below 485.*PAD"),
        (lambda: setattr(tiny, "truncation_side", "middle"), "truncation_side"),
        (lambda: setattr(tiny, "model_max_length", "long"), "model_max_length"),
        (lambda: setattr(tiny, "encode_special_tokens", True), "encode_special_tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    for name, value, match in (
        ("eos_token", "sop", "eos_token: is '</s>'; generate"),
        ("family", "v3", "family: is 'v2'"),
        ("add_bos_token", True, "add_bos_token: has no effect"),
        ("truncation_sid", "left", "did you mean 'truncation_side'"),
    ):
        with pytest.raises(AttributeError, match=match):
            setattr(tiny, name, value)
    tiny.add_bos_token, tiny.eos_token, tiny.note = False, "</s>", "of the user's own"


def test_settings_of_tokenizer_config(tiny_dir, tmp_path, recwarn):
    (tmp_path / "tokenizer.model").write_bytes((tiny_dir / "tokenizer.model").read_bytes())
    file = tmp_path / "tokenizer_config.json"
    held = {
        "model_max_length": 5,
        "truncation_side": "left",
        "pad_token": {"content": "</s>", "special": True},
        "clean_up_tokenization_spaces": True,
        "encode_special_tokens": True,
        "chat_template": "<|assistant|>",
    }
    silent = {"do_lower_case": False, "eos_token": "</s>", "auto_map": {}, "cls_token": None}
    silent["added_tokens_decoder"] = {"64795": {"content": "<|user|>", "special": True}}
    silent["additional_special_tokens"] = ["<|user|>", {"content": "sop"}]
    file.write_text(json.dumps({**held, **silent}))
    for place in (tmp_path, tmp_path / "again"):
        t = AutoTokenizer.from_pretrained(place, family="v3")
        assert (t.model_max_length, t.truncation_side, t.pad_token_id) == (5, "left", 2)
        assert t.encode_special_tokens and t.decode(t.text_ids("a .")) == "a."
        assert t.decode(t.text_ids("a ."), clean_up_tokenization_spaces=False) == "a ."
        t.save_pretrained(tmp_path / "again")
    t.truncation_side, t.model_max_length = "right", 7
    t.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again", family="v3")
    assert (again.truncation_side, again.model_max_length) == ("right", 7) and not len(recwarn)
    assert not AutoTokenizer.from_pretrained(
        tmp_path, family="v3", encode_special_tokens=False
    ).encode_special_tokens
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "eop", "eos_token": "<|x|>"}')
    wrong = {"do_lower_case": True, "padding_side": "right"}
    wrong["additional_special_tokens"] = ["eop", [1], {"content": None}, 7]
    wrong["added_tokens_decoder"] = {"64798": {"content": "<|new|>"}}
    file.write_text(
        json.dumps({**wrong, "truncation_side": "up", "extra_special_tokens": ["<|y|>"]})
    )
    with pytest.warns(UserWarning, match="tokenizer_config.json") as found:
        t = AutoTokenizer.from_pretrained(tmp_path, family="v3")
    assert t.pad_token == "eop"
    assert len(found) == 1 and found[0].filename == __file__
    for name in (*wrong, "truncation_side", "extra_special_tokens", "<|new|>", "eos_token"):
        assert name in str(found[0].message)


def test_templates_and_their_text(tiny3, tiny_dir, anew, recwarn):
    messages = [{"role": "user", "content": "title of"}, {"role": "assistant", "content": "sop"}]
    telling = AutoTokenizer.from_pretrained(tiny_dir, family="v3", encode_special_tokens=True)
    for prompt in (True, False):
        text = telling.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        ids = telling.apply_chat_template(messages, add_generation_prompt=prompt)
        assert telling.encode(text, add_special_tokens=False) == ids
        assert telling(text, add_special_tokens=False).input_ids == ids
        assert telling.apply_chat_template(conversation=messages, return_dict=True).input_ids
    assert telling.encode("[MASK] sop", add_special_tokens=False) == tiny3.text_ids("[MASK] sop")
    one = tiny3.apply_chat_template(messages[:1])
    both = tiny3.apply_chat_template([messages, messages[:1]], padding=True, return_tensors="pt")
    assert both.shape[0] == 2 and both[1].tolist()[-len(one) :] == one
    cut = tiny3.apply_chat_template(messages, truncation=True, max_length=4)
    assert cut == tiny3.apply_chat_template(messages)[:4]
    neutral = {"tools": None, "chat_template": None, "continue_final_message": False}
    assert tiny3.apply_chat_template(messages[:1], **neutral) == one and not len(recwarn)
    for name in ("documents", "enable_thinking", "continue_final_message"):
        with pytest.raises(ValueError, match=f"{name}: "):
            tiny3.apply_chat_template(messages, **{name: ["x"]})
    with pytest.raises(ValueError, match="tools: ChatGLM3 has none beside the messages"):
        tiny3.apply_chat_template(messages, tools=["x"])


# Decoding


def test_decode_details(tiny, tiny3):
    ids = tiny.text_ids("paper")
    assert tiny.decode([len(tiny), *ids, 10**6]) == "paper"
    assert tiny.decode(ids[:1]) == tiny.decode(int(ids[0])) == tiny.decode(np.array(ids[:1]))
    assert tiny.decode([]) == ""
    byte = {b: tiny.convert_tokens_to_ids(f"<0x{b:02X}>") for b in range(256)}
    assert tiny.decode([byte[0xE4], byte[0xBD], *ids]) == "\ufffd\ufffd paper"
    assert tiny3.decode([tiny3.get_command("<|user|>"), *ids]) == "<|user|> paper"
    assert tiny3.decode([tiny3.get_command("<|user|>"), *ids], skip_special_tokens=True) == "paper"
    assert tiny.decode([*tiny.special_tokens.values(), *ids, 2]) == "paper"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(
    lambda s: s.replace("\u2581", "_")  # the vocabulary's own sign for a space
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=TEXT | st.text("a 答：\n\t👋1<|user|>\x00", max_size=30))
def test_decode_inverts_encode(tiny, tiny3, text):
    ids = tiny.encode(text)
    assert tiny.decode(ids) == text
    assert tiny3.decode(tiny3.text_ids(text)) == text
    starts = tiny.text_offsets(text)
    assert len(starts) == len(ids) - 2 and sorted(starts) == starts
    for start, i in zip(starts, ids[2:], strict=True):
        piece = tiny.convert_ids_to_tokens(i)
        if i in range(3, 259):
            assert int(piece[3:5], 16) in text[start].encode()
        elif not piece.startswith("\u2581"):
            assert text.startswith(piece, start)


def some_ids(size):
    return st.lists(st.integers(0, size + 3) | st.integers(3, 258), max_size=25)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ids=some_ids(489), skip=st.booleans(), text=TEXT)
def test_stream_equals_decode(tiny, tiny3, ids, skip, text):
    for tokenizer in (tiny, tiny3):
        for row in (ids, tokenizer.encode(text)):
            stream = TextStream(tokenizer, skip_special_tokens=skip)
            for n, i in enumerate(row, 1):
                whole = tokenizer.decode(row[:n], skip_special_tokens=skip)
                shown = stream.feed(i)
                assert stream.text == whole
                assert shown == (whole if whole and not whole.endswith("\ufffd") else None)
            at_once = TextStream(tokenizer, skip_special_tokens=skip)
            at_once.feed(*row)
            assert at_once.text == stream.text


def test_stream_decodes_a_window(tiny):
    stream = TextStream(tiny)
    for i in tiny.text_ids("title of a paper 你好 " * 20):
        stream.feed(i)
        assert len(stream._pieces) <= 4


# Files


def test_copies_work(tiny, tiny3):
    for tokenizer in (tiny, tiny3):
        for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
            assert other.encode("你好 title") == tokenizer.encode("你好 title")
            assert other.family == tokenizer.family and len(other) == len(tokenizer)


@pytest.mark.parametrize("family", ["v2", "v3"])
def test_save_and_load(tiny_dir, tmp_path, family):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/tokenizer.model").write_bytes((tiny_dir / "tokenizer.model").read_bytes())
    kept = {"name_or_path": "x", "padding_side": "left"}
    (tmp_path / "src/tokenizer_config.json").write_text(json.dumps(kept))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "src", family=family)
    (tmp_path / "src/tokenizer.model").unlink()
    paths = tokenizer.save_pretrained(tmp_path / "out" / "deep")
    assert sorted(paths) == sorted(str(p) for p in (tmp_path / "out/deep").iterdir())
    again = ChatGLMTokenizer.from_pretrained(tmp_path / "out/deep")
    assert again.family == family and again.encode("title") == tokenizer.encode("title")
    saved = (tmp_path / "out/deep/tokenizer.model").read_bytes()
    assert saved == (tiny_dir / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "out/deep/tokenizer_config.json").read_text())
    assert config["name_or_path"] == "x" and config["tokenizer_class"] == "ChatGLMTokenizer"
    assert json.loads((tmp_path / "out/deep/special_tokens_map.json").read_text()) == {}


def test_from_pretrained_errors(tiny_dir, tmp_path, monkeypatch):
    load = AutoTokenizer.from_pretrained
    options = dict(trust_remote_code=True, revision="v1.0", use_fast=False, cache_dir="x")
    assert load(str(tiny_dir), padding_side="left", **options).vocab_size == 485
    with pytest.raises(OSError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="tokenizer.model"):
        load(tmp_path)
    with pytest.raises(TypeError, match="bogus"):
        load(tiny_dir, bogus=1)
    with pytest.raises(ValueError, match="family: expected v1 or v2 or v3 or g4.*'v9'"):
        load(tiny_dir, family="v9")
    with pytest.raises(ValueError, match=r"line \d+: expected a new token in base64"):
        load(tiny_dir, family="g4")
    with pytest.raises(ValueError, match="padding_side"):
        load(tiny_dir, padding_side="right")
    with pytest.raises(ValueError, match="encode_special_tokens"):
        load(tiny_dir, encode_special_tokens=True)
    file = tmp_path / "tokenizer.model"
    for content, match in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1018370\n", "git-lfs"),
        (b"", "empty"),
        (b"not a model", "not a SentencePiece model"),
        (b"IQ== 0\nIg== 1\n", "no token of the byte 0x00"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            load(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        load(tiny_dir)


def test_import_is_light():
    code = "import sys, glmlora.tokenization; assert 'sentencepiece' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ctrl_c_ends_the_encoding_of_a_long_text(tiny, monkeypatch):
    """The text is encoded beside the main thread, which hears of Ctrl-C meanwhile."""
    begun, goes_on = threading.Event(), threading.Event()

    class Slow:
        def encode_as_ids(self, text):
            begun.set()
            assert goes_on.wait(60)

    def interrupt():
        assert begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tiny._vocabulary, "_sp", Slow())
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            tiny.text_ids("a" * 1_000_000)
    finally:
        goes_on.set()


def test_a_long_text_has_the_ids_of_its_library(tiny):
    text = "We measure cells. " * 10_000
    assert tiny.text_ids(text) == tiny._vocabulary._sp.encode_as_ids(text)
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)
