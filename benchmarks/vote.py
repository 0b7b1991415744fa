"""A vote of word counts and a language model on the real papers of the competition.

    python benchmarks/vote.py DATA [--method METHOD] [--held HELD] [--seeds 5]

DATA holds train.csv, testB.csv and testB_labels.csv (not part of the project); scikit-learn is
needed. METHOD: head (usual), lora, lora+head; HELD: folds (usual), validation.

Word counts: logistic regression on TF-IDF of title and abstract. The model: LoraClassifier with its
defaults over glm-tiny. The weight of the model in the mean of both is `glmlora.vote_weight` of rows
that neither has seen: "validation" holds a fifth of train.csv out of both (word counts then learn
it, too), "folds" predicts each row of train.csv by the one of five models that has not seen it, and
testB.csv by all five and word counts of all rows. Prints a line a seed: the weight,
and accuracy and log-loss on those rows and on testB.csv, of word counts, the model and their vote;
then the means.
"""

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import glmlora
from glmlora.training.classes import label_scores, stratified_split

NAMES = ("word counts", "model", "vote")


def read(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def word_counts():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    return make_pipeline(vectors, LogisticRegression(C=30, max_iter=1000))


def text(rows):
    return [row["title"] + " " + row["abstract"] for row in rows]


def columns(rows):
    return [{name: row[name] for name in ("title", "abstract")} for row in rows]


def one_seed(train, y, test, method, held, seed, cache):
    """Probabilities (counts, model) of rows held out, their labels, and probabilities of test."""
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    settings = {"method": method, "random_state": seed}
    if method == "head":
        settings["features_cache"] = cache
    if held == "folds":
        model = glmlora.LoraClassifier(folds=5, **settings).fit(columns(train), y)
        cv = PredefinedSplit(model.oof_fold_)
        own = cross_val_predict(word_counts(), text(train), y, cv=cv, method="predict_proba")
        unseen, labels = (own, model.oof_proba_), y
        counts = word_counts().fit(text(train), y)
    else:
        out = stratified_split(y, 0.2, seed)
        kept = [train[i] for i in np.flatnonzero(~out)]
        rest = [train[i] for i in np.flatnonzero(out)]
        model = glmlora.LoraClassifier(**settings).fit(columns(kept), y[~out])
        counts = word_counts().fit(text(kept), y[~out])
        unseen = counts.predict_proba(text(rest)), model.predict_proba(columns(rest))
        labels = y[out]
        counts.fit(text(train), y)
    return unseen, labels, (counts.predict_proba(text(test)), model.predict_proba(columns(test)))


def shown(scores):
    return ", ".join(
        f"{name} {accuracy:.4f} {loss:.4f}"
        for name, (accuracy, loss) in zip(NAMES, scores, strict=True)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--method", default="head", choices=("head", "lora", "lora+head"))
    parser.add_argument("--held", default="folds", choices=("validation", "folds"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    args = parser.parse_args()
    data = Path(args.data)
    train, test = read(data / "train.csv"), read(data / "testB.csv")
    y = np.array([int(row["label"]) for row in train])
    named = {row["uuid"]: int(row["label"]) for row in read(data / "testB_labels.csv")}
    truth = np.array([named[row["uuid"]] for row in test])
    print(f"{args.method}, weight by {args.held}; accuracy and log-loss of each", flush=True)
    found, cache = [], tempfile.TemporaryDirectory()
    for seed in range(args.first, args.first + args.seeds):
        start = time.process_time()
        held, labels, asked = one_seed(train, y, test, args.method, args.held, seed, cache.name)
        weight = glmlora.vote_weight(labels, held[1], held[0])
        scores = []
        for codes, (counts, model) in ((labels, held), (truth, asked)):
            all_three = counts, model, weight * model + (1 - weight) * counts
            each = [label_scores(codes, proba) for proba in all_three]
            scores.append([(one["accuracy"], one["log_loss"]) for one in each])
        found.append([weight, *np.ravel(scores)])
        print(
            f"seed {seed}: weight {weight:.3f}; held out: {shown(scores[0])}; test: "
            f"{shown(scores[1])}; processor: {time.process_time() - start:.0f} s",
            flush=True,
        )
    mean = np.mean(found, axis=0)
    held_mean, test_mean = mean[1:7].reshape(3, 2), mean[7:].reshape(3, 2)
    print(
        f"mean of {args.seeds}: weight {mean[0]:.3f}; held out: {shown(held_mean)}; test: "
        f"{shown(test_mean)}"
    )
    worse = sum(row[11] < row[7] for row in found)
    print(f"seeds whose vote is less accurate on testB than word counts alone: {worse}")


if __name__ == "__main__":
    sys.exit(main())
