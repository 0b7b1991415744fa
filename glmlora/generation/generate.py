"""From ids to ids, and from a question to an answer: the one token loop that generate, chat and
stream_chat share.

A row is a list of ids; the core's cache holds a leading part of it, and every step feeds what it
lacks. So a prompt, one more token and a new round of a conversation are the same call.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _core, families
from ..files.write import read_json

if TYPE_CHECKING:
    from ..model.configuration import ChatGLMConfig
    from ..model.modeling import ChatGLMForConditionalGeneration

CHUNK = 1024  # tokens fed at a time: bounds the memory of a long prompt
CAPACITY_STEP = 256  # positions by which caches are sized
ROWS = 16  # rows of a batch that are decoded together; the others wait for a place ..
CACHE_BYTES = 2 << 30  # .. and fewer than that where their keys and values would take more
# New tokens after which a cache grows: nothing is reserved for the 8192 positions chat may use.
ROOM = (256, 1024, 4096, 16384, 65536)

# Random streams: (global seed, call number) -> seed of a call; (that, row, index) -> one draw.

_random_lock = threading.Lock()
_global_seed = int.from_bytes(os.urandom(8), "little")
_calls = 0


def set_seed(seed: int) -> None:
    """Make what follows repeatable: sampling, fresh adapters and prefixes, dropout. seed: a whole
    number.
    """
    global _global_seed, _calls
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed: expected a whole number, got {seed!r}")
    with _random_lock:
        _global_seed, _calls = int(seed) % 2**64, 0


def next_key() -> tuple[int, int]:
    """What `seed_of` makes the next seed of, once it is needed: many a seed never is."""
    global _calls
    with _random_lock:
        _calls += 1
        return _global_seed, _calls - 1


def seed_of(key: tuple[int, int]) -> int:
    """A seed of 64 bits."""
    return int(np.random.Philox(key=np.array(key, np.uint64)).random_raw())


def next_seed() -> int:
    """A seed of 64 bits that depends on `set_seed` and on how many were taken since."""
    return seed_of(next_key())


def generator(seed: int | None = None) -> np.random.Generator:
    """A NumPy generator (Philox) of `seed`, or of the next global one."""
    key = next_seed() if seed is None else int(seed) % 2**64
    return np.random.Generator(np.random.Philox(key=key))


# Settings


class GenerationConfig:
    """How to generate. Neutral by default: greedy, and as long as the model has positions.

    max_length: prompt and answer together, max_new_tokens: the answer alone (wins if both are
    given); min_length: no end before that many ids, prompt included; do_sample, temperature (0 is
    greedy), top_k (0 is off), top_p; repetition_penalty over the whole context;
    no_repeat_ngram_size; num_beams, length_penalty, early_stopping; num_return_sequences;
    eos_token_id: an id, a list, or [] to never stop; pad_token_id; seed: None takes the next one of
    `set_seed`; use_cache is accepted.
    """

    FIELDS: dict[str, Any] = {
        "max_length": None,
        "max_new_tokens": None,
        "min_length": 0,
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "length_penalty": 1.0,
        "early_stopping": False,
        "num_return_sequences": 1,
        "eos_token_id": None,
        "pad_token_id": None,
        "seed": None,
        "use_cache": True,
    }

    max_length: int | None
    max_new_tokens: int | None
    min_length: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    num_beams: int
    length_penalty: float
    early_stopping: bool
    num_return_sequences: int
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    seed: int | None
    use_cache: bool

    def __init__(self, **fields: Any):
        self.__dict__.update(self.FIELDS)
        self.update(**fields)

    def update(self, **fields: Any) -> None:
        """Set fields. TypeError naming one that does not exist."""
        for name, value in fields.items():
            if name not in self.FIELDS:
                raise TypeError(
                    f"unknown generation argument {name!r}; known: {', '.join(self.FIELDS)}"
                )
            setattr(self, name, value)

    @classmethod
    def from_model_config(cls, config: ChatGLMConfig) -> GenerationConfig:
        """End and pad ids of a model's config.json."""
        return cls(eos_token_id=config.eos_token_ids, pad_token_id=config.pad_token_id)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, config: ChatGLMConfig | None = None
    ) -> GenerationConfig:
        """Read `path/generation_config.json`; keys that are not fields here are ignored, as in
        transformers.
        """
        file = Path(path) / "generation_config.json"
        found = cls() if config is None else cls.from_model_config(config)
        stored = read_json(file, dict)
        found.update(**{k: v for k, v in stored.items() if k in cls.FIELDS and v is not None})
        return found

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return {name: getattr(self, name) for name in self.FIELDS}

    @property
    def eos(self) -> list[int]:
        """`eos_token_id` as a list."""
        ids = self.eos_token_id
        if ids is None:
            return []
        return [int(i) for i in ids] if isinstance(ids, Sequence | np.ndarray) else [int(ids)]

    def check(self, vocabulary: int) -> None:
        """Raise ValueError naming the field that is out of range."""
        whole = (
            ("max_length", 1),
            ("max_new_tokens", 1),
            ("min_length", 0),
            ("top_k", 0),
            ("no_repeat_ngram_size", 0),
            ("num_beams", 1),
            ("num_return_sequences", 1),
            ("seed", None),
        )
        for name, least in whole:
            value = getattr(self, name)
            if value is None and name in ("max_length", "max_new_tokens", "seed"):
                continue
            known = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not known or (least is not None and value < least):
                expected = "a whole number" + ("" if least is None else f" from {least}")
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        for name in ("temperature", "top_p", "repetition_penalty", "length_penalty"):
            value = getattr(self, name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {self.temperature!r}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p: expected 0 to 1, got {self.top_p!r}")
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty: expected more than 0, got {self.repetition_penalty!r}"
            )
        for i in self.eos:
            if not 0 <= i < vocabulary:
                raise ValueError(f"eos_token_id: {i} is outside the vocabulary of {vocabulary} ids")
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences: {self.num_return_sequences} of {self.num_beams} beams "
                "were asked for"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn rather than the best one taken."""
        return bool(self.do_sample) and self.temperature > 0

    def __repr__(self) -> str:
        changed = {k: v for k, v in self.to_dict().items() if v != self.FIELDS[k]}
        return f"GenerationConfig({', '.join(f'{k}={v!r}' for k, v in changed.items())})"


Processor = Callable[[np.ndarray, np.ndarray], Any]


class Scores:
    """Changes to the scores of a row before one is chosen: the settings', then the caller's
    functions, in order.
    """

    def __init__(self, settings: GenerationConfig, processors: Sequence[Processor] | None):
        self.settings = settings
        if callable(processors):
            processors = [processors]
        self.processors = list(processors or ())
        for f in self.processors:
            if not callable(f):
                raise TypeError(f"logits_processor: expected functions, got {f!r}")
        self.eos = settings.eos
        g = settings
        self.adjusts = g.repetition_penalty != 1 or g.no_repeat_ngram_size > 0 or g.min_length > 0
        self.active = self.adjusts or bool(self.processors)  # else scores stay as they are
        self.greedy = not (g.samples or self.active)  # the highest score decides

    def choice(
        self, draws: Iterable[tuple[int, int, int]], contexts: Iterable[Sequence[int]]
    ) -> dict[str, Any] | None:
        """What tells the core to choose where the scores are; None: the highest one.

        draws: (seed, stream, index) of each row; contexts: its ids.
        """
        if self.greedy:
            return None
        g, found = self.settings, {"draws": np.array(list(draws), np.uint64)}
        if g.samples:
            found |= {
                "temperature": float(g.temperature),
                "top_k": int(g.top_k),
                "top_p": float(g.top_p),
            }
        if self.adjusts:
            ids = list(contexts)
            found |= {
                "context": np.fromiter(chain.from_iterable(ids), np.int32),
                "context_lengths": np.array([len(c) for c in ids], np.int32),
                "repetition_penalty": float(g.repetition_penalty),
                "no_repeat_ngram_size": int(g.no_repeat_ngram_size),
                "suppress": np.array(self.eos, np.int32),
                "min_length": int(g.min_length),
            }
        return found

    def __call__(self, scores: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """scores float32 (V), changed in place; ids: the whole context. Returns float32 (V)."""
        g = self.settings
        if self.adjusts:
            suppress = self.eos if len(ids) < g.min_length else ()
            _core.adjust_logits(
                scores,
                np.asarray(ids, np.int32),
                float(g.repetition_penalty),
                int(g.no_repeat_ngram_size),
                np.asarray(suppress, np.int32),
            )
        for f in self.processors:
            result = np.asarray(f(np.asarray([ids], np.int64), scores[None]), np.float32)
            if result.shape not in ((1, scores.size), (scores.size,)):
                raise ValueError(
                    f"logits_processor: expected scores of shape (1, {scores.size}), got "
                    f"{result.shape}"
                )
            scores = np.ascontiguousarray(result.reshape(-1))
        if self.active:
            if np.isnan(scores).any() or scores.max() == np.inf:
                raise FloatingPointError(
                    f"logits_processor: scores are not finite at token {len(ids)}"
                )
            if scores.max() == -np.inf:
                raise ValueError(f"no token is allowed at position {len(ids)}: all are suppressed")
        return scores


# Rows and their cache


class CachedRow:
    """Rows of ids, and the core's cache of a leading part of each. One row in chat, many in
    generate. `shared` ids stand before the ids of every row and are computed once.
    """

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        rows: int,
        capacity: int,
        shared: Sequence[int] = (),
    ):
        self.model = model
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.held = [0] * rows  # tokens of each row that the cache holds
        self._ones = np.ones(rows, np.int32)
        self._places = [0], np.zeros(1, np.int32)  # the rows of the last step, for the core
        opening = np.asarray(shared, np.int32)
        self.cache = model.core.cache(rows, self._capacity(capacity), opening.size)
        for start in range(0, opening.size, CHUNK):
            model.core.extend_shared(self.cache, opening[start : start + CHUNK])

    def _capacity(self, needed: int) -> int:
        rounded = -(-needed // CAPACITY_STEP) * CAPACITY_STEP
        return min(rounded, self.model.config.seq_length)

    def forget(self) -> None:
        """Empty the cache; the ids stay, and are fed again when they are needed."""
        for row in range(len(self.held)):
            self.cache.rewind(row, 0)
            self.held[row] = 0

    def make_room(self, needed: int) -> None:
        """At least `needed` positions for each row; what the cache holds stays."""
        if self.cache.capacity < needed:
            self.cache.grow(self._capacity(needed))

    def become(self, row: int, ids: Sequence[int]) -> None:
        """Make `ids` the row's, keeping what the cache holds of the beginning they share."""
        old, held = self.ids[row], self.held[row]
        shared = 0
        while shared < min(held, len(ids)) and old[shared] == ids[shared]:
            shared += 1
        if shared < held:
            self.cache.rewind(row, shared)
        self.held[row] = shared
        self.ids[row] = list(ids)

    def fork(self, parents: Sequence[int]) -> None:
        """Row i becomes a copy of what row parents[i] was."""
        self.cache.reorder(list(parents))
        self.ids = [list(self.ids[p]) for p in parents]
        self.held = [self.held[p] for p in parents]

    def extend(
        self,
        rows: Sequence[int],
        choose: Callable[[Sequence[int]], dict[str, Any] | None] | None = None,
    ) -> np.ndarray:
        """Feed what the cache lacks of each row; scores float32 (len(rows), V) of each row's next
        token, or, to choose, the ids (len(rows),) that the core chose. choose: `choice` of
        core.next for some of `rows`, by their places.

        Cuts fall at multiples of CHUNK of each row, wherever other rows are.
        """

        def run(
            places: Sequence[int],
            of: Sequence[int] | np.ndarray,
            ids: np.ndarray,
            lengths: np.ndarray,
        ) -> np.ndarray:
            core = self.model.core
            if choose is None:
                return core.extend(self.cache, of, ids, lengths)
            choice = choose(places)
            if choice is None:
                return core.next(self.cache, of, ids, lengths)
            return core.next(self.cache, of, ids, lengths, choice)

        lacks = [len(self.ids[row]) - self.held[row] for row in rows]
        if lacks.count(1) == len(rows) <= CHUNK:  # a step of decoding
            if rows != self._places[0]:
                self._places = list(rows), np.array(rows, np.int32)
            tokens = np.array([self.ids[row][-1] for row in rows], np.int32)
            places, ones = range(len(rows)), self._ones[: len(rows)]
            found = run(places, self._places[1], tokens, ones)
            for row in rows:
                self.held[row] += 1
            return found
        for row, lack in zip(rows, lacks, strict=True):
            if lack == 0:  # nothing new: its last token once more
                self.held[row] -= 1
                self.cache.rewind(row, self.held[row])
        vocabulary = self.model.config.padded_vocab_size
        shape = (len(rows),) if choose else (len(rows), vocabulary)
        found = np.empty(shape, np.int32 if choose else np.float32)
        waiting = list(range(len(rows)))
        while waiting:
            turn, ids, lengths, total = [], [], [], 0
            for i in waiting:
                held, row_ids = self.held[rows[i]], self.ids[rows[i]]
                piece = row_ids[held : min(len(row_ids), (held // CHUNK + 1) * CHUNK)]
                if turn and total + len(piece) > CHUNK:
                    break
                turn.append(i)
                ids += piece
                lengths.append(len(piece))
                total += len(piece)
            of = [rows[i] for i in turn]
            after = run(turn, of, np.asarray(ids, np.int32), np.asarray(lengths, np.int32))
            for i, length, of_row in zip(turn, lengths, after, strict=True):
                self.held[rows[i]] += length
                if self.held[rows[i]] == len(self.ids[rows[i]]):
                    found[i] = of_row
                    waiting.remove(i)
        return found


def _limits(
    model: ChatGLMForConditionalGeneration, lengths: Sequence[int], g: GenerationConfig
) -> list[int]:
    """New tokens allowed to each row. ValueError for a prompt that leaves no room, with both
    numbers.
    """
    positions = model.config.seq_length
    limits = []
    for row, length in enumerate(lengths):
        which = f"prompt of {length} tokens" + (f" (row {row})" if len(lengths) > 1 else "")
        if length >= positions:
            raise ValueError(f"{which}: the model has positions for {positions} (seq_length)")
        if g.max_new_tokens is not None:
            if length + g.max_new_tokens > positions:
                raise ValueError(
                    f"max_new_tokens: {which} and {g.max_new_tokens} new ones exceed the model's "
                    f"{positions} positions (seq_length)"
                )
            limits.append(int(g.max_new_tokens))
            continue
        most = positions if g.max_length is None else g.max_length
        if length >= most:
            raise ValueError(
                f"max_length: {which} leaves no room for an answer: max_length is {most}, prompt "
                "included"
            )
        limits.append(min(most, positions) - length)
    return limits


def _first_room(lengths: Sequence[int], limits: Sequence[int]) -> int:
    return max(n + min(limit, ROOM[0]) for n, limit in zip(lengths, limits, strict=True))


def _grow(rows: CachedRow, live: Sequence[int], index: int, limits: Sequence[int]) -> None:
    """At the counts of ROOM, room for as many new tokens as the next one says."""
    if index in ROOM:
        room = next((r for r in ROOM if r > index), 1 << 62)
        rows.make_room(max(len(rows.ids[r]) + min(limits[r], room) - index for r in live))


def _seed_of(g: GenerationConfig) -> int:
    """The seed of a call's draws; of no use, and 0, where nothing is drawn."""
    if g.seed is not None:
        return int(g.seed) % 2**64
    key = next_key()
    return seed_of(key) if g.samples else 0


def _choose(g: GenerationConfig, scores: np.ndarray, draw: tuple[int, int], index: int) -> int:
    """The index-th new token of a row from its scores float32 (V); draw: its (seed, stream)."""
    if not g.samples:
        return scores.argmax().item()
    return _core.sample(scores, float(g.temperature), int(g.top_k), float(g.top_p), *draw, index)


def _run(
    model: ChatGLMForConditionalGeneration,
    rows: CachedRow,
    limits: Sequence[int],
    g: GenerationConfig,
    change: Scores,
    scores: np.ndarray | None = None,
) -> Iterator[dict[int, int]]:
    """The token loop: yields {row: its new token} until every row has ended. Tokens are appended to
    rows.ids.

    scores (rows, V): of the first new tokens, where they are known already.
    """
    seed = _seed_of(g)
    live = list(range(len(rows.ids)))
    for index in count():
        _grow(rows, live, index, limits)

        def choose(
            places: Sequence[int], live: list[int] = live, index: int = index
        ) -> dict[str, Any] | None:
            turn = [live[i] for i in places]
            return change.choice(((seed, r, index) for r in turn), (rows.ids[r] for r in turn))

        chosen = scores is None and not change.processors
        if scores is None:
            scores = rows.extend(live, choose if chosen else None)
        tokens = {}
        for row, found in zip(live, scores.tolist() if chosen else scores, strict=True):
            token = found
            if not chosen:
                if change.active:
                    found = change(found, rows.ids[row])
                token = _choose(g, found, (seed, row), index)
            rows.ids[row].append(token)
            tokens[row] = token
        scores = None
        live = [r for r in live if tokens[r] not in change.eos and index + 1 < limits[r]]
        yield tokens
        if not live:
            return


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many ids all prompts begin with, less one where one of them has no others."""
    first, last = min(prompts), max(prompts)  # of the rest, every one lies between
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def complete(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    g: GenerationConfig,
    change: Scores,
    draws: Sequence[tuple[int, int]],
    at_once: int = ROWS,
) -> Iterator[tuple[int, list[int]]]:
    """(number of a prompt, its new ids, an end id included), in the order in which they end.

    At most `at_once` rows run together; the place of one that ended goes to the next prompt. What
    all prompts begin with is computed once. limits: new ids allowed to each; draws: the (seed,
    stream) of each one's random numbers. Each gets what it would get alone.
    """
    shared = _shared_length(prompts) if len(prompts) > 1 else 0
    own = [len(p) - shared for p in prompts]
    room = _first_room(own, limits)
    c = model.config
    row_bytes = 8 * c.num_layers * c.multi_query_group_num * c.kv_channels * room
    places = max(1, min(at_once, len(prompts), CACHE_BYTES // row_bytes))
    rows = CachedRow(model, places, room, prompts[0][:shared])
    waiting = iter(range(len(prompts)))
    running: dict[int, int] = {}  # place: prompt, in the order of places
    new: list[list[int]] = [[] for _ in prompts]
    free, live, left = list(range(places)), [], 0

    def choose(at: Sequence[int]) -> dict[str, Any] | None:
        turn = [running[live[i]] for i in at]
        return change.choice(
            ((*draws[n], len(new[n])) for n in turn), (prompts[n] + new[n] for n in turn)
        )

    while True:
        if free:  # the next prompts take the places
            running.update(zip(free, waiting, strict=False))
            for place in free:
                if place in running:
                    rows.become(place, prompts[running[place]][shared:])
            if not running:
                return
            running = dict(sorted(running.items()))
            live, left, free = list(running), 0, []
        if left == 0:  # steps for which the cache has room
            longest = max(len(rows.ids[place]) for place in live)
            if longest > rows.cache.capacity:
                most = max(own[n] + limits[n] for n in running.values())
                rows.make_room(min(2 * longest, most))
            left = rows.cache.capacity - longest + 1
        left -= 1
        chosen = not change.processors
        found = rows.extend(live, choose if chosen else None)
        for place, token in zip(live, found.tolist() if chosen else found, strict=True):
            number = running[place]
            answer = new[number]
            if not chosen:
                scores = change(token, prompts[number] + answer)
                token = _choose(g, scores, draws[number], len(answer))
            rows.ids[place].append(token)
            answer.append(token)
            if token in change.eos or len(answer) == limits[number]:
                del running[place]
                free.append(place)
                yield number, answer


# generate


def _settings(
    model: ChatGLMForConditionalGeneration,
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
    model: ChatGLMForConditionalGeneration, input_ids: Any, attention_mask: Any, pad: int
) -> tuple[np.ndarray, list[list[int]]]:
    """(ids as given (B, T) int64, rows without padding). Lists of several lengths are padded on the
    left.
    """
    from ..batch import Batch
    from ..model.modeling import as_rows, check_ids

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


def _warn_of_prefix(model: ChatGLMForConditionalGeneration) -> None:
    if model.prefix_is_fresh:
        import warnings

        model.prefix_is_fresh = False  # once
        warnings.warn(
            "the P-Tuning prefix is neither trained nor loaded: use "
            "model.transformer.prefix_encoder.load_state_dict or glmlora.load_prefix",
            stacklevel=4,
        )


def stream_generate(
    model: ChatGLMForConditionalGeneration,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[Processor] | None = None,
    **fields: Any,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the ids so far, int64 (B, T + k), after the k-th new token. Beams
    are ignored.
    """
    g = _settings(model, generation_config, fields)
    pad = _pad(g)
    padded, prompts = _prompts(model, input_ids, attention_mask, pad)
    change = Scores(g, logits_processor)
    n = int(g.num_return_sequences)
    limits = _limits(model, [len(p) for p in prompts], g)
    _warn_of_prefix(model)

    def run() -> Iterator[np.ndarray]:
        rows = CachedRow(model, len(prompts) * n, _first_room([len(p) for p in prompts], limits))
        for row, prompt in enumerate(prompts):
            rows.ids[row] = list(prompt)
        scores = None
        if n > 1:
            scores = rows.extend(range(len(prompts)))
            rows.fork([i // n for i in range(len(prompts) * n)])
            scores = np.repeat(scores, n, axis=0)
        out = np.repeat(padded, n, axis=0)
        for tokens in _run(model, rows, np.repeat(limits, n).tolist(), g, change, scores):
            column = np.full((len(out), 1), pad, np.int64)
            column[list(tokens), 0] = list(tokens.values())
            out = np.concatenate((out, column), axis=1)
            yield out

    return run()


def generate(
    model: ChatGLMForConditionalGeneration,
    input_ids: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[Processor] | None = None,
    **fields: Any,
) -> np.ndarray:
    """Continue prompts.

    input_ids (B, T) integers with padding at either end where attention_mask is 0, or B lists of
    ids of any lengths. position_ids are accepted and not needed: a row counts from its first token.
    logits_processor: functions of (ids int64 (1, t), scores float32 (1, V)) that return scores.
    fields: see GenerationConfig.

    Returns int64 (B * num_return_sequences, T + new): prompts as given, new ids, rows that ended
    filled with the pad id. Up to 16 rows run together, a row that ends gives its place to the next,
    and each gets what it would get alone. Raises ValueError naming the argument, TypeError for an
    unknown one, FloatingPointError naming layer and row.
    """
    g = _settings(model, generation_config, fields)
    change = Scores(g, logits_processor)
    if g.num_beams > 1:
        return _beam_generate(model, input_ids, attention_mask, g, change)
    padded, prompts = _prompts(model, input_ids, attention_mask, _pad(g))
    limits = _limits(model, [len(p) for p in prompts], g)
    _warn_of_prefix(model)
    n = int(g.num_return_sequences)
    seed = _seed_of(g)
    answers: list[list[int]] = [[]] * (len(prompts) * n)
    many = [p for p in prompts for _ in range(n)]
    draws = [(seed, row) for row in range(len(many))]
    for row, new in complete(model, many, np.repeat(limits, n).tolist(), g, change, draws):
        answers[row] = new
    return _beside(np.repeat(padded, n, axis=0), answers, _pad(g))


def _pad(g: GenerationConfig) -> int:
    return 0 if g.pad_token_id is None else int(g.pad_token_id)


def _beside(padded: np.ndarray, answers: Sequence[Sequence[int]], pad: int) -> np.ndarray:
    """Prompts (B, T) and their answers (B, T + longest), filled with `pad`."""
    out = np.full((len(answers), max(map(len, answers))), pad, np.int64)
    for row, answer in enumerate(answers):
        out[row, : len(answer)] = answer
    return np.concatenate((padded, out), axis=1)


def generate_rows(
    model: ChatGLMForConditionalGeneration,
    prompts: Sequence[list[int]],
    g: GenerationConfig,
    at_once: int = ROWS,
) -> Iterator[tuple[int, list[int]]]:
    """(number of a prompt, its new ids) in the order in which they end; at most `at_once` rows run
    together, and no answer depends on that.
    """
    g.check(model.config.padded_vocab_size)
    change = Scores(g, None)
    limits = _limits(model, [len(p) for p in prompts], g)
    _warn_of_prefix(model)
    seed = _seed_of(g)
    draws = [(seed, row) for row in range(len(prompts))]
    if g.num_beams == 1:
        yield from complete(model, prompts, limits, g, change, draws, at_once)
        return
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        yield row, _beams(model, prompt, limit, g, change, draws[row])[0]


def _beam_generate(
    model: ChatGLMForConditionalGeneration,
    input_ids: Any,
    attention_mask: Any,
    g: GenerationConfig,
    change: Scores,
) -> np.ndarray:
    padded, prompts = _prompts(model, input_ids, attention_mask, _pad(g))
    limits = _limits(model, [len(p) for p in prompts], g)
    seed = _seed_of(g)
    answers = []
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        answers += _beams(model, prompt, limit, g, change, (seed, row))
    return _beside(np.repeat(padded, int(g.num_return_sequences), axis=0), answers, _pad(g))


def _beams(
    model: ChatGLMForConditionalGeneration,
    prompt: list[int],
    limit: int,
    g: GenerationConfig,
    change: Scores,
    seed: tuple[int, int],
) -> list[list[int]]:
    """The best `num_return_sequences` answers to one prompt by sum of log probabilities / length **
    length_penalty.

    The rules are transformers': twice as many candidates as beams (more with several end ids), an
    end counts among the first `num_beams` of them, and the search is over when no running beam can
    beat the worst finished one. With `do_sample`, candidates are drawn without replacement from the
    warped distribution, of which at least two tokens of each beam survive.
    """
    n = int(g.num_beams)
    wanted = n * max(2, 1 + len(change.eos))
    limits = [limit] * n
    rows = CachedRow(model, n, _first_room([len(prompt)], [limit]))
    rows.ids[0] = list(prompt)
    scores = np.repeat(rows.extend([0]), n, axis=0)
    rows.fork([0] * n)
    sums = np.full(n, -np.inf)
    sums[0] = 0.0  # the beams are still alike
    finished: list[tuple[float, list[int]]] = []
    for index in range(limit):
        table = np.empty(scores.shape)
        for beam in range(n):
            logp = change(_log_softmax(scores[beam]), rows.ids[beam])
            if g.samples:
                warped = _core.warp_logits(
                    logp, float(g.temperature), int(g.top_k), float(g.top_p), 2
                )
                with np.errstate(divide="ignore"):
                    logp = np.log(warped)
            table[beam] = logp + sums[beam]
        flat = table.reshape(-1)
        keys = flat
        if g.samples:  # the largest of log p + Gumbel noise are draws without replacement
            key = np.array([seed[0], seed[1] << 32 | index], np.uint64)
            keys = flat + np.random.Generator(np.random.Philox(key=key)).gumbel(size=flat.size)
        best = np.argpartition(-keys, min(wanted, flat.size - 1))[:wanted]
        best = best[np.lexsort((best, -flat[best]))]
        length = (index + 1) ** float(g.length_penalty)
        chosen: list[tuple[float, int, int]] = []
        for rank, candidate in enumerate(best):
            beam, token = divmod(int(candidate), scores.shape[1])
            if flat[candidate] == -np.inf:
                break
            if token in change.eos or index + 1 == limit:
                if rank < n:
                    answer = rows.ids[beam][len(prompt) :] + [token]
                    finished.append((float(flat[candidate]) / length, answer))
            elif len(chosen) < n:
                chosen.append((float(flat[candidate]), beam, token))
        finished = sorted(finished, key=lambda f: -f[0])[:n]
        if not chosen:
            break
        highest = chosen[0][0] / length
        if len(finished) == n and (g.early_stopping or finished[-1][0] >= highest):
            break
        chosen += [(-np.inf, *chosen[0][1:])] * (n - len(chosen))
        rows.fork([beam for _, beam, _ in chosen])
        for row, (_, _, token) in enumerate(chosen):
            rows.ids[row].append(token)
        sums = np.array([total for total, _, _ in chosen])
        _grow(rows, range(n), index + 1, limits)
        scores = rows.extend(range(n))
    finished += finished[-1:] * (g.num_return_sequences - len(finished))
    return [answer for _, answer in finished[: g.num_return_sequences]]


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    wide = scores.astype(np.float64)
    wide -= wide.max()
    return (wide - np.log(np.exp(wide).sum())).astype(np.float32)


# Chat


class PastKeyValues:
    """What a conversation has in its cache: opaque, to be passed back to `stream_chat` for the next
    round.

    It stays valid when the loop was left early and when another round went another way meanwhile:
    the ids say what was shown, and whatever the cache lacks of them is fed again.
    """

    def __init__(self, rows: CachedRow, ids: list[int]):
        self.rows = rows
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)


_CHAT = ("max_length", "num_beams", "do_sample", "top_p", "temperature", "logits_processor")
_STREAM = (
    "past_key_values",
    "max_length",
    "do_sample",
    "top_p",
    "temperature",
    "logits_processor",
    "return_past_key_values",
)
_CHAT_DEFAULTS = {
    "max_length": 8192,
    "num_beams": 1,
    "do_sample": True,
    "top_p": 0.8,
    "temperature": 0.8,
    "logits_processor": None,
    "role": "user",
    "past_key_values": None,
    "return_past_key_values": False,
}


def _arguments(
    method: str, family: str, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Positional and keyword arguments of a chat method by name, defaults filled in; `role` only
    where there are roles.
    """
    if families.of(family).takes_role:
        names = ("role", *names)
    if len(args) > len(names):
        raise TypeError(
            f"{method}: at most {len(names) + 3} positional arguments, got {len(args) + 3}"
        )
    found = dict(zip(names, args, strict=False))
    for name in found:
        if name in kwargs:
            raise TypeError(f"{method}: got {name!r} twice")
    return {**{n: _CHAT_DEFAULTS[n] for n in names}, **found, **kwargs}


def _chat_settings(
    model: ChatGLMForConditionalGeneration, tokenizer: Any, fields: dict[str, Any]
) -> GenerationConfig:
    """Settings of a chat call: neutral but for `fields`, ending where the family's answers end."""
    if fields.get("eos_token_id") is None:
        fields["eos_token_id"] = end_ids(model, tokenizer)
    g = GenerationConfig(pad_token_id=model.generation_config.pad_token_id)
    g.update(**fields)
    g.check(model.config.padded_vocab_size)
    return g


def chat_family(model: ChatGLMForConditionalGeneration, tokenizer: Any) -> str:
    """The family whose prompts and histories a chat has: the tokenizer's, which writes them."""
    return getattr(tokenizer, "family", model.config.family)


def end_ids(model: ChatGLMForConditionalGeneration, tokenizer: Any) -> list[int]:
    """Ids that end an answer."""
    family = families.of(chat_family(model, tokenizer))
    return family.end_ids(tokenizer, model.config.eos_token_ids)


def _check_query(query: Any) -> None:
    if not isinstance(query, str):
        raise TypeError(f"query: expected text, got {type(query).__name__}")


def _take_row(model: ChatGLMForConditionalGeneration, ids: Sequence[int], needed: int) -> CachedRow:
    """The row that chats leave behind, or a new one, with these ids; what the last chat began with
    too is not computed again. The taker owns it until it gives it back.
    """
    row, model.cached_row = model.cached_row, None
    if row is None:
        row = CachedRow(model, 1, needed)
    if not row.cache.current:
        row.forget()
    row.become(0, ids)
    row.make_room(needed)
    return row


def _answer(
    model: ChatGLMForConditionalGeneration, tokenizer: Any, text: str, asked: list
) -> tuple[Any, list]:
    """(response, history) of an answer's text; `asked` is a history that ends in the question."""
    return families.of(chat_family(model, tokenizer)).answer(text, asked)


def chat(
    model: ChatGLMForConditionalGeneration,
    tokenizer: Any,
    query: str,
    history: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, list]:
    """One turn of conversation.

    Further arguments, in this order: (role="user" in ChatGLM3 and GLM-4,) max_length=8192 (prompt
    included), num_beams=1, do_sample=True, top_p=0.8, temperature=0.8, logits_processor=None; by
    name everything of GenerationConfig. Sampling keeps the 50 best tokens unless `top_k` says
    otherwise (0: all). temperature 0 is greedy. Returns (response, history): the answer's text, and
    a new list with this turn at its end: (query, response) tuples in ChatGLM2, dicts of role and
    content in ChatGLM3. The caller's list is not changed and nothing is printed. Raises ValueError
    naming the argument, TypeError for one that is not known.
    """
    _check_query(query)
    fields = _arguments("chat", chat_family(model, tokenizer), _CHAT, args, kwargs)
    role, processors = fields.pop("role", None), fields.pop("logits_processor")
    g = _chat_settings(model, tokenizer, fields)
    change = Scores(g, processors)
    ids, asked = _question(model, tokenizer, query, history, role)
    limits = _limits(model, [len(ids)], g)
    _warn_of_prefix(model)
    if g.num_beams > 1:
        seed = _seed_of(g)
        new = _beams(model, ids, limits[0], g, change, (seed, 0))[0]
    else:
        row = _take_row(model, ids, _first_room([len(ids)], limits))
        for _ in _run(model, row, limits, g, change):
            pass
        new = row.ids[0][len(ids) :]
        model.cached_row = row
    if new[-1] in change.eos:  # only a real end id is cut, not the last token of a full answer
        new.pop()
    return _answer(model, tokenizer, tokenizer.decode(new), asked)


def chat_rows(
    model: ChatGLMForConditionalGeneration,
    tokenizer: Any,
    queries: Sequence[str],
    at_once: int = ROWS,
    **kwargs: Any,
) -> Iterator[tuple[int, Any]]:
    """(number of a query, response) in the order in which they are ready: what `chat` gives to each
    query, in this order, with an empty history. Arguments by name as in `chat`.
    """
    for query in queries:
        _check_query(query)
    fields = _arguments("chat", chat_family(model, tokenizer), _CHAT, (), kwargs)
    role, processors = fields.pop("role", None), fields.pop("logits_processor")
    g = _chat_settings(model, tokenizer, fields)
    change = Scores(g, processors)
    if g.num_beams > 1:
        for number, query in enumerate(queries):
            yield number, chat(model, tokenizer, query, [], **kwargs)[0]
        return
    asked = [_question(model, tokenizer, query, [], role) for query in queries]
    prompts = [ids for ids, _ in asked]
    limits = _limits(model, [len(p) for p in prompts], g)
    _warn_of_prefix(model)
    draws = [(_seed_of(g), 0) for _ in prompts]
    if not prompts:
        return
    for number, new in complete(model, prompts, limits, g, change, draws, at_once):
        if new[-1] in change.eos:
            new.pop()
        yield number, _answer(model, tokenizer, tokenizer.decode(new), asked[number][1])[0]


def batch_chat(
    model: ChatGLMForConditionalGeneration,
    tokenizer: Any,
    queries: Sequence[str],
    at_once: int = ROWS,
    **kwargs: Any,
) -> list[Any]:
    """Responses to many queries, each what `model.chat(tokenizer, query, history=[], ..)` would
    give, several times faster: rows run together, `at_once` of them, and the opening that all
    prompts share is computed once. Arguments by name as in `chat`. Shows a progress bar on a
    terminal.
    """
    from tqdm.auto import tqdm

    queries = list(queries)
    answers: list[Any] = [None] * len(queries)
    ready = chat_rows(model, tokenizer, queries, at_once, **kwargs)
    for number, answer in tqdm(ready, desc="chat", unit="row", total=len(queries), disable=None):
        answers[number] = answer
    return answers


def _question(
    model: ChatGLMForConditionalGeneration,
    tokenizer: Any,
    query: str,
    history: Any,
    role: str | None,
) -> tuple[list[int], list]:
    """(ids of the whole prompt, a new history that ends in the question)."""
    family = families.of(chat_family(model, tokenizer))
    asked = family.asked(query, history, role)
    return family.chat_ids(tokenizer, query, history, role or "user"), asked


def stream_chat(
    model: ChatGLMForConditionalGeneration,
    tokenizer: Any,
    query: str,
    history: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Iterator[tuple]:
    """One turn that yields (response, history) after each token that completes text; nothing runs
    before the first.

    Further arguments, in this order: (role="user" in ChatGLM3 and GLM-4,) past_key_values=None,
    max_length=8192, do_sample=True, top_p=0.8, temperature=0.8, logits_processor=None,
    return_past_key_values=False; by name as in `chat`, but num_beams is ignored. `response` is the
    whole text so far. With return_past_key_values, a third value holds the cache: pass it back with
    the next query to continue without computing the conversation again. Errors as in `chat`.
    """
    from ..families import prompt
    from ..tokenization import TextStream

    _check_query(query)
    fields = _arguments("stream_chat", chat_family(model, tokenizer), _STREAM, args, kwargs)
    role, processors = fields.pop("role", None), fields.pop("logits_processor")
    past, return_past = fields.pop("past_key_values"), fields.pop("return_past_key_values")
    if past is not None and not isinstance(past, PastKeyValues):
        raise TypeError(
            f"past_key_values: expected what stream_chat returned, got {type(past).__name__}"
        )
    if past is not None and past.rows.model is not model:
        raise ValueError("past_key_values: made by another model")
    fields["num_beams"] = 1
    g = _chat_settings(model, tokenizer, fields)
    change = Scores(g, processors)
    ids, asked = _question(model, tokenizer, query, history, role)
    if past is not None:
        ids = past.ids + list(
            prompt.stream_ids(tokenizer, query, len(history or []) + 1, role or "user")
        )
    limits = _limits(model, [len(ids)], g)
    _warn_of_prefix(model)
    needed = _first_room([len(ids)], limits)
    if past is not None:
        row = past.rows
        row.become(0, ids)
        row.make_room(needed)
    elif return_past:
        row = CachedRow(model, 1, needed)
        row.become(0, ids)
    else:
        row = _take_row(model, ids, needed)
    decoded = TextStream(tokenizer)
    try:
        for tokens in _run(model, row, limits, g, change):
            ended = tokens[0] in change.eos
            text = decoded.feed(*([] if ended else [tokens[0]]))
            if text is None:
                continue
            response, told = _answer(model, tokenizer, text, asked)
            if return_past:
                yield response, told, PastKeyValues(row, row.ids[0][: len(row.ids[0]) - ended])
            else:
                yield response, told
    finally:
        if past is None and not return_past:
            model.cached_row = row
