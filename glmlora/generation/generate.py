"""From ids to ids: generate and stream_generate, and many prompts at once for those above."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import tell
from ..batch import Batch, as_rows, check_ids, given_rows
from .beams import best_answers
from .cache import CachedRow, Model, PastKeyValues, check_past
from .config import GenerationConfig, Settings, check_names, spelled_out, tell_without_effect
from .processors import Processor
from .scheduler import Request, Scheduler, Scores, by_doubling, call_seed, first_room, limits_of
from .stopping import Criterion
from .streamers import check_streamer, ended

if TYPE_CHECKING:
    from typing_extensions import Unpack

ROWS = 16  # rows of a batch that are decoded together; the others wait for a place ..
CACHE_BYTES = 2 << 30  # .. and fewer than that where their keys and values would take more


@dataclass
class GenerateOutput:
    """What `generate` returns with `return_dict_in_generate`; R rows, N new tokens.

    sequences int64 (R, T + N). scores (with output_scores) and logits (with output_logits): after
    and before all changes, N arrays float32 (R, V); where a row has ended, all but its pad id are
    -inf. With beams neither is kept, but sequences_scores float32 (R,). past_key_values: of all but
    the last id of each row, for `model(ids, past_key_values=..)`; None with beams.
    """

    sequences: np.ndarray
    scores: tuple[np.ndarray, ...] | None = None
    logits: tuple[np.ndarray, ...] | None = None
    sequences_scores: np.ndarray | None = None
    past_key_values: PastKeyValues | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None."""
        return tuple(v for f in fields(self) if (v := getattr(self, f.name)) is not None)

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are not None."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


@spelled_out(Settings)
def generate(
    model: Model,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Processor | Sequence[Processor] | None = None,
    stopping_criteria: Criterion | Sequence[Criterion] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Any] | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    inputs: Any = None,
    past_key_values: PastKeyValues | None = None,
    **settings: Unpack[Settings],
) -> Any:
    """Continue prompts.

    input_ids (or `inputs`) (B, T) integers with padding at either end where attention_mask is 0, or
    B lists of ids of any lengths; without a mask, pad ids at the ends of rows are padding, which is
    told once. position_ids are not needed: a row counts from its first token.
    logits_processor: functions of (ids int64 (1, t), scores float32 (1, V)) that return scores.
    stopping_criteria: functions of (ids, scores or None), true where the row ends. Both see one row
    at a time. prefix_allowed_tokens_fn: of (row, ids (t,)), the ids that may follow. streamer: gets
    the ids of the only row, see TextStreamer. tokenizer: for stop_strings. past_key_values is
    accepted and saves nothing here: `input_ids` are the whole sequences. settings: see
    GenerationConfig; those not given are generation_config's, or the model's.

    Returns int64 (B * num_return_sequences, T + new): prompts as given, new ids, rows that ended
    filled with the pad id; a GenerateOutput with return_dict_in_generate. Up to 16 rows run
    together, a row that ends gives its place to the next, and each gets what it would get alone.
    Raises ValueError naming the argument, TypeError for an unknown one, FloatingPointError naming
    layer and row.
    """
    with ended(streamer):
        g = _settings(model, generation_config, settings, generate)
        change = Scores(g, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, tokenizer)
        padded, prompts = _prompts(
            model, _one_of(input_ids, inputs), attention_mask, position_ids, g
        )
        _check_whole(model, past_key_values, prompts)
        limits = limits_of(model, [len(p) for p in prompts], g)
        n = int(g.num_return_sequences)
        check_streamer(streamer, len(prompts) * n, g.num_beams)
        if g.num_beams > 1:
            return _by_beams(model, padded, prompts, limits, change)
        warn_of_weights(model)
        seed = call_seed(g)
        done: list[Any] = [None] * (len(prompts) * n)
        many = [p for p in prompts for _ in range(n)]
        draws = [(seed, row) for row in range(len(many))]
        ready = complete(
            model, many, np.repeat(limits, n).tolist(), change, draws, each=n, to=streamer
        )
        for row, request in ready:
            done[row] = request
        sequences = _beside(np.repeat(padded, n, axis=0), [r.new for r in done], _pad(g))
        return _output(model, sequences, done, g) if g.return_dict_in_generate else sequences


