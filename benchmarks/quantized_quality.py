"""Accuracy on the synthetic test after LoRA: over float32, int8 and int4 bases, and with products
in bfloat16 and int8.

    python benchmarks/quantized_quality.py [--rows float32,int8] [--seed 42] [--keep DIR]

Trains glm-tiny once for each row, and predicts with the base and the
products it was trained with; then with the adapter that was trained in float32, as a user who
trains once and predicts in another form. Prints, a row as soon as it is known: accuracy, odd
answers, the difference to float32 in points; the same for float32's adapter; minutes. With --keep
the adapters and answers stay in DIR, where another call with other rows finds float32's.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import glmlora  # noqa: E402
from glmlora.generation.chat import chat_rows  # noqa: E402
from glmlora.tools import project  # noqa: E402
from glmlora.tools.demo import ORDER, PAPER, _read  # noqa: E402
from glmlora.training.methods import unwrapped  # noqa: E402

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

# name: (bits, columns of a group, products); a base of 0 bits is float32, or as stored (float16)
ROWS = {
    "float32": (0, 0, "float32"),
    "bfloat16": (0, 0, "bfloat16"),
    "int8": (8, 0, "float32"),
    "int8-int8": (8, 0, "int8"),
    "int4-groups": (4, 32, "float32"),
    "int4-groups-int8": (4, 32, "int8"),
}


class Papers:
    """The synthetic papers, and the glm-tiny of a new project."""

    def __init__(self, folder, n):
        home = folder / "xfg"
        if not home.exists():
            project.init(home)
        self.base = str(folder / project.BASE)
        self.train = [
            {"instruction": ORDER, "input": PAPER.format(**r), "output": r["label"]}
            for r in _read(home / "csv_data/train.csv")
        ]
        test = _read(home / "csv_data/testB.csv")[:n]
        truth = {r["uuid"]: r["label"] for r in _read(home / "csv_data/testB_labels.csv")}
        self.prompts = [ORDER + PAPER.format(**r) for r in test]
        self.truth = [truth[r["uuid"]] for r in test]
        self.tokenizer = glmlora.AutoTokenizer.from_pretrained(self.base)

    def model(self, bits, group, products):
        """A fresh base in that form."""
        model = glmlora.AutoModel.from_pretrained(self.base, compute_dtype=products)
        if bits:
            model.quantize(bits, group_size=group)
        elif products == "float32":
            model.float()
        assert model.compute_dtype == products, model.compute_dtype
        return model

    def answers(self, model):
        """What the model says to each prompt."""
        found = dict(chat_rows(unwrapped(model), self.tokenizer, self.prompts, temperature=0.01))
        return [found[i] for i in range(len(self.prompts))]

    def accuracy(self, answers):
        return sum(map(str.__eq__, answers, self.truth)) / len(self.truth)


def facts(papers, answers, first):
    """Accuracy, odd answers and points beside `first` (an accuracy, or None)."""
    accuracy = papers.accuracy(answers)
    odd = sum(a not in ("0", "1") for a in answers)
    points = "" if first is None else f" {100 * (accuracy - first):+.2f} points"
    return f"accuracy {accuracy:.4f}{points}, odd {odd}"


def measure(papers, names, folder, seed):
    """Train, predict and print each row."""
    kept = folder / "float32"
    for name in names:
        begun = time.perf_counter()
        place = folder / name
        settings = TRAINING | dict(
            plot_loss=False, disable_tqdm=True, logging_steps=1000, seed=seed
        )
        result = glmlora.train(
            papers.model(*ROWS[name]),
            papers.train,
            output_dir=str(place),
            tokenizer=papers.tokenizer,
            **settings,
        )
        trained = papers.answers(result.model)
        (place / "answers.json").write_text(json.dumps(trained))
        first = None
        if name != "float32" and (kept / "answers.json").exists():
            first = papers.accuracy(json.loads((kept / "answers.json").read_text()))
        line = facts(papers, trained, first)
        if first is not None:
            model = glmlora.PeftModel.from_pretrained(papers.model(*ROWS[name]), str(kept))
            line += "; float32's adapter: " + facts(papers, papers.answers(model), first)
        minutes = (time.perf_counter() - begun) / 60
        print(f"{name:20} {line}; {minutes:.1f} min", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--papers", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=42, help="of the training")
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    names = args.rows.split(",")
    for name in names:
        if name not in ROWS:
            parser.error(f"--rows: expected some of {', '.join(ROWS)}, got {name!r}")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        measure(Papers(folder, args.papers), names, folder, args.seed)


if __name__ == "__main__":
    main()
