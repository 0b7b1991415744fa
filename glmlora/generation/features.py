"""A prompt as a vector: what a model's layers make of it, for heads that are trained on top."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ..files.vectors import KEY_BYTES, VectorFile
from ..progress import bar
from .cache import CHUNK, Model
from .generate import warn_of_weights
from .identity import model_digest
from .labels import prompt_writer, queries_of

MOST = 16384  # features of a row; of a larger model fewer layers are taken


def check_depth(model: Model, depth: int | None) -> int:
    """The number of layers that are run. ValueError naming what is none."""
    layers = model.config.num_layers
    if depth is None:
        return layers
    whole = isinstance(depth, int | np.integer) and not isinstance(depth, bool)
    if not whole or not 1 <= depth <= layers:
        raise ValueError(
            f"depth: expected a whole number of the model's layers, 1 to {layers}, or None for "
            f"all, got {depth!r:.80}"
        )
    return int(depth)


def layers_taken(model: Model, depth: int | None = None) -> np.ndarray:
    """The layers whose inputs are features, int32: evenly spaced from 0, which is fed the
    embeddings, to `depth`.
    """
    depth = check_depth(model, depth)
    most = max(2, MOST // model.config.hidden_size)
    return np.linspace(0, depth, min(depth + 1, most)).round().astype(np.int32)


def features(
    model: Model,
    tokenizer: Any,
    table_or_texts: Any,
    *,
    template: str | None = None,
    role: str = "user",
    depth: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> np.ndarray:
    """float32 (rows, layers taken * hidden size): the mean over the tokens of each query's prompt,
    which `chat` would ask, of the hidden states that go into the layers and out of the last.

    table_or_texts, template: as in `classify`. depth: only so many layers, the first ones, are run
    and taken; None: all. cache: a folder that keeps the features of each prompt, in a file for each
    model; those that are there are not computed again. What a model is, its adapters and types too,
    is told by what it makes of some tokens.

    No row depends on the others, and equal ones are computed once. Shows a progress bar on a
    terminal. ValueError for a prompt that is longer than the model's positions, naming the row;
    OSError naming a file or folder of the cache.
    """
    queries, layers = queries_of(table_or_texts, template), layers_taken(model, depth)
    prompt_ids = prompt_writer(model, tokenizer, role)
    numbers: dict[tuple[int, ...], list[int]] = {}
    for number, query in enumerate(queries):
        numbers.setdefault(tuple(prompt_ids(number, query)), []).append(number)
    warn_of_weights(model)
    found = np.empty((len(queries), len(layers) * model.config.hidden_size), np.float32)
    with nullcontext() if cache is None else _opened(model, layers, cache) as kept:
        missing = []
        for prompt, (first, *same) in numbers.items():
            if kept is None or not kept.read(_key(prompt), found[first]):
                missing.append(prompt)
            found[same] = found[first]
        there = len(queries) - sum(len(numbers[prompt]) for prompt in missing)
        count = {"total": len(queries), "initial": there}
        with bar(desc="features", unit="row", disable=None, **count) as shown:
            for together in _calls(missing):
                vectors = _means(model, together, layers)
                if kept is not None:
                    kept.add([*map(_key, together)], vectors)
                for prompt, vector in zip(together, vectors, strict=True):
                    found[numbers[prompt]] = vector
                    shown.update(len(numbers[prompt]))
    return found


def _calls(prompts: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Neighbours that are computed together: at most CHUNK tokens, or one prompt."""
    calls: list[list[Any]] = []
    tokens = 0
    for prompt in prompts:
        tokens += len(prompt)
        if not calls or tokens > CHUNK:
            calls.append([])
            tokens = len(prompt)
        calls[-1].append(prompt)
    return calls


def _means(model: Model, prompts: Sequence[Sequence[int]], layers: np.ndarray) -> np.ndarray:
    """The features of prompts, float32 (prompts, layers * hidden size)."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    ids = np.concatenate([np.array(p, np.int32) for p in prompts])
    states = model.core.hidden_states(ids, lengths, layers)
    parts = np.split(states, np.cumsum(lengths)[:-1], axis=1)
    means = [part.mean(axis=1, dtype=np.float64).reshape(-1) for part in parts]
    return np.array(means, np.float32)


# What is kept


def _key(prompt: Sequence[int]) -> bytes:
    return hashlib.sha256(np.array(prompt, "<i4").tobytes()).digest()[:KEY_BYTES]


def _opened(model: Model, layers: np.ndarray, folder: str | os.PathLike[str]) -> VectorFile:
    """The file of a model's features in a folder, which is made where there is none."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise NotADirectoryError(f"cache: {os.fspath(folder)} is a file, expected a folder")
    os.makedirs(folder, exist_ok=True)
    name = f"features-{model_digest(model, layers)}.bin"
    return VectorFile(Path(folder, name), len(layers) * model.config.hidden_size)
