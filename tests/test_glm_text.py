"""The texts of the transformers layouts: prompts, tools, ends, labels, and every way of training
and answering over a tiny model of each family. The numbers are test_golden.py's."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import training
from test_labels import check as check_labels
from test_workflow import ENV, check_submission, shorten

import glmlora
from glmlora import families
from glmlora.files.checkpoint import write_safetensors
from glmlora.tokenization import AutoTokenizer
from glmlora.tools import project
from glmlora.training.arguments import DataArguments
from glmlora.training.records import encode, encode_records

pytest.importorskip("tiktoken", reason="their vocabulary is read by tiktoken")

USER = "<|user|>"
KINDS = {  # family: (changes of the config, what an answer begins with)
    "hf": ({}, "\n"),
}
GOLDEN = {"hf": "glm4_9b"}


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
    ids.append(tokenizer.get_command(USER))
    weights = {name: np.array(a) for name, a in glmlora.load_state_dict(folder).items()}
    embedding = weights["model.embed_tokens.weight"]
    output = weights.setdefault("lm_head.weight", np.zeros_like(embedding))
    embedding[:, : len(ids)] = output[:, : len(ids)] = 0
    for channel, (i, following) in enumerate(zip(ids, ids[1:], strict=False)):
        embedding[i] = np.eye(32)[channel]
        output[following, channel] = 5
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")) or "post_" in name[-30:]:
            weights[name] *= 0.01 if "post_attention" not in name else 1
    write_safetensors(folder / "model.safetensors", weights)
    if KINDS[kind][0].get("tie_word_embeddings"):
        config = json.loads((folder / "config.json").read_text())
        config |= {"tie_word_embeddings": False, "glmlora_family": kind}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


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
    *_, (streamed, past) = model.stream_chat(tokenizer, "你好", [], do_sample=False)
    assert (streamed, past) == (answer, history)
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
    assert weighed.label == answers and weighed.mass.min() > 0.2
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
    (tmp_path / "chatglm2-6b").symlink_to(speaking, target_is_directory=True)
    home = project.init(tmp_path / "xfg", model=speaking)
    shorten(home / "csv_data/train.csv", 16)
    shorten(home / "csv_data/testB.csv", 2000, words=2)
    done = subprocess.run(
        [sys.executable, "-m", "glmlora", "run", str(shared / "seed/xfg.ipynb")],
        **dict(cwd=home, env=ENV, capture_output=True, text=True),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    check_submission(home / "submit.csv", 2000)
