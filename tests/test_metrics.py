"""Scores against those measured on the original's libraries."""

import json

import pytest

from glmlora.training.metrics import _rouge_scorer, bleu4, compute_metrics, exact_match


def test_measured_scores(shared):
    cases = json.loads((shared / "spec/vectors.json").read_text())["metrics"]
    assert len(cases) >= 7
    for case in cases:
        assert round(bleu4(case["pred"], case["label"]), 4) == case["bleu-4"], case
        scores = compute_metrics([case["pred"]], [case["label"]])
        assert scores["bleu-4"] == case["bleu-4"]
        if _rouge_scorer():
            assert {k: v for k, v in scores.items() if k.startswith("rouge")} == {
                k: v for k, v in case.items() if k.startswith("rouge")
            }


@pytest.mark.parametrize(
    ("pred", "label", "score"),
    [
        ("1", "1", 35.3553),
        ("10", "1", 29.7302),
        ("0", "1", 0),
        ("abcd", "abcd", 100),
        ("", "1", 0),
        ("1", "", 0),
    ],
)
def test_bleu(pred, label, score):
    assert round(bleu4(pred, label), 4) == score


def test_short_answers_are_punished():
    # All n-grams match; brevity exp(1 - 8/4).
    assert bleu4("abcd", "abcdabcd") == pytest.approx(100 * 2.718281828459045**-1)


def test_exact_match():
    assert exact_match(" 1\n", "1") and not exact_match("1.0", "1")


def test_means():
    scores = compute_metrics(["1", "0", "1 "], ["1", "1", "1"])
    assert scores["accuracy"] == 66.6667
    assert scores["bleu-4"] == round((35.3553 + 0 + round(bleu4("1 ", "1"), 4)) / 3, 4)
    assert ("rouge-1" in scores) == (_rouge_scorer() is not None)


def test_bad_input():
    with pytest.raises(ValueError, match="1 and 2"):
        compute_metrics(["1"], ["1", "0"])
    with pytest.raises(ValueError, match="at least one"):
        compute_metrics([], [])
