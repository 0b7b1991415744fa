"""From a question to an answer: chat, stream_chat, and many questions at once."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from .. import families, tell
from ..families import recognition
from ..families.vendored import in_template
from ..progress import bar
from ..questions import fit_question
from ..tokenization import TextStream
from .beams import best_answers
from .cache import CachedRow, Model, PastKeyValues, check_past
from .config import (
    BatchChatArguments,
    ChatArguments,
    GenerationConfig,
    StreamChatArguments,
    check_names,
    spelled_out,
    tell_without_effect,
)
from .generate import ROWS, complete, warn_of_weights
from .processors import Processor
from .scheduler import Scheduler, Scores, call_seed, first_room, limits_of
from .streamers import check_streamer, ended

if TYPE_CHECKING:
    from typing_extensions import Unpack

Function = TypeVar("Function", bound=Callable[..., Any])
#: Errors that one query may have while the others are answered.
OF_ONE_ROW = (ValueError, TypeError, LookupError, ArithmeticError, RecursionError)
KEYWORD = inspect.Parameter.KEYWORD_ONLY
DEFAULTS = {"max_length": 8192, "num_beams": 1, "do_sample": True, "top_p": 0.8, "temperature": 0.8}


def chat_family(model: Model, tokenizer: Any) -> families.Family:
    """The family whose prompts and histories a chat has: the tokenizer's, which writes them, in the
    template that the model was trained with.
    """
    if tokenizer is None or isinstance(tokenizer, str | os.PathLike):
        raise TypeError(
            f"tokenizer: expected what AutoTokenizer.from_pretrained returns, got {tokenizer!r:.80}"
        )
    family = families.of(getattr(tokenizer, "family", model.config.family))
    if model.prompt_template == "auto":
        family = getattr(tokenizer, "writer", None) or family
    if hasattr(tokenizer, "family"):
        family = family.as_released(tokenizer)
    return in_template(family, model.prompt_template)


def end_ids(model: Model, tokenizer: Any) -> list[int]:
    """Ids that end an answer."""
    return chat_family(model, tokenizer).end_ids(tokenizer, model.config.eos_token_ids)


def by_position(function: Function) -> Function:
    """Let the keywords of a chat function be given by position too, after the history, as in the
    published models: in the order of its signature, without `role` or a cache in families that
    have none.
    """
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is KEYWORD]
    names = [p.name for p in keywords]

    @wraps(function)
    def call(
        model: Model, tokenizer: Any, query: str, history: Any = None, *args: Any, **given: Any
    ) -> Any:
        if args:
            family = chat_family(model, tokenizer)
            left_out = set() if family.takes_role else {"role"}
            if not family.takes_past:
                left_out |= {"past_key_values", "return_past_key_values"}
            order = [name for name in names if name not in left_out]
            if len(args) > len(order):
                raise TypeError(
                    f"{function.__name__}: at most {len(order) + 3} positional arguments, got "
                    f"{len(args) + 3}"
                )
            for name, value in zip(order, args, strict=False):
                if name in given:
                    raise TypeError(f"{function.__name__}: got {name!r} twice")
                given[name] = value
        return function(model, tokenizer, query, history, **given)

    return cast(Function, call)


def with_family_defaults(function: Function) -> Function:
    """Let a chat function begin from the settings of the tokenizer's family, where these are others
    than its signature's.
    """

    @wraps(function)
    def call(model: Model, tokenizer: Any, *args: Any, **given: Any) -> Any:
        given = {**chat_family(model, tokenizer).chat_defaults, **given}
        return function(model, tokenizer, *args, **given)

    return cast(Function, call)


class _Turns:
    """What the questions of a call of `function` have in common: the family, the settings, the end
    ids.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        model: Model,
        tokenizer: Any,
        *,
        logits_processor: Any = None,
        generation_config: GenerationConfig | None = None,
        stopping_criteria: Any = None,
        prefix_allowed_tokens_fn: Any = None,
        **settings: Any,
    ):
        check_names(function, settings)
        self.as_trained = True  # first questions are cut, and checked, as those of the model's task
        self.model, self.tokenizer = model, tokenizer
        self.family = chat_family(model, tokenizer)
        config = model.config
        recognition.check_tokenizer(tokenizer, config.family, config.padded_vocab_size)
        if model.core.names() == list(model.core.shapes()):  # no adapter, no prefix
            name = getattr(config, "_name_or_path", None)
            recognition.tell_base(config.family, name, getattr(model, "name_or_path", None))
        usual = {**DEFAULTS, **self.family.chat_defaults}
        named = {n for n, v in settings.items() if v is not None}
        named -= {n for n in usual if settings.get(n) == usual[n]}
        settings = {**usual, **settings}
        self.settings = _settings(model, tokenizer, settings, generation_config)
        tell_without_effect(function, self.settings, named)
        self.change = Scores(
            self.settings, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, tokenizer
        )

    def ask(self, query: str, history: Any, role: str) -> tuple[list[int], list[Any]]:
        """(ids of the whole prompt, a new history that ends in the question)."""
        if self.as_trained and not history and role in ("user", None):
            template = self.model.prompt_template
            query = fit_question(self.model.task, query, self.tokenizer, template)
        asked = self.family.asked(query, history, role)
        return list(self.family.chat_ids(self.tokenizer, query, history, role)), asked

    def limits(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """New ids allowed after each prompt."""
        return limits_of(self.model, [len(p) for p in prompts], self.settings)

    def answer(self, new: list[int], asked: list[Any]) -> tuple[Any, list[Any]]:
        """(response, history) of new ids; only a real end id is cut, not the last token of a full
        answer.
        """
        ids = new[:-1] if new[-1] in self.change.eos else new
        return self.family.answer(self.tokenizer.decode(ids), asked)


def _settings(
    model: Model,
    tokenizer: Any,
    fields: dict[str, Any],
    given: GenerationConfig | None = None,
) -> GenerationConfig:
    """Settings of a chat call: the model's, or those given, but for `fields`; an answer ends where
    the family's answers end, too.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise TypeError(f"generation_config: expected a GenerationConfig, got {given!r:.80}")
    own = model.generation_config
    g = copy.copy(own if given is None else given)
    g.num_return_sequences = 1
    if fields.get("eos_token_id") is None:
        found = [*end_ids(model, tokenizer), *g.eos]
        fields["eos_token_id"] = list(dict.fromkeys(found))
    g.update(**fields)
    if g.pad_token_id is None:
        g.pad_token_id = own.pad_token_id
    for name in ("num_return_sequences", "return_dict_in_generate"):
        if fields.get(name) and fields[name] != g.__dataclass_fields__[name].default:
            raise ValueError(f"{name}: a chat has one answer, as text; use generate")
    g.output_scores = g.output_logits = g.return_dict_in_generate = False
    g.check(model.config.padded_vocab_size)
    return g


def answer_settings(model: Any, tokenizer: Any, fields: dict[str, Any]) -> GenerationConfig:
    """Settings of one answer as `chat` has them where nobody says otherwise, but for `fields`.
    model: its config, generation_config and prompt_template are read.
    """
    usual = {**DEFAULTS, **chat_family(model, tokenizer).chat_defaults}
    return _settings(model, tokenizer, {**usual, **fields})


def _check_query(query: Any) -> None:
    if not isinstance(query, str):
        raise TypeError(f"query: expected text, got {type(query).__name__}")


def _take_row(model: Model, needed: int) -> CachedRow:
    """The row that chats leave behind, or a new one: what the last chat began with too is not
    recomputed. The taker owns it until it gives it back.
    """
    row, model.cached_row = model.cached_row, None
    if row is None:
        return CachedRow(model, 1, needed)
    if not row.cache.current:
        row.forget()
    return row


@spelled_out(ChatArguments)
@by_position
@with_family_defaults
def chat(
    model: Model,
    tokenizer: Any,
    query: str,
    history: Any = None,
    *positional: Any,
    role: str = "user",
    max_length: int | None = 8192,
    num_beams: int = 1,
    do_sample: bool = True,
    top_p: float = 0.8,
    temperature: float = 0.8,
    logits_processor: Processor | Sequence[Processor] | None = None,
    **settings: Unpack[ChatArguments],
) -> tuple[str, list[Any]]:
    """One turn of conversation. The first question of a model with a `task` is cut as those that
    were trained, where it is longer; that is told, and so is one that begins otherwise.

    max_length: prompt included. Sampling keeps the 50 best tokens unless `top_k` says otherwise (0:
    all); temperature 0 is greedy; further settings: see GenerationConfig. What is neither given nor
    has a default here is generation_config's, or the model's. stopping_criteria,
    prefix_allowed_tokens_fn, streamer: as in `generate`. From role on, or from max_length on in a
    family without roles, arguments may be given by position too.

    Returns (response, history): the answer's text, and a new list with this turn at its end:
    (query, response) tuples, or dicts of role and content in a family with roles. A tool that such
    a model calls is a dict in place of the text: {"name", "parameters"}, or "content" where they
    cannot be read. The caller's list is not changed and nothing is printed. Raises ValueError
    naming the argument, TypeError for one that is not known.
    """
    streamer = settings.pop("streamer", None)
    with ended(streamer):
        _check_query(query)
        turns = _Turns(
            chat,
            model,
            tokenizer,
            max_length=max_length,
            num_beams=num_beams,
            do_sample=do_sample,
            top_p=top_p,
            temperature=temperature,
            logits_processor=logits_processor,
            **settings,
        )
        check_streamer(streamer, 1, turns.settings.num_beams)
        ids, asked = turns.ask(query, history, role)
        [limit] = turns.limits([ids])
        warn_of_weights(model)
        draw = call_seed(turns.settings), 0
        if turns.settings.num_beams > 1:
            [(_, new)] = best_answers(model, ids, limit, turns.change, draw)
        else:
            row = _take_row(model, first_room([len(ids)], [limit]))
            scheduler = Scheduler(row, turns.change)
            request = scheduler.submit(ids, limit, draw)
            if streamer is not None:
                streamer.put(np.array([ids], np.int64))
            for _, token, _ in scheduler.run(unseen=streamer is None):
                if streamer is not None:
                    streamer.put(np.array([token], np.int64))
            new = request.new
            model.cached_row = row
        return turns.answer(new, asked)


def chat_rows(
    model: Model,
    tokenizer: Any,
    queries: Sequence[str],
    at_once: int = ROWS,
    *,
    role: str = "user",
    seeds: Sequence[int] | None = None,
    keep_errors: bool = False,
    as_trained: bool = False,
    **settings: Any,
) -> Iterator[tuple[int, Any]]:
    """(number of a query, response) in the order in which they are ready: what `chat` gives to each
    query, in this order, with an empty history. Arguments by name as in `chat`.

    seeds: of each query's random numbers, in place of `seed`. keep_errors: the error of a query
    that cannot be asked (its prompt is too long), or whose answer cannot be read, is its response.
    as_trained: queries are cut, and checked, as `chat` does, and not taken as they are.
    """
    if not isinstance(at_once, int) or at_once < 1:
        raise ValueError(f"at_once: expected a whole number from 1, got {at_once!r:.80}")
    for query in queries:
        _check_query(query)
    turns = _Turns(batch_chat, model, tokenizer, **settings)
    turns.as_trained = as_trained
    kept = OF_ONE_ROW if keep_errors else ()
    response: Any
    if turns.settings.num_beams > 1:
        for number, query in enumerate(queries):
            if seeds is not None:
                settings["seed"] = seeds[number]
            try:
                response = chat(model, tokenizer, query, [], role=role, **settings)[0]
            except kept as error:
                response = error
            yield number, response
        return
    asked: list[tuple[int, list[int], list[Any]]] = []
    for number, query in enumerate(queries):
        try:
            ids, turn = turns.ask(query, [], role)
            if keep_errors:
                turns.limits([ids])
        except kept as error:
            yield number, error
        else:
            asked.append((number, ids, turn))
    prompts = [ids for _, ids, _ in asked]
    limits = turns.limits(prompts)
    warn_of_weights(model)
    if seeds is None:
        draws = [(call_seed(turns.settings), 0) for _ in prompts]
    else:
        draws = [(seeds[number], 0) for number, _, _ in asked]
    if not prompts:
        return
    for i, request in complete(model, prompts, limits, turns.change, draws, at_once):
        number, _, turn = asked[i]
        try:
            response = turns.answer(request.new, turn)[0]
        except kept as error:
            response = error
        yield number, response


@spelled_out(BatchChatArguments)
@with_family_defaults
def batch_chat(
    model: Model,
    tokenizer: Any,
    queries: Sequence[str],
    at_once: int = ROWS,
    *,
    role: str = "user",
    max_length: int | None = 8192,
    num_beams: int = 1,
    do_sample: bool = True,
    top_p: float = 0.8,
    temperature: float = 0.8,
    logits_processor: Processor | Sequence[Processor] | None = None,
    **settings: Unpack[BatchChatArguments],
) -> list[str]:
    """Responses to many queries, each what `model.chat(tokenizer, query, history=[], ..)` would
    give, several times faster: rows run together, `at_once` of them, and the opening that all
    prompts share is computed once. Arguments as in `chat`. Shows a progress bar on a terminal.
    """
    if isinstance(queries, str):
        raise TypeError("queries: expected a list of texts, got one text; chat answers one")
    queries = list(queries)
    answers: list[Any] = [None] * len(queries)
    ready = chat_rows(
        model,
        tokenizer,
        queries,
        at_once,
        role=role,
        as_trained=True,
        max_length=max_length,
        num_beams=num_beams,
        do_sample=do_sample,
        top_p=top_p,
        temperature=temperature,
        logits_processor=logits_processor,
        **settings,
    )
    for number, answer in bar(ready, desc="chat", unit="row", total=len(queries), disable=None):
        answers[number] = answer
    return answers


@spelled_out(StreamChatArguments)
@by_position
@with_family_defaults
def stream_chat(
    model: Model,
    tokenizer: Any,
    query: str,
    history: Any = None,
    *positional: Any,
    role: str = "user",
    past_key_values: PastKeyValues | None = None,
    max_length: int | None = 8192,
    do_sample: bool = True,
    top_p: float = 0.8,
    temperature: float = 0.8,
    logits_processor: Processor | Sequence[Processor] | None = None,
    return_past_key_values: bool = False,
    **settings: Unpack[StreamChatArguments],
) -> Iterator[tuple[Any, ...]]:
    """One turn that yields (response, history) after each token that completes text; nothing runs
    before the first.

    Arguments, also by position, as in `chat`, but num_beams is ignored. `response` is the whole
    text so far. With return_past_key_values, a third value holds the cache: pass it back with the
    next query to continue without computing the conversation again. Errors as in `chat`.
    """
    _check_query(query)
    past = past_key_values
    wants_past = past is not None or return_past_key_values
    if wants_past and not chat_family(model, tokenizer).takes_past:
        title = families.of(tokenizer.family).title
        raise ValueError(
            f"past_key_values: {title} reads every prompt anew, in both directions; leave it out, "
            "the history says what came before"
        )
    if past is not None:
        check_past(past, model, 1)
    if settings.get("num_beams") not in (None, 1):
        tell.once("stream_chat: num_beams: no effect, tokens are shown as they are chosen")
    turns = _Turns(
        stream_chat,
        model,
        tokenizer,
        max_length=max_length,
        do_sample=do_sample,
        top_p=top_p,
        temperature=temperature,
        logits_processor=logits_processor,
        **{**settings, "num_beams": 1},
    )
    ids, asked = turns.ask(query, history, role)
    if past is not None:
        ids = turns.family.later_ids(tokenizer, past.ids, query, history, role or "user")
    [limit] = turns.limits([ids])
    warn_of_weights(model)
    needed = first_room([len(ids)], [limit])
    kept = past is None and not return_past_key_values
    if past is not None:
        row = past.rows
    elif return_past_key_values:
        row = CachedRow(model, 1, needed)
    else:
        row = _take_row(model, needed)
    scheduler = Scheduler(row, turns.change)
    decoded = TextStream(tokenizer)
    try:
        request = scheduler.submit(ids, limit, (call_seed(turns.settings), 0))
        for _, token, _ in scheduler.run():
            is_end = token in turns.change.eos
            text = decoded.feed(*([] if is_end else [token]))
            if text is None or (is_end and not turns.family.shows_end):
                continue
            response, so_far = turns.family.answer(text, asked)
            if return_past_key_values:
                shown = PastKeyValues(model, [request.ids[: len(request.ids) - is_end]], row)
                yield response, so_far, shown
            else:
                yield response, so_far
    finally:
        if kept:
            model.cached_row = row
