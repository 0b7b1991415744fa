"""GenerationConfig: how to generate, and the same fields as keyword arguments of functions."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np

from .. import tell
from ..files.write import read_json, write_json
from ..names import did_you_mean
from .unsupported import NOTHING, REFUSED, changes_nothing

Kind = TypeVar("Kind", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])


class HasEnds(Protocol):
    """What GenerationConfig reads of a model's config."""

    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def padded_vocab_size(self) -> int: ...
    def to_dict(self) -> dict[str, Any]: ...


def _names_unknown_fields(cls: Kind) -> Kind:
    """A dataclass whose TypeError for an unknown field names the nearest that there is."""
    init = cls.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        init(self, *args, **{n: v for n, v in given.items() if self._known(n, v)})

    cls.__init__ = checked
    return cls


@_names_unknown_fields
@dataclass(kw_only=True, eq=False, repr=False)
class GenerationConfig:
    """How to generate. Neutral by default: greedy, and as long as the model has positions.

    None is the default of a field. transformers' other fields are accepted and mean nothing (those
    of caches, compilation, encoders and assistant models), or are refused unless they have the
    value that changes nothing: see `unsupported.NOTHING` and `unsupported.REFUSED`.
    """

    max_length: int | None = None  # prompt and answer together
    max_new_tokens: int | None = None  # the answer alone; wins if both are given
    min_length: int = 0  # no end before that many ids, prompt included
    min_new_tokens: int | None = None  # the same without the prompt; wins if both are given
    max_time: float | None = None  # seconds after which no further token is begun
    stop_strings: str | Sequence[str] | None = None  # texts that end an answer; need a tokenizer
    do_sample: bool = False
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 50  # 0 is off
    top_p: float = 1.0
    min_p: float | None = None  # least probability, as a part of the best token's
    repetition_penalty: float = 1.0  # over the whole context
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None  # sequences that are never completed
    suppress_tokens: Sequence[int] | None = None  # ids that are never chosen
    begin_suppress_tokens: Sequence[int] | None = None  # ids that no answer begins with
    forced_bos_token_id: int | None = None  # what follows a prompt of one id
    forced_eos_token_id: int | Sequence[int] | None = None  # the last id, where the length ends it
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # of beams: True, False or "never", as in transformers
    renormalize_logits: bool = False  # of beams: after all changes
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None  # an id, several, or [] to never stop
    pad_token_id: int | None = None
    bos_token_id: int | None = None  # begins what has no prompt
    return_dict_in_generate: bool = False  # a GenerateOutput rather than ids
    output_scores: bool = False
    output_logits: bool = False
    seed: int | None = None  # None takes the next one of `set_seed`
    use_cache: bool = True  # accepted; there always is one

    @classmethod
    def _known(cls, name: str, value: Any) -> bool:
        """Whether it is a field. False for a name of transformers that changes nothing; ValueError
        for one that would, TypeError for other names.
        """
        known = cls.__dataclass_fields__
        if name in known:
            return True
        if changes_nothing(name, value):
            return False
        near = did_you_mean(name, known)
        raise TypeError(
            f"unknown generation argument {name!r}{near or '; known: ' + ', '.join(known)}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            if self._known(name, value):
                super().__setattr__(name, value)
        except TypeError as error:
            raise AttributeError(str(error)) from None

    def update(self, **given: Any) -> None:
        """Set fields; None stands for the default. TypeError naming one that does not exist,
        ValueError naming one of transformers' that is not supported.
        """
        for name, value in given.items():
            if self._known(name, value):
                setattr(self, name, value)

    @classmethod
    def from_model_config(cls, config: HasEnds) -> GenerationConfig:
        """Ids of a model's config.json, and the settings that older programs write there."""
        found = cls(eos_token_id=config.eos_token_ids, pad_token_id=config.pad_token_id)
        given = config.to_dict()
        names = set(cls.__dataclass_fields__) - {"eos_token_id", "pad_token_id", "use_cache"}
        unused = found._take(
            {n: v for n, v in given.items() if n in names}, config.padded_vocab_size
        )
        if unused:
            tell.warn(f"config.json: is not used: {'; '.join(unused)}")
        return found

    def _take(self, values: Mapping[str, Any], vocabulary: int) -> list[str]:
        """Set fields that are in a file; returns what is wrong about those that cannot be set."""
        unused = []
        for name, value in values.items():
            try:
                one = type(self)(**{name: value})
                one.check(vocabulary)
            except (TypeError, ValueError) as error:
                unused.append(str(error))
            else:
                if value is not None and name in self.__dataclass_fields__:
                    setattr(self, name, value)
        return unused

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, config: HasEnds | None = None, **fields: Any
    ) -> GenerationConfig:
        """Read `path/generation_config.json`, then set `fields`. Keys that are no fields here, or
        have values that cannot be, are named by one warning.
        """
        file = Path(path) / "generation_config.json"
        found = cls() if config is None else cls.from_model_config(config)
        vocabulary = 1 << 31 if config is None else config.padded_vocab_size
        unused = found._take(read_json(file, dict), vocabulary)
        if unused:
            tell.warn(f"{file}: is not used: {'; '.join(unused)}")
        found.update(**fields)
        return found

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **fields: Any) -> GenerationConfig:
        """Of fields by name."""
        return cls(**{**config_dict, **fields})

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write `directory/generation_config.json`: the fields that are not at their defaults."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_json(Path(directory) / "generation_config.json", self._changed())

    def _changed(self) -> dict[str, Any]:
        """Fields that are not at their defaults; arrays as lists."""
        plain = {
            n: v.tolist() if isinstance(v, np.ndarray | np.generic) else v
            for n, v in self.to_dict().items()
        }
        return {f.name: plain[f.name] for f in fields(self) if plain[f.name] != f.default}

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @property
    def eos(self) -> list[int]:
        """`eos_token_id` as a list."""
        return as_list(self.eos_token_id)

    @property
    def stop_texts(self) -> list[str]:
        """`stop_strings` as a list."""
        texts = self.stop_strings
        return [texts] if isinstance(texts, str) else list(texts or ())

    def check(self, vocabulary: int) -> None:
        """Put the default in place of None, and raise ValueError naming the field that is out of
        range.
        """
        # each call of generate comes by here: only what differs from the defaults is looked at
        given = {n: v for n, v in vars(self).items() if v is not _DEFAULTS[n]}
        for name, value in given.items():
            if value is None:
                setattr(self, name, _DEFAULTS[name])
        for name, least in _WHOLE.items():
            if name not in given:
                continue
            value = getattr(self, name)
            known = _is_whole(value) and (least is None or least <= value < 1 << 63)
            if value is not None and not known:
                expected = "a whole number" + ("" if least is None else f" from {least}")
                raise ValueError(f"{name}: expected {expected}, got {value!r}")
        for name in (n for n in _NUMBERS if n in given):
            value = getattr(self, name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if value is not None and not (number and abs(value) <= _LARGEST):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        for name in (n for n in _SWITCHES if n in given):
            value = getattr(self, name)
            if name == "early_stopping" and value == "never":
                continue
            if not isinstance(value, bool | np.bool_ | int) or value not in (0, 1):
                never = " or 'never'" if name == "early_stopping" else ""
                raise ValueError(f"{name}: expected True or False{never}, got {value!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature: expected 0 (greedy) or more, got {self.temperature!r}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {value!r}")
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty: expected more than 0, got {self.repetition_penalty!r}"
            )
        if self.max_time is not None and self.max_time <= 0:
            raise ValueError(f"max_time: expected more than 0 seconds, got {self.max_time!r}")
        texts = self.stop_strings
        fine = texts is None or isinstance(texts, str | Sequence)
        if not fine or not all(isinstance(t, str) and t for t in self.stop_texts):
            raise ValueError(f"stop_strings: expected a text or a list of texts, got {texts!r:.80}")
        self._check_ids(vocabulary)
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences: {self.num_return_sequences} of {self.num_beams} beams "
                "were asked for"
            )

    def _check_ids(self, vocabulary: int) -> None:
        for name in _IDS:
            value = getattr(self, name)
            rows = value if name == "bad_words_ids" else [value]
            if value is None:
                continue
            if not isinstance(rows, Sequence) or isinstance(rows, str):
                raise ValueError(f"{name}: expected a list of lists of ids, got {value!r:.80}")
            for row in rows:
                several = isinstance(row, Sequence | np.ndarray) and not isinstance(row, str)
                several = several and name != "forced_bos_token_id"
                if several == _is_whole(row) or name == "bad_words_ids" and not several:
                    raise ValueError(f"{name}: expected ids, got {value!r:.80}")
                if name == "bad_words_ids" and not len(row):
                    raise ValueError(f"{name}: a sequence of no ids")
                for i in row if several else [row]:
                    if not _is_whole(i):
                        raise ValueError(f"{name}: expected ids, got {i!r:.80}")
                    if not 0 <= i < vocabulary:
                        raise ValueError(
                            f"{name}: {i} is outside the vocabulary of {vocabulary} ids"
                        )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn rather than the best one taken."""
        return bool(self.do_sample) and self.temperature > 0

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{n}={v!r}' for n, v in self._changed().items())})"


# Whole numbers and their least values; numbers; switches; ids, or lists of them.
_WHOLE = {
    **dict.fromkeys(("max_length", "max_new_tokens", "num_beams", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), 0),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), 0),
    "seed": None,
}
_LARGEST = float(np.finfo(np.float32).max)  # the core computes with float32
_NUMBERS = ("temperature", "top_p", "repetition_penalty", "length_penalty", "min_p", "max_time")
_SWITCHES = (
    *("do_sample", "early_stopping", "renormalize_logits", "return_dict_in_generate"),
    *("output_scores", "output_logits", "use_cache"),
)
_DEFAULTS = {f.name: f.default for f in fields(GenerationConfig)}
_IDS = (
    *("eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("forced_bos_token_id", "forced_eos_token_id"),
)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_list(ids: int | Sequence[int] | None) -> list[int]:
    """An id or several as a list; None is []."""
    if ids is None:
        return []
    return [int(i) for i in ids] if isinstance(ids, Sequence | np.ndarray) else [int(ids)]


# The same fields for type checkers, as in `**settings: Unpack[Settings]`.


class ChatSettings(TypedDict, total=False):
    """Fields beside those that chat names itself."""

    max_new_tokens: int | None
    min_length: int
    min_new_tokens: int | None
    max_time: float | None
    stop_strings: str | Sequence[str] | None
    top_k: int
    min_p: float | None
    repetition_penalty: float
    no_repeat_ngram_size: int
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    length_penalty: float
    early_stopping: bool | str
    renormalize_logits: bool
    num_return_sequences: int
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    bos_token_id: int | None
    return_dict_in_generate: bool
    output_scores: bool
    output_logits: bool
    seed: int | None
    use_cache: bool


class StreamSettings(ChatSettings, total=False):
    """The same beside those that stream_chat names."""

    num_beams: int  # ignored


class Settings(StreamSettings, total=False):
    """All fields of GenerationConfig."""

    max_length: int | None
    do_sample: bool
    temperature: float
    top_p: float


class BatchChatArguments(ChatSettings, total=False):
    """What batch_chat takes beside its own."""

    generation_config: GenerationConfig | None
    stopping_criteria: Any
    prefix_allowed_tokens_fn: Any


class ChatArguments(BatchChatArguments, total=False):
    """What chat takes beside its own."""

    streamer: Any


class StreamChatArguments(StreamSettings, total=False):
    """What stream_chat takes beside its own."""

    generation_config: GenerationConfig | None
    stopping_criteria: Any
    prefix_allowed_tokens_fn: Any


def check_names(function: Function, given: Iterable[str]) -> None:
    """TypeError for a keyword that is neither an argument of the function nor a name of
    transformers that is told apart later, with the nearest argument.
    """
    known = (getattr(function, "__signature__", None) or inspect.signature(function)).parameters
    for name in given:
        if name not in known and name not in NOTHING and name not in REFUSED:
            near = did_you_mean(name, known)
            raise TypeError(f"{function.__name__}: unknown argument {name!r}{near}")


def tell_without_effect(function: Function, g: GenerationConfig, named: set[str]) -> None:
    """Say once which of the settings that a call names have no effect beside the others."""
    kept = {"output_scores", "output_logits"}
    for names, idle, why in (
        ({"temperature", "top_k", "top_p", "min_p"}, not g.do_sample, "without do_sample=True"),
        (
            {"length_penalty", "early_stopping", "renormalize_logits"},
            g.num_beams == 1,
            "with num_beams=1",
        ),
        (kept, not g.return_dict_in_generate, "without return_dict_in_generate=True"),
        (kept, g.num_beams > 1, "with beams, of which sequences_scores are kept"),
        ({"max_length"}, g.max_new_tokens is not None, "beside max_new_tokens"),
        ({"min_length"}, g.min_new_tokens is not None, "beside min_new_tokens"),
    ):
        given = [n for n in sorted(names & named) if getattr(g, n) != _DEFAULTS[n]]
        if idle and given:
            tell.once(f"{function.__name__}: {', '.join(given)}: no effect {why}")
    if not g.return_dict_in_generate or g.num_beams > 1:
        g.output_scores = g.output_logits = False


def spelled_out(arguments: Any) -> Callable[[Function], Function]:
    """Of a function, for help and completion: the fields of GenerationConfig, and what `arguments`
    has beside them, in place of its **settings.
    """

    def spelled(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = {p.name for p in own}
        typed = {f.name: (f.default, f.type) for f in fields(GenerationConfig)}
        typed |= {n: (None, t) for n, t in arguments.__annotations__.items() if n not in typed}
        more = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=d, annotation=t)
            for name, (d, t) in typed.items()
            if name not in named
        ]
        function.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
        return function

    return spelled