def _by_beams(
    model: Model,
    padded: np.ndarray,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    change: Scores,
) -> Any:
    """What `generate` returns with beams."""
    g, seed = change.settings, call_seed(change.settings)
    found: list[tuple[float, list[int]]] = []
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        found += best_answers(model, prompt, limit, change, (seed, row), row)
    repeated = np.repeat(padded, int(g.num_return_sequences), axis=0)
    sequences = _beside(repeated, [ids for _, ids in found], _pad(g))
    if not g.return_dict_in_generate:
        return sequences
    return GenerateOutput(
        sequences, sequences_scores=np.array([score for score, _ in found], np.float32)
    )


def _output(
    model: Model, sequences: np.ndarray, done: Sequence[Request], g: GenerationConfig
) -> GenerateOutput:
    steps = max(request.index for request in done)

    def kept(rows: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, ...]:
        ended = np.full_like(rows[0][0], -np.inf)
        ended[min(_pad(g), ended.size - 1)] = 0
        return tuple(np.stack([r[i] if i < len(r) else ended for r in rows]) for i in range(steps))

    return GenerateOutput(
        sequences,
        kept([r.scores for r in done]) if g.output_scores else None,
        kept([r.logits for r in done]) if g.output_logits else None,
        past_key_values=PastKeyValues(
            model, [r.ids[:-1] for r in done], width=sequences.shape[1] - 1
        ),
    )


