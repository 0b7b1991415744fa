"""LoraClassifier: what it learns, keeps and says, alone and inside scikit-learn."""

import copy
import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import training

import glmlora
from glmlora import LoraClassifier
from glmlora.questions import task_queries, usual_instruction
from glmlora.task import Task, base_digest, read_task

#: Enough to learn the rows below by heart.
QUICK = {
    "instruction": "",
    "lora_rank": 16,
    "learning_rate": 1e-2,
    "num_train_epochs": 7,
    "random_state": 0,
}
TEXTS = [
    f"We measure cells {i}." if i % 2 else f"A fast algorithm for graphs {i}." for i in range(24)
]
LABELS = [i % 2 for i in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.model_dir(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def fitted(base):
    """Fitted once: tests do not change it."""
    return LoraClassifier(base, **QUICK).fit(TEXTS, LABELS)


def quick(base, **parameters):
    return LoraClassifier(base, **{**QUICK, **parameters})


# Fit and predict


def test_it_learns_texts_and_is_repeatable(base, fitted):
    proba = fitted.predict_proba(TEXTS)
    assert proba.shape == (24, 2) and proba.dtype == np.float64
    assert proba.sum(axis=1) == pytest.approx(np.ones(24))
    assert fitted.score(TEXTS, LABELS) == 1
    assert fitted.predict(["We measure cells of patients."]).tolist() == [1]
    again = quick(base).fit(TEXTS, LABELS)
    assert (again.predict_proba(TEXTS) == proba).all()
    assert again.adapters_ == fitted.adapters_
    other = quick(base, random_state=1).fit(TEXTS, LABELS)
    assert other.adapters_ != fitted.adapters_


@pytest.mark.parametrize(
    "labels",
    [
        np.array([True, False]),
        ["cells", "cells and graphs"],
        np.array([7, -1], np.int16),
        np.array([1.0, 0.0]),
        np.array(["b", "a"], object),
    ],
    ids=lambda labels: type(labels[0]).__name__,
)
def test_labels_come_back_as_they_were(base, labels):
    y = np.asarray([labels[i] for i in LABELS], dtype=getattr(labels, "dtype", None))
    fitted = quick(base).fit(TEXTS, y)
    assert fitted.classes_.tolist() == sorted(labels) and fitted.classes_.dtype == y.dtype
    assert fitted.task_.answers == [str(x).removesuffix(".0") for x in sorted(labels)]
    found = fitted.predict(TEXTS)
    assert found.dtype == y.dtype and found.tolist() == y.tolist()


def test_tables_are_data_frames_dicts_and_files(base, tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    rows = [{"title": text, "year": 1990 + i} for i, text in enumerate(TEXTS)]
    rows[3]["title"] = None
    fitted = quick(base).fit(rows, LABELS)
    assert fitted.feature_names_in_.tolist() == ["title", "year"] and fitted.n_features_in_ == 2
    assert fitted.task_.template == "title: {title}\nyear: {year}"
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    expected = fitted.predict_proba(rows)
    frame = pandas.DataFrame(rows)
    for table in (frame, frame[["year", "title"]], str(tmp_path / "rows.json")):
        assert (fitted.predict_proba(table) == expected).all()
    assert not hasattr(quick(base).fit(TEXTS, LABELS), "n_features_in_")


def test_it_says_nothing_unless_asked(base, capfd):
    quick(base, validation=0.2).fit(TEXTS, LABELS)
    said = capfd.readouterr()
    assert said.out == said.err == ""
    quick(base, validation=0.2, verbose=1).fit(TEXTS, LABELS)
    said = capfd.readouterr()
    assert said.out.count("log_loss") > 3 and "grad_norm" not in said.out
    quick(base, verbose=2).fit(TEXTS, LABELS)
    assert "'grad_norm'" in capfd.readouterr().out


def test_the_base_is_left_as_it_was(base):
    classifier = quick(base)
    model, tokenizer = classifier._load_base()
    before = model.chat(tokenizer, TEXTS[0], do_sample=False)
    classifier.fit(TEXTS, LABELS)
    assert classifier._load_base()[0] is model
    assert model.chat(tokenizer, TEXTS[0], do_sample=False) == before
    assert classifier.score(TEXTS, LABELS) == 1
    assert model.chat(tokenizer, TEXTS[0], do_sample=False) == before


def test_an_interrupted_fit_keeps_what_an_earlier_one_learnt(base, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    classifier = quick(base).fit(TEXTS, LABELS)
    assert not list(tmp_path.iterdir())
    before = classifier.predict_proba(TEXTS)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("glmlora.classifier._print_scores", interrupt)
        with pytest.raises(KeyboardInterrupt):
            classifier.set_params(verbose=1).fit(TEXTS, LABELS)
    assert (classifier.predict_proba(TEXTS) == before).all()
    [folder] = tmp_path.iterdir()  # what its message names is there
    assert str(folder) in capfd.readouterr().err
    assert (folder / "checkpoint-1" / "adapter_model.safetensors").is_file()


# Prompts


def test_the_longest_column_is_cut(base):
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
    rows = [
        {"title": "graph", "abstract": "cells " * 60},
        {"title": "graph " * 60, "abstract": "x"},
    ]
    task = Task(None, "Judge: ", "{abstract} | {title} ->", ["title", "abstract"], [0, 1], 80)
    queries = task_queries(task, rows, task.columns, tokenizer)
    for query, longest, other in zip(queries, ("cells", "graph"), ("graph", "x"), strict=True):
        assert 76 <= len(glmlora.families.prompt.chat_ids(tokenizer, query)) <= 80
        assert query.startswith("Judge: ") and query.endswith(" ->") and other in query
        assert 5 < query.count(longest) < 60
    short = Task(None, "", "{title}", ["title"], [0, 1], 80)
    assert task_queries(short, [{"title": "graph"}], ["title"], tokenizer) == ["graph"]
    long = Task(None, "Judge: " * 20, "{title}", ["title"], [0, 1], 40)
    with pytest.raises(ValueError, match=r"max_source_length: instruction and template alone"):
        task_queries(long, [{"title": "graph"}], ["title"], tokenizer)


def test_training_and_prediction_ask_the_same(base, monkeypatch):
    asked = {}
    real = glmlora.classifier.train

    def spy(model, records, **given):
        asked["train"] = [record["instruction"] for record in records]
        return real(model, records, **given)

    monkeypatch.setattr("glmlora.classifier.train", spy)
    rows = [{"title": text * 5} for text in TEXTS]
    classifier = quick(base, max_source_length=60, instruction="Judge: ").fit(rows, LABELS)

    def classify(model, tokenizer, queries, labels):
        asked["predict"] = queries
        raise StopIteration

    monkeypatch.setattr("glmlora.model.peft.PeftModel.classify", classify)
    with pytest.raises(StopIteration):
        classifier.predict(rows)
    assert asked["predict"] == asked["train"]
    assert len(asked["train"][0]) < len("Judge: title: " + rows[0]["title"])


def test_the_usual_instruction_names_the_labels():
    assert usual_instruction([0, 1]) == "Answer with one of: 0, 1.\n"
    assert usual_instruction(list(range(999))) == "Answer with the label.\n"


# Validation, weights, thresholds, folds


def test_validation_scores_and_keeps_the_best(base, monkeypatch):
    losses = iter([0.5, 0.3, 0.1, 0.2, 0.4, 0.05])
    seen = []

    def scores(codes, proba):
        seen.append(proba.max(axis=1))
        assert sorted(codes) == [0, 0, 0, 1, 1, 1]
        return {"accuracy": 1.0, "macro_f1": 1.0, "log_loss": next(losses)}

    held_out = []
    real = glmlora.classifier.train

    def spy(model, records, **given):
        held_out.extend(record["instruction"] for record in given["eval_data"])
        return real(model, records, **given)

    monkeypatch.setattr("glmlora.training.evaluation.label_scores", scores)
    monkeypatch.setattr("glmlora.classifier.train", spy)
    few = {"validation": 0.25, "early_stopping": 2, "per_device_train_batch_size": 3}
    classifier = quick(base, **few).fit(TEXTS, LABELS)
    told = [(record["epoch"], record["log_loss"]) for record in classifier.history_]
    assert told == [(0.5, 0.5), (1, 0.3), (1.5, 0.1), (2, 0.2), (2.5, 0.4)]
    kept = classifier.predict_proba(held_out).max(axis=1)
    assert kept == pytest.approx(seen[2], abs=1e-6) and kept != pytest.approx(seen[4], abs=1e-6)


def test_the_last_weights_are_scored_too(base):
    """5 updates in 2 parts: scored after 2 and 4, not after 3 and never again."""
    few = {"validation": 0.25, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    classifier = quick(base, **few).fit(TEXTS, LABELS)
    assert [record["epoch"] for record in classifier.history_] == [0.4, 0.8]


def test_rows_held_out_are_not_trained(base, monkeypatch):
    trained, seeds = [], []
    real = glmlora.classifier.train

    def spy(model, records, **given):
        seeds.append(given["seed"])
        trained.append([record["instruction"] for record in records])
        return real(model, records, **given)

    monkeypatch.setattr("glmlora.classifier.train", spy)
    quick(base, validation=0.25).fit(TEXTS, LABELS)
    assert len(set(trained[0])) == 18
    classifier = quick(base, folds=3, class_weight={1: 2}).fit(TEXTS, LABELS)
    assert len(set(seeds[1:])) == 3
    for number in range(3):
        unseen = {TEXTS[i] for i in np.flatnonzero(classifier.oof_fold_ == number)}
        assert len(unseen) == 8 and not unseen & set(trained[1 + number])
        heavy = [text for text in trained[1 + number] if "cells" in text]
        assert len(heavy) == 2 * len(set(heavy)) == 2 * (len(trained[1 + number]) - len(heavy))


def test_folds_give_unseen_probabilities_and_their_mean(base):
    classifier = quick(base, folds=3, validation=0.2).fit(TEXTS, LABELS)
    assert len(classifier.adapters_) == 3 and len(set(map(str, classifier.adapters_))) == 3
    assert {record["fold"] for record in classifier.history_} == {0, 1, 2}
    each = []
    for adapter in classifier.adapters_:
        one = copy.deepcopy(classifier)
        one.adapters_ = [adapter]
        each.append(one.predict_proba(TEXTS))
    assert classifier.predict_proba(TEXTS) == pytest.approx(np.mean(each, axis=0), abs=1e-12)
    of_own = np.stack(each)[classifier.oof_fold_, np.arange(24)]
    assert classifier.oof_proba_ == pytest.approx(of_own, abs=1e-6)
    accuracies = [scores["accuracy"] for scores in classifier.fold_scores_]
    assert classifier.mean_scores_["accuracy"] == pytest.approx(
        (np.mean(accuracies), np.std(accuracies))
    )
    assert not hasattr(classifier.set_params(folds=0).fit(TEXTS, LABELS), "oof_proba_")


def test_a_threshold_decides(base, fitted, monkeypatch):
    proba = fitted.predict_proba(TEXTS)[:, 1]
    at = float(np.sort(proba)[5])
    strict = quick(base, threshold=at).fit(TEXTS, LABELS)
    assert strict.threshold_ == at and strict.predict(TEXTS).sum() == 19
    seen = {}

    def best(truth, proba, by):
        seen.update(truth=truth, by=by)
        return 0.0

    monkeypatch.setattr("glmlora.classifier.best_threshold", best)
    chosen = quick(base, threshold="f1", validation=0.25).fit(TEXTS, LABELS)
    assert seen["by"] == "f1" and seen["truth"].tolist().count(True) == 3 == len(seen["truth"]) / 2
    assert chosen.predict(TEXTS).all() and chosen.task_.threshold == 0
    quick(base, threshold="accuracy", folds=2).fit(TEXTS, LABELS)
    assert seen["truth"].tolist() == [bool(label) for label in LABELS]


def test_usual_rank_and_rate_depend_on_the_width(base, monkeypatch):
    given = {}

    def stop(model, records, **arguments):
        given.update(arguments)
        raise StopIteration

    monkeypatch.setattr("glmlora.classifier.train", stop)
    for width, expected in ((32, (128, 256, 0.192 / 32)), (4096, (16, 32, 0.192 / 4096))):
        classifier = LoraClassifier(base)
        vars(classifier._load_base()[0].config)["hidden_size"] = width
        with pytest.raises(StopIteration):
            classifier.fit(TEXTS, LABELS)
        names = ("lora_rank", "lora_alpha", "learning_rate")
        assert tuple(given[name] for name in names) == expected


# What it says is wrong


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"validation": 1}, "validation: expected a number from 0 to below 1, got 1"),
        ({"early_stopping": 2}, "early_stopping: needs rows held out"),
        ({"folds": 1}, "folds: expected a whole number from 0 (0, or 2 or more), got 1"),
        ({"threshold": "f2"}, "threshold: expected None, 'accuracy', 'f1' or a number from 0 to 1"),
        ({"threshold": "f1"}, "threshold: 'f1' is chosen on rows held out"),
        ({"threshold": 1.5}, "threshold: expected None, 'accuracy', 'f1' or a number from 0 to 1"),
        ({"random_state": -1}, "random_state: expected None, a whole number from 0"),
        ({"training_arguments": {"seed": 1}}, "training_arguments: 'seed' is set by"),
        ({"training_arguments": {"lora_rank": 1}}, "training_arguments: 'lora_rank' is its own"),
        ({"template": "{text"}, "expected '}'"),
        ({"template": "{txt}"}, "template: 'txt' is no column of X (did you mean 'text'?)"),
        ({"class_weight": {2: 1}}, "class_weight: 2 is no label of y, which has [0, 1]"),
    ],
)
def test_wrong_parameters_are_named_before_the_training(base, monkeypatch, parameters, said):
    monkeypatch.setattr("glmlora.classifier.train", None)
    with pytest.raises(ValueError, match=re.escape(said)):
        quick(base, **parameters).fit(TEXTS, LABELS)


@pytest.mark.parametrize(
    ("X", "y", "error", "said"),
    [
        ([], [], ValueError, "X: expected at least one row, got none"),
        (5, [1], TypeError, "X: expected a DataFrame, a list of dicts or texts"),
        (["a", {"b": 1}], [0, 1], TypeError, "X: row 1: expected text, as row 0 is, got dict"),
        ([{"b": 1}, "a"], [0, 1], TypeError, "X: row 1: expected a dict, as row 0 is, got str"),
        (["a", "b"], [0], ValueError, "y: expected 2 labels, one for each row of X, got 1"),
        (["a", "b"], [[0], [1]], ValueError, "y: expected one label a row, got shape (2, 1)"),
        (["a", "b"], [0, None], ValueError, "y: row 1 has no label"),
        (["a", "b"], np.array([0, np.nan]), ValueError, "y: row 1 has no label"),
        (["a", "b"], [0.5, 1.0], ValueError, "y: expected labels, got fractions"),
        (["a", "b"], np.array([1, "x"], object), ValueError, "labels of one type, got int, str"),
        (["a", "b"], [1, 1], ValueError, "y: expected two labels or more, all rows have 1"),
    ],
)
def test_wrong_rows_and_labels_are_named(base, X, y, error, said):
    with pytest.raises(error, match=re.escape(said)):
        quick(base).fit(X, y)


def test_a_table_with_its_own_labels_is_refused(base, monkeypatch):
    rows = [{"title": t, "label": y} for t, y in zip(TEXTS, LABELS, strict=True)]
    with pytest.raises(ValueError, match=r"template: column 'label' of X is y itself"):
        quick(base).fit(rows, LABELS)
    quick(base, template="{title}", num_train_epochs=1).fit(rows, LABELS)


def test_a_wrong_base_is_named(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"base: '.*nowhere' is no directory"):
        quick(tmp_path / "nowhere").fit(TEXTS, LABELS)
    with pytest.raises(TypeError, match=r"base: expected the directory of a model"):
        quick(7).fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match=r"'lora_rnk' is no parameter \(did you mean 'lora_rank'"):
        LoraClassifier().set_params(lora_rnk=4)


