"""OpenAI's messages as a family's prompts, and new ids as OpenAI's messages: tools, thoughts."""

import json

import pytest
from tiny import tiny_glm4_dir

import glmlora

pytest.importorskip("pydantic", reason="needs the extra serve")

from glmlora import families  # noqa: E402
from glmlora.model.kept import Kept  # noqa: E402
from glmlora.serving.prompts import Answer, Writer  # noqa: E402
from glmlora.serving.schema import ChatRequest  # noqa: E402

FUNCTION = {"name": "weather", "description": "of a city", "parameters": {"type": "object"}}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"a": "b"}'}}


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    path = tiny_glm4_dir(tmp_path_factory.mktemp("glm4"))
    model = glmlora.AutoModel.from_pretrained(path)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(path)
    return Writer(Kept("m", 0, model, "auto", None), tokenizer)


def request(messages, **more):
    return ChatRequest.model_validate({"model": "m", "messages": messages, **more})


def test_a_conversation_with_calls_is_that_of_chat(writer):
    """As `chat` writes it from the history that it gave."""
    asked = request(
        [
            {"role": "user", "content": "sun?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
        ],
        tools=TOOLS,
    )
    history = [
        {"role": "system", "content": "", "tools": TOOLS},
        {"role": "user", "content": "sun?"},
        {"role": "assistant", "metadata": "weather", "content": '{"a": "b"}'},
    ]
    expected = writer.family.chat_ids(writer.tokenizer, "rain", history, "observation")
    assert writer.ids(asked.messages, asked.tools) == list(expected)
    plain = request([{"role": "system", "content": "x"}, {"role": "user", "content": "hi"}])
    history = [{"role": "system", "content": "x"}]
    expected = writer.family.chat_ids(writer.tokenizer, "hi", history, "user")
    assert writer.ids(plain.messages, []) == list(expected)
    with pytest.raises(ValueError, match=r"messages\[0\]: arguments: expected a JSON object"):
        wrong = {**CALL, "function": {"name": "weather", "arguments": "[1]"}}
        said = [{"role": "assistant", "tool_calls": [wrong]}, {"role": "user", "content": "?"}]
        writer.ids(request(said).messages, [])


def test_a_call_is_read_back_in_each_family():
    parameters = {"city": "北京", "n": 2}
    for family in families.all_families().values():
        if family.calls_tools:
            assert family.tool_parameters(family.call_text(parameters)) == parameters


def fed(answer, tokenizer, text):
    """(what is told while it comes, what in the end)."""
    told = []
    for token in tokenizer.text_ids(text):
        answer.feed(token)
        told.append(answer.news())
    answer.close()
    return [one for one in told if one], answer.news(last=True)


def test_a_call_in_an_answer_is_told_as_one(writer):
    tools = request([{"role": "user", "content": "x"}], tools=TOOLS).tools
    answer = Answer(writer, tools)
    told, last = fed(answer, writer.tokenizer, 'weather\n{"city": "x"}')
    assert told == [] and last == {}
    [call] = answer.tool_calls()
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "x"}
    answer = Answer(writer, tools)
    told, last = fed(answer, writer.tokenizer, "\nno weather here")
    assert answer.tool_calls() is None and len(told) > 2
    assert "".join(one["content"] for one in [*told, last] if one) == "no weather here"
    answer = Answer(writer)  # nobody told of tools
    fed(answer, writer.tokenizer, "weather\nis fine")
    assert answer.tool_calls() is None and answer.content == "weather\nis fine"


def test_a_stop_is_held_back_until_it_is_none(writer):
    answer = Answer(writer, stops=["abc"])
    told, last = fed(answer, writer.tokenizer, "\nxx ab ab abc yy")
    text = "".join(one.get("content", "") for one in [*told, last])
    assert answer.stopped and text.strip() == "xx ab ab"
    assert all("abc" not in one.get("content", "") for one in told)
    answer = Answer(writer, stops=["abc"])
    told, last = fed(answer, writer.tokenizer, "\nxx ab")
    assert not answer.stopped and answer.content == "xx ab" and last == {"content": "ab"}
