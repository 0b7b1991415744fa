"""The texts of the transformers layouts: prompts, tools, ends, labels, and every way of training
and answering over a tiny model of each family. The numbers are test_golden.py's."""

import csv
import json

import numpy as np
import pytest
import tiny
import training
from chat_templates import KNOWN
from test_glm4 import FUNCTION
from test_labels import check as check_labels
from test_workflow import run_the_documents_notebook

import glmlora
from glmlora import families
from glmlora.tokenization import AutoTokenizer
from glmlora.training.arguments import DataArguments
from glmlora.training.records import encode, encode_records

pytest.importorskip("tiktoken", reason="their vocabulary is read by tiktoken")

USER = "<|user|>"
KINDS = {  # family: (changes of the config, what an answer begins with)
    "hf": ({}, "\n"),
    "0414": ({"model_type": "glm4"}, "\n"),
    "z1": (
        {"model_type": "glm4", "template": KNOWN["z1"], "thinks": True},
        "</think>\n",
    ),
    "edge": ({"tie_word_embeddings": True}, "\n"),
}
GOLDEN = {"hf": "glm4_9b", "0414": "glm4_0414", "z1": "glm_z1", "edge": "glm_edge"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    return tiny.tiny_transformers_dir(tmp_path_factory.mktemp(kind), **KINDS[kind][0])


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def speaking(kind, tmp_path_factory):
    """A model that answers "1" to everything."""
    folder = tiny.tiny_transformers_dir(tmp_path_factory.mktemp("speaking"), **KINDS[kind][0])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    family = families.of(kind)
    ids = [*family.opening_ids(tokenizer)[-1:], *family.answer_ids(tokenizer, "1")]
    return tiny.speak(folder, [*ids, tokenizer.get_command(USER)], kind)


def opened(folder, **words):
    return (c.from_pretrained(folder, **words) for c in (glmlora.AutoModel, AutoTokenizer))


# Prompts


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("family", GOLDEN)
def test_prompts_are_the_published_template(shared, family):
    place = shared / "golden/tokenizer-glm4-hf-tiny"
    plain = AutoTokenizer.from_pretrained(place, family=family)
    telling = AutoTokenizer.from_pretrained(place, family=family, encode_special_tokens=True)
    file = shared / "golden/chat-glm4-tiny/golden.json"
    cases = json.loads(file.read_text(encoding="utf-8"))["prompts"][GOLDEN[family]]
    assert len(cases) in (18, 24)
    n_plain = 0
    for case in cases:
        messages, prompt = case["messages"], case["add_generation_prompt"]
        words = {"tools": case["tools"]} if case.get("tools") else {}
        text = plain.apply_chat_template(messages, prompt, tokenize=False, **words)
        assert text == case["text"], (family, case["case"])
        assert telling.encode(text, add_special_tokens=False) == case["ids"]
        ids = plain.apply_chat_template(messages, prompt, **words)
        assert plain.decode(ids) == text
        if case["case"] != "special_typed" and "<think>" not in repr(messages):
            assert ids == case["ids"], (family, case["case"])  # no text of a user makes a token
            n_plain += 1
            if prompt and not words and messages[-1]["role"] == "user":
                *history, last = messages
                asked = plain.build_chat_input(last["content"], history).input_ids
                assert asked.tolist() == [ids]
    assert n_plain >= 12


def test_a_directory_tells_its_family(kind, folder):
    model, tokenizer = opened(folder)
    assert (model.config.family, tokenizer.family) == (kind, kind)
    ends = families.of(kind).end_ids(tokenizer, [])
    assert sorted(ends) == sorted(model.config.eos_token_ids) == [376, 383, 385]


@pytest.mark.parametrize(
    ("name", "changes", "family"),
    [
        ("glm-4-9b-chat-hf", {}, "hf"),
        ("GLM-4-9B-0414", {"model_type": "glm4"}, "0414"),
        ("GLM-Z1-9B-0414", {"model_type": "glm4"}, "z1"),
        ("GLM-Z1-Rumination-32B-0414", {"model_type": "glm4"}, "rumination"),
        ("glm-edge-4b-chat", {}, "edge"),
        ("x", {"vocab_size": 59264}, "edge"),
        ("x", {"model_type": "glm4", "template": KNOWN["z1"]}, "z1"),
        ("x", {"model_type": "glm4", "template": KNOWN["rumination"]}, "rumination"),
        ("x", {"model_type": "glm4", "glmlora_family": "z1"}, "z1"),
    ],
)
def test_names_and_files_tell_the_family(tmp_path, name, changes, family):
    place = tiny.tiny_transformers_dir(tmp_path, **changes).rename(tmp_path / name)
    assert glmlora.AutoConfig.from_pretrained(place).family == family
    assert AutoTokenizer.from_pretrained(place).family == family
    if changes.get("template"):  # the tokenizer alone, and as a file of its own
        config = json.loads((place / "tokenizer_config.json").read_text())
        (place / "chat_template.jinja").write_text(config.pop("chat_template"))
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        assert AutoTokenizer.from_pretrained(place).family == family
        (place / "config.json").unlink()
        assert AutoTokenizer.from_pretrained(place).family == family


TEMPLATE = KNOWN["0414"]


def test_tools_beside_messages_are_told_in_the_checkpoints_words(tmp_path):
    folder = tiny.tiny_transformers_dir(tmp_path, model_type="glm4", template=TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}]
    for several in (messages, [messages]):
        text = tokenizer.apply_chat_template(several, True, tokenize=False, tools=[FUNCTION])
        assert (text if several is messages else text[0]) == (
            '[gMASK]<sop><|system|>\nYou have tools.\n\n# Tools\n## f\n\n{\n    "name": "f",\n'
            '    "description": "天"\n}\nAnswer with JSON.<|system|>\ns<|user|>\nq<|assistant|>'
        )
    asked = tokenizer.build_chat_input("s", messages[:1], "system").input_ids[0].tolist()
    assert asked == tokenizer.apply_chat_template(messages, True)
    called = {"role": "assistant", "metadata": "f ", "content": "{}"}  # as an answer keeps it
    assert tokenizer.apply_chat_template([called], tokenize=False).endswith("<|assistant|>f \n{}")


def test_edge_has_no_observations(tmp_path):
    folder = tiny.tiny_transformers_dir(tmp_path, tie_word_embeddings=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="role: expected one of system user assistant, got 'obs"):
        tokenizer.build_chat_input("25 C", [], "observation")
    messages = [{"role": r, "content": r, "metadata": "m"} for r in ("user", "observation")]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|user|>\nuser<|assistant|>"


# Thoughts

TOOLS = [{"role": "system", "content": "", "tools": [FUNCTION]}]


@pytest.mark.parametrize(
    ("text", "history", "answer", "thought"),
    [
        ("\nadd them\n</think>\n\n2", [], "2", "add them"),
        ("\nadd th", [], "", "add th"),
        ("</think>2\nmore", [], "2\nmore", ""),
        ("<think>a</think>b</think>c", [], "b</think>c", "a"),
        ('x</think>\nf \n{"a": 1}', TOOLS, {"name": "f", "parameters": {"a": 1}}, "x"),
        ('x</think>\ng\n{"a": 1}', TOOLS, 'g\n{"a": 1}', "x"),
    ],
)
def test_a_thought_is_kept_apart(text, history, answer, thought):
    asked = [*history, {"role": "user", "content": "q"}]
    got, after = families.of("z1").answer(text, asked)
    assert (got, after[-1]["thought"]) == (answer, thought)
    assert after[: len(asked)] == asked and len(after) == len(asked) + 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("thinks", [True, False])
def test_a_thought_is_in_no_later_prompt_but_may_be_learnt(tmp_path, thinks):
    """With tokens of its own around a thought, and as text."""
    folder = tiny.tiny_transformers_dir(tmp_path, model_type="glm4", thinks=thinks)
    tokenizer = AutoTokenizer.from_pretrained(folder, family="z1")
    message = {"role": "assistant", "content": "2", "thought": "add"}
    ids = tokenizer.build_chat_input("x", [message]).input_ids[0].tolist()
    text = "[gMASK]<sop><|assistant|>\n2<|user|>\nx<|assistant|>\n<think>"
    assert tokenizer.decode(ids) == text and (390 in ids) == thinks
    row = {"prompt": "x", "query": "", "response": "<think>\nadd\n</think>\n\n2", "history": []}
    labels = encode_records([row], tokenizer).target(0).tolist()
    assert tokenizer.decode(labels) == f"\nadd\n</think>\n\n2{USER}" and (391 in labels) == thinks


