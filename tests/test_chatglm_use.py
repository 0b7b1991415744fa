"""ChatGLM-6B as users have it: chats, training by every method, tables, the command line and the
document's notebook, over tiny models of both releases. The numbers are test_chatglm_6b.py's, the
texts test_chatglm_text.py's."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import training
from emulator import built, needs_compiler
from test_chat import Scripted
from test_labels import check as check_labels
from test_workflow import ENV, run_the_documents_notebook
from tiny_chatglm import tiny_chatglm_dir, tiny_weights

import glmlora
from glmlora import tell
from glmlora.families import prompt
from glmlora.files.checkpoint import write_safetensors
from glmlora.generation import chat as chats
from glmlora.tokenization import AutoTokenizer
from glmlora.tools.plan import plan
from glmlora.training.records import encode_records
from glmlora.training.trainer import run_train


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [tiny_chatglm_dir(tmp_path_factory.mktemp("v1"), first=first) for first in (False, True)]


@pytest.fixture(scope="module")
def folder(folders):
    return folders[0]


def opened(folder):
    return glmlora.AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def both(folders):
    return [opened(folder) for folder in folders]


def chained(folder, *texts):
    """Weights that say what follows each token: a token's own channel, and the next one's score."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = tiny_weights(json.loads((folder / "config.json").read_text()))
    ids = [tokenizer.convert_tokens_to_ids(text) for text in texts]
    embedding, output = (
        weights[f"{name}.weight"] for name in ("transformer.word_embeddings", "lm_head")
    )
    embedding[:, : len(ids)] = output[:, : len(ids)] = 0
    for channel, (i, following) in enumerate(zip(ids, ids[1:], strict=False)):
        embedding[i] = 9 * np.eye(32)[channel]
        output[following, channel] = 9
    for name, array in weights.items():
        if name.endswith((".bias", "dense.weight", "dense_4h_to_h.weight")):
            array *= 0.01
    write_safetensors(folder / "model.safetensors", weights)
    return folder


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A model that answers "1" to everything."""
    return chained(
        tiny_chatglm_dir(tmp_path_factory.mktemp("speaking")), "<sop>", "▁", "1", "<eop>"
    )


# Chats


def test_a_conversation(both):
    """What is asked, said and told of it: rounds from 0, punctuation, pairs."""
    for (model, tokenizer), full_width in zip(both, (True, False), strict=True):
        history, seen = [("q", "a")], []
        script = Scripted([*tokenizer.text_ids(" 你好,1 \n"), tokenizer.eos_token_id], 448)

        def look(context, scores, seen=seen, script=script):
            seen.append(context[0].tolist())
            return script(context, scores)

        response, told = model.chat(tokenizer, "title", history, logits_processor=[look])
        assert response == ("你好，1" if full_width else "你好,1")  # noqa: RUF001
        assert told == [("q", "a"), ("title", response)] and history == [("q", "a")]
        text = "[Round 0]\n问：q\n答：a\n[Round 1]\n问：title\n答："
        assert seen[0] == [*tokenizer.text_ids(text), *tokenizer.get_prefix_tokens()]
        assert seen[0] == prompt.chat_ids(tokenizer, "title", history)


def test_a_stream_shows_every_token_once(both):
    for model, tokenizer in both:
        said = [*tokenizer.text_ids("你好 1"), tokenizer.eos_token_id]
        stream = model.stream_chat(tokenizer, "q", [], logits_processor=[Scripted(said, 448)])
        assert list(stream) == [(t, [("q", t)]) for t in ("你好", "你好", "你好 1")]
        short = list(model.stream_chat(tokenizer, "q", max_new_tokens=3, seed=5, top_k=0))
        assert short[-1][0] == model.chat(tokenizer, "q", max_new_tokens=3, seed=5, top_k=0)[0]
        for given in ({"past_key_values": []}, {"return_past_key_values": True}):
            with pytest.raises(ValueError, match="past_key_values: ChatGLM-6B reads every prompt"):
                next(model.stream_chat(tokenizer, "q", **given))


def test_arguments_by_position_and_the_familys_defaults(both, monkeypatch):
    model, tokenizer = both[0]
    real, found = chats._settings, []

    def spy(*given):
        found.append(real(*given))
        found[-1].max_new_tokens = 1
        return found[-1]

    monkeypatch.setattr(chats, "_settings", spy)

    def asked(method, *given, **named):
        for _ in method(tokenizer, "q", [], *given, **named):
            pass
        g = found[-1]
        return g.max_length, g.num_beams, g.do_sample, g.top_p, g.temperature, g.top_k

    usual = (2048, 1, True, 0.7, 0.95, 50)
    assert asked(model.chat) == asked(model.stream_chat) == usual
    model.batch_chat(tokenizer, ["q"])
    [*chats.chat_rows(model, tokenizer, ["q"])]
    for g in found[-2:]:
        assert (g.max_length, g.top_p, g.temperature) == (2048, 0.7, 0.95)
    assert asked(model.chat, 300, 1, False, 0.5, 0.25) == (300, 1, False, 0.5, 0.25, 50)
    assert asked(model.stream_chat, 300, False, 0.5, 0.25) == (300, 1, False, 0.5, 0.25, 50)
    assert asked(model.chat, top_p=0.8, max_length=8192)[:4:3] == (8192, 0.8)
    with pytest.raises(TypeError, match="positional"):
        model.stream_chat(tokenizer, "q", [], 300, False, 0.5, 0.25, None, 3)
    assert set(model.generation_config.eos) == {tokenizer.eos_token_id}


@pytest.mark.filterwarnings("error")
def test_defaults_have_no_effect_that_is_told(both, monkeypatch):
    monkeypatch.setattr(tell, "_told", set())
    model, tokenizer = both[0]
    settings = {"max_new_tokens": 1, "do_sample": False}
    model.chat(tokenizer, "q", **settings)
    model.batch_chat(tokenizer, ["q"], **settings)
    assert len(list(model.stream_chat(tokenizer, "q", **settings))) <= 1
    with pytest.raises(ValueError, match=r"max_length: prompt of \d+ tokens.*max_length is 3"):
        model.chat(tokenizer, "q 1", max_length=3)
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens: the model has positions for 512"):
        model.chat(tokenizer, "1 " * 600)


def test_many_chats_are_each_alone(both):
    """Beams, rows side by side, and a row that is used again."""
    queries = ["你好", "title", "", "a  b\n", "你好 1"]
    for model, tokenizer in both:
        for settings in ({"do_sample": False}, {"seed": 3}, {"num_beams": 3, "do_sample": False}):
            settings = {**settings, "max_new_tokens": 6}
            alone = [opened_again(model, tokenizer, q, settings) for q in queries]
            assert model.batch_chat(tokenizer, queries, 2, **settings) == alone
            assert [model.chat(tokenizer, q, **settings)[0] for q in queries] == alone
        check_labels(model, tokenizer, queries, ["0", "1", "10", "你好"])


def opened_again(model, tokenizer, query, settings):
    """What a model that has seen nothing answers."""
    return glmlora.AutoModel.from_pretrained(model.name_or_path).chat(tokenizer, query, **settings)[
        0
    ]


def test_what_the_tokenizer_gives_is_what_the_model_takes(both):
    for model, tokenizer in both:
        inputs = tokenizer(["你好", "title 1 0"], padding=True, return_tensors="pt")
        new = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for row, text in enumerate(("你好", "title 1 0")):
            ids = tokenizer.encode(text)
            alone = model.generate([ids], max_new_tokens=4, do_sample=False)
            answer = alone[0, len(ids) :].tolist()
            assert new[row, inputs.input_ids.shape[1] :].tolist()[: len(answer)] == answer
        logits = model(**inputs).logits
        assert (
            np.abs(logits[0, -4:] - model(**tokenizer("你好", return_tensors="pt")).logits).max()
            < 1e-4
        )


# Training


METHODS = {
    "lora": {"lora_target": "all"},
    "p_tuning": {"pre_seq_len": 4, "learning_rate": 0.2},
    "freeze": {"num_layer_trainable": 1, "learning_rate": 0.02},
    "full": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_training_by_every_method_and_going_on(folders, tmp_path, method):
    folder = str(folders[method == "p_tuning"])  # that of the first release
    words = {"finetuning_type": method, "learning_rate": 5e-3, "save_steps": 5, **METHODS[method]}
    whole = training.run(folder, tmp_path / "a", **words)
    logged = training.losses(whole)
    assert logged[-1][1] < logged[0][1] - 0.1
    training.run(folder, tmp_path / "b", **words, max_steps=5, num_train_epochs=2)
    words |= {"resume_from_checkpoint": str(tmp_path / "a/checkpoint-5")}
    again = training.run(folder, tmp_path / "c", **words)
    assert training.losses(again) == logged
    if method == "full":
        assert opened(tmp_path / "a")[1].family == "v1"  # its tokenizer is there, too


@pytest.mark.parametrize("projection", [False, True])
def test_a_trained_prefix_answers(folder, tmp_path, projection):
    """Loaded as THUDM's scripts do, and over an int8 base."""
    data = [{"instruction": f"paper {i}", "output": str(i % 2)} for i in range(4)]
    words = dict(finetuning_type="p_tuning", pre_seq_len=8, max_steps=60, save_steps=100)
    words |= dict(learning_rate=0.05 if projection else 0.2, prefix_projection=projection)
    training.run(str(folder), tmp_path / "out", data, **words)
    config = glmlora.AutoConfig.from_pretrained(folder, pre_seq_len=8, prefix_projection=projection)
    model = glmlora.AutoModel.from_pretrained(folder, config=config)
    state = glmlora.load_state_dict(tmp_path / "out/pytorch_model.bin")
    start = "transformer.prefix_encoder."
    state = {name.removeprefix(start): value for name, value in state.items() if start in name}
    model.transformer.prefix_encoder.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    queries = [row["instruction"] for row in data]
    found = model.classify(tokenizer, queries, ["0", "1"])
    other = glmlora.load_prefix(opened(folder)[0], tmp_path / "out")
    again = other.classify(tokenizer, queries, ["0", "1"])
    assert np.array_equal(found.log_likelihood, again.log_likelihood)
    plain = opened(folder)[0].classify(tokenizer, queries, ["0", "1"])
    assert found.mass.min() > 10 * plain.mass.max()
    small = glmlora.load_prefix(opened(folder)[0].quantize(8), tmp_path / "out")
    assert small.batch_chat(tokenizer, queries, do_sample=False, max_new_tokens=9) == (
        other.batch_chat(tokenizer, queries, do_sample=False, max_new_tokens=9)
    )


