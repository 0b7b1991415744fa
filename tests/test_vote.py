"""The weight of a vote: exactly where its log-loss is least, and an end where no mean is better."""

import numpy as np
import pytest

import glmlora


def probabilities(seed, rows=200, sure=1.0):
    """Labels, and two sets of probabilities that are right in part and wrong in different rows."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, rows)
    both = []
    for strength in (1.0, sure):
        scores = rng.standard_normal((rows, 3)) + strength * np.eye(3)[y]
        both.append(np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True))
    return y, *both


def log_loss(y, proba):
    return -np.log(proba[np.arange(len(y)), y]).mean()


@pytest.mark.parametrize("seed", range(4))
def test_it_is_where_the_log_loss_is_least(seed):
    y, one, other = probabilities(seed, sure=0.8)
    weight = glmlora.vote_weight(y, one, other)
    assert 0 < weight < 1
    a, b = (proba[np.arange(len(y)), y] for proba in (one, other))
    slope = ((a - b) / (b + weight * (a - b))).sum()
    assert abs(slope) < 1e-10  # of 200 rows
    best = log_loss(y, weight * one + (1 - weight) * other)
    for grid in np.linspace(0, 1, 101):
        assert best <= log_loss(y, grid * one + (1 - grid) * other) + 1e-15
    assert glmlora.vote_weight(y, other, one) == pytest.approx(1 - weight, abs=1e-12)


def test_one_that_adds_nothing_has_no_part():
    y, one, _ = probabilities(0)
    uniform, sure = np.full_like(one, 1 / 3), 0.01 + 0.97 * np.eye(3)[y]
    for worse in (uniform, one):
        assert glmlora.vote_weight(y, worse, sure) == 0
        assert glmlora.vote_weight(y, sure, worse) == 1


def test_of_equal_ones_the_other_alone():
    y, one, _ = probabilities(1)
    assert glmlora.vote_weight(y, one, one) == 0
    assert glmlora.vote_weight(y, one, one + 1e-13 * np.eye(3)[y]) == 0
    assert glmlora.vote_weight(y, one + 1e-13 * np.eye(3)[y], one) == 0


def test_labels_that_are_ruled_out():
    """One is certain and wrong: the row counts, but not without end; both are: no weight helps."""
    y = [0, 0, 1]
    certain = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    unsure = [[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]]
    weight = glmlora.vote_weight(y, certain, unsure)
    # 2 log(1/2 + w/2) + log(1 - w) is greatest at w = 1/3
    assert weight == pytest.approx(1 / 3, abs=1e-12)
    assert glmlora.vote_weight([*y, 1], certain + [[1, 0]], unsure + [[1, 0]]) == weight


def test_labels_are_names_in_the_order_of_columns():
    y, one, other = probabilities(2)
    weight = glmlora.vote_weight(y, one, other)
    names = np.array(["a", "b", "c"])
    assert glmlora.vote_weight(names[y], one, other) == weight
    order = [2, 0, 1]
    turned = glmlora.vote_weight(names[y], one[:, order], other[:, order], labels=names[order])
    assert turned == weight
    first = y < 2  # a label without a row
    few = glmlora.vote_weight(y[first], one[first], other[first], labels=[0, 1, 2])
    assert 0 < few < 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(y=[]), r"y: expected one label a row, got shape \(0,\)"),
        (dict(y=[[0], [1]]), r"y: expected one label a row, got shape \(2, 1\)"),
        (dict(labels=["no", "yes"]), r"y: 0 is none of labels, which are no, yes$"),
        (dict(y=["a", None]), r"y: expected labels of one type, got NoneType, str"),
        (dict(y=[1, 1]), r"proba: expected \(2, 1\) probabilities, for 2 rows of y and labels 1"),
        (dict(other=[[0.5, 0.5]]), r"other: expected \(2, 2\) probabilities.*got \(1, 2\)"),
        (dict(other=[[0.5, 0.5], [0.5, 0.6]]), r"other: row 1 is no probabilities: 0.5, 0.6"),
        (dict(proba=[[1.5, -0.5], [0.5, 0.5]]), r"proba: row 0 is no probabilities: 1.5, -0.5"),
        (dict(proba=[[np.nan, 0.5], [0.5, 0.5]]), r"proba: row 0 is no probabilities: nan, 0.5"),
    ],
)
def test_what_is_refused(change, words):
    half = [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(ValueError, match=words):
        glmlora.vote_weight(**{"y": [0, 1], "proba": half, "other": half, **change})
