"""`glmlora demo`: the whole workflow on synthetic papers: csv -> a look at them -> LoRA with papers
held out -> probabilities -> submit.csv."""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import glmlora

from ..files.write import atomic_file
from . import plots, project

ORDER = (
    "Please judge whether it is a medical field paper according to the given paper title and "
    "abstract, output 1 or 0, the following is the paper title and abstract -->"
)
PAPER = "title:{title},abstract:{abstract}"
PAPERS = ORDER + PAPER  # the question of the paper workflow
NAMES = {0: "other", 1: "medical"}


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def _papers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """What the model reads of each."""
    return [{column: row[column] for column in ("title", "abstract")} for row in rows]


def _picture(path: Path, log_history: Any, truth: np.ndarray, proba: np.ndarray) -> bool:
    """Training, confusion and calibration side by side; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    loss, matrix, trust = figure.subplots(1, 3)
    plots.plot_training(loss, log_history)
    plots.plot_confusion(matrix, truth, proba.argmax(axis=1), NAMES)
    plots.plot_calibration(trust, truth, proba[:, 1])
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100)
    return True


def run_demo(directory: str | os.PathLike = "demo") -> int:
    """Make the project folder `directory`/xfg (a new one), look at its papers, train, predict 2,000
    papers; 0 when all went well."""
    start = time.perf_counter()
    home = Path(directory) / "xfg"
    if home.exists():
        print(
            f"{home} exists: remove it, or name another directory: glmlora demo DIR",
            file=sys.stderr,
        )
        return 1
    print(f"1. a project folder with synthetic papers: {home}")
    project.init(home)
    base, tables = str(home.parent / project.BASE), home / "csv_data"
    train, test = _read(tables / "train.csv"), _read(tables / "testB.csv")

    print("\n2. a look at them: glmlora inspect csv_data/train.csv --test csv_data/testB.csv")
    print(glmlora.inspect(train, test, template=PAPERS, tokenizer=base))

    print(f"\n3. LoRA fine-tuning of glm-tiny on {len(train):,} papers, a tenth of them held out")
    classifier = glmlora.LoraClassifier(
        base, PAPER, ORDER, validation=0.1, random_state=0, verbose=1
    )
    classifier.fit(_papers(train), [int(row["label"]) for row in train])
    classifier.save(home / "output/label_xfg")

    print(f"\n4. the probability of each label for {len(test):,} papers")
    proba = classifier.predict_proba(_papers(test))
    labels = classifier.classes_[proba.argmax(axis=1)]
    known = {row["uuid"]: int(row["label"]) for row in _read(tables / "testB_labels.csv")}
    truth = np.array([known[row["uuid"]] for row in test])
    loss = -np.log(proba[np.arange(len(truth)), truth]).mean()
    print(f"accuracy {(labels == truth).mean():.4f}, log-loss {loss:.3f}; truth, and predicted as")
    for label, counts in enumerate(plots.confusion(truth, labels, list(NAMES))):
        cells = (f"{NAMES[at]} {n} ({n / counts.sum():.1%})" for at, n in enumerate(counts))
        print(f"  {NAMES[label]}:", ", ".join(cells))

    print("\n5. a submission: glmlora submit --sample csv_data/sample_submit.csv ..")
    answers = [
        {"uuid": row["uuid"], "Keywords": "tmp", "label": label}
        for row, label in zip(test, labels.tolist(), strict=True)
    ]
    print(glmlora.submit(str(tables / "sample_submit.csv"), answers, home / "submit.csv"))
    picture = home / "results.png"
    if _picture(picture, classifier.log_history_, truth, proba):
        print(picture)
    print(f"done in {time.perf_counter() - start:.0f} s")
    return 0