@pytest.mark.parametrize("first", [False, True])
def test_a_trained_model_answers_merged_quantized_and_in_tables(folders, tmp_path, first):
    folder = folders[first]
    data = [{"instruction": f"paper {i}", "output": str(i % 2)} for i in range(4)]
    model, tokenizer = opened(folder)
    training.run(
        *(model, tmp_path / "out", data),
        **dict(lora_rank=16, lora_target="all", max_steps=60, learning_rate=2e-2, save_steps=100),
    )
    queries, answers = [row["instruction"] for row in data], [row["output"] for row in data]
    base = glmlora.AutoModel.from_pretrained(folder)
    tuned = glmlora.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert tuned.batch_chat(tokenizer, queries, do_sample=False, max_new_tokens=9) == answers
    weighed = check_labels(tuned, tokenizer, queries, ["0", "1", "01", "你好"])
    assert weighed.label == answers and weighed.mass.min() > 0.1
    rows = [{"title": query} for query in queries]
    tuned.predict_table(tokenizer, rows, "{title}", output=tmp_path / "o.csv")
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as f:
        assert [row[-1] for row in csv.reader(f)][1:] == answers
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged/ice_text.model").is_file()
    saved, tokenizer = opened(tmp_path / "merged")
    for bits in (None, 8, 4):
        if bits:
            saved = glmlora.AutoModel.from_pretrained(tmp_path / "merged").quantize(bits)
            place = tmp_path / f"int{bits}"
            saved.save_pretrained(place)
            tokenizer.save_pretrained(place)
            saved, tokenizer = opened(place)
            assert saved.config.quantization_bit == bits
        found = saved.batch_chat(tokenizer, queries, do_sample=False, max_new_tokens=9)
        assert sum(a == b for a, b in zip(found, answers, strict=True)) >= (2 if bits == 4 else 4)


