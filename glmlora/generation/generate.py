"""From ids to ids: generate and stream_generate, and many prompts at once for those above."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..batch import Batch, as_rows, check_ids
from .beams import best_answers
from .cache import CachedRow, Model
from .config import GenerationConfig, Settings, spelled_out
from .scheduler import (
    Processor,
    Scheduler,
    Scores,
    by_doubling,
    call_seed,
    first_room,
    limits_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

ROWS = 16  # rows of a batch that are decoded together; the others wait for a place ..
CACHE_BYTES = 2 << 30  # .. and fewer than that where their keys and values would take more


@spelled_out
def generate(
    model: Model,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Processor | Sequence[Processor] | None = None,
    **settings: Unpack[Settings],
) -> np.ndarray:
    """Continue prompts.

    input_ids (B, T) integers with padding at either end where attention_mask is 0, or B lists of
    ids of any lengths. position_ids are accepted and not needed: a row counts from its first token.
    logits_processor: functions of (ids int64 (1, t), scores float32 (1, V)) that return scores.
    settings: see GenerationConfig; those not given are generation_config's, or the model's.

    Returns int64 (B * num_return_sequences, T + new): prompts as given, new ids, rows that ended
    filled with the pad id. Up to 16 rows run together, a row that ends gives its place to the next,
    and each gets what it would get alone. Raises ValueError naming the argument, TypeError for an
    unknown one, FloatingPointError naming layer and row.
    """
    g = _settings(model, generation_config, settings)
    change = Scores(g, logits_processor)
    padded, prompts = _prompts(model, input_ids, attention_mask, _pad(g))
    limits = limits_of(model, [len(p) for p in prompts], g)
    if g.num_beams == 1:
        warn_of_prefix(model, stacklevel=3)
    n = int(g.num_return_sequences)
    seed = call_seed(g)
    answers: list[list[int]] = [[]] * (len(prompts) * n)
    if g.num_beams > 1:
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            found = best_answers(model, prompt, limit, change, (seed, row))
            answers[row * n : (row + 1) * n] = found
    else:
        many = [p for p in prompts for _ in range(n)]
        draws = [(seed, row) for row in range(len(many))]
        for row, new in complete(model, many, np.repeat(limits, n).tolist(), change, draws):
            answers[row] = new
    return _beside(np.repeat(padded, n, axis=0), answers, _pad(g))


@spelled_out
def stream_generate(
    model: Model,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Processor | Sequence[Processor] | None = None,
    **settings: Unpack[Settings],
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the ids so far, int64 (B, T + k), after the k-th new token. Beams
    are ignored.
    """
    g = _settings(model, generation_config, settings)
    pad = _pad(g)
    padded, prompts = _prompts(model, input_ids, attention_mask, pad)
    change = Scores(g, logits_processor)
    n = int(g.num_return_sequences)
    lengths = [len(p) for p in prompts]
    limits = limits_of(model, lengths, g)
    warn_of_prefix(model, stacklevel=3)

    def run() -> Iterator[np.ndarray]:
        rows = CachedRow(model, len(prompts) * n, first_room(lengths, limits))
        scheduler = Scheduler(rows, change)
        seed = call_seed(g)
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            scheduler.submit(prompt, limit, (seed, row))
        scores = None
        if n > 1:  # each prompt is computed once
            scores = np.repeat(scheduler.scores(), n, axis=0)
            scheduler.fork([i // n for i in range(len(prompts) * n)])
        out = np.repeat(padded, n, axis=0)
        while events := scheduler.step(scores):
            column = np.full((len(out), 1), pad, np.int64)
            column[[e.request.row for e in events], 0] = [e.token for e in events]
            out = np.concatenate((out, column), axis=1)
            scores = None
            yield out

    return run()


def generate_rows(
    model: Model, prompts: Sequence[list[int]], g: GenerationConfig, at_once: int = ROWS
) -> Iterator[tuple[int, list[int]]]:
    """(number of a prompt, its new ids) in the order in which they end; at most `at_once` rows run
    together, and no answer depends on that.
    """
    g.check(model.config.padded_vocab_size)
    change = Scores(g, None)
    limits = limits_of(model, [len(p) for p in prompts], g)
    warn_of_prefix(model)
    seed = call_seed(g)
    draws = [(seed, row) for row in range(len(prompts))]
    if g.num_beams == 1:
        yield from complete(model, prompts, limits, change, draws, at_once)
        return
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        yield row, best_answers(model, prompt, limit, change, draws[row])[0]


def complete(
    model: Model,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    change: Scores,
    draws: Sequence[tuple[int, int]],
    at_once: int = ROWS,
) -> Iterator[tuple[int, list[int]]]:
    """(number of a prompt, its new ids, an end id included), in the order in which they end.

    At most `at_once` rows run together. What all prompts begin with is computed once. limits: new
    ids allowed to each; draws: the (seed, stream) of each one's random numbers. Each gets what it
    would get alone.
    """
    shared = _shared_length(prompts) if len(prompts) > 1 else 0
    room = first_room((len(p) - shared for p in prompts), limits)
    c = model.config
    row_bytes = 8 * c.num_layers * c.multi_query_group_num * c.kv_channels * room
    places = max(1, min(at_once, len(prompts), CACHE_BYTES // row_bytes))
    rows = CachedRow(model, places, room, prompts[0][:shared])
    scheduler = Scheduler(rows, change, by_doubling)
    numbers = {
        scheduler.submit(*request): number
        for number, request in enumerate(zip(prompts, limits, draws, strict=True))
    }
    for request, _, finished in scheduler.run():
        if finished:
            yield numbers.pop(request), request.new


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many ids all prompts begin with, less one where one of them has no others."""
    first, last = min(prompts), max(prompts)  # of the rest, every one lies between
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _settings(
    model: Model,
    given: GenerationConfig | None,
    fields: Mapping[str, Any],
) -> GenerationConfig:
    if given is not None and not isinstance(given, GenerationConfig):
        raise TypeError(f"generation_config: expected a GenerationConfig, got {given!r}")
    own = model.generation_config
    g = copy.copy(own if given is None else given)
    g.update(**fields)
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(g, name) is None:
            setattr(g, name, getattr(own, name))
    g.check(model.config.padded_vocab_size)
    return g


def _prompts(
    model: Model, input_ids: Any, attention_mask: Any, pad: int
) -> tuple[np.ndarray, list[list[int]]]:
    """(ids as given (B, T) int64, rows without padding). Lists of several lengths are padded on the
    left.
    """
    if input_ids is None:
        raise ValueError("input_ids: expected an array of ids (rows, tokens), got None")
    ragged = isinstance(input_ids, Sequence) and input_ids and isinstance(input_ids[0], Sequence)
    if ragged and len({len(row) for row in input_ids}) > 1:
        if attention_mask is not None:
            raise ValueError("attention_mask: not needed for rows of several lengths")
        width = max(len(row) for row in input_ids)
        attention_mask = [[0] * (width - len(row)) + [1] * len(row) for row in input_ids]
        input_ids = [[pad] * (width - len(row)) + list(row) for row in input_ids]
    ids = as_rows("input_ids", input_ids)
    check_ids("input_ids", ids, model.config.padded_vocab_size)
    if attention_mask is None and ids.dtype.kind != "b":
        return ids.astype(np.int64), ids.tolist()
    mask = None if attention_mask is None else as_rows("attention_mask", attention_mask)
    batch, _, _ = Batch.from_padded(ids, mask)
    ends = np.cumsum(batch.lengths)
    rows = [batch.ids[e - n : e].tolist() for e, n in zip(ends, batch.lengths, strict=True)]
    return ids.astype(np.int64), rows


def warn_of_prefix(model: Model, stacklevel: int = 4) -> None:
    """Say once that a P-Tuning prefix is random. stacklevel: of the user's line."""
    if model.prefix_is_fresh:
        model.prefix_is_fresh = False
        warnings.warn(
            "the P-Tuning prefix is neither trained nor loaded: use "
            "model.transformer.prefix_encoder.load_state_dict or glmlora.load_prefix",
            stacklevel=stacklevel,
        )


def _pad(g: GenerationConfig) -> int:
    return 0 if g.pad_token_id is None else int(g.pad_token_id)


def _beside(padded: np.ndarray, answers: Sequence[Sequence[int]], pad: int) -> np.ndarray:
    """Prompts (B, T) and their answers (B, T + longest), filled with `pad`."""
    out = np.full((len(answers), max(map(len, answers))), pad, np.int64)
    for row, answer in enumerate(answers):
        out[row, : len(answer)] = answer
    return np.concatenate((padded, out), axis=1)
