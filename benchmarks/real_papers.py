"""Accuracy on the real papers of the competition, beside a linear model on TF-IDF.

    python benchmarks/real_papers.py DATA [--methods lora,full,tfidf,classifier,head,depths]
        [--seeds 5] [--base DIR]

DATA holds train.csv, testB.csv and testB_labels.csv (not part of the project). Starts from
glm-tiny, trains on train.csv, asks for each paper of testB.csv through `model.chat`, and prints one
line a method. TF-IDF needs scikit-learn. "classifier" is LoraClassifier with nothing but its
defaults over title and abstract, once a seed: a line each, with the processor's seconds, and the
mean; "head" the same with method="head"; "depths" a line for each number of layers that a head may
read, with 5 folds of train.csv, too.
"""

import argparse
import csv
import tempfile
import time
from pathlib import Path

import glmlora
from glmlora.tools.demo import ORDER, PAPER
from glmlora.tools.project import tiny_directory

COMMON = dict(
    per_device_train_batch_size=8,
    lr_scheduler_type="cosine",
    warmup_ratio=0.05,
    logging_steps=20,
    save_strategy="no",
    max_source_length=1024,
)
METHODS = {
    "lora": dict(
        finetuning_type="lora",
        lora_rank=16,
        lora_target="query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
        learning_rate=1e-3,
        num_train_epochs=2.0,
    ),
    "full": dict(finetuning_type="full", learning_rate=5e-4, num_train_epochs=2.0),
}


def read(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def predict_labels(model, tokenizer, rows):
    """Labels of the papers, and how many answers were neither 0 nor 1 (taken as 0)."""
    from tqdm.auto import tqdm

    labels, odd = [], 0
    for row in tqdm(rows, desc="predict", unit="paper"):
        question = ORDER + PAPER.format(**row)
        answer, _ = model.chat(tokenizer, question, history=[], temperature=0.01)
        odd += answer not in ("0", "1")
        labels.append(int(answer == "1"))
    return labels, odd


def tfidf(train, test):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    x = vectors.fit_transform([r["title"] + " " + r["abstract"] for r in train])
    model = LogisticRegression(C=30, max_iter=1000).fit(x, [int(r["label"]) for r in train])
    return list(model.predict(vectors.transform([r["title"] + " " + r["abstract"] for r in test])))


def fine_tuned(method, train, test, base):
    records = [
        {"instruction": ORDER, "input": PAPER.format(**r), "output": r["label"]} for r in train
    ]
    with tempfile.TemporaryDirectory() as output:
        result = glmlora.train(str(base), records, output_dir=output, **COMMON, **METHODS[method])
        labels, odd = predict_labels(result.model, result.tokenizer, test)
    return labels, odd


def classifier(name, train, test, truth, base, seeds, **parameters):
    def columns(rows):
        return [{name: r[name] for name in ("title", "abstract")} for r in rows]

    shares = []
    for seed in range(seeds):
        start = time.process_time()
        model = glmlora.LoraClassifier(base, random_state=seed, **parameters)
        model.fit(columns(train), [int(r["label"]) for r in train])
        trained = time.process_time()
        shares.append(model.score(columns(test), truth))
        print(
            f"{name}, seed {seed}: accuracy {shares[-1]:.4f}, processor: fit "
            f"{trained - start:.0f} s, predict {time.process_time() - trained:.1f} s",
            flush=True,
        )
    spread = max(shares) - min(shares)
    print(f"{name}, mean of {seeds}: accuracy {sum(shares) / seeds:.4f}, spread {spread:.4f}")


def depths(train, test, truth, base):
    def columns(rows):
        return [{name: r[name] for name in ("title", "abstract")} for r in rows]

    layers = glmlora.AutoConfig.from_pretrained(base or tiny_directory()).num_layers
    for depth in range(1, layers + 1):
        start = time.process_time()
        model = glmlora.LoraClassifier(base, method="head", depth=depth, folds=5, random_state=0)
        model.fit(columns(train), [int(r["label"]) for r in train])
        right = model.score(columns(test), truth)
        out = {name: mean for name, (mean, _) in model.mean_scores_.items()}
        print(
            f"{depth} of {layers} layers: accuracy {right:.4f}; rows left out: accuracy "
            f"{out['accuracy']:.4f}, log-loss {out['log_loss']:.3f}; processor "
            f"{time.process_time() - start:.0f} s",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--methods", default="lora,full,tfidf")
    parser.add_argument("--seeds", type=int, default=5, help="of classifier")
    parser.add_argument("--base", default=None, help="model directory; default: glm-tiny")
    args = parser.parse_args()
    data = Path(args.data)
    train, test = read(data / "train.csv"), read(data / "testB.csv")
    truth = {r["uuid"]: int(r["label"]) for r in read(data / "testB_labels.csv")}
    for method in args.methods.split(","):
        start, odd = time.perf_counter(), 0
        if method in ("classifier", "head"):
            parameters = {"method": "head"} if method == "head" else {}
            right = [truth[r["uuid"]] for r in test]
            classifier(method, train, test, right, args.base, args.seeds, **parameters)
            continue
        if method == "depths":
            depths(train, test, [truth[r["uuid"]] for r in test], args.base)
            continue
        if method == "tfidf":
            labels = tfidf(train, test)
        else:
            labels, odd = fine_tuned(method, train, test, args.base or tiny_directory())
        right = sum(truth[r["uuid"]] == label for r, label in zip(test, labels, strict=True))
        print(
            f"{method:6} accuracy {right / len(test):.4f} ({right} of {len(test)}), "
            f"odd answers {odd}, {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    main()
