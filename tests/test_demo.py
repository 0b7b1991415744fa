"""The demo on few papers, and the pictures of a classifier."""

import functools

import numpy as np
import pytest
from test_workflow import check_submission

import glmlora
from glmlora.tools import demo, papers, plots


def test_the_demo(tmp_path, monkeypatch, capsys):
    """Every step of it, in order; what it writes; a second run leaves the first alone."""
    few = functools.partial(papers.write_tables, train_rows=48, test_rows=24)
    monkeypatch.setattr(papers, "write_tables", few)
    assert demo.run_demo(tmp_path) == 0
    out = capsys.readouterr().out
    steps = "1. a project", "near-duplicates", "prompt tokens", "log_loss", "accuracy 0.", "submit"
    places = [out.index(step) for step in steps]
    assert places == sorted(places) and "medical: other" in out
    check_submission(tmp_path / "xfg/submit.csv", 24)
    loaded = glmlora.LoraClassifier.load(tmp_path / "xfg/output/label_xfg")
    assert loaded.task_.columns == ["title", "abstract"]
    if plots_are_there():
        assert (tmp_path / "xfg/results.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "xfg/submit.csv").stat().st_mtime_ns
    assert demo.run_demo(tmp_path) == 1 and "remove it" in capsys.readouterr().err
    assert (tmp_path / "xfg/submit.csv").stat().st_mtime_ns == before


def plots_are_there():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_confusion():
    truth, predicted = np.array([1, 1, 1, 0, 0]), ["1", "1", "0", "0", "1"]
    assert plots.confusion(truth.astype(str), predicted, ["0", "1"]).tolist() == [[1, 1], [1, 2]]
    assert plots.confusion([2], [2], [1, 2]).tolist() == [[0, 0], [0, 1]]
    with pytest.raises(ValueError):
        plots.confusion([1, 1], [1], [0, 1])


def test_reliability():
    """Parts of equal size whatever the values, in their order."""
    proba = np.array([0.9, 0.1, 0.8, 0.2, 0.3, 0.7, 0.95])
    truth = proba > 0.75
    mean, share, rows = plots.reliability(truth, proba, bins=3)
    assert rows.tolist() == [3, 2, 2]
    assert mean == pytest.approx([0.2, 0.75, 0.925]) and share == pytest.approx([0, 0.5, 1])
    assert len(plots.reliability(truth, proba, bins=50)[0]) == 7
    for wrong in ([], proba[:3]):
        with pytest.raises(ValueError, match=r"truth and proba: expected .*, got "):
            plots.reliability(truth if len(wrong) else [], wrong)


def test_pictures():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    loss, matrix, trust = figure.subplots(1, 3)
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}, {"train_loss": 0.4, "step": 2}]
    scores = [{"step": 1, "eval_log_loss": 0.2}, {"step": 2, "eval_log_loss": 0.3}]
    plots.plot_training(loss, history + scores)
    drawn = [line.get_xydata().tolist() for line in loss.lines]
    assert drawn == [[[1, 0.5], [2, 0.4]], [[1, 0.2], [2, 0.3]], [[1, 0.2]]]  # the ring: the best
    plots.plot_training(figure.add_subplot(), history)  # without rows held out
    plots.plot_confusion(matrix, [0, 0, 0, 1], [0, 0, 1, 1], {1: "medical"})
    texts = [text.get_text() for text in matrix.texts]
    assert texts == ["2\n66.7%", "1\n33.3%", "0\n0.0%", "1\n100.0%"]
    assert [tick.get_text() for tick in matrix.get_yticklabels()] == ["0", "medical"]
    assert matrix.get_title() == "75.0% right"
    plots.plot_calibration(trust, [0, 1, 1, 1], [0.1, 0.6, 0.7, 0.9], bins=2)
    assert trust.lines[1].get_xydata() == pytest.approx(np.array([[0.35, 0.5], [0.8, 1.0]]))
