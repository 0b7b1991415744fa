"""Rows with labels: folds, weights, scores, thresholds."""

import numpy as np
import pytest
import training

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
    either = classes.best_threshold(np.array([False, True]), np.array([0.9, 0.4]), "accuracy")
    assert either == pytest.approx(0.2)
    one_side = classes.best_threshold(np.array([True, True]), np.array([0.8, 0.7]), "f1")
    assert one_side == pytest.approx(0.35)


# In `glmlora.train`


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return training.model_dir(tmp_path_factory.mktemp("base"))


EVERY_EPOCH = {
    "eval_data": training.records(12),
    "evaluation_strategy": "epoch",
    "save_strategy": "epoch",
    "save_steps": 500,
    "label_metrics": True,
    "load_best_model_at_end": True,
}


@pytest.mark.parametrize("kind", ["lora", "p_tuning", "full"])
def test_evaluations_tell_what_classify_would(base, tmp_path, kind):
    how = {**EVERY_EPOCH, "metric_for_best_model": "log_loss", "finetuning_type": kind}
    result = training.run(base, tmp_path, **how)
    data = EVERY_EPOCH["eval_data"]
    queries = [record["instruction"] + record["input"] for record in data]
    found = result.model.classify(result.tokenizer, queries, ["0", "1"])
    expected = classes.label_scores(np.array([int(r["output"]) for r in data]), found.proba)
    told = [r for r in result.log_history if "eval_log_loss" in r]
    assert len(told) == 2
    best = min(told, key=lambda record: record["eval_log_loss"])
    assert result.best_metric == best["eval_log_loss"] == result.metrics["eval_log_loss"]
    for name in classes.SCORES:
        assert best[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize(("metric", "steps"), [("log_loss", 20), ("accuracy", 15)])
def test_a_run_that_finds_nothing_better_ends(base, tmp_path, monkeypatch, metric, steps):
    values = iter([0.5, 0.3, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(
        "glmlora.training.evaluation.label_scores",
        lambda *_: dict.fromkeys(classes.SCORES, next(values)),
    )
    result = training.run(
        base,
        tmp_path,
        **EVERY_EPOCH,
        metric_for_best_model=metric,
        num_train_epochs=6,
        early_stopping_patience=2,
    )
    assert result.global_step == steps and result.stopped_early
    assert result.best_model_checkpoint.endswith("-10" if metric == "log_loss" else "-5")


def test_answers_that_are_no_labels_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr("glmlora.training.evaluation.MOST_LABELS", 1)
    with pytest.raises(ValueError, match=r"label_metrics: expected answers that are labels, at mo"):
        training.run(base, tmp_path, **EVERY_EPOCH)
    with pytest.raises(ValueError, match=r"expected 'loss', which .* \(with label_metrics: accu"):
        later = {**EVERY_EPOCH, "label_metrics": False, "metric_for_best_model": "accuracy"}
        training.run(base, tmp_path, **later)


def test_metrics_of_labels_change_nothing_that_is_trained(base, tmp_path):
    adapters = []
    for number, label_metrics in enumerate((True, False)):
        how = {**EVERY_EPOCH, "label_metrics": label_metrics, "metric_for_best_model": "loss"}
        training.run(base, tmp_path / str(number), **how)
        adapters.append(training.adapter(tmp_path / str(number)))
    assert adapters[0] == adapters[1]


def test_a_resumed_run_ends_where_the_whole_one_does(base, tmp_path, monkeypatch):
    at_the_end = 9.0  # of each of the two runs
    values = iter([0.5, 0.3, 0.4, at_the_end, 0.35, at_the_end])
    monkeypatch.setattr(
        "glmlora.training.evaluation.label_scores",
        lambda *_: dict.fromkeys(classes.SCORES, next(values)),
    )
    how = {**EVERY_EPOCH, "metric_for_best_model": "log_loss", "early_stopping_patience": 2}

    class Stop:
        def on_step_end(self, state):
            state.should_stop = state.global_step == 16

    training.run(base, tmp_path, **how, num_train_epochs=6, callbacks=[Stop()])
    result = training.run(
        base, tmp_path, **how, num_train_epochs=6, resume_from_checkpoint=tmp_path / "checkpoint-15"
    )
    assert result.global_step == 20 and result.best_model_checkpoint.endswith("-10")