@spelled_out(Settings)
def stream_generate(
    model: Model,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Processor | Sequence[Processor] | None = None,
    stopping_criteria: Criterion | Sequence[Criterion] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, np.ndarray], Any] | None = None,
    tokenizer: Any = None,
    inputs: Any = None,
    **settings: Unpack[Settings],
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the ids so far, int64 (B, T + k), after the k-th new token. Beams
    are ignored, and so is return_dict_in_generate.
    """
    g = _settings(model, generation_config, settings, stream_generate)
    g.output_scores = g.output_logits = False
    if g.num_beams > 1:
        tell.once("stream_generate: num_beams: no effect, tokens are shown as they are chosen")
    pad = _pad(g)
    padded, prompts = _prompts(model, _one_of(input_ids, inputs), attention_mask, position_ids, g)
    change = Scores(g, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, tokenizer)
    n = int(g.num_return_sequences)
    lengths = [len(p) for p in prompts]
    limits = limits_of(model, lengths, g)
    warn_of_weights(model)

    def run() -> Iterator[np.ndarray]:
        rows = CachedRow(model, len(prompts) * n, first_room(lengths, limits))
        scheduler = Scheduler(rows, change)
        seed = call_seed(g)
        for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            scheduler.submit(prompt, limit, (seed, row), row)
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
    warn_of_weights(model)
    seed = call_seed(g)
    draws = [(seed, row) for row in range(len(prompts))]
    if g.num_beams == 1:
        for row, request in complete(model, prompts, limits, change, draws, at_once):
            yield row, request.new
        return
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        yield row, best_answers(model, prompt, limit, change, draws[row])[0][1]


def complete(
    model: Model,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    change: Scores,
    draws: Sequence[tuple[int, int]],
    at_once: int = ROWS,
    each: int = 1,
    to: Any = None,
) -> Iterator[tuple[int, Request]]:
    """(number of a prompt, its request, which has its new ids, an end id included), in the order in
    which they end.

    At most `at_once` rows run together. What all prompts begin with is computed once. limits: new
    ids allowed to each; draws: the (seed, stream) of each one's random numbers. Each gets what it
    would get alone. each: how many prompts in a row are one of the caller's; to: a streamer that
    gets the only row.
    """
    shared = shared_length(model, prompts) if len(prompts) > 1 else 0
    room = first_room((len(p) - shared for p in prompts), limits)
    places = places_for(model, room, min(at_once, len(prompts)))
    rows = CachedRow(model, places, room, prompts[0][:shared])
    scheduler = Scheduler(rows, change, by_doubling)
    numbers = {
        scheduler.submit(*request, number // each): number
        for number, request in enumerate(zip(prompts, limits, draws, strict=True))
    }
    if to is not None:
        to.put(np.array(prompts, np.int64))
    for request, token, finished in scheduler.run(unseen=to is None):
        if to is not None:
            to.put(np.array([token], np.int64))
        if finished:
            yield numbers.pop(request), request


def places_for(model: Model, room: int, wanted: int) -> int:
    """How many of the rows wanted the cache may have, of `room` positions each."""
    c = model.config
    row_bytes = 8 * c.num_layers * c.multi_query_group_num * c.kv_channels * room
    return max(1, min(wanted, CACHE_BYTES // row_bytes))


def shared_length(model: Model, prompts: Sequence[Sequence[int]]) -> int:
    """How many ids all prompts begin with, less one where one of them has no others; 0 where what
    follows changes them.
    """
    if model.config.context is not None:
        return 0
    first, last = min(prompts), max(prompts)  # of the rest, every one lies between
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def _settings(
    model: Model,
    given: GenerationConfig | None,
    named: Mapping[str, Any],
    function: Callable[..., Any],
) -> GenerationConfig:
    """Checked settings of a call of `function`; those that have no effect there are told once."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise TypeError(f"generation_config: expected a GenerationConfig, got {given!r:.80}")
    check_names(function, named)
    own = model.generation_config
    g = copy.copy(own if given is None else given)
    g.update(**named)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if getattr(g, name) is None:
            setattr(g, name, getattr(own, name))
    g.check(model.config.padded_vocab_size)
    if g.max_new_tokens is None and g.max_length is None:
        tell.once(
            f"{function.__name__}: neither max_new_tokens nor max_length is given: it goes on to "
            f"an end id or the model's {model.config.seq_length} positions (transformers: 20 ids)",
        )
    tell_without_effect(function, g, set(named))
    return g


def _one_of(input_ids: Any, inputs: Any) -> Any:
    if inputs is None:
        return input_ids
    if input_ids is not None:
        raise TypeError("inputs: the same as input_ids, which is given too")
    return inputs


def _prompts(
    model: Model, input_ids: Any, attention_mask: Any, position_ids: Any, g: GenerationConfig
) -> tuple[np.ndarray, list[list[int]]]:
    """(ids as given (B, T) int64, rows without padding). Lists of several lengths are padded on the
    left. ValueError for positions that do not count from each row's first token.
    """
    if isinstance(attention_mask, GenerationConfig):
        raise TypeError("generation_config: is to be given by name, got one as attention_mask")
    if input_ids is None and g.bos_token_id is not None:
        input_ids = [[g.bos_token_id]]
    if input_ids is None:
        raise ValueError("input_ids: expected an array of ids (rows, tokens), got None")
    pad = _pad(g)
    ragged = isinstance(input_ids, Sequence) and input_ids and isinstance(input_ids[0], Sequence)
    if ragged and len({len(row) for row in input_ids}) > 1:
        if attention_mask is not None:
            raise ValueError("attention_mask: not needed for rows of several lengths")
        width = max(len(row) for row in input_ids)
        attention_mask = [[0] * (width - len(row)) + [1] * len(row) for row in input_ids]
        input_ids = [[pad] * (width - len(row)) + list(row) for row in input_ids]
    ids = as_rows("input_ids", input_ids)
    check_ids("input_ids", ids, model.config.padded_vocab_size)
    if attention_mask is None:
        attention_mask = _inferred_mask(ids, g)
    if attention_mask is None and position_ids is None and ids.dtype.kind != "b":
        return ids.astype(np.int64), ids.tolist()
    ids, mask, places, _ = given_rows(ids, attention_mask, position_ids, None, model.config.context)
    batch, _, _ = Batch.from_padded(ids, mask, position_ids=places)
    if batch.positions is not None:
        raise ValueError("position_ids: expected 0, 1, .. from each row's first token on")
    ends = np.cumsum(batch.lengths)
    rows = [batch.ids[e - n : e].tolist() for e, n in zip(ends, batch.lengths, strict=True)]
    return ids.astype(np.int64), rows


