"""The synthetic papers: deterministic, balanced, and not separable by a single word."""

import csv
import hashlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from glmlora.tools.papers import make_papers, write_tables


@pytest.fixture(scope="module")
def papers():
    return make_papers(3200, 5)


def words(paper):
    return set(re.findall(r"[a-z]+", (paper["title"] + " " + paper["abstract"]).lower()))


def test_balanced_and_distinct(papers):
    assert sum(p["label"] for p in papers) == 1600
    assert len({p["abstract"] for p in papers}) == 3200
    lengths = [len(p["abstract"].split()) for p in papers]
    assert 35 < min(lengths) and max(lengths) < 130


def test_no_single_word_tells_the_classes_apart(papers):
    labels = np.array([p["label"] for p in papers])
    sets = [words(p) for p in papers]
    vocabulary = sorted(set().union(*sets))
    best = 0
    for word in vocabulary:
        present = np.array([word in s for s in sets])
        right = (present == labels).mean()
        best = max(best, right, 1 - right)
    assert best <= 0.75


def test_words_together_tell_them_apart(papers):
    train, test = papers[:1200], papers[1200:]
    vocabulary = {w: i for i, w in enumerate(sorted(set().union(*map(words, train))))}

    def counts(rows):
        x = np.zeros((len(rows), len(vocabulary)))
        for i, row in enumerate(rows):
            for word in words(row):
                if word in vocabulary:
                    x[i, vocabulary[word]] = 1
        return x

    x, y = counts(train), np.array([p["label"] for p in train])
    log = [np.log((x[y == c].sum(0) + 1) / (x[y == c].sum() + len(vocabulary))) for c in (0, 1)]
    guess = counts(test) @ (log[1] - log[0]) > 0
    assert (guess == [p["label"] for p in test]).mean() >= 0.95


def test_length_and_authors_tell_nothing(papers):
    labels = np.array([p["label"] for p in papers])
    for value in (
        np.array([len(p["abstract"]) for p in papers]),
        np.array([len(p["author"]) for p in papers]),
        np.array([p["title"].count(" ") for p in papers]),
    ):
        best = max(abs(((value > t) == labels).mean() - 0.5) for t in np.unique(value))
        assert best <= 0.12


def test_tables(tmp_path):
    write_tables(tmp_path)
    rows = {n: list(csv.reader(open(tmp_path / n))) for n in os.listdir(tmp_path)}
    assert sorted(rows) == ["sample_submit.csv", "testB.csv", "testB_labels.csv", "train.csv"]
    assert rows["train.csv"][0] == "uuid,title,author,abstract,Keywords,label".split(",")
    assert rows["testB.csv"][0] == "uuid,title,author,abstract".split(",")
    assert (len(rows["train.csv"]), len(rows["testB.csv"])) == (1201, 2001)
    assert not {r[3] for r in rows["train.csv"][1:]} & {r[3] for r in rows["testB.csv"][1:]}
    assert [r[0] for r in rows["testB.csv"]] == [r[0] for r in rows["testB_labels.csv"]]
    ids = [r[0] for r in rows["testB.csv"][1:]]
    sample = [["uuid", "Keywords", "label"], *([i, "tmp", "0"] for i in ids)]
    assert rows["sample_submit.csv"] == sample


def test_same_bytes_in_every_process(tmp_path):
    code = "import sys; from glmlora.tools.papers import write_tables; write_tables(sys.argv[1])"
    sums = set()
    for hash_seed in ("1", "2"):
        place = tmp_path / hash_seed
        place.mkdir()
        env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code, place], check=True, env=env)
        data = b"".join((place / n).read_bytes() for n in sorted(os.listdir(place)))
        sums.add(hashlib.sha256(data).hexdigest())
    assert len(sums) == 1
