"""A prompt as a vector: what a model's layers make of it, for heads that are trained on top."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..progress import bar
from .cache import Model
from .generate import warn_of_weights
from .labels import prompt_writer, queries_of

HELD_BYTES = 1 << 28  # of hidden states, which the core hands out for all tokens of a call
MOST = 16384  # features of a row; of a larger model fewer layers are taken


def layers_taken(model: Model) -> list[int]:
    """The layers whose states are features, evenly spaced from the embeddings, 0, to the last."""
    layers, hidden = model.config.num_layers, model.config.hidden_size
    wanted = min(layers + 1, max(2, MOST // hidden))
    return np.linspace(0, layers, wanted).round().astype(int).tolist()


def features(
    model: Model,
    tokenizer: Any,
    table_or_texts: Any,
    *,
    template: str | None = None,
    role: str = "user",
) -> np.ndarray:
    """float32 (rows, layers taken * hidden size): the mean over the tokens of each query's prompt,
    which `chat` would ask, of the hidden states that go into the layers and out of the last.

    table_or_texts, template: as in `classify`. No row depends on the others. Shows a progress bar
    on a terminal. ValueError for a prompt that is longer than the model's positions, naming the
    row.
    """
    queries = queries_of(table_or_texts, template)
    prompt_ids, config = prompt_writer(model, tokenizer, role), model.config
    prompts = [prompt_ids(number, query) for number, query in enumerate(queries)]
    warn_of_weights(model)
    taken = layers_taken(model)
    found = np.empty((len(prompts), len(taken), config.hidden_size), np.float32)
    token_bytes = 4 * config.hidden_size * (config.num_layers + 1)
    with bar(desc="features", unit="row", total=len(prompts), disable=None) as shown:
        for first, last in _calls(prompts, max(1, HELD_BYTES // token_bytes)):
            together = prompts[first:last]
            lengths = np.array([len(p) for p in together], np.int32)
            ids = np.concatenate(together).astype(np.int32)
            _, states = model.core.forward(ids, lengths, hidden_states=True)
            end = np.cumsum(lengths)
            for row, (start, stop) in enumerate(zip(end - lengths, end, strict=True)):
                found[first + row] = states[taken, start:stop].mean(axis=1, dtype=np.float64)
            shown.update(last - first)
    return found.reshape(len(prompts), len(taken) * config.hidden_size)


def _calls(prompts: Sequence[Sequence[int]], most: int) -> list[tuple[int, int]]:
    """Neighbours that are computed together: at most so many tokens, or one prompt."""
    calls, first, tokens = [], 0, 0
    for number, prompt in enumerate(prompts):
        if number > first and tokens + len(prompt) > most:
            calls.append((first, number))
            first, tokens = number, 0
        tokens += len(prompt)
    return [*calls, (first, len(prompts))] if prompts else []
