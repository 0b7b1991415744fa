"""Chat templates that checkpoints bring: which of them a family writes by itself, what others do to
prompts, labels and answers, and what no template can do. Their texts are compared with those of
transformers in test_signatures_templates.py."""

import copy
import csv
import json
import os
import pickle
import sys
import threading

import pytest
import tiny
from chat_templates import KNOWN, OTHERS

import glmlora
from glmlora import families, rendering, tell
from glmlora.files.checkpoint import write_json
from glmlora.tokenization import AutoTokenizer
from glmlora.training.records import encode_records

pytest.importorskip("tiktoken", reason="the vocabulary of these families is read by tiktoken")
pytest.importorskip("jinja2", reason="other templates are rendered by jinja2")

USER, END = "<|user|>", "<|endoftext|>"
TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n2"},
    {"role": "user", "content": " and\n2+2? "},
]
FUNCTION = {"type": "function", "function": {"name": "f", "description": "天 <"}}
FAMILIES = ("g4", "hf", "0414", "z1", "rumination", "edge")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.tiny_transformers_dir(tmp_path_factory.mktemp("model"), thinks=True)


def with_template(folder, template, family="hf", **words):
    """Its tokenizer, with a template."""
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": template})
    return AutoTokenizer.from_pretrained(folder, family=family, **words)


def rendered(tokenizer, messages, prompt, **variables):
    """The text by jinja2, whoever would write it."""
    source = tokenizer.chat_template
    return tokenizer.apply_chat_template(
        messages, prompt, tokenize=False, chat_template=source, **variables
    )


# Which templates are known


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_write_their_templates_by_themselves(folder, family):
    tokenizer = with_template(folder, KNOWN[family], family)
    assert tokenizer.writer is families.of(family)
    messages = TALK[1:] if family == "rumination" else TALK
    for prompt in (True, False):
        text = tokenizer.apply_chat_template(messages, prompt, tokenize=False)
        assert text == rendered(tokenizer, messages, prompt)
        ids = tokenizer.apply_chat_template(messages, prompt)
        assert tokenizer.decode(ids) == text
    if families.of(family).takes_tools:
        text = tokenizer.apply_chat_template(TALK, True, tokenize=False, tools=[FUNCTION])
        assert text == rendered(tokenizer, TALK, True, tools=[FUNCTION]) and "## f" in text


@pytest.mark.filterwarnings("error")
def test_a_vocabulary_of_pieces_and_its_template(tmp_path):
    tiny.tiny_tokenizer_dir(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": KNOWN["v3"]})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.family == "v3" and tokenizer.writer is families.of("v3")
    text = tokenizer.apply_chat_template(TALK, True, tokenize=False)
    assert text == rendered(tokenizer, TALK, True)
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": KNOWN["v3"] + "!"})
    other = AutoTokenizer.from_pretrained(tmp_path)
    ids = other.build_chat_input("x").input_ids[0].tolist()
    assert ids == other.apply_chat_template([{"role": "user", "content": "x"}], True)
    text = "[gMASK]sop<|user|>\n x<|assistant|>!"
    assert other.decode(ids).replace(" ", "") == text.replace(" ", "")
    assert ids[:2] == other.get_prefix_tokens()


def test_rounds_are_no_messages_and_stay(tmp_path):
    """ChatGLM2's chat has rounds, whatever template stands beside it."""
    tiny.tiny_tokenizer_dir(tmp_path)
    template = "{% for m in messages %}{{ m.content }};{% endfor %}"
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": template})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, family="v2")
    assert tokenizer.writer is families.of("v2")
    assert tokenizer.apply_chat_template(TALK[:2], tokenize=False) == "be kind;1+1?;"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_template_that_was_edited_is_another(folder, family):
    edited = KNOWN[family].replace("<|user|>\n", "<|user|>", 1)
    edited = edited.replace("<|{{ item['role'] }}|>", "<|{{ item['role'] }}|> ")
    assert edited != KNOWN[family]
    tokenizer = with_template(folder, edited, family)
    assert tokenizer.writer is not families.of(family)
    messages = [{"role": "user", "content": "q"}]
    ids = tokenizer.build_chat_input("q").input_ids[0].tolist()
    assert tokenizer.decode(ids) == rendered(tokenizer, messages, True)


def test_without_jinja2_marks_tell_and_others_are_refused(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    for family in FAMILIES:
        assert with_template(folder, KNOWN[family], family).writer is families.of(family)
    tokenizer = with_template(folder, next(iter(OTHERS.values())))
    needs = r'chat_template is not one that is known here; jinja2 is missing.*install "glmlora\[t'
    for use in (
        lambda: tokenizer.apply_chat_template(TALK),
        lambda: tokenizer.build_chat_input("q"),
        lambda: encode_records([{"prompt": "p", "response": "1"}], tokenizer),
    ):
        with pytest.raises(ImportError, match=needs):
            use()


# Conversations


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", OTHERS)
def test_another_template_writes_chats_and_labels(folder, name):
    tokenizer = with_template(folder, OTHERS[name])
    assert tokenizer.writer is not families.of("hf")
    text = tokenizer.apply_chat_template(TALK, True, tokenize=False)
    ids = tokenizer.apply_chat_template(TALK, True)
    assert tokenizer.decode(ids) == text
    special = tokenizer.special_tokens
    assert special[USER] in ids and special["<|assistant|>"] in ids
    *history, last = TALK
    assert tokenizer.build_chat_input(last["content"], history).input_ids[0].tolist() == ids
    both = tokenizer.apply_chat_template([TALK, TALK[:2]], True, padding=True, return_tensors="np")
    assert both[0].tolist() == ids and both[1][0] == tokenizer.pad_token_id
    row = {"prompt": "and", "query": "2+2?", "history": [["1+1?", "2"]], "system": "be kind"}
    data = encode_records([{**row, "response": "4 你好"}], tokenizer)
    asked = [*TALK[:2], {"role": "assistant", "content": "2"}]
    asked += [{"role": "user", "content": "and2+2?"}]
    prompt = data.source(0).tolist()
    assert prompt == tokenizer.apply_chat_template(asked, True)
    labels = data.target(0).tolist()
    ends = tokenizer.writer.end_ids(tokenizer, [])
    assert labels[-1] in ends and not set(labels[:-1]) & set(ends)
    whole = tokenizer.apply_chat_template(
        [*asked, {"role": "assistant", "content": "4 你好"}], tokenize=False
    )
    said = tokenizer.decode(prompt + labels[:-1])
    if "opened" in name:  # an empty thought, which the template leaves out later
        assert said.endswith("<think>\n</think>\n4 你好")
    else:
        assert whole.startswith(said) and said.endswith("4 你好")
    end = END if name == "an end behind each answer" else USER
    assert labels[-1] == special[end]
    cut = encode_records([{**row, "query": "x " * 99, "response": "1"}], tokenizer, 60)
    opening = text[text.rindex("<|assistant|>") :]
    assert len(cut.source(0)) <= 60
    assert tokenizer.decode(cut.source(0).tolist()).endswith(opening)


def test_a_thought_that_is_learnt_takes_the_place_of_an_empty_one(folder):
    tokenizer = with_template(folder, OTHERS["thoughts to be switched off"])
    writer = tokenizer.writer
    for response, text in (
        ("4", "\n<think></think>\n4"),
        ("<think>add</think>\n4", "\n<think>add</think>\n4"),
    ):
        ids = writer.answer_ids(tokenizer, response)
        assert tokenizer.decode(ids) == text and {390, 391} <= set(ids)


def test_thoughts_are_switched_off_and_other_names_refused(folder):
    tokenizer = with_template(folder, OTHERS["thoughts to be switched off"])
    asked = TALK[:2]
    on, off = (
        tokenizer.apply_chat_template(asked, True, tokenize=False, enable_thinking=value)
        for value in (True, False)
    )
    assert on.endswith("1+1?<|assistant|>")
    assert off.endswith("1+1?/nothink<|assistant|>\n<think></think>")
    thought = {"role": "assistant", "content": "2", "reasoning_content": "add"}
    shown = tokenizer.apply_chat_template([*asked, thought], tokenize=False)
    assert shown.endswith("<|assistant|>\n<think>add</think>\n2")
    with pytest.raises(TypeError, match="'enable_thinkng', which .*did you mean 'enable_thinking"):
        tokenizer.apply_chat_template(asked, enable_thinkng=False)
    for family, value in (("z1", False), ("hf", True)):
        known = with_template(folder, KNOWN[family], family)
        with pytest.raises(ValueError, match="enable_thinking: GLM.* (always thinks|no thoughts)"):
            known.apply_chat_template(asked, enable_thinking=value)
        assert known.apply_chat_template(asked, enable_thinking=not value)
    plain = with_template(folder, OTHERS["an end behind each answer"])
    for name, value in (("enable_thinking", True), ("documents", [{"title": "t"}])):
        with pytest.raises(ValueError, match=f"{name}: is not supported"):
            plain.apply_chat_template(asked, **{name: value})
    with pytest.raises(TypeError, match="'tools', which .*chat_template does not read"):
        plain.apply_chat_template(asked, tools=[FUNCTION])


def test_a_template_says_what_it_does_not_take(folder):
    tokenizer = with_template(folder, OTHERS["tools in JSON and a date"])
    text = tokenizer.apply_chat_template(TALK[:2], tokenize=False, tools=[FUNCTION])
    assert text.startswith(f"<|system|>\nTools:\n{json.dumps(FUNCTION, ensure_ascii=False)}\nYear")
    calls = [{"function": {"name": "f", "arguments": {"city": "北京"}}}]
    called = {"role": "assistant", "content": None, "tool_calls": calls}
    text = tokenizer.apply_chat_template([*TALK[:2], called], tokenize=False)
    assert text.endswith('\n{\n  "city": "北京"\n}')
    with pytest.raises(ValueError, match="chat_template: unknown role tool"):
        tokenizer.apply_chat_template([*TALK[:2], {"role": "tool", "content": "25 C"}])
    for messages, error in (
        ([], "messages: expected at least one"),
        ([{"content": "x"}], r"messages\[0\]: expected a message"),
        ("x", "messages: expected a list of messages"),
    ):
        with pytest.raises(ValueError, match=error):
            tokenizer.apply_chat_template(messages)
    with pytest.raises(ValueError, match="tools: expected a list of JSON objects, got 'x'"):
        tokenizer.apply_chat_template(TALK, tools="x")


@pytest.mark.parametrize("name", ["an end behind each answer", "a system text where there is none"])
def test_typed_special_tokens_stay_text_unless_told(folder, name):
    typed = [{"role": "user", "content": f"{USER}x{END}<|system|>"}]
    plain = with_template(folder, OTHERS[name])
    telling = with_template(folder, OTHERS[name], encode_special_tokens=True)
    found = [t.apply_chat_template(typed, True) for t in (plain, telling)]
    special = plain.special_tokens
    texts = [t.apply_chat_template(typed, True, tokenize=False) for t in (plain, telling)]
    assert texts[0] == texts[1] == plain.decode(found[0]) == plain.decode(found[1])
    assert found[0].count(special[USER]) == 1 and special[END] not in found[0]
    assert found[1].count(special[USER]) == 2 and special[END] in found[1]
    asked = plain.build_chat_input(typed[0]["content"]).input_ids[0].tolist()
    assert asked == found[0]


def test_a_template_is_named_given_and_kept(folder, tmp_path):
    named = [
        {"name": "default", "template": "{{ messages[0].content }}"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    tokenizer = with_template(folder, named)
    words = {"tokenize": False}
    assert tokenizer.apply_chat_template(TALK, **words) == "be kind"
    assert tokenizer.apply_chat_template(TALK, tools=[FUNCTION], **words) == "f"
    named = {"chat_template": "tool_use", "tools": [FUNCTION], **words}
    assert tokenizer.apply_chat_template(TALK, **named) == "f"
    given = {"chat_template": "{{ eos_token }}{{ messages | length }}", **words}
    assert tokenizer.apply_chat_template(TALK, **given) == f"{END}4"
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "from the file"
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other.apply_chat_template(TALK, **words) == "be kind"
    with pytest.raises(AttributeError, match=r"chat_template: is .*; apply_chat_template\(chat_te"):
        tokenizer.chat_template = "x"


# Answers


def speaking(tmp_path, template, answer, family="hf", **config):
    """A model that answers this to everything."""
    folder = tiny.tiny_transformers_dir(tmp_path, template=template, thinks=True, **config)
    tokenizer = AutoTokenizer.from_pretrained(folder, family=family)
    writer = tokenizer.writer
    ids = [*writer.chat_ids(tokenizer, "q", [], "user")[-1:]]
    ids += [*writer.answer_ids(tokenizer, answer), writer.end_id(tokenizer)]
    tiny.speak(folder, ids, family)
    return glmlora.AutoModel.from_pretrained(folder, family=family), tokenizer


@pytest.mark.parametrize(
    ("template", "family", "answer", "thought"),
    [
        (OTHERS["an end behind each answer"], "hf", "1", None),
        (OTHERS["thoughts to be switched off"], "hf", "<think>ad</think>1", "ad"),
        (OTHERS["thoughts opened by the prompt"], "hf", "ad</think>1", "ad"),
        (KNOWN["rumination"], "rumination", "<think>ad</think>1", "ad"),
        (KNOWN["z1"], "z1", "ad</think>\n1", "ad"),
    ],
)
def test_answers_come_without_their_thoughts_everywhere(
    tmp_path, template, family, answer, thought
):
    kind = {"model_type": "glm4"} if family != "hf" else {}
    model, tokenizer = speaking(tmp_path, template, answer, family, **kind)
    how = {"do_sample": False, "max_new_tokens": 30}
    response, history = model.chat(tokenizer, "你好", **how)
    assert (response, history[-1].get("thought")) == ("1", thought)
    shown = list(model.stream_chat(tokenizer, "你好", **how, return_past_key_values=True))
    assert {text for text, _, _ in shown} <= {"", "1"} and shown[-1][:2] == (response, history)
    later = list(
        model.stream_chat(
            *(tokenizer, "天", history),
            **how,
            past_key_values=shown[-1][2],
            return_past_key_values=True,
        )
    )[-1]
    assert later[0] == "1"
    if family == "hf":  # what the cache held is rewritten by the template
        asked = tokenizer.build_chat_input("天", history).input_ids[0].tolist()
        assert later[2].ids[: len(asked)] == asked
    assert model.batch_chat(tokenizer, ["你好", "a" * 9], **how) == ["1", "1"]
    table = tmp_path / "o.csv"
    model.predict_table(tokenizer, [{"title": "x"}], "{title}", output=table, max_new_tokens=30)
    with open(table, encoding="utf-8", newline="") as f:
        assert [row[-1] for row in csv.reader(f)][1:] == ["1"]
    weighed = model.classify(tokenizer, ["你好"], ["1", "0"])
    assert weighed.label == ["1"]


def test_rumination_has_its_own_system_text_and_calls(folder, monkeypatch):
    monkeypatch.setattr(tell, "_told", set())
    tokenizer = with_template(folder, KNOWN["rumination"], "rumination")
    with pytest.warns(UserWarning, match="system messages and tools are not used"):
        text = tokenizer.apply_chat_template(TALK, True, tokenize=False)
    assert text == (
        '[gMASK]<sop><|system|>\nYou search.\n\n<tools>\n[{"name": "search"}]<|user|>\n1+1?'
        "<|assistant|>\n2<|user|>\nand\n2+2?<|assistant|>"
    )
    rumination = families.of("rumination")
    call = '{"name": "search", "arguments": {"query": "x"}}'
    for text, answer, thought in (
        (f"\n<think>a</think>\n{call}", {"name": "search", "parameters": {"query": "x"}}, "a"),
        (f"\n<think>a</think>\n{call[:-1]}", call[:-1], "a"),
        ('\n{"name": 1}', '{"name": 1}', None),
        ("\n<think>a", "", "a"),
        ("\n<thi", "", ""),
        ("\nplain", "plain", None),
    ):
        got, history = rumination.answer(text, [{"role": "user", "content": "q"}])
        assert (got, history[-1].get("thought")) == (answer, thought)
    bare = with_template(folder, None, "rumination")
    with pytest.warns(UserWarning, match="the checkpoint has no chat_template"):
        assert bare.apply_chat_template(TALK[1:2], tokenize=False) == "[gMASK]<sop><|user|>\n1+1?"


# What no template can do


@pytest.fixture
def limits(monkeypatch):
    """Small ones, and a process of its own that has them."""
    rendering._worker.end()
    monkeypatch.setattr(rendering, "MAX_SECONDS", 1)
    monkeypatch.setattr(rendering, "MAX_CHARACTERS", 1 << 16)
    monkeypatch.setattr(rendering, "MAX_MEMORY", 1 << 28)
    yield
    rendering._worker.end()


LOOP = "{% for i in range(99999) %}"
BOUNDED = {
    "a loop without end": (f"{LOOP}{LOOP}{'{% endfor %}' * 2}", "takes longer than 1 s"),
    "a power": ("{{ 9 ** (9 ** 9) }}", "takes longer than 1 s|MiB of memory"),
    "a huge string": ("{{ 'a' * 10 ** 10 }}", "takes more than 256 MiB of memory"),
    "a huge field": ("{{ '%1000000000d' % 1 }}", "takes more than 256 MiB of memory"),
    "a string that doubles": (
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "takes more than 256 MiB of memory",
    ),
    "a long text": (f"{LOOP}{{{{ 'a' * 99 }}}}{{% endfor %}}", "writes more than 65536 characters"),
    "a macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "a class": ("{{ ''.__class__.__base__.__subclasses__() }}", "unsafe"),
    "globals": ("{{ cycler.__init__.__globals__.os.listdir('/') }}", "unsafe"),
    "globals of a function": ("{{ raise_exception.__globals__.json }}", "unsafe"),
    "a hidden name": ("{{ namespace(__class__=1) }}", "begins with _"),
    "a change of what it is given": ("{{ messages.append(1) }}", "unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "an undefined name": ("{{ a.b.c }}", "'a' is undefined"),
    "a broken one": ("{% if %}", "line 1: "),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_template_is_bounded(folder, limits, name):
    source, error = BOUNDED[name]
    tokenizer = with_template(folder, source)
    with pytest.raises(ValueError, match=f"tiny-model: chat_template: .*({error})"):
        tokenizer.apply_chat_template(TALK)
    assert rendering.render("{{ x }}", {"x": "works again"}) == "works again"


def test_the_process_can_open_nothing(limits):
    """Were the sandbox left, what stands behind it is closed, too."""
    rendering.render("", {})
    worker = rendering._worker._process.pid
    with open(f"/proc/{worker}/limits", encoding="utf-8") as f:
        found = {line[:26].strip(): line[26:].split()[:2] for line in f}
    assert found["Max open files"] == ["3", "3"] and found["Max file size"] == ["0", "0"]
    assert found["Max address space"] == [str(1 << 28)] * 2


def test_an_interrupt_ends_the_rendering_and_the_next_one_works(monkeypatch):
    def interrupted(process, line):
        raise KeyboardInterrupt

    rendering.render("", {})
    process = rendering._worker._process
    monkeypatch.setattr(rendering._worker, "_exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rendering.render("{{ 1 }}", {})
    assert process.returncode is not None
    monkeypatch.undo()
    assert rendering.render("{{ 2 }}", {}) == "2"


def test_forks_and_threads_have_answers_of_their_own():
    assert rendering.render("{{ 1 }}", {}) == "1"
    child = os.fork()
    if child == 0:
        try:
            fine = rendering.render("{{ 2 }}", {}) == "2"
            rendering._worker.end()
        except BaseException:
            fine = False
        os._exit(0 if fine else 1)
    found = []
    threads = [
        threading.Thread(
            target=lambda i=i: found.append(rendering.render("{{ x }}", {"x": i}) == str(i))
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8
    assert os.waitpid(child, 0)[1] == 0


def test_what_json_does_not_have_is_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        rendering.render("{{ x }}", {"x": object()})
    assert rendering.render("{{ x }}", {"x": 1}) == "1"