def test_the_original_trainers_text_is_asked_as_it_was_trained(folder, tmp_path):
    data = [{"instruction": f"paper {i}", "output": str(i % 2)} for i in range(4)]
    words = dict(lora_rank=16, lora_target="all", max_steps=90, learning_rate=2e-2, save_steps=100)
    model, tokenizer = opened(folder)
    training.run(model, tmp_path / "out", data, **words, template="vendored")
    tuned = glmlora.PeftModel.from_pretrained(opened(folder)[0], tmp_path / "out").eval()
    queries, answers = [row["instruction"] for row in data], [row["output"] for row in data]
    assert tuned.batch_chat(tokenizer, queries, do_sample=False, max_new_tokens=9) == answers
    asked = encode_records(
        [{"prompt": "paper 0", "query": "", "response": "0", "history": []}],
        tokenizer,
        template="vendored",
    )
    tuned.chat(tokenizer, "paper 0", do_sample=False, max_new_tokens=1)
    ids = asked.source(0).tolist()
    assert tuned.base_model.model.cached_row.ids[0][: len(ids)] == ids


def test_evaluation_and_prediction(speaking, tmp_path, capsys):
    """The labels are the answers' texts, and every prompt ends where an answer begins."""
    words = ["--model_name_or_path", str(speaking), "--dataset", "paper_label"]
    words += ["--dataset_dir", str(training.dataset_dir(tmp_path, 3)), "--output_dir"]
    words += [
        str(tmp_path / "out"),
        "--max_target_length",
        "6",
        "--do_eval",
        "--do_predict",
        "--predict_with_generate",
    ]
    with pytest.warns(UserWarning, match="no checkpoint_dir"):
        run_train([*words, "--disable_tqdm", "true"])
    lines = (tmp_path / "out/generated_predictions.jsonl").read_text().splitlines()
    said = [{"label": label, "predict": "1"} for label in "010"]
    assert [json.loads(line) for line in lines] == said


