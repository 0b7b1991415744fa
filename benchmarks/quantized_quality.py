"""Accuracy on the synthetic test after LoRA over float32, int8 and int4 bases.

    python benchmarks/quantized_quality.py [--papers 2000]

Trains glm-tiny as `glmlora demo` does, once for each base, and predicts with the base it was
trained over. Prints accuracy, odd answers and the difference to float32 in points.
"""

import argparse
import tempfile
import warnings
from pathlib import Path

import glmlora
from glmlora import project
from glmlora.demo import ORDER, TRAINING, _read, paper_text
from glmlora.generation import chat_rows
from glmlora.methods import unwrapped

BASES = {"float32": {}, "int8": {"bits": 8}, "int4, groups of 32": {"bits": 4, "group_size": 32}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--papers", type=int, default=2000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "xfg"
        project.init(home)
        train = _read(home / "csv_data/train.csv")
        test = _read(home / "csv_data/testB.csv")[: args.papers]
        truth = {r["uuid"]: r["label"] for r in _read(home / "csv_data/testB_labels.csv")}
        records = [
            {"instruction": ORDER, "input": paper_text(r), "output": r["label"]} for r in train
        ]
        base = str(home.parent / project.BASE)
        tokenizer = glmlora.AutoTokenizer.from_pretrained(base)
        prompts = [ORDER + paper_text(r) for r in test]
        first = None
        for name, form in BASES.items():
            model = glmlora.AutoModel.from_pretrained(base).float()
            if form:
                model.quantize(form["bits"], group_size=form.get("group_size"))
            settings = TRAINING | dict(plot_loss=False, disable_tqdm=True, logging_steps=1000)
            result = glmlora.train(
                model, records, output_dir=f"{folder}/{name}", tokenizer=tokenizer, **settings
            )
            answers = dict(chat_rows(unwrapped(result.model), tokenizer, prompts, temperature=0.01))
            right = sum(answers[i] == truth[r["uuid"]] for i, r in enumerate(test))
            odd = sum(a not in ("0", "1") for a in answers.values())
            accuracy = right / len(test)
            first = accuracy if first is None else first
            difference = 100 * (accuracy - first)
            print(f"{name:20} accuracy {accuracy:.4f}  odd {odd}  {difference:+.2f} points")


if __name__ == "__main__":
    main()
