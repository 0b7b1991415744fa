"""`glmlora demo`: the whole workflow on synthetic papers: csv -> LoRA -> chat -> predictions ->
submit.csv."""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import glmlora

from ..files.write import atomic_file
from . import project

ORDER = (
    "Please judge whether it is a medical field paper according to the given paper title and "
    "abstract, output 1 or 0, the following is the paper title and abstract -->"
)
PAPERS = ORDER + "title:{title},abstract:{abstract}"
# glm-tiny is small: all four linears and a larger learning rate than a 6B model would take
TRAINING = dict(
    finetuning_type="lora",
    lora_rank=16,
    lora_target="query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
    learning_rate=2e-3,
    per_device_train_batch_size=8,
    num_train_epochs=1.0,
    lr_scheduler_type="cosine",
    logging_steps=10,
    save_strategy="no",
    plot_loss=True,
)


def _read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def paper_text(row: dict[str, str]) -> str:
    """The part of the prompt that is the paper; the same for training and prediction."""
    return f"title:{row['title']},abstract:{row['abstract']}"


def confusion_picture(path: Path, counts: list[list[int]]) -> bool:
    """Draws counts[truth][predicted]; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title="synthetic papers, test")
    axes.imshow(counts, cmap="Blues")
    names = ["other", "medical"]
    axes.set_xticks([0, 1], names)
    axes.set_yticks([0, 1], names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    top = max(max(row) for row in counts)
    for i in range(2):
        for j in range(2):
            color = "white" if counts[i][j] > top / 2 else "black"
            axes.text(j, i, str(counts[i][j]), ha="center", va="center", color=color)
    figure.tight_layout()
    figure.savefig(path)
    return True


def predict_labels(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[list[int], int]:
    """Labels of the papers, and how many answers were neither 0 nor 1 (taken as 0)."""
    from tqdm.auto import tqdm

    labels, odd = [], 0
    for row in tqdm(rows, desc="predict", unit="paper"):
        answer, _ = model.chat(tokenizer, ORDER + paper_text(row), history=[], temperature=0.01)
        odd += answer not in ("0", "1")
        labels.append(int(answer == "1"))
    return labels, odd


def run_demo(directory: str | os.PathLike = "demo") -> int:
    """Make the project folder `directory`/xfg (a new one), train, chat, predict 2,000 papers; 0
    when all went well."""
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
    train_rows, test_rows = _read(home / "csv_data/train.csv"), _read(home / "csv_data/testB.csv")
    truth = {r["uuid"]: int(r["label"]) for r in _read(home / "csv_data/testB_labels.csv")}
    records = [
        {"instruction": ORDER, "input": paper_text(r), "output": r["label"]} for r in train_rows
    ]
    with atomic_file(home / "data/paper_label.json", "w") as f:
        json.dump(records, f, ensure_ascii=False, indent=4)

    print(f"2. LoRA fine-tuning of glm-tiny on {len(records)} papers")
    base, output = str(home.parent / project.BASE), str(home / "output/label_xfg")
    glmlora.train(base, records, output_dir=output, **TRAINING)

    print("3. base + adapter, one chat turn")
    model = glmlora.AutoModel.from_pretrained(base, trust_remote_code=True).half()
    tokenizer = glmlora.AutoTokenizer.from_pretrained(base, trust_remote_code=True)
    model = glmlora.PeftModel.from_pretrained(model, output).half().eval()
    with model.disable_adapter():
        print("   你好 ->", model.chat(tokenizer, "你好", history=[])[0])
    print(f"   {test_rows[0]['title']} ->", predict_labels(model, tokenizer, test_rows[:1])[0][0])

    print(f"4. {len(test_rows)} predictions")
    labels, odd = predict_labels(model, tokenizer, test_rows)
    with atomic_file(home / "submit.csv", "w") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["uuid", "Keywords", "label"])
        writer.writerows(
            (row["uuid"], "tmp", label) for row, label in zip(test_rows, labels, strict=True)
        )
    counts = [[0, 0], [0, 0]]
    for row, label in zip(test_rows, labels, strict=True):
        counts[truth[row["uuid"]]][label] += 1
    accuracy = (counts[0][0] + counts[1][1]) / len(test_rows)
    print(f"   accuracy {accuracy:.4f}, odd answers {odd}")
    print(f"   truth other: {counts[0]}, truth medical: {counts[1]} (predicted other, medical)")
    pictures = [Path(output) / "training_loss.png"]
    if confusion_picture(home / "confusion.png", counts):
        pictures.append(home / "confusion.png")
    for path in [home / "submit.csv", *pictures]:
        if path.exists():
            print(f"   {path}")
    print(f"done in {time.perf_counter() - start:.0f} s")
    return 0