@pytest.mark.parametrize("method", ["lora", "head"])
def test_a_classifier(folder, tmp_path, method):
    rows = [{"title": f"paper {i}"} for i in range(8)]
    labels = [str(i % 2) for i in range(8)]
    words = dict(learning_rate=2e-2, num_train_epochs=60, lora_rank=16) if method == "lora" else {}
    words |= dict(template="{title}", method=method, random_state=2)  # of others 7 % learn less
    classifier = glmlora.LoraClassifier(folder, **words)
    assert classifier.fit(rows, labels).score(rows, labels) >= 0.75
    classifier.save(tmp_path / method)
    again = glmlora.LoraClassifier.load(tmp_path / method)
    assert np.array_equal(again.predict_proba(rows), classifier.predict_proba(rows))


# The command line and the notebook


def command(*words, **options):
    done = subprocess.run(
        [sys.executable, "-m", "glmlora", *map(str, words)],
        **dict(env=ENV, capture_output=True, text=True, **options),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_command_line_and_the_plan(speaking, tmp_path):
    (tmp_path / "t.csv").write_text("title,label\nHeart failure,1\nRouting,0\n")
    words = ["--input", tmp_path / "t.csv", "--output", tmp_path / "o.csv"]
    words += ["--labels", "0,1", "--template", "Medical? {title}"]
    command("predict", "--model", speaking, *words)
    with open(tmp_path / "o.csv", encoding="utf-8", newline="") as f:
        assert [row[-1] for row in csv.reader(f)][1:] == ["1", "1"]
    said = command("chat", "--model", speaking, input="你好\nclear\nq\nstop\n")
    assert said.split() == ["1", "1"]
    planned = plan(speaking, 2, 64, labels=3, lora_rank=8)
    assert planned.layers == 2 and planned.total > 0


def test_the_documents_notebook_untouched(speaking, tmp_path, shared):
    """As in test_workflow.py, over this family; its last cell wants 2,000 rows."""
    run_the_documents_notebook(speaking, tmp_path, shared)


@needs_compiler
def test_on_the_emulator(speaking, folders, monkeypatch):
    """Answers, probabilities and losses are the processor's."""
    monkeypatch.setenv("GLMLORA_CUDA_LIBRARY", str(built()))
    model = glmlora.AutoModel.from_pretrained(speaking).to("emu")
    tokenizer = AutoTokenizer.from_pretrained(speaking)
    assert model.chat(tokenizer, "你好", [("q", "a")], do_sample=False)[0] == "1"
    found = []
    for device in ("cpu", "emu"):
        glmlora.set_seed(1)
        model, tokenizer = opened(folders[1])
        config = glmlora.LoraConfig(r=4, target_modules="all-linear")
        tuned = glmlora.get_peft_model(model.to(device), config)
        optimizer = glmlora.AdamW(tuned, lr=1e-2)
        row = {"prompt": "p", "query": "q", "response": "1", "history": []}
        rows = encode_records([row], tokenizer)
        ids = [*rows.source(0).tolist(), *rows.target(0).tolist()]
        labels = [-100] * len(rows.source(0)) + rows.target(0).tolist()
        found.append([])
        for _ in range(2):
            found[-1].append(tuned.backward(input_ids=[ids], labels=[labels]))
            optimizer.step()
        found[-1] += [*tuned.classify(tokenizer, ["a", "b"], ["0", "你好"]).proba.ravel()]
    assert np.abs(np.subtract(*found)).max() <= 1e-3 and found[0][1] < found[0][0]
