"""What the tests of training share: a tiny model with its tokenizer, records, and a quiet run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

import glmlora
from glmlora.training.trainer import TrainResult

PROMPT = "Please judge whether it is a medical field paper -->"
QUIET = {"disable_tqdm": True, "plot_loss": False}


def model_dir(parent: Path, **overrides: Any) -> str:
    """A tiny ChatGLM2 directory with a tokenizer that fits it."""
    sizes = {"padded_vocab_size": 560, "seq_length": 256, "_name_or_path": "", **overrides}
    if not sizes["_name_or_path"]:
        sizes["glmlora_family"] = "v2"  # else it would be guessed, with a warning
    directory = tiny.tiny_model_dir(parent, **sizes)
    tiny.tiny_tokenizer_dir(directory)
    return str(directory)


def records(n: int = 20) -> list[dict[str, str]]:
    """Records of different lengths."""
    return [
        {
            "instruction": PROMPT,
            "input": f"title:T{i},abstract:{'We measure cells. ' * (i % 3)}{i * i}",
            "output": str(i % 2),
        }
        for i in range(n)
    ]


def run(model: Any, out: Path, data: Any = None, **overrides: Any) -> TrainResult:
    """A short LoRA run without bar and plot: 20 records, batch 2 x 2, 2 epochs = 10 updates."""
    settings = {
        "output_dir": str(out),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        **QUIET,
        **overrides,
    }
    if settings.get("max_steps", 0) > 0:  # in place of epochs
        settings.pop("num_train_epochs")
    return glmlora.train(model, records() if data is None else data, **settings)


def losses(result: glmlora.training.trainer.TrainResult) -> list[tuple[Any, ...]]:
    """What is logged about each update: numbers that two equal runs share exactly."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "epoch")
    return [tuple(r[k] for k in keys) for r in result.log_history if "loss" in r]


def adapter(out: Path) -> bytes:
    """Bytes of the adapter in a folder."""
    return (Path(out) / "adapter_model.safetensors").read_bytes()


def dataset_dir(parent: Path, n: int = 12) -> Path:
    """A data folder with paper_label registered as the workflow does."""
    folder = parent / "data"
    folder.mkdir(exist_ok=True)
    (folder / "paper_label.json").write_text(json.dumps(records(n)), encoding="utf-8")
    info = {"paper_label": {"file_name": "paper_label.json"}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder
