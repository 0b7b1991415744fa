"""Features of prompts, and linear heads over them."""

import os
import pickle

import numpy as np
import pytest
import training
from test_labels import QUESTIONS, model_of, shake

import glmlora
from glmlora import head
from glmlora.generation import features
from glmlora.generation.chat import chat_family

# Features


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return model_of("chatglm2", tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("held", [1, 1 << 14, 1 << 28])
def test_features_are_means_of_the_hidden_states(loaded, monkeypatch, held):
    monkeypatch.setattr(features, "HELD_BYTES", held)
    model, tokenizer = loaded
    got = model.features(tokenizer, QUESTIONS)
    assert got.dtype == np.float32 and got.shape == (len(QUESTIONS), 3 * 32)
    for row, query in zip(got, QUESTIONS, strict=True):
        ids = chat_family(model, tokenizer).chat_ids(tokenizer, query, [], "user")
        states = model(input_ids=[ids], output_hidden_states=True).hidden_states
        first = [np.asarray(s).reshape(len(ids), -1).mean(axis=0) for s in states[:2]]
        assert np.abs(row.reshape(3, 32)[:2] - first).max() < 1e-5


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
    assert features.layers_taken(model) == [0, 2]
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
def test_a_classifier_with_a_head(base, tmp_path, method, folds):
    classifier = glmlora.LoraClassifier(
        base, method=method, folds=folds, validation=0.25, random_state=0, num_train_epochs=1
    )
    classifier.fit(TEXTS, TOPICS)
    assert classifier.score(TEXTS, TOPICS) == 1
    proba = classifier.predict_proba(TEXTS)
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


def test_methods_that_there_are_not(base):
    with pytest.raises(ValueError, match="method: expected one of lora, head, lora.head, got 'x'"):
        glmlora.LoraClassifier(base, method="x").fit(TEXTS, TOPICS)
    with pytest.raises(ValueError, match="early_stopping: has no effect with method='head'"):
        glmlora.LoraClassifier(base, method="head", validation=0.2, early_stopping=2).fit(
            TEXTS, TOPICS
        )
