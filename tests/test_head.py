"""Features of prompts, and linear heads over them."""

import errno
import os
import pickle

import numpy as np
import pytest
import training
from test_labels import QUESTIONS, model_of, shake

import glmlora
from glmlora import classifier as classifier_module
from glmlora import head
from glmlora.files.vectors import VectorFile
from glmlora.generation import features
from glmlora.generation.chat import chat_family

# Features


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return model_of("chatglm2", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("together", [1, 100, 1024])
def test_features_are_means_of_the_hidden_states(loaded, monkeypatch, together):
    monkeypatch.setattr(features, "CHUNK", together)
    model, tokenizer = loaded
    got = model.features(tokenizer, QUESTIONS)
    assert got.dtype == np.float32 and got.shape == (len(QUESTIONS), 3 * 32)
    assert (model.features(tokenizer, QUESTIONS[:2], depth=1) == got[:2, :64]).all()
    for row, query in zip(got, QUESTIONS, strict=True):
        ids = chat_family(model, tokenizer).chat_ids(tokenizer, query, [], "user")
        states = model(input_ids=[ids], output_hidden_states=True).hidden_states
        means = [np.asarray(s).reshape(len(ids), -1).mean(axis=0) for s in states]
        assert np.abs(row.reshape(3, 32) - means).max() < 1e-5
        assert (model.features(tokenizer, [query]) == row).all()


def test_an_adapter_is_in_the_features(loaded, tmp_path):
    model, tokenizer = model_of("chatglm2", tmp_path)
    before = model.features(tokenizer, QUESTIONS[:2])
    lora = glmlora.get_peft_model(model, glmlora.LoraConfig(r=4), seed=1)
    shake(lora)
    after = lora.features(tokenizer, QUESTIONS[:2])
    assert (after[:, :32] == before[:, :32]).all() and np.abs(after - before).max() > 1e-3


def test_fewer_layers_of_a_large_model(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(features, "MOST", 64)
    assert features.layers_taken(model).tolist() == [0, 2]
    assert features.layers_taken(model, 1).tolist() == [0, 1]
    whole = model.features(tokenizer, QUESTIONS[:2])
    monkeypatch.undo()
    both = model.features(tokenizer, QUESTIONS[:2]).reshape(2, 3, 32)
    assert (whole.reshape(2, 2, 32) == both[:, [0, 2]]).all()


def test_bad_queries(loaded):
    model, tokenizer = loaded
    for queries, error, message in (
        ("x", TypeError, "table_or_texts: expected a list"),
        (["x", 1], TypeError, "row 1: expected text"),
        (["x " * 600], ValueError, "row 0: a prompt of .* exceeds the model's 512"),
    ):
        with pytest.raises(error, match=message):
            model.features(tokenizer, queries)
    assert model.features(tokenizer, []).shape == (0, 96)
    for depth in (0, 3, True, 1.0, "1"):
        with pytest.raises(ValueError, match="depth: expected a whole number .* 1 to 2, or None"):
            model.features(tokenizer, ["x"], depth=depth)


# Features that are kept


class Counted:
    """The tokens of each call of a function, which goes on."""

    def __init__(self, function):
        self.function, self.tokens = function, []

    def __call__(self, model, prompts, layers):
        self.tokens += map(len, prompts)
        return self.function(model, prompts, layers)


@pytest.fixture
def computed(monkeypatch):
    counted = Counted(features._means)
    monkeypatch.setattr(features, "_means", counted)
    return counted.tokens


def test_kept_features_are_not_computed_again(loaded, tmp_path, computed):
    model, tokenizer = loaded
    queries = [*QUESTIONS, QUESTIONS[4], "another", QUESTIONS[0]]
    plain = model.features(tokenizer, queries)
    assert len(computed) == len(QUESTIONS) + 1  # equal rows once
    computed.clear()
    some = model.features(tokenizer, QUESTIONS[2:5], cache=tmp_path / "new" / "folder")
    assert len(computed) == 3 and (some == plain[2:5]).all()
    computed.clear()
    assert (model.features(tokenizer, queries, cache=tmp_path / "new" / "folder") == plain).all()
    assert len(computed) == len(QUESTIONS) + 1 - 3
    computed.clear()
    for _ in range(2):
        again = model.features(tokenizer, queries[::-1], cache=tmp_path / "new" / "folder")
        assert (again == plain[::-1]).all()
    assert not computed and len(os.listdir(tmp_path / "new" / "folder")) == 1


def test_what_another_model_has_kept_is_not_taken(tmp_path, computed):
    """A step of training of an adapter or of one embedding, an adapter switched off, other numbers,
    another depth."""
    model, tokenizer = model_of("chatglm2", tmp_path / "base")
    folder, seen = tmp_path / "cache", []

    def is_new(model, **options):
        computed.clear()
        got = model.features(tokenizer, QUESTIONS[:2], cache=folder, **options)
        assert (got == model.features(tokenizer, QUESTIONS[:2], **options)).all()
        seen.append(len(computed) == 4)
        return seen[-1]

    assert is_new(model) and not is_new(model) and is_new(model, depth=1)
    lora = glmlora.get_peft_model(model, glmlora.LoraConfig(r=4), seed=1)
    assert not is_new(lora)  # its B is 0 yet
    shake(lora)
    assert is_new(lora) and not is_new(lora)
    with lora.disable_adapter():
        assert not is_new(lora)
    model = lora.unload()
    assert not is_new(model)
    name = "transformer.embedding.word_embeddings.weight"
    model.core.set_trainable([name])
    values = model.core.read(name)
    values[337] += 1e-3
    model.core.write(name, values)
    assert is_new(model)
    assert is_new(model_of("chatglm2", tmp_path / "half")[0].half())
    assert sum(seen) == len(os.listdir(folder))


def test_a_torn_or_damaged_record_is_computed_again(loaded, tmp_path, computed):
    model, tokenizer = loaded
    plain = model.features(tokenizer, QUESTIONS, cache=tmp_path)
    [file] = tmp_path.iterdir()
    whole = file.read_bytes()
    size = 16 + 4 + 4 * 96
    assert len(whole) == 16 + len(QUESTIONS) * size
    damaged = whole[: 3 * size] + bytes([whole[3 * size] ^ 1]) + whole[3 * size + 1 :]
    for content, lost in (
        (b"", 9),
        (whole[:7], 9),
        (whole[: 16 + 30], 9),
        (whole[: 16 + size], 8),
        (whole[:-1], 1),
        (damaged, 1),
    ):
        file.write_bytes(content)
        for expected in (lost, 0):
            computed.clear()
            assert (model.features(tokenizer, QUESTIONS, cache=tmp_path) == plain).all()
            assert len(computed) == expected
        assert len(file.read_bytes()) == len(whole) + (size if content == damaged else 0)


def test_two_processes_add_to_one_file(tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    keys = [bytes([n]) * 16 for n in range(4)]
    with VectorFile(tmp_path / "file", 3) as one, VectorFile(tmp_path / "file", 3) as two:
        one.add(keys[:1], rows[:1])
        two.add(keys[1:3], rows[1:3])
        one.add(keys[3:], rows[3:])
        out = np.empty(3, np.float32)
        assert one.read(keys[3], out) and out.tolist() == [9, 10, 11]
        assert two.read(keys[1], out) and out.tolist() == [3, 4, 5]
        assert not one.read(keys[1], out)
    with VectorFile(tmp_path / "file", 3) as both:
        for key, row in zip(keys, rows, strict=True):
            assert both.read(key, out) and (out == row).all()


def test_a_cache_that_cannot_be(loaded, tmp_path, monkeypatch):
    model, tokenizer = loaded
    (tmp_path / "file").write_bytes(b"notes")
    with pytest.raises(NotADirectoryError, match="cache: .*file is a file, expected a folder"):
        model.features(tokenizer, ["x"], cache=tmp_path / "file")
    for content in (b"notes", b"GLMLORAV" + (4).to_bytes(4, "little") + bytes(4)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(ValueError, match="file: holds something else than vectors of 3"):
            VectorFile(tmp_path / "file", 3)
        assert (tmp_path / "file").read_bytes() == content
    os.symlink("/dev/full", tmp_path / "full")
    with pytest.raises(ValueError, match="full: is a character device"):
        VectorFile(tmp_path / "full", 3)
    with VectorFile(tmp_path / "new", 3) as kept:
        kept.add([b"a" * 16], np.zeros((1, 3), np.float32))

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left .*new"):
            kept.add([b"b" * 16], np.zeros((1, 3), np.float32))
        assert not kept.read(b"b" * 16, np.empty(3, np.float32))


# Heads


def data(rows=60, columns=20, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)) * rng.uniform(0.1, 9, columns) + rng.normal(size=columns)
    y = (x @ rng.normal(size=(columns, classes)) / 9 + rng.gumbel(size=(rows, classes))).argmax(1)
    return x.astype(np.float32), y


def objective(x, y, classes, strength, weights, made):
    """Loss and prior of a head, in the scaled features that the prior is of."""
    scale = x.astype(np.float64).std(axis=0) * np.sqrt(x.shape[1])
    loss = -(weights * made.log_proba(x)[np.arange(len(y)), y]).sum()
    prior = ((made.weight * scale[:, None]) ** 2).sum() / 2 / strength
    return loss + prior


@pytest.mark.parametrize("rows, columns", [(60, 20), (30, 90)])
def test_no_other_head_is_better(rows, columns):
    x, y = data(rows, columns)
    weights = np.random.default_rng(1).uniform(0.5, 3, rows)
    made = head.fit_head(x, y, 3, weights, strengths=[10.0])
    least, rng = objective(x, y, 3, 10.0, weights, made), np.random.default_rng(2)
    for size in (1e-1, 1e-2):
        for _ in range(20):
            weight = made.weight * (1 + size * rng.normal(size=made.weight.shape))
            bias = made.bias + size * rng.normal(size=3)
            other = head.Head(weight.astype(np.float32), bias.astype(np.float32), 10.0)
            assert objective(x, y, 3, 10.0, weights, other) > least
    # weights shared by all classes say nothing: the prior keeps them at 0
    assert np.abs(made.weight.sum(axis=1)).max() < 1e-3 * np.abs(made.weight).max()


def test_the_strength_is_chosen_by_rows_left_out():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    noise = rng.normal(size=(200, 300)).astype(np.float32)
    assert head.fit_head(noise, y, 2).strength == min(head.STRENGTHS)
    clear = noise.copy()
    clear[:, :40] += 3 * y[:, None]
    made = head.fit_head(clear, y, 2)
    assert made.strength > min(head.STRENGTHS)
    assert (made.log_proba(clear).argmax(axis=1) == y).all()


def test_constant_features_and_one_class():
    x, y = data()
    x = np.concatenate([x, np.full((len(x), 2), 7, np.float32)], axis=1)
    made = head.fit_head(x, y, 3, strengths=[10.0])
    assert (made.weight[-2:] == 0).all() and np.isfinite(made.weight).all()
    one = head.fit_head(x, np.zeros(len(x), int), 1)
    assert (one.log_proba(x) == 0).all()


def test_what_it_refuses():
    x, y = data()
    with pytest.raises(ValueError, match="features: expected .rows, D. and as many classes"):
        head.fit_head(x, y[:-1], 3)
    x[4, 2] = np.nan
    with pytest.raises(ValueError, match="features: row 4 is not finite"):
        head.fit_head(x, y, 3)
    made = head.fit_head(data()[0], y, 3, strengths=[1.0])
    with pytest.raises(ValueError, match=r"features: expected \(rows, 20\), got \(60, 19\)"):
        made.log_proba(x[:, :19])


# The estimator


TEXTS = [
    f"We measure cells {i}." if i % 2 else f"A fast algorithm for graphs {i}." for i in range(24)
]
TOPICS = ["cells" if i % 2 else "graphs" for i in range(24)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.model_dir(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("method", ["head", "lora+head"])
@pytest.mark.parametrize("folds", [0, 3])
def test_a_classifier_with_a_head(base, tmp_path, computed, method, folds):
    classifier = glmlora.LoraClassifier(
        base, method=method, folds=folds, validation=0.25, random_state=0, num_train_epochs=1
    )
    classifier.fit(TEXTS, TOPICS)
    assert classifier.score(TEXTS, TOPICS) == 1
    computed.clear()
    proba = classifier.predict_proba(TEXTS)
    assert len(computed) == (24 * folds if folds and method == "lora+head" else 24)
    assert np.allclose(proba.sum(axis=1), 1) and proba.shape == (24, 2)
    assert {"accuracy", "macro_f1", "log_loss"} <= set(classifier.history_[-1])
    if folds:
        assert (classifier.oof_proba_.argmax(axis=1) == [i % 2 == 0 for i in range(24)]).all()
    assert len(classifier.adapters_) == max(folds, 1)
    has_adapter = "adapter_config.json" in classifier.adapters_[0]
    assert has_adapter == (method == "lora+head") and "head.safetensors" in classifier.adapters_[0]
    classifier.save(tmp_path)
    loaded = glmlora.LoraClassifier.load(tmp_path)
    assert loaded.method == method and (loaded.predict_proba(TEXTS) == proba).all()
    assert (pickle.loads(pickle.dumps(classifier)).predict_proba(TEXTS) == proba).all()
    glmlora.LoraClassifier(base, method="head", random_state=0).fit(TEXTS, TOPICS).save(tmp_path)
    assert ("adapter_config.json" in os.listdir(tmp_path)) is False


def test_a_head_is_that_of_the_rows_not_held_out(base):
    """Features of all rows are computed once; the head sees those that train it."""
    wrong = ["graphs" if topic == "cells" else "cells" for topic in TOPICS]
    classifier = glmlora.LoraClassifier(base, method="head", folds=2, random_state=0)
    classifier.fit(TEXTS, TOPICS)
    for number in range(2):
        rows = np.flatnonzero(classifier.oof_fold_ != number)
        alone = glmlora.LoraClassifier(base, method="head", random_state=number)
        alone.fit([TEXTS[i] for i in rows], [TOPICS[i] for i in rows])
        left_out = np.flatnonzero(classifier.oof_fold_ == number)
        proba = alone.predict_proba([TEXTS[i] for i in left_out])
        assert np.abs(classifier.oof_proba_[left_out] - proba).max() <= 1e-5
    assert glmlora.LoraClassifier(base, method="head").fit(TEXTS, wrong).score(TEXTS, wrong) == 1


@pytest.mark.parametrize("weight, expected", [(None, 0.25), ({"cells": 9}, 0.75)])
def test_weights_of_classes_move_a_head(base, weight, expected):
    """Rows that say nothing: the shares of the classes are all there is."""
    topics = [*["cells"] * 6, *["graphs"] * 18]
    classifier = glmlora.LoraClassifier(base, method="head", class_weight=weight, random_state=0)
    proba = classifier.fit(["We measure."] * 24, topics).predict_proba(["We measure."])
    assert proba[0, 0] == pytest.approx(expected, abs=1e-3)


def test_a_second_fit_reads_the_base_for_new_rows_only(base, tmp_path, computed):
    """Folds, parameters of the head and predictions share what is kept."""
    cache = {"method": "head", "features_cache": tmp_path / "cache"}
    classifier = glmlora.LoraClassifier(base, folds=2, random_state=0, **cache).fit(TEXTS, TOPICS)
    assert len(computed) == 24
    plain = glmlora.LoraClassifier(base, method="head", folds=2, random_state=0).fit(TEXTS, TOPICS)
    computed.clear()
    weighed = glmlora.LoraClassifier(base, class_weight="balanced", **cache).fit(TEXTS, TOPICS)
    assert (classifier.predict_proba(TEXTS) == plain.predict_proba(TEXTS)).all()
    assert len(computed) == 24  # by the one without a folder
    computed.clear()
    assert weighed.score([*TEXTS, "We measure graphs."], [*TOPICS, "graphs"]) >= 24 / 25
    assert len(computed) == 1
    classifier.set_params(method="lora+head", folds=0, num_train_epochs=2).fit(TEXTS, TOPICS)
    assert len(os.listdir(tmp_path / "cache")) == 1


@pytest.mark.parametrize("method", ["head", "lora+head"])
def test_a_head_over_fewer_layers(base, tmp_path, method):
    classifier = glmlora.LoraClassifier(base, method=method, depth=1, num_train_epochs=0.2)
    proba = classifier.fit(TEXTS, TOPICS).predict_proba(TEXTS)
    assert head_width(classifier) == 2 * 32
    classifier.save(tmp_path)
    loaded = glmlora.LoraClassifier.load(tmp_path)
    assert loaded.depth == 1 and (loaded.predict_proba(TEXTS) == proba).all()
    with pytest.raises(ValueError, match="depth: expected a whole number .* 1 to 2, or None"):
        classifier.set_params(depth=9).fit(TEXTS, TOPICS)
    with pytest.raises(ValueError, match="depth: has no effect with method='lora'"):
        classifier.set_params(method="lora").fit(TEXTS, TOPICS)


def head_width(classifier):
    """The features that a fitted classifier's head reads."""
    [files] = classifier.adapters_
    return len(classifier_module._stored_head(files).weight)


def test_methods_that_there_are_not(base):
    with pytest.raises(ValueError, match="method: expected one of lora, head, lora.head, got 'x'"):
        glmlora.LoraClassifier(base, method="x").fit(TEXTS, TOPICS)
    with pytest.raises(ValueError, match="early_stopping: has no effect with method='head'"):
        glmlora.LoraClassifier(base, method="head", validation=0.2, early_stopping=2).fit(
            TEXTS, TOPICS
        )