def _inferred_mask(ids: np.ndarray, g: GenerationConfig) -> np.ndarray | None:
    """0 over the pad ids at the ends of rows, told once; None where there are none, or where the
    pad id is an end id. Pad ids between others are text, told once.
    """
    pad = g.pad_token_id
    if pad is None or pad in g.eos or (ids != pad).all():
        return None
    text = ids != pad
    mask = np.logical_or.accumulate(text, axis=1)
    mask &= np.logical_or.accumulate(text[:, ::-1], axis=1)[:, ::-1]
    if (mask & ~text).any():
        tell.once(
            f"input_ids: the pad id {pad} stands between other ids and no attention_mask is given: "
            "there it is read as text (transformers would leave it out)"
        )
    if mask.all():
        return None
    tell.once(
        f"input_ids: rows begin or end with the pad id {pad} and no attention_mask is given: these "
        "ids are taken for padding; pass attention_mask, the tokenizer gives one"
    )
    return mask.astype(np.int64)


def _check_whole(model: Model, past: Any, prompts: Sequence[Sequence[int]]) -> None:
    if past is None:
        return
    check_past(past, model, len(prompts))
    pairs = zip(prompts, past.rows_of_ids, strict=True)
    if not all(list(row[: len(old)]) == old for row, old in pairs):
        raise ValueError(
            "past_key_values: input_ids do not begin with what it holds; pass the whole sequences"
        )


def warn_of_padding(ids: np.ndarray, pad: int | None) -> None:
    """Say once that ids without a mask look padded: the model reads them as text, as in
    transformers.
    """
    if pad is not None and (ids[:, [0, -1]] == pad).any():
        tell.once(
            f"input_ids: rows begin or end with the pad id {pad} and no attention_mask is given: "
            "the model reads these ids as text; pass attention_mask, the tokenizer gives one"
        )


def warn_of_weights(model: Model) -> None:
    """Say once that a P-Tuning prefix is random, or that the weights are not those that the asked
    products are for.
    """
    warn_of_products(model)
    if model.prefix_is_fresh:
        model.prefix_is_fresh = False
        tell.warn(
            "the P-Tuning prefix is neither trained nor loaded: use "
            "model.transformer.prefix_encoder.load_state_dict or glmlora.load_prefix"
        )


def warn_of_products(model: Model) -> None:
    """Say once that int8 products were asked for and no weight is such that they are made."""
    core = model.core
    if not core.backend.endswith("/int8"):
        return
    kinds = {core.dtype(name) for name in core.names()}
    if not kinds & {"I8", "I4"}:
        tell.once(
            "compute_dtype 'int8' has no effect: the base is not quantized to integers; use "
            "quantization_bit=8 or 4, or model.quantize"
        )


def _pad(g: GenerationConfig) -> int:
    return 0 if g.pad_token_id is None else int(g.pad_token_id)


def _beside(padded: np.ndarray, answers: Sequence[Sequence[int]], pad: int) -> np.ndarray:
    """Prompts (B, T) and their answers (B, T + longest), filled with `pad`."""
    out = np.full((len(answers), max(map(len, answers))), pad, np.int64)
    for row, answer in enumerate(answers):
        out[row, : len(answer)] = answer
    return np.concatenate((padded, out), axis=1)
