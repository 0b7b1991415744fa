"""Rows with labels: folds, weights, scores, thresholds."""

import numpy as np
import pytest

from glmlora.training import classes

CODES = np.array([0] * 13 + [1] * 7 + [2] * 4)


def test_folds_keep_the_shares_of_labels():
    fold = classes.stratified_folds(CODES, 4, seed=3)
    for code in range(3):
        counts = np.bincount(fold[code == CODES], minlength=4)
        assert counts.max() - counts.min() <= 1
    assert np.ptp(np.bincount(fold)) <= 1
    assert (fold == classes.stratified_folds(CODES, 4, seed=3)).all()
    assert (fold != classes.stratified_folds(CODES, 4, seed=4)).any()
    with pytest.raises(ValueError, match=r"folds: expected from 2 to the 24 rows, got 25"):
        classes.stratified_folds(CODES, 25, seed=0)


def test_a_split_holds_out_some_of_each_label():
    held_out = classes.stratified_split(CODES, 0.25, seed=1)
    assert [int(held_out[code == CODES].sum()) for code in range(3)] == [3, 2, 1]
    assert classes.stratified_split(np.array([0, 0, 1, 1]), 0.01, 0).sum() == 2
    assert classes.stratified_split(np.array([0, 0, 1, 1]), 0.99, 0).sum() == 2
    with pytest.raises(ValueError, match=r"validation: a label has one row \(row 3\)"):
        classes.stratified_split(np.array([0, 0, 0, 1]), 0.5, 0)


def test_weights_of_classes():
    names = np.array(["a", "b", "c"])
    assert classes.class_weights(None, CODES, names) is None
    balanced = classes.class_weights("balanced", CODES, names)
    assert balanced == pytest.approx([24 / 39, 24 / 21, 2])
    assert classes.class_weights({"b": 3}, CODES, names).tolist() == [1, 3, 1]
    with pytest.raises(ValueError, match=r"class_weight: 'd' is no label of y"):
        classes.class_weights({"d": 1}, CODES, names)
    with pytest.raises(ValueError, match=r"class_weight: 'a': expected a number above 0, got 0"):
        classes.class_weights({"a": 0}, CODES, names)
    with pytest.raises(ValueError, match=r"class_weight: expected None, 'balanced' or a dict"):
        classes.class_weights("balance", CODES, names)


def test_rows_of_heavy_classes_are_there_more_often():
    rows = classes.resampled(CODES, np.array([1.0, 1.5, 13 / 4]), seed=0)
    assert np.bincount(CODES[rows]).tolist() == [13, 10, 13]
    assert set(rows) == set(range(24))
    assert classes.resampled(CODES, None, seed=0).tolist() == list(range(24))


def test_scores_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(5)
    proba = rng.dirichlet(np.ones(3), size=24)
    scores = classes.label_scores(CODES, proba)
    predicted = proba.argmax(1)
    assert scores["accuracy"] == pytest.approx(metrics.accuracy_score(CODES, predicted))
    assert scores["macro_f1"] == pytest.approx(metrics.f1_score(CODES, predicted, average="macro"))
    assert scores["log_loss"] == pytest.approx(metrics.log_loss(CODES, proba))
    sure = np.eye(3)[(CODES + 1) % 3]
    assert np.isfinite(classes.label_scores(CODES, sure)["log_loss"])


@pytest.mark.parametrize("by", classes.THRESHOLDS)
def test_a_threshold_is_the_best_of_all(by):
    rng = np.random.default_rng(2)
    for n in (1, 2, 5, 30):
        truth = rng.random(n) < 0.4
        proba = np.round(rng.random(n), 1)  # with ties, which no threshold can part

        def score(at, truth=truth, proba=proba):
            taken = proba >= at
            return classes.f1_score(truth, taken) if by == "f1" else (taken == truth).mean()

        found = classes.best_threshold(truth, proba, by)
        most = max(score(at) for at in np.linspace(0, 1, 101))
        assert 0 <= found <= 1 and score(found) == pytest.approx(most)


def test_of_equal_thresholds_it_is_the_nearest_to_one_half():
    truth, proba = np.array([True, True, False]), np.array([0.9, 0.58, 0.5])
    assert classes.best_threshold(truth, proba, "accuracy") == pytest.approx(0.54)
    one_side = classes.best_threshold(np.array([True, True]), np.array([0.8, 0.7]), "f1")
    assert one_side == pytest.approx(0.35)
