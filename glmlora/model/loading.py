"""A model and its tokenizer from the directories that a command names."""

from __future__ import annotations

import os
from typing import Any

from ..tokenization import AutoTokenizer
from .auto import AutoModel
from .peft import PeftModel
from .prefix import load_prefix


def load_model(
    model_path: str | os.PathLike,
    adapter: str | os.PathLike | None,
    dtype: str | None,
    compute_dtype: str | None,
    device: str = "cpu",
    family: str = "auto",
) -> tuple[Any, Any]:
    """Model and tokenizer of a base directory and an optional adapter or P-Tuning directory.

    dtype: float16, bfloat16 or float32; None: as stored. compute_dtype, family: as in
    `AutoModel.from_pretrained`. Errors as its, and those of `PeftModel.from_pretrained`.
    """
    known = None if family == "auto" else family
    model: Any = AutoModel.from_pretrained(model_path, compute_dtype=compute_dtype, family=known)
    if dtype:
        model = getattr(
            model, {"float16": "half", "bfloat16": "bfloat16", "float32": "float"}[dtype]
        )()
    if adapter:
        is_prefix = not os.path.exists(os.path.join(adapter, "adapter_config.json"))
        load = load_prefix if is_prefix else PeftModel.from_pretrained
        model = load(model, adapter)
    model.to(device=device)
    return model.eval(), AutoTokenizer.from_pretrained(model_path, family=known)