# Training


def test_a_record_is_the_chat_and_its_labels_end_in_user(kind, tokenizer):
    row = {"prompt": "判断", "query": "T", "response": "1 你好", "history": [["q", "a"]]}
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "判断T"},
    ]
    data = encode_records([{**row, "system": "be kind"}], tokenizer)
    assert data.source(0).tolist() == tokenizer.apply_chat_template(messages, True), kind
    labels = tokenizer.decode(data.target(0).tolist())
    assert labels == f"{KINDS[kind][1]}1 你好{USER}", kind


def test_a_pad_that_is_the_end_is_learnt(kind, folder):
    """`ignore_pad_token_for_loss` leaves the pad id out of the labels, but never the end."""
    model, tokenizer = opened(folder)
    rows = [{"prompt": "p", "query": "", "response": "1", "history": []}]
    args = DataArguments(ignore_pad_token_for_loss=True)
    for pad in ("<|endoftext|>", USER):
        tokenizer.pad_token = pad
        data = encode(rows, tokenizer, args, model.config, "x")
        labels = data.batch(np.arange(1)).labels
        assert tokenizer.get_command(USER) in labels.tolist()


# Answers


def test_a_conversation(kind, speaking):
    model, tokenizer = opened(speaking)
    answer, history = model.chat(tokenizer, "你好", do_sample=False, max_new_tokens=20)
    assert answer == "1" and [m["role"] for m in history] == ["user", "assistant"], kind
    assert history[-1].get("thought") == ("" if kind == "z1" else None)
    shown = list(model.stream_chat(tokenizer, "你好", [], do_sample=False))
    assert shown[-1] == (answer, history)
    assert {text for text, _ in shown} <= {"", "1"}, kind  # a thought is never shown as an answer
    assert model.chat(tokenizer, "天", history, do_sample=False, max_new_tokens=20)[0] == "1"
    asked = tokenizer.build_chat_input("天", history).input_ids[0].tolist()
    assert model.cached_row.ids[0][: len(asked)] == asked
    assert model.batch_chat(tokenizer, ["你好", "a" * 20, ""], do_sample=False) == ["1"] * 3


def test_a_trained_model_goes_on_and_answers_merged_quantized_and_in_tables(folder, tmp_path, kind):
    data = [{"instruction": f"paper {i}", "output": str(i % 2)} for i in range(4)]
    words = {"lora_rank": 16, "lora_target": "all", "max_steps": 60, "learning_rate": 2e-2}
    words |= {"save_steps": 30}
    whole = training.run(str(folder), tmp_path / "out", data, **words)
    words |= {"resume_from_checkpoint": str(tmp_path / "out/checkpoint-30")}
    again = training.run(str(folder), tmp_path / "again", data, **words)
    assert training.losses(again) == training.losses(whole)
    base, tokenizer = opened(folder)
    queries, answers = [row["instruction"] for row in data], [row["output"] for row in data]
    tuned = glmlora.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert tuned.batch_chat(tokenizer, queries, do_sample=False, max_new_tokens=20) == answers
    weighed = check_labels(tuned, tokenizer, queries, ["0", "1", "01", "你好"])
    assert weighed.label == answers and weighed.mass.min() > 0.1
    rows = [{"title": query} for query in queries]
    tuned.predict_table(tokenizer, rows, "{title}", output=tmp_path / "o.csv")
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as f:
        assert [row[-1] for row in csv.reader(f)][1:] == answers
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    for bits in (None, 4):
        saved, saved_tokenizer = opened(tmp_path / "merged")
        assert saved.config.family == saved_tokenizer.family == kind
        saved = saved.quantize(bits) if bits else saved
        found = saved.batch_chat(saved_tokenizer, queries, do_sample=False, max_new_tokens=20)
        assert sum(a == b for a, b in zip(found, answers, strict=True)) >= (2 if bits else 4)


def test_the_documents_notebook_untouched(speaking, tmp_path, shared):
    """As in test_workflow.py, over each family; its last cell wants 2,000 rows."""
    run_the_documents_notebook(speaking, tmp_path, shared)
