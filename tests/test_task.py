"""One template for training and prediction: the task beside an adapter, and who keeps to it."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import training

import glmlora
from glmlora import LoraClassifier, cli, tell
from glmlora.families.prompt import chat_ids, encode_source
from glmlora.files.rows import table_rows
from glmlora.generation import chat as chats
from glmlora.questions import task_queries
from glmlora.task import Task, base_digest, card, check_asked, labels_among, read_task, write_task
from glmlora.training.records import encode_records, records_from

PROMPT = training.PROMPT
RECORDS = training.records()
TASK = Task("/m", "Judge: ", "{title} ->", ["title"], ["no", "yes"], 60)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.model_dir(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """An adapter of records with labels, prompts cut at 60 ids. Tests do not change it."""
    out = tmp_path_factory.mktemp("trained")
    more = {"dev_ratio": 0.2, "evaluation_strategy": "steps", "eval_steps": 5, "save_steps": 3}
    return training.run(base, out, max_source_length=60, label_metrics=True, verbose=False, **more)


@pytest.fixture
def anew(monkeypatch):
    """What is told once is told again."""
    monkeypatch.setattr(tell, "_told", set())


def with_adapter(base, folder):
    model = glmlora.AutoModel.from_pretrained(base)
    return glmlora.PeftModel.from_pretrained(model, folder).eval()


# What training writes


def test_training_says_what_it_was_for(base, trained):
    folder = Path(trained.output_dir)
    names = ("loss", "accuracy", "macro_f1", "log_loss")
    expected = Task(
        base=base,
        instruction=PROMPT,
        template="{input}",
        columns=["input"],
        labels=["0", "1"],
        max_source_length=60,
        base_digest=base_digest(base),
        scores={name: trained.metrics[f"eval_{name}"] for name in names},
    )
    assert read_task(folder) == trained.model.task == with_adapter(base, folder).task == expected
    for step in (3, 6):  # it was evaluated at 5, and at the end
        assert read_task(folder / f"checkpoint-{step}") == replace(expected, scores={})


def test_scores_are_those_of_the_weights(base, tmp_path):
    every = {"evaluation_strategy": "steps", "eval_steps": 4, "save_steps": 4, "verbose": False}
    run = training.run(base, tmp_path, dev_ratio=0.2, load_best_model_at_end=True, **every)
    told = {r["step"]: r["eval_loss"] for r in run.log_history if "eval_loss" in r}
    assert len(told) == 2
    for step, loss in told.items():
        assert read_task(tmp_path / f"checkpoint-{step}").scores == {"loss": loss}
    assert read_task(tmp_path).scores == {"loss": min(told.values())} == run.model.task.scores
    assert f"| loss | {min(told.values()):.4g} |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("method", ["p_tuning", "full"])
def test_other_methods_say_it_too(base, tmp_path, method):
    more = {"pre_seq_len": 4} if method == "p_tuning" else {}
    run = training.run(base, tmp_path, finetuning_type=method, max_steps=1, verbose=False, **more)
    task = read_task(tmp_path)
    assert (task.method, task.instruction, task.labels) == (method, PROMPT, ["0", "1"])
    assert run.model.task == task
    if method == "full":
        model = glmlora.AutoModel.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path / "again")
        assert model.task == read_task(tmp_path / "again") == task
    else:
        model = glmlora.AutoModel.from_pretrained(base)
        assert model.task is None and glmlora.load_prefix(model, tmp_path).task == task


def test_a_save_carries_the_task_of_its_adapter(base, trained, tmp_path):
    model = with_adapter(base, trained.output_dir)
    model.save_pretrained(tmp_path)
    assert read_task(tmp_path) == trained.model.task
    with model.disable_adapter():
        assert model.task is None
    assert model.task == trained.model.task
    model.task = None
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "task.json").exists()
    assert model.unload().task is None


@pytest.mark.parametrize(
    ("rows", "prefix", "expected"),
    [
        ([("Q ", "a", "1"), ("Q ", "b", "0")] * 2, None, ("Q ", "{input}", ["0", "1"])),
        ([("Q ", "a", "1"), ("Q ", "", "0")] * 2, "P: ", ("P: Q ", "{input}", ["0", "1"])),
        (
            [("Q", "a", "1"), ("R", "b", "0")] * 2,
            "P: ",
            ("P: ", "{instruction}{input}", ["0", "1"]),
        ),
        ([("Q", "", "1"), ("R", "", "0")] * 2, None, ("", "{instruction}", ["0", "1"])),
        ([("Q ", "a", "x"), ("Q ", "b", "y")], None, ("Q ", "{input}", [])),
    ],
)
def test_what_records_say(base, tmp_path, rows, prefix, expected):
    more = {} if prefix is None else {"source_prefix": prefix}
    run = training.run(base, tmp_path, records_rows(rows), max_steps=1, verbose=False, **more)
    task = run.model.task
    assert (task.instruction, task.template, task.labels) == expected
    assert task.columns == re.findall(r"{(\w+)}", task.template)


def records_rows(rows):
    return [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]


def test_conversations_are_no_rows_of_a_table(base, tmp_path):
    data = [{"instruction": "Q ", "input": "a", "output": "1", "history": [["x", "y"]]}] * 3
    data += [{"instruction": "Q ", "input": "b", "output": "0"}] * 3
    task = training.run(base, tmp_path, data, max_steps=1, verbose=False).model.task
    assert (task.instruction, task.template, task.labels) == ("", "{instruction}{input}", [])


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        (["1", "0", "1", "0"], ["0", "1"]),
        (["1", "0", "1"], []),
        (["1"] * 9, []),
        (["a\nb", "c"] * 2, []),
        (["x" * 65, "c"] * 2, []),
        (["x" * 64, "c"] * 2, ["c", "x" * 64]),
        ([str(i) for i in range(101)] * 2, []),
        ([str(i) for i in range(100)] * 2, sorted(str(i) for i in range(100))),
    ],
)
def test_answers_that_are_labels(answers, labels):
    assert labels_among(answers) == labels


# Files


def test_files_of_earlier_versions_open(tmp_path):
    write_task(tmp_path, TASK)
    file = tmp_path / "task.json"
    stored = json.loads(file.read_text())
    file.write_text(
        json.dumps({k: stored[k] for k in stored if k not in ("base_digest", "scores")})
    )
    assert read_task(tmp_path) == TASK


def test_a_card_has_a_head_that_others_read(tmp_path):
    odd = replace(TASK, base='/m/a "b": #c', threshold=0.25, instruction="```\n---\n{", folds=2)
    write_task(tmp_path, odd)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, head, body = re.split("^---\n", text, maxsplit=2, flags=re.MULTILINE)
    assert head.splitlines()[:2] == [f"base_model: {json.dumps(odd.base)}", "library_name: peft"]
    assert head.splitlines()[2:] == ["tags:", "- glmlora", "- lora"]
    assert "````text\n```\n---\n{{{title} ->\n````" in body
    assert "\nno\nyes\n" in body and "probability of 0.25 on" in body
    assert "library_name" not in card(replace(TASK, method="full"))
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    found = yaml.safe_load(head)
    assert found["base_model"] == odd.base and found["tags"] == ["glmlora", "lora"]


@pytest.mark.parametrize("edit", [lambda old: "mine\n", lambda old: old.replace("yes", "no")])
def test_a_card_that_is_not_ours_stays(tmp_path, edit):
    path = tmp_path / "README.md"
    write_task(tmp_path, TASK)
    write_task(tmp_path, replace(TASK, threshold=0.75))
    assert "0.75" in path.read_text()
    text = edit(path.read_text())
    path.write_text(text)
    write_task(tmp_path, replace(TASK, threshold=0.5))
    assert path.read_text() == text and read_task(tmp_path).threshold == 0.5


def test_training_leaves_a_readme_alone(base, tmp_path):
    (tmp_path / "README.md").write_text("my notes")
    training.run(base, tmp_path, max_steps=1, verbose=False)
    assert (tmp_path / "README.md").read_text() == "my notes"
    assert read_task(tmp_path).labels == ["0", "1"]


# The same ids


@pytest.mark.parametrize("family", ["v2", "v3"])
@pytest.mark.parametrize("template", ["auto", "vendored"])
def test_training_and_prediction_have_the_same_ids(base, trained, family, template):
    """Of rows that are cut, too, whatever pieces a cut goes through."""
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base, family=family)
    texts = ["title:" + "proteins é👋你好 of 1990, " * n + "x" * n for n in range(12)]
    rows = [{"instruction": "Judge -->", "input": text, "output": "1"} for text in texts]
    for limit in range(50, 70):
        encoded = encode_records(
            records_from(rows), tokenizer, max_source_length=limit, template=template
        )
        trained_ids = [encoded.source(i).tolist() for i in range(len(rows))]
        task = replace(trained.model.task, instruction="Judge -->", max_source_length=limit)
        queries = task_queries(task, rows, ["input"], tokenizer, template)
        asked = [encode_source(tokenizer, q, "", [], 9999, template=template)[0] for q in queries]
        assert asked == trained_ids
        assert 4 < encoded.n_cut < 12 and max(map(len, asked)) <= limit
        assert all(query.startswith("Judge -->") for query in queries)
        if template == "auto":
            assert [chat_ids(tokenizer, query) for query in queries] == trained_ids


def test_no_piece_is_cut_that_has_room(base):
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    for limit in range(50, 60):  # each digit is a piece
        ids, cut = encode_source(tokenizer, "Judge", "7" * 99, [], limit)
        assert cut and len(ids) == limit


def test_chat_asks_what_was_trained(base, trained, monkeypatch, anew):
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    rows = [{**RECORDS[0], "input": "We measure cells. " * n} for n in (1, 30)]
    encoded = encode_records(records_from(rows), tokenizer, max_source_length=60)
    expected = [encoded.source(i).tolist() for i in range(2)]
    model = with_adapter(base, trained.output_dir)
    asked = []
    real = chats.Scheduler.submit

    def submit(self, ids, *rest):
        asked.append(list(ids))
        return real(self, ids, *rest)

    monkeypatch.setattr(chats.Scheduler, "submit", submit)
    queries = [PROMPT + row["input"] for row in rows]
    short = {"max_length": 64, "do_sample": False}
    model.chat(tokenizer, queries[0], **short)
    with pytest.warns(UserWarning, match="a question is cut to 60 ids, as those that the adapter"):
        _, history = model.chat(tokenizer, queries[1], **short)
    list(model.stream_chat(tokenizer, queries[1], **short))
    assert asked == [expected[0], expected[1], expected[1]]
    assert queries[1].startswith(history[0][0]) and len(history[0][0]) < len(queries[1])
    asked.clear()
    model.batch_chat(tokenizer, queries, **short)
    assert sorted(map(len, asked)) == sorted(map(len, expected))
    model.task = None
    model.chat(tokenizer, queries[1], max_length=250, do_sample=False)
    assert len(asked[-1]) > 100


def test_chat_tells_a_question_that_was_not_trained_once(base, trained, recwarn, anew):
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    model = with_adapter(base, trained.output_dir)
    short = {"max_length": 30, "do_sample": False}
    _, history = model.chat(tokenizer, "hello", **short)
    model.chat(tokenizer, "you", **short)
    model.chat(tokenizer, "you", history=history, **{**short, "max_length": 60})
    told = [str(w.message) for w in recwarn if "another task" in str(w.message)]
    assert len(told) == 1 and f"questions began with {PROMPT!r}" in told[0]


# What is asked otherwise


SAID = "the adapter was trained for another task than is asked: "


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"template": "Judge: {title} ->", "labels": ["yes", "no"], "query": "Judge: x"}, None),
        ({"template": "{title}"}, "template: 'Judge: {title} ->' was trained, '{title}' is asked"),
        ({"query": "x"}, "template: questions began with 'Judge: ', and one asked does not"),
        ({"labels": ["yes"]}, "labels: ['no', 'yes'] were trained, ['yes'] are asked"),
    ],
)
def test_what_differs_is_told_or_refused(asked, said, anew, recwarn):
    check_asked(TASK, **asked)
    check_asked(TASK, **asked)
    assert [str(w.message) for w in recwarn] == ([] if said is None else [SAID + said])
    if said is not None:
        with pytest.raises(ValueError, match=re.escape(SAID + said)):
            check_asked(TASK, strict=True, **asked)
    check_asked(None, strict=True, **asked)


def test_records_are_asked_by_any_template_behind_their_instruction():
    task = replace(TASK, template="{input}", instruction="Is {it}? ")
    assert task.takes("Is {{it}}? title:{title}") and not task.takes("title:{title}")
    assert task.asked_by("Is {{it}}? t:{title}").template == "t:{title}"
    free = replace(task, labels=[])
    check_asked(free, strict=True, labels=["a", "b"])


def test_another_base_is_told(base, trained, tmp_path, anew):
    other = training.model_dir(tmp_path, num_layers=2)
    weights = tmp_path / "tiny-model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    with_adapter(other, trained.output_dir)  # elsewhere, the same weights
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.warns(UserWarning, match=f"base: trained over {base}, asked over {other}: other"):
        model = with_adapter(other, trained.output_dir)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(other)
    with pytest.raises(ValueError, match="base: trained over"):
        model.classify(tokenizer, RECORDS, strict=True)


# Prediction


def test_classify_asks_the_task(base, trained, anew):
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    model = with_adapter(base, trained.output_dir)
    rows = [{"input": "We measure cells. " * n} for n in (1, 30)]
    found = model.classify(tokenizer, rows, strict=True)
    queries = task_queries(model.task, rows, ["input"], tokenizer)
    assert found.labels == ["0", "1"] and len(queries[1]) < len(PROMPT + rows[1]["input"])
    model.task, task = None, model.task
    assert (found.proba == model.classify(tokenizer, queries, ["0", "1"]).proba).all()
    with pytest.raises(TypeError, match="labels: expected a list of answers, got None"):
        model.classify(tokenizer, queries)
    model.task = task
    for asked in ({"labels": ["x", "y"]}, {"template": "{input}"}):
        with pytest.raises(ValueError, match=SAID):
            model.classify(tokenizer, rows, strict=True, **asked)
    with pytest.raises(ValueError, match="questions began with"):
        model.classify(tokenizer, ["hello"], strict=True)
    with pytest.warns(UserWarning, match="labels: .* were trained"):
        model.classify(tokenizer, rows, labels=["x", "y"])


def test_a_table_is_asked_the_task(base, trained, anew):
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    model = with_adapter(base, trained.output_dir)
    rows = [{"input": "We measure cells. " * n} for n in (1, 30)]
    expected = model.classify(tokenizer, rows).proba
    found = model.predict_table(tokenizer, rows, proba=True, strict=True)
    assert [[row["proba_0"], row["proba_1"]] for row in found] == expected.tolist()
    high = float(expected[:, 1].max())
    for threshold, label in ((high + 1e-9, "0"), (float(expected[:, 1].min()), "1")):
        model.task = replace(model.task, threshold=threshold)
        for labels in (None, ["1", "0"]):
            found = model.predict_table(tokenizer, rows, labels=labels)
            assert [row["label"] for row in found] == [label] * 2
    written = model.predict_table(tokenizer, rows, temperature=0, max_length=70)
    assert [set(row) for row in written] == [{"input", "label"}] * 2  # in the model's own words
    with pytest.raises(ValueError, match="template: .* was trained, 'X{input}' is asked"):
        model.predict_table(tokenizer, rows, "X{input}", strict=True)
    model.task = None
    with pytest.raises(TypeError, match="template: expected the question, the model has no task"):
        model.predict_table(tokenizer, rows)


def predict(base, folder, table, *words):
    words = ["--model", base, "--adapter", str(folder), "--input", str(table), *words]
    out = table.with_name("out.csv")
    return cli.main(["predict", *words, "--output", str(out), "--overwrite"]), out


def write_rows(path, column, texts):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[column], *([text] for text in texts)])
    return path


def test_predict_asks_what_was_trained(base, trained, tmp_path, capsys, anew):
    texts = ["We measure cells. " * n for n in (1, 3, 30)]
    table = write_rows(tmp_path / "in.csv", "input", texts)
    status, out = predict(base, trained.output_dir, table, "--proba", "--strict")
    assert status == 0, capsys.readouterr().err
    model = with_adapter(base, trained.output_dir)
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    expected = model.classify(tokenizer, [{"input": text} for text in texts])
    found = table_rows(str(out), "out")
    assert [row["label"] for row in found] == expected.label
    assert [float(row["proba_1"]) for row in found] == pytest.approx(expected.proba[:, 1])
    asked = ("--template", "Medical? {input}", "--labels", "0,1,2")
    capsys.readouterr()
    with pytest.warns(UserWarning, match=SAID) as told:
        assert predict(base, trained.output_dir, table, *asked)[0] == 0
    ours = [str(w.message) for w in told if SAID in str(w.message)]
    assert len(ours) == 1 and "'Medical? {input}' is asked" in ours[0] and "'2'" in ours[0]
    assert predict(base, trained.output_dir, table, *asked, "--strict")[0] == 1
    assert f"glmlora: ValueError: {ours[0]}" in capsys.readouterr().err


def test_a_table_of_papers_is_asked_the_papers_question(base, trained, tmp_path, monkeypatch):
    """Where it lacks the column `input` of records."""
    table = tmp_path / "in.csv"
    table.write_text("title,abstract\na,b\n")
    asked = []

    def rows(model, tokenizer, queries, labels, **given):
        asked.extend(queries)
        yield from ((i, np.zeros(len(labels))) for i in range(len(queries)))

    monkeypatch.setattr("glmlora.tables.answers.score_rows", rows)
    monkeypatch.setattr(cli.verbs, "PAPERS", PROMPT + "title:{title},abstract:{abstract}")
    assert predict(base, trained.output_dir, table, "--strict")[0] == 0
    assert asked == [PROMPT + "title:a,abstract:b"]


def test_a_journal_of_another_task_is_refused(base, trained, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(trained.output_dir, tmp_path / "adapter")
    table = write_rows(tmp_path / "in.csv", "input", ["a", "b"])
    words = ["--model", base, "--adapter", str(folder), "--input", str(table)]
    words = ["predict", *words, "--output", str(tmp_path / "o.csv")]

    def stop(*_, **__):
        yield 0, {"answer": "0", "proba": [1.0, 0.0]}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("glmlora.tables.job.label_scores", stop)
        assert cli.main(words) == 130
    write_task(folder, replace(read_task(folder), threshold=0.9))
    assert cli.main(words) == 1
    assert "task differs (threshold: None there, 0.9 here)" in capsys.readouterr().err
    write_task(folder, replace(read_task(folder), threshold=None, scores={"loss": 1.0}))
    assert cli.main(words) == 0
    assert table_rows(str(tmp_path / "o.csv"), "o")[0]["label"] == "0"


@pytest.mark.parametrize("kind", [{"folds": 2}, {"method": "head"}], ids=["folds", "head"])
def test_predict_takes_folds_and_heads(base, tmp_path, kind, capsys):
    few = {"lora_rank": 4, "learning_rate": 1e-2, "num_train_epochs": 1, "random_state": 0}
    rows = [{"title": f"We measure {i}" if i % 2 else f"A graph {i}"} for i in range(12)]
    labels = [i % 2 for i in range(12)]
    fitted = LoraClassifier(base, threshold=0.45, **few, **kind).fit(rows, labels)
    fitted.save(tmp_path / "adapter")
    table = write_rows(tmp_path / "in.csv", "title", [row["title"] for row in rows])
    status, out = predict(base, tmp_path / "adapter", table, "--proba", "--strict")
    assert status == 0, capsys.readouterr().err
    found = table_rows(str(out), "out")
    assert [int(row["label"]) for row in found] == fitted.predict(rows).tolist()
    proba = [float(row["proba_1"]) for row in found]
    assert proba == pytest.approx(fitted.predict_proba(rows)[:, 1], abs=1e-6)
    assert predict(base, tmp_path / "adapter", table, "--template", "{title}")[0] == 1
    assert "has folds or a head, which weigh the labels ['0', '1']" in capsys.readouterr().err


def test_a_classifier_opens_what_training_wrote(base, trained, tmp_path):
    loaded = LoraClassifier.load(trained.output_dir)
    rows = [{"input": record["input"]} for record in RECORDS]
    model = with_adapter(base, trained.output_dir)
    expected = model.classify(glmlora.AutoTokenizer.from_pretrained(base), rows).proba
    assert loaded.predict_proba(rows) == pytest.approx(expected, abs=1e-6)
    assert loaded.classes_.tolist() == ["0", "1"]
    write_task(tmp_path, replace(trained.model.task, labels=[]))
    with pytest.raises(ValueError, match="labels: the adapter was trained to answer with any text"):
        LoraClassifier.load(tmp_path)
