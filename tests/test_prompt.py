"""Prompts, answers and training rows against published ids, and the cut of long records."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer_dir

from glmlora import tell
from glmlora.families import chatglm2, chatglm3, of, prompt, rounds
from glmlora.families.vendored import in_template
from glmlora.tokenization import AutoTokenizer


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory):
    return tiny_tokenizer_dir(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.fixture(scope="session")
def tiny3(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir, family="v3")


@pytest.fixture
def real(shared):
    return AutoTokenizer.from_pretrained(shared / "golden/tokenizer-chatglm2")


@pytest.fixture
def real3(shared):
    return AutoTokenizer.from_pretrained(shared / "golden/tokenizer-chatglm2", family="v3")


def load(shared, name):
    return json.loads((shared / name).read_text(encoding="utf-8"))


# Against the published code


def test_chatglm2_prompts(shared, real):
    for case in load(shared, "golden/tokenizer-chatglm2/golden.json")["prompts"]:
        query, history = case["query"], case["history"]
        assert chatglm2.FAMILY.prompt_text(query, history) == case["prompt"]
        assert real.build_prompt(query, history) == case["prompt"]
        assert prompt.chat_ids(real, query, history) == case["input_ids"]
        inputs = real.build_chat_input(query, [tuple(pair) for pair in history])
        for name in ("input_ids", "attention_mask", "position_ids"):
            assert inputs[name].tolist() == [case[name]]
        if history:
            assert prompt.stream_ids(real, query, len(history) + 1) == case["stream_input_ids"]
        else:
            assert prompt.chat_ids(real, query) == case["stream_input_ids"]


def test_vectors(shared, real, real3):
    vectors = load(shared, "spec/vectors.json")
    for case in vectors["build_prompt_v2"]:
        assert chatglm2.FAMILY.prompt_text(case["query"], case["history"]) == case["text"]
        assert prompt.chat_ids(real, case["query"], case["history"]) == case["ids"]
    case = vectors["stream_second_round_v2"]
    assert prompt.stream_ids(real, case["query"], 2) == case["ids"]
    for case in vectors["build_chat_input_v3"]:
        assert prompt.chat_ids(real3, case["query"], case["history"], case["role"]) == case["ids"]


def test_chatglm3_prompts(shared, real3):
    for case in load(shared, "golden/tokenizer-chatglm2/golden-chatglm3.json")["chat"]:
        query, history, role = case["query"], case["history"], case["role"]
        before = json.dumps(history)
        assert prompt.chat_ids(real3, query, history, role) == case["input_ids"]
        assert json.dumps(history) == before
        inputs = real3.build_chat_input(query, history=history, role=role)
        assert inputs.input_ids.tolist() == [case["input_ids"]]
        assert inputs.position_ids.tolist() == [case["position_ids"]]
        messages = [*history, {"role": role, "content": query}]
        ids = real3.apply_chat_template(messages, add_generation_prompt=True)
        assert ids == case["input_ids"]
        stream = prompt.stream_ids(real3, query, role=role)
        assert stream == case["input_ids"][-len(stream) :] and stream[0] > 64793


def test_responses_as_published(shared):
    for case in load(shared, "golden/tokenizer-chatglm2/golden.json")["process_response"]:
        assert rounds.process_response(case["in"]) == case["out"]
    for case in load(shared, "golden/tokenizer-chatglm2/golden-chatglm3.json")["process_response"]:
        given_history = json.loads(json.dumps(case["history"]))
        answer, history = chatglm3.FAMILY.answer(case["in"], given_history)
        assert answer == case["content"]
        assert history == case["history"] + case["new_history"]
        assert given_history == case["history"]


def rows_of(tokenizer, rows, max_source, max_target, source_prefix=None):
    for row in rows:
        if not row["prompt"] or not row["response"]:
            continue
        source, _ = prompt.encode_source(
            tokenizer,
            row["prompt"],
            row["query"],
            row["history"],
            max_source,
            truncation="vendored",
            source_prefix=source_prefix,
            template="vendored",
        )
        target = prompt.encode_target(tokenizer, row["response"], max_target, template="vendored")
        yield (
            source,
            target,
            prompt.encode_label(tokenizer, row["response"], max_target, "vendored"),
        )


def test_training_rows_as_measured(shared, real, real3):
    vectors = load(shared, "spec/vectors.json")
    for tokenizer in (real, real3):
        for case in vectors["sft"]:
            limits = case["max_source_length"], case["max_target_length"]
            rows = list(rows_of(tokenizer, case["rows"], *limits, case["source_prefix"]))
            assert len(rows) == len(case["items"])
            for (source, target, _), item in zip(rows, case["items"], strict=True):
                assert source + target == item["input_ids"]
                assert [-100] * len(source) + target == item["labels"]
        for case in vectors["sft_generate"]:
            limits = case["max_source_length"], case["max_target_length"]
            rows = list(rows_of(tokenizer, case["rows"], *limits))
            for (source, _, label), item in zip(rows, case["items"], strict=True):
                assert source == item["input_ids"] and label == item["labels"]


def test_training_rows_as_published(shared, real):
    for case in load(shared, "golden/tokenizer-chatglm2/golden.json")["sft"]["rows"]:
        row = case["row"]
        source, was_cut = prompt.encode_source(
            real,
            row["instruction"],
            row["input"],
            row.get("history"),
            case["max_source_length"],
            truncation="vendored",
        )
        target = prompt.encode_target(real, row["output"], case["max_target_length"])
        assert source + target == case["input_ids"]
        assert was_cut == (len(source) == case["max_source_length"])
        assert [-100] * len(source) + target == case["labels"]


# Histories and templates


def test_histories_are_checked(tiny, tiny3):
    assert chatglm2.FAMILY.prompt_text(1, [(2, None)]) == (
        "[Round 1]\n\n问：2\n\n答：None\n\n[Round 2]\n\n问：1\n\n答："
    )
    for history in ("ab", 5, [("a",)], ["ab"], [{"role": "user", "content": "a"}]):
        with pytest.raises(ValueError, match="history"):
            prompt.chat_ids(tiny, "q", history)
    for history in ("ab", [("a", "b")], [{"role": "bot", "content": ""}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="history"):
            prompt.chat_ids(tiny3, "q", history)
    for content in (["a"], {"name": "f"}, [{"type": "text", "text": "a"}]):
        with pytest.raises(ValueError, match=r"history\[0\]: content: expected text, got a"):
            prompt.chat_ids(tiny3, "q", [{"role": "user", "content": content}])
    with pytest.raises(ValueError, match="role"):
        prompt.chat_ids(tiny, "q", [], role="system")
    with pytest.raises(ValueError, match="role"):
        prompt.chat_ids(tiny3, "q", [], role="bot")


def test_what_a_prompt_leaves_out_of_a_message_is_told(tiny3, recwarn, monkeypatch):
    monkeypatch.setattr(tell, "_told", set())
    usual = {"role": "assistant", "metadata": "", "content": "a", "tool_calls": None}
    prompt.chat_ids(
        tiny3, "q", [{"role": "system", "content": "s", "tools": [{"name": "f"}]}, usual]
    )
    assert not recwarn.list
    prompt.chat_ids(tiny3, "q", [{**usual, "tool_calls": [{"id": 1}]}])
    prompt.chat_ids(tiny3, "q", [{"role": "user", "content": "a", "tools": [{"name": "f"}]}])
    assert [str(w.message) for w in recwarn] == [
        "history: tool_calls of a message: not used in a prompt",
        "history: tools, which a system message holds, of a message: not used in a prompt",
    ]


def test_chat_template_of_rounds(tiny):
    messages = [
        {"role": "system", "content": "S."},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    text = chatglm2.FAMILY.prompt_text("b", [("S.q", "a")])
    assert tiny.apply_chat_template(messages, True, tokenize=False) == text
    assert tiny.apply_chat_template(messages, add_generation_prompt=True) == tiny.encode(text)
    assert tiny.apply_chat_template(messages, tokenize=False) == text[:-2]
    assert tiny.apply_chat_template(messages[:3], tokenize=False) == text[: text.index("[Round 2]")]
    arrays = tiny.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    assert arrays.input_ids.shape == arrays.position_ids.shape
    assert tiny.apply_chat_template(messages, return_tensors="np").shape == arrays.input_ids.shape
    for wrong in (messages[1:2] * 2, [{"role": "observation", "content": "x"}]):
        with pytest.raises(ValueError, match="messages"):
            tiny.apply_chat_template(wrong)
    with pytest.raises(ValueError, match="last one must be from the user"):
        tiny.apply_chat_template(messages[:3], add_generation_prompt=True)


def test_chat_template_of_roles(tiny3):
    messages = [{"role": "user", "content": "q"}]
    assert tiny3.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "[gMASK]sop<|user|>\n q<|assistant|>"
    )
    ids = tiny3.apply_chat_template(messages)
    assert ids + [tiny3.get_command("<|assistant|>")] == prompt.chat_ids(tiny3, "q")


# Tool calls


TOOLS = [{"role": "system", "content": "s", "tools": [{"name": "f"}]}]


@pytest.mark.parametrize(
    ("code", "parameters"),
    [
        ("tool_call(a=1, b='x', c=[1, {'d': None}], e=-2.5)", None),
        ("  tool_call()  ", {}),
        ("tool_call(a=__import__('os').system('true'))", "refused"),
        ("__import__('os').system('true')", "refused"),
        ("tool_call(a=1) or tool_call(b=2)", "refused"),
        ("tool_call(1)", "refused"),
        ("tool_call(**{'a': 1})", "refused"),
        ("tool_call(a=1, a=2)", "refused"),
        ("other(a=1)", "refused"),
        ("x.tool_call(a=1)", "refused"),
        ("tool_call(a=b)", "refused"),
        ("tool_call(a=", "refused"),
        ("tool_call(a='\x00')", "refused"),
        ("tool_call(a=" + "-" * 60000 + "1)", "refused"),
        ("tool_call(a='" + "x" * 70000 + "')", "refused"),
        ("", "refused"),
    ],
)
def test_tool_calls_are_read_never_run(code, parameters):
    content = f"```python\n{code}\n```"
    answer, history = chatglm3.FAMILY.answer(f"f\n{content}", TOOLS)
    assert history[-1] == {"role": "assistant", "metadata": "f", "content": content}
    if parameters == "refused":
        assert answer == {"name": "f", "content": content}
    else:
        expected = (
            parameters
            if parameters is not None
            else {
                "a": 1,
                "b": "x",
                "c": [1, {"d": None}],
                "e": -2.5,
            }
        )
        assert answer == {"name": "f", "parameters": expected}


def test_response_without_tools():
    assert chatglm3.FAMILY.answer("run\ncode", [])[0] == {"name": "run", "content": "code"}
    answer, history = chatglm3.FAMILY.answer(" \n hi ", [])
    assert answer == "hi" and history == [{"role": "assistant", "metadata": "", "content": "hi"}]


# Cutting long records


def marker(tokenizer):
    """The ids that end every whole prompt."""
    if tokenizer.family == "v3":
        return [tokenizer.get_command("<|assistant|>")]
    return tokenizer.text_ids("x\n\n答：")[-4:]


WORDS = st.lists(
    st.sampled_from(
        ["title", " paper", " 你好", "👋", "\n", "abstract:", "  ", "1990", "é", "algorithm"]
    ),
    max_size=40,
).map("".join)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    query=WORDS,
    history=st.lists(st.tuples(WORDS, WORDS), max_size=3),
    limit=st.integers(32, 120),
    first=st.sampled_from([None, "P: "]),
)
def test_template_cut_keeps_the_frame(tiny, tiny3, query, history, limit, first):
    for tokenizer in (tiny, tiny3):
        whole, cut = prompt.encode_source(
            tokenizer, "Judge", query, history, 10**6, source_prefix=first
        )
        assert not cut
        if first is None and tokenizer.family == "v2":
            assert whole == prompt.chat_ids(tokenizer, "Judge" + query, history)
        ids, cut = prompt.encode_source(
            tokenizer, "Judge", query, history, limit, source_prefix=first
        )
        assert cut == (len(whole) > limit)
        if not cut:
            assert ids == whole
            continue
        assert len(ids) <= limit and ids[:2] == tokenizer.get_prefix_tokens()
        assert ids[-len(marker(tokenizer)) :] == marker(tokenizer)
        if tokenizer.family == "v2":
            # The encoding of a text with a shorter query and the last rounds of the history.
            text = tokenizer.decode(ids)
            assert tokenizer.encode(text) == ids and text.startswith(first or "")
            assert any(
                text
                == (first or "") + chatglm2.FAMILY.prompt_text(("Judge" + query)[:n], history[k:])
                for k in range(len(history) + 1)
                for n in range(len("Judge" + query) + 1)
            )
        vendored, cut = prompt.encode_source(
            tokenizer, "Judge", query, history, limit, "vendored", first
        )
        assert cut and vendored == whole[:limit]


def test_chatglm3_source_is_the_chat_prompt(tiny3):
    ids, cut = prompt.encode_source(tiny3, "Judge", " paper", [("q", "a")], 512)
    history = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert not cut and ids == prompt.chat_ids(tiny3, "Judge paper", history)
    answer = prompt.encode_target(tiny3, "1", 512)
    # Prompt and answer make the start of the next turn's prompt.
    messages = [*history, {"role": "user", "content": "Judge paper"}]
    messages.append({"role": "assistant", "content": "1"})
    assert tiny3.apply_chat_template(messages) + [2] == ids + answer


def test_chats_in_the_template_of_the_original_training(tiny, tiny3):
    """Prompts are those that `template="vendored"` trains on; histories stay the family's."""
    assert in_template(of("v2"), "vendored") is of("v2")
    assert in_template(of("v3"), "auto") is of("v3")
    family = in_template(of("v3"), "vendored")
    history, rounds = [], []
    for query, text in (("q", " one\ntwo"), ("Judge paper", "1")):
        want, _ = prompt.encode_source(tiny3, query, "", rounds, 512, template="vendored")
        asked = family.asked(query, history, "user")
        assert family.chat_ids(tiny3, query, history, "user") == want
        answer, after = family.answer(text, asked)
        assert answer == text.strip() and after[:-1] == asked
        # a next turn over a cache that has this one feeds what v2 feeds
        number = len(rounds) + 1
        later = of("v2").stream_ids(tiny, query, number, "user")
        assert family.stream_ids(tiny3, query, len(history) + 1, "user") == later
        history, rounds = after, [*rounds, (query, answer)]
    assert family.end_ids(tiny3, []) == of("v3").end_ids(tiny3, [])
    with pytest.raises(ValueError, match="got 'observation' here"):
        family.chat_ids(tiny3, "q", [], "observation")


