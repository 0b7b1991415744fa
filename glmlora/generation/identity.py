"""Which model it is, whatever it was loaded from, trained to or merged with since."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from .cache import CHUNK, Model

_PROBE = 64  # tokens, from all over the vocabulary


def model_digest(model: Model, layers: Sequence[int] | np.ndarray | None = None) -> str:
    """32 hexadecimal digits, of all embeddings and of what the model makes of some tokens: of what
    goes into these layers (see `core.hidden_states`), or without them of the scores.

    It tells models apart that only a step of training, an adapter switched off or a type of numbers
    sets apart. Nothing is read but by computing, which takes seconds at 6 billion parameters.
    """
    core, vocabulary, context = model.core, model.config.padded_vocab_size, model.config.context
    total = hashlib.sha256()
    for start in range(0, vocabulary, CHUNK):
        ids = np.arange(start, min(start + CHUNK, vocabulary), dtype=np.int32)
        lengths = np.ones_like(ids)
        if context is not None and context.sop in ids:  # which stands behind a mask only
            at = context.sop - start
            ids, lengths[at] = np.insert(ids, at, context.gmask), 2
        total.update(core.hidden_states(ids, lengths, [0]))
    length = min(_PROBE, model.config.seq_length)
    probe = np.linspace(0, vocabulary - 1, length).astype(np.int32)
    if context is not None:  # none that ends a prompt: it is one as a whole
        probe[np.isin(probe, context)] = 0
    lengths = np.array([length], np.int32)
    if layers is None:
        total.update(core.forward(probe, lengths)[0])
    else:
        total.update(core.hidden_states(probe, lengths, layers))
    return total.hexdigest()[:32]
