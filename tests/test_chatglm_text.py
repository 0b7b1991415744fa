"""ChatGLM-6B's text: the vocabulary of both releases, prompts, answers and training records."""

import copy
import json
import pickle
import sys

import numpy as np
import pytest
import tiny_chatglm
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer_dir
from tiny_chatglm import BLANKS, SPECIAL, ice_text, message, tiny_ice_text_dir

from glmlora import families
from glmlora.families import prompt
from glmlora.families.vendored import in_template
from glmlora.tokenization import AutoTokenizer, ChatGLMTokenizer, TextStream
from glmlora.tokenization.protobuf import fields
from glmlora.training.records import encode_records

FIRST = 20000  # ids of images in front of the first release's pieces
PIECES = [name for name, _, _ in tiny_chatglm.text_pieces()] + SPECIAL + BLANKS
PIECES += [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [tiny_ice_text_dir(tmp_path_factory.mktemp("ice"), first) for first in (False, True)]


@pytest.fixture(scope="module")
def both(folders):
    """The tokenizers of the later release and of the first one."""
    return [AutoTokenizer.from_pretrained(folder) for folder in folders]


@pytest.fixture(scope="module")
def later(both):
    return both[0]


# The vocabulary


def ids_of(*pieces):
    return [PIECES.index(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("你好", ["▁", "你好"]),
        ("\n", ["▁", "<n>"]),
        ("你\n\n好", ["▁", "你", "<n>", "<n>", "好"]),
        ("1\t0", ["▁", "1", "<|tab|>", "0"]),
        ("1 0  1", ["▁", "1", "▁", "0", "<|blank_2|>", "1"]),
        (" 1", ["▁", "▁", "1"]),
        (" " * 80, ["▁", "<|blank_80|>"]),
        (" " * 81 + "1", ["▁", "<|blank_80|>", "▁", "1"]),
        (" " * 163, ["▁", "<|blank_80|>", "<|blank_80|>", "<|blank_3|>"]),
        ("title", ["▁title"]),
        ("好👋", ["▁", "好", "<0xF0>", "<0x9F>", "<0x91>", "<0x8B>"]),
        ("", []),
    ],
)
def test_texts_have_these_pieces(both, text, pieces):
    wanted = ids_of(*pieces)
    for tokenizer, images in zip(both, (0, FIRST), strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == [images + i for i in wanted]
        assert tokenizer.tokenize(text) == pieces
        assert tokenizer.convert_ids_to_tokens(ids) == pieces
        assert tokenizer.convert_tokens_to_ids(pieces) == ids
        assert tokenizer.decode(ids) == tokenizer.convert_tokens_to_string(pieces) == text


def published(sp, text):
    """(ids, text of ids) as the published code describes them, a blank at a time."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    for n in range(80, 1, -1):
        text = text.replace(" " * n, f"<|blank_{n}|>")
    ids = sp.encode_as_ids(text)
    text = sp.decode_ids(ids).replace("<n>", "\n").replace("<|tab|>", "\t")
    for n in range(2, 81):
        text = text.replace(f"<|blank_{n}|>", " " * n)
    return ids, text


BLANKS_AND_SIGNS = st.sampled_from(["\n", "\t", " ", "  ", " " * 41, "a", "你", "é", "👋"])
BLANK_TEXTS = st.lists(BLANKS_AND_SIGNS, max_size=12).map("".join)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=40), BLANK_TEXTS))
def test_texts_have_the_published_ids_and_come_back(both, sp, text):
    ids, shown = published(sp, text)
    for tokenizer, images in zip(both, (0, FIRST), strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == [images + i for i in ids]
        assert tokenizer.decode([images + i for i in ids]) == shown == text
        starts = tokenizer.text_offsets(text)
        assert starts == sorted(starts) and len(starts) == len(ids)
    for n, start in enumerate(starts):  # what is in front of a piece has the pieces in front of it
        if text[start:].strip() and (n == 0 or starts[n - 1] < start):
            assert tokenizer.decode([images + i for i in ids[:n]]) == text[:start]


@pytest.fixture(scope="module")
def sp():
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=ice_text())


def test_a_normalised_text_is_cut_where_it_was_written(tmp_path):
    """As the published file has it: full-width punctuation becomes that of ASCII."""
    import sentencepiece

    if not hasattr(sentencepiece, "SentencePieceNormalizer"):
        pytest.skip("this sentencepiece gives no map of a normalisation")
    rules = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc").serialized_model_proto()
    (spec,) = (value for number, value in fields(rules) if number == 3)
    (characters,) = (value for number, value in fields(spec) if number == 2)
    (tmp_path / "ice_text.model").write_bytes(ice_text(characters=characters))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "你好：\t㍿ １\n"
    assert tokenizer.tokenize(text)[:5] == ["▁", "你好", ":", "<|tab|>", "<0xE6>"]
    assert tokenizer.tokenize(text)[-3:] == ["▁", "1", "<n>"]
    assert tokenizer.text_offsets(text)[:4] == [0, 0, 2, 3]
    assert tokenizer.text_offsets(text)[-3:] == [5, 6, 7]
    assert tokenizer.decode(tokenizer.text_ids(text)) == "你好:\t株式会社 1\n"


def test_special_tokens(both):
    for tokenizer, images in zip(both, (0, FIRST), strict=True):
        first = images + PIECES.index("[MASK]")
        assert tokenizer.special_tokens == {name: first + i for i, name in enumerate(SPECIAL)}
        assert tokenizer.vocab_size == len(tokenizer.get_vocab()) == images + len(PIECES)
        for word, name in {
            **{"unk": "<unk>", "pad": "<pad>", "bos": "<sop>", "eos": "<eop>", "end": "</s>"},
            **{"mask": "[MASK]", "gmask": "[gMASK]"},
        }.items():
            assert getattr(tokenizer, f"{word}_token") == name
            assert getattr(tokenizer, f"{word}_token_id") == images + PIECES.index(name)
            assert tokenizer.convert_tokens_to_ids(name) == images + PIECES.index(name)
        hidden = [tokenizer.pad_token_id, *tokenizer.special_tokens.values(), images, images + 2]
        assert tokenizer.decode([*hidden, *tokenizer.text_ids("1"), *hidden]) == "1"
        mask = tokenizer.get_special_tokens_mask([*hidden, 9999], already_has_special_tokens=True)
        assert mask == [1] * len(hidden) + [0]
    first = both[1]
    assert first.convert_ids_to_tokens([0, 19999]) == ["<image_0>", "<image_19999>"]
    assert first.convert_tokens_to_ids("<image_19999>") == 19999
    assert first.convert_tokens_to_ids("<image_20000>") == first.unk_token_id
    assert first.decode([7, *first.text_ids("a"), 19999]) == "a"


@pytest.mark.parametrize("name", [*SPECIAL, "<unk>", "<pad>", "</s>", "<image_3>", "<0x41>"])
def test_typed_special_tokens_are_text(both, name):
    for tokenizer in both:
        ids = tokenizer.text_ids(f"a{name}b")
        assert not set(ids) & {*tokenizer.special_tokens.values(), *tokenizer.all_special_ids}
        assert tokenizer.decode(ids) == f"a{name}b"


def test_a_file_whose_special_tokens_would_be_found_in_texts(tmp_path, later):
    data = ice_text()
    for name in SPECIAL:
        piece = message((1, name), (2, 0.0), (3, 3))
        assert piece in data
        data = data.replace(piece, message((1, name), (2, 0.0), (3, 4)))
    (tmp_path / "ice_text.model").write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "a[gMASK]<sop>b <eop>"
    assert tokenizer.text_ids(text) == later.text_ids(text)
    assert tokenizer.special_tokens == later.special_tokens
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 3)  # without a config, too


def test_prompts_end_in_the_special_tokens(both, folders):
    for tokenizer, folder in zip(both, folders, strict=True):
        gmask, sop = tokenizer.get_prefix_tokens()
        assert [gmask, sop] == tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
        a, b, eop = tokenizer.text_ids("title"), tokenizer.text_ids("1"), tokenizer.eos_token_id
        assert tokenizer.encode("title") == [*a, gmask, sop]
        assert tokenizer("title", "1").input_ids == [*a, gmask, sop, *b, eop]
        assert tokenizer.encode("title 1 0", max_length=4)[2:] == [gmask, sop]
        assert tokenizer.num_special_tokens_to_add() == 2
        rows = tokenizer(["title", "1 0 1"], padding=True, return_tensors="np")
        n = len(tokenizer.text_ids("1 0 1")) - 1
        assert rows.input_ids[0].tolist() == [tokenizer.pad_token_id] * n + [*a, gmask, sop]
        assert rows.attention_mask[0].tolist() == [0] * n + [1] * 3
        last = 2 if tokenizer is both[1] else 1  # the first release counts on
        assert rows.position_ids[0].tolist() == [[0] * n + [0, 1, last], [0] * n + [0, 0, 1]]
        assert rows.position_ids.shape == (2, 2, n + 3)
        assert rows.input_ids[1, -2:].tolist() == [gmask, sop]
        alone = [tokenizer(text) for text in ("title", "1 0 1")]
        assert alone[0].position_ids == [[0, 1, last], [0, 0, 1]]
        for rows_of in (alone, tokenizer(["title", "1 0 1"])):
            padded = tokenizer.pad(rows_of, return_tensors="np")
            assert all(np.array_equal(padded[name], rows[name]) for name in rows)
        with pytest.raises(ValueError, match=r"encoded_inputs\[0\]: fields have different lengths"):
            tokenizer.pad([{"input_ids": [1, 2], "position_ids": [[0], [1]]}])
        text = tokenizer("title", add_special_tokens=False)
        assert text.position_ids == [[0], [0]]
        telling = AutoTokenizer.from_pretrained(folder, encode_special_tokens=True)
        mask = telling.special_tokens["[MASK]"]
        ids = telling.encode("1 [MASK]0")
        assert mask in ids and ids[-1] == sop and gmask not in ids
        assert telling.encode("[gMASK]") == [gmask, sop]
        assert telling.encode("<sop><eop>") == tokenizer.encode("<sop><eop>")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, FIRST + len(PIECES) - 1), max_size=12), st.booleans())
def test_a_stream_ends_as_decoding_does(both, ids, skip):
    for tokenizer in both:
        stream = TextStream(tokenizer, skip)
        for i in ids:
            shown = stream.feed(i)
            assert shown is None or shown == stream.text
        assert stream.text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.filterwarnings("error")
def test_save_and_load(both, folders, tmp_path):
    text = "title:\t[gMASK]  你好👋"
    for tokenizer, folder in zip(both, folders, strict=True):
        for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            assert copied.encode(text) == tokenizer.encode(text)
            assert copied.mask_token_id == tokenizer.mask_token_id
        place = tmp_path / folder.name
        written = tokenizer.save_pretrained(place)
        assert (place / "ice_text.model").read_bytes() == (folder / "ice_text.model").read_bytes()
        assert str(place / "ice_text.model") in written and not list(place.glob("tokenizer.model"))
        said = json.loads((place / "tokenizer_config.json").read_text())
        assert said["num_image_tokens"] == tokenizer.convert_tokens_to_ids("<unk>")
        assert "glmlora_family" not in said
        again = AutoTokenizer.from_pretrained(place)
        assert again.family == "v1" and again.encode(text) == tokenizer.encode(text)
        tokenizer.save_pretrained(folder)  # into itself
        assert AutoTokenizer.from_pretrained(folder).vocab_size == tokenizer.vocab_size
    slim = tiny_ice_text_dir(tmp_path / "slim", first=True, images=0, gmask="x")
    assert AutoTokenizer.from_pretrained(slim).encode(text) == both[0].encode(text)


def test_files_of_others_are_named(both, folders, tmp_path, monkeypatch):
    load = AutoTokenizer.from_pretrained
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.model or .*ice_text.model"):
        load(tmp_path)
    other = tmp_path / "other"
    tiny_ice_text_dir(other)
    file = other / "ice_text.model"
    chatglm2 = (tiny_tokenizer_dir(tmp_path / "v2") / "tokenizer.model").read_bytes()
    partly = ice_text().replace(message((1, "<eop>")), message((1, "<eOp>")))
    for content, match in (
        (chatglm2, "ice_text.model: has no piece <pad>, which every ice_text.model has"),
        (ice_text().replace(b"<|tab|>", b"<|tub|>"), r"has no piece <\|tab\|>"),
        (partly, "has no piece <eop>, but other special tokens"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2\n", "git-lfs"),
        (b"", "empty"),
        (ice_text().replace(b"<unk>", b"<un\xff>"), "ice_text.model: is not a SentencePiece model"),
        (b"IQ== 0\nIg== 1\n", "is a vocabulary of byte pairs"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            load(other)
    for images in (-1, 0.5, "0", True):
        tiny_ice_text_dir(other, images=images)
        with pytest.raises(ValueError, match="tokenizer_config.json: num_image_tokens: expected"):
            load(other)
    with pytest.raises(ValueError, match="has the pieces <pad> and <n> of an ice_text.model"):
        ChatGLMTokenizer(folders[0] / "ice_text.model", family="v2")
    with pytest.raises(ValueError, match=r"says family 'v2', .* than its ice_text.model; say .*v1"):
        (other / "config.json").write_text('{"glmlora_family": "v2"}')
        load(other)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        load(folders[0])


# Prompts and answers


def test_prompts_count_from_0_and_a_first_question_is_bare(both):
    for tokenizer in both:
        assert tokenizer.build_prompt("你好") == "你好"
        history = [("1", "0"), ["title", 3]]
        text = "[Round 0]\n问：1\n答：0\n[Round 1]\n问：title\n答：3\n[Round 2]\n问：你好\n答："
        assert tokenizer.build_prompt("你好", history) == text
        for query, past, wanted in (("你好", [], "你好"), ("你好", history, text)):
            ids = [*tokenizer.text_ids(wanted), *tokenizer.get_prefix_tokens()]
            assert prompt.chat_ids(tokenizer, query, past) == ids
            asked = tokenizer.build_chat_input(query, past)
            assert asked.input_ids[0].tolist() == ids
        with pytest.raises(ValueError, match=r"history\[0\]: expected a .query, answer. pair"):
            tokenizer.build_prompt("a", ["b"])
        with pytest.raises(ValueError, match="role: ChatGLM-6B knows only 'user', got 'system'"):
            prompt.chat_ids(tokenizer, "a", [], "system")
        with pytest.raises(ValueError, match="ChatGLM-6B has rounds"):
            tokenizer.build_single_message("user", "", "a")


def test_messages_are_rounds(later):
    def text(*said, prompted=True):
        roles = {"s": "system", "u": "user", "a": "assistant"}
        messages = [{"role": roles[role], "content": content} for role, content in said]
        written = later.apply_chat_template(messages, prompted, tokenize=False)
        ids = later.apply_chat_template(messages, prompted)
        assert ids == [*later.text_ids(written), *later.get_prefix_tokens()]
        return written

    assert text(("u", "1")) == text(("u", "1"), prompted=False) == "1"
    assert text(("s", "S"), ("u", "答：")) == text(("u", "S答："), prompted=False) == "S答："
    rounds = "[Round 0]\n问：S1\n答：0\n"
    said = ("s", "S"), ("u", "1"), ("a", "0")
    assert text(*said, prompted=False) == rounds
    assert text(*said, ("u", "2")) == rounds + "[Round 1]\n问：2\n答："
    assert text(*said, ("u", "2"), prompted=False) == rounds + "[Round 1]\n问：2\n"
    for wrong in ([("a", "0")], [("u", "0"), ("u", "1")]):
        with pytest.raises(ValueError, match="ChatGLM-6B takes user and assistant in turns"):
            text(*wrong)
    with pytest.raises(ValueError, match="nothing to answer"):
        text(*said)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" 你好,世界! \n", "你好，世界！"),
        ("你:a;b?好,1", "你：a;b？好，1"),  # noqa: RUF001
        ("好,,,你", "好，,，你"),  # noqa: RUF001
        ("好.a,b!", "好.a,b!"),
        ("[[训练时间]],1", "2023年，1"),  # noqa: RUF001
    ],
)
def test_answers_have_the_punctuation_of_chinese(both, text, shown):
    family = families.of("chatglm")
    later, first = (family.as_released(tokenizer) for tokenizer in both)
    assert later.answer(text, [("a", "b"), "q"]) == (shown, [("a", "b"), ("q", shown)])
    plain = text.strip().replace("[[训练时间]]", "2023年")
    assert first.answer(text, ["q"]) == (plain, [("q", plain)])
    assert in_template(later, "vendored").answer(text, ["q"])[0] == shown
    assert in_template(first, "vendored").answer(text, ["q"])[0] == plain


# Training records


def test_records_end_their_prompts_in_the_special_tokens(both):
    row = {"prompt": "判断", "query": "title", "response": "1 你好", "history": [["q", "a"]]}
    for tokenizer in both:
        gmask, sop = tokenizer.get_prefix_tokens()
        data = encode_records([row, {**row, "history": [], "system": "S"}], tokenizer)
        asked = "[Round 0]\n问：q\n答：a\n[Round 1]\n问：判断title\n答："
        for i, text in enumerate((asked, "S判断title")):
            assert data.source(i).tolist() == [*tokenizer.text_ids(text), gmask, sop]
            answer = [*tokenizer.text_ids("1 你好"), tokenizer.eos_token_id]
            assert data.target(i).tolist() == answer
        batch = data.batch(np.arange(1))
        assert batch.labels.tolist() == [-100] * len(data.source(0)) + answer
        rounds = "[Round 1]\n\n问：q\n\n答：a\n\n[Round 2]\n\n问：判断title\n\n答："
        data = encode_records([row], tokenizer, template="vendored")
        assert data.source(0).tolist() == [*tokenizer.text_ids(rounds), gmask, sop]
        ids = tokenizer.text_ids(rounds)
        cut = encode_records([row], tokenizer, 20, 4, truncation="vendored", template="vendored")
        assert cut.source(0).tolist() == [*ids[:18], gmask, sop] and cut.n_cut == 1
        assert cut.target(0).tolist() == [*answer[:3], tokenizer.eos_token_id]
        label = prompt.encode_label(tokenizer, "1 你好", 5)
        assert label == [*answer[:3], gmask, sop]
        long = {**row, "query": "title " * 60}
        cut = encode_records([long], tokenizer, 48)
        text = tokenizer.decode(cut.source(0).tolist())
        assert text.startswith("[Round 0]\n问：q\n答：a\n[Round 1]\n问：判断title title")
        assert text.endswith("\n答：") and 44 < len(cut.source(0)) <= 48