# Files


def test_a_pickle_holds_the_adapter(base, fitted, tmp_path):
    again = pickle.loads(pickle.dumps(fitted))
    assert not hasattr(again, "_loaded")
    assert (again.predict_proba(TEXTS) == fitted.predict_proba(TEXTS)).all()
    moved = copy.copy(fitted).set_params(base=str(tmp_path / "gone"))
    stored = pickle.dumps(moved)
    with pytest.warns(UserWarning, match=r"its base .*gone is not there"):
        back = pickle.loads(stored)
    with pytest.raises(FileNotFoundError, match=r"base: '.*gone' is no directory"):
        back.predict(TEXTS)
    back.set_params(base=base)
    assert (back.predict_proba(TEXTS) == fitted.predict_proba(TEXTS)).all()


@pytest.mark.parametrize("folds", [0, 2])
def test_save_and_load(base, tmp_path, folds):
    y = np.array(["graph", "cells"])[LABELS]
    rows = [{"title": text} for text in TEXTS]
    parameters = {"threshold": 0.3, "max_source_length": 90, "instruction": "Judge: "}
    fitted = quick(base, folds=folds, **parameters).fit(rows, y)
    folder = tmp_path / "saved"
    fitted.save(folder)
    expected = fitted.predict_proba(rows)
    loaded = LoraClassifier.load(folder)
    assert (loaded.predict_proba(rows) == expected).all()
    assert loaded.predict(rows).tolist() == fitted.predict(rows).tolist()
    assert loaded.classes_.tolist() == ["cells", "graph"]
    assert {name: loaded.get_params()[name] for name in parameters} == parameters
    assert loaded.task_ == fitted.task_ == read_task(folder)
    assert set(fitted.task_.scores) == ({"accuracy", "macro_f1", "log_loss"} if folds else set())
    place = folder / "fold-1" if folds else folder
    model = glmlora.AutoModel.from_pretrained(base)
    assert glmlora.PeftModel.from_pretrained(model, place).peft_config["default"].r == 16
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    assert task == {
        "base": base,
        "base_digest": base_digest(base),
        "columns": ["title"],
        "depth": None,
        "folds": folds,
        "instruction": "Judge: ",
        "labels": ["cells", "graph"],
        "max_source_length": 90,
        "method": "lora",
        "quantization_bit": None,
        "scores": fitted.task_.scores,
        "template": "title: {title}",
        "threshold": 0.3,
    }
    (place / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: not there"):
        LoraClassifier.load(folder)


def test_a_save_is_whole_and_takes_the_place_of_another(fitted, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "fold-0").mkdir()
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    fitted.save(tmp_path)
    written = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    written += ["notes.txt", "task.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("glmlora.classifier.write_task", fail)
    other = copy.copy(fitted)
    other.adapters_ = [dict.fromkeys(fitted.adapters_[0], b"other")]
    with pytest.raises(OSError, match="No space left"):
        other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_task_is_named(fitted, tmp_path):
    fitted.save(tmp_path)
    file = tmp_path / "task.json"
    good = json.loads(file.read_text(encoding="utf-8"))
    for changed, said in (
        ({"labels": 5}, "labels: expected list, got 5"),
        ({"method": "trees"}, "task.json: method: expected one of lora, head"),
        ({"labels": [[1]]}, "labels: expected text or whole numbers, got [1]"),
        ({"base": str(tmp_path / "gone")}, "its base .*gone is not there; .*base=.."),
    ):
        file.write_text(json.dumps({**good, **changed}), encoding="utf-8")
        with pytest.raises((ValueError, OSError), match=said.replace("[", r"\[")):
            LoraClassifier.load(tmp_path)
    assert LoraClassifier.load(tmp_path, base=good["base"]).classes_.tolist() == [0, 1]
    file.write_text(json.dumps({k: v for k, v in good.items() if k != "labels"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"task.json: has no 'labels'"):
        LoraClassifier.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"task.json: not there"):
        LoraClassifier.load(tmp_path)


# scikit-learn


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.exceptions", None)
    with pytest.raises(ValueError, match=r"not fitted yet: call fit") as caught:
        LoraClassifier().predict(["a"])
    assert isinstance(caught.value, AttributeError)
    code = "import glmlora, sys; glmlora.LoraClassifier; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_parameters_and_clone(base, fitted):
    sklearn = pytest.importorskip("sklearn.base", reason="scikit-learn is not installed")
    fresh = sklearn.clone(fitted)
    assert fresh.get_params() == fitted.get_params() and not hasattr(fresh, "adapters_")
    assert fresh.set_params(lora_rank=4) is fresh and fresh.lora_rank == 4
    assert repr(LoraClassifier(lora_rank=4, folds=0)) == "LoraClassifier(lora_rank=4)"
    assert sklearn.is_classifier(fitted)
    validation = pytest.importorskip("sklearn.utils.validation")
    validation.check_is_fitted(fitted)
    exceptions = pytest.importorskip("sklearn.exceptions")
    with pytest.raises(exceptions.NotFittedError):
        validation.check_is_fitted(fresh)
    with pytest.raises(exceptions.NotFittedError):
        fresh.predict(TEXTS)


@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_repr",
        "check_get_params_invariance",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_set_params",
    ],
)
def test_scikit_learns_own_checks(check):
    checks = pytest.importorskip("sklearn.utils.estimator_checks", reason="no scikit-learn")
    if not hasattr(checks, check):
        pytest.skip(f"this scikit-learn has no {check}")
    getattr(checks, check)("LoraClassifier", LoraClassifier())


def test_cross_validation_and_searches(base):
    selection = pytest.importorskip("sklearn.model_selection", reason="no scikit-learn")
    folds = selection.StratifiedKFold(2)
    X = np.array(TEXTS, object)
    few = quick(base, per_device_train_batch_size=2)  # rows in a fold
    proba = selection.cross_val_predict(few, X, LABELS, cv=folds, method="predict_proba")
    assert ((proba[:, 1] > 0.5) == LABELS).mean() > 0.8
    search = selection.GridSearchCV(few, {"learning_rate": [1e-6, 1e-2]}, cv=folds)
    search.fit(TEXTS, LABELS)
    assert search.best_params_ == {"learning_rate": 1e-2} and search.best_score_ > 0.8
    assert search.predict(TEXTS).tolist() == LABELS


def test_ensembles_and_joblib(base, tmp_path):
    ensemble = pytest.importorskip("sklearn.ensemble", reason="scikit-learn is not installed")
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    y = np.array(["graph", "cells"])[LABELS]
    words = make_pipeline(TfidfVectorizer(), LogisticRegression())
    parts = [("glm", quick(base)), ("words", words)]
    vote = ensemble.VotingClassifier(parts, voting="soft").fit(TEXTS, y)
    assert vote.predict(TEXTS).tolist() == y.tolist()
    with joblib.parallel_backend("threading"):  # processes would each start an interpreter
        stack = ensemble.StackingClassifier(parts, cv=2, n_jobs=2).fit(TEXTS, y)
    assert stack.predict(TEXTS).tolist() == y.tolist()
    joblib.dump(vote, tmp_path / "vote.joblib")
    again = joblib.load(tmp_path / "vote.joblib")
    assert (again.predict_proba(TEXTS) == vote.predict_proba(TEXTS)).all()