def test_prefix_stands_before_the_first_text_of_chatglm3(tiny3):
    def text(history, limit=512):
        ids, _ = prompt.encode_source(tiny3, "Judge ", "it", history, limit, source_prefix="P: ")
        return tiny3.decode(ids)

    assert text([]) == "[gMASK]sop<|user|> \n P: Judge it<|assistant|>"
    rounds = [("q" * 90, "a"), ("r", "b")]
    assert text(rounds[1:]).startswith("[gMASK]sop<|user|> \n P: r<|assistant|> \n b<|user|>")
    assert text(rounds, 60) == text(rounds[1:])
    assert text(rounds[:1], 40) == text([])


def test_little_is_lost_and_rounds_go_last(tiny):
    long = "a fast algorithm for large graphs is given. " * 30
    for limit in range(60, 90):
        ids, _ = prompt.encode_source(tiny, long, "", [], limit)
        assert limit - 3 <= len(ids) <= limit
    rounds = [("first " * 60, "x"), ("second", "y")]
    text = tiny.decode(prompt.encode_source(tiny, long, "", rounds, 120)[0])
    assert "first" not in text and text.startswith("[Round 1]\n\n问：second\n\n答：y\n\n[Round 2]")


def test_lengths_are_checked(tiny, tiny3):
    for tokenizer in (tiny, tiny3):
        with pytest.raises(ValueError, match="max_source_length"):
            prompt.encode_source(tokenizer, "p", "q" * 100, [], 2)
        with pytest.raises(ValueError, match="max_source_length.*template"):
            prompt.encode_source(tokenizer, "p", "q" * 100, [], 5)
    with pytest.raises(ValueError, match="max_target_length"):
        prompt.encode_target(tiny, "1", 0)
    with pytest.raises(ValueError, match="max_target_length"):
        prompt.encode_label(tiny, "1", 1)
    with pytest.raises(ValueError, match="truncation"):
        prompt.encode_source(tiny, "p", "", [], 99, truncation="end")
    with pytest.raises(ValueError, match="template"):
        prompt.encode_source(tiny, "p", "", [], 99, template="v2")
    assert prompt.encode_target(tiny, "1 2 3 4 5 6", 1) == [tiny.eos_token_id]
    assert prompt.encode_target(tiny, 1, 9) == tiny.text_ids("1") + [tiny.eos_token_id]
