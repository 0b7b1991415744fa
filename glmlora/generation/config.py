"""GenerationConfig: how to generate, and the same fields as keyword arguments of functions."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np

from ..files.write import read_json

Kind = TypeVar("Kind", bound=type)
Function = TypeVar("Function", bound=Callable[..., Any])


class HasEnds(Protocol):
    """What GenerationConfig reads of a model's config."""

    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def pad_token_id(self) -> int | None: ...


def _names_unknown_fields(cls: Kind) -> Kind:
    """A dataclass whose TypeError for an unknown field lists those that there are."""
    init = cls.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        for name in given:
            self._check_known(name)
        init(self, *args, **given)

    cls.__init__ = checked
    return cls


@_names_unknown_fields
@dataclass(kw_only=True, eq=False, repr=False)
class GenerationConfig:
    """How to generate. Neutral by default: greedy, and as long as the model has positions."""

    max_length: int | None = None  # prompt and answer together
    max_new_tokens: int | None = None  # the answer alone; wins if both are given
    min_length: int = 0  # no end before that many ids, prompt included
    do_sample: bool = False
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 50  # 0 is off
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # over the whole context
    no_repeat_ngram_size: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_return_sequences: int = 1
    eos_token_id: int | Sequence[int] | None = None  # an id, several, or [] to never stop
    pad_token_id: int | None = None
    seed: int | None = None  # None takes the next one of `set_seed`
    use_cache: bool = True  # accepted; there always is one

    @classmethod
    def _check_known(cls, name: str) -> None:
        known = cls.__dataclass_fields__
        if name not in known:
            raise TypeError(f"unknown generation argument {name!r}; known: {', '.join(known)}")

    def update(self, **given: Any) -> None:
        """Set fields. TypeError naming one that does not exist."""
        for name, value in given.items():
            self._check_known(name)
            setattr(self, name, value)

    @classmethod
    def from_model_config(cls, config: HasEnds) -> GenerationConfig:
        """End and pad ids of a model's config.json."""
        return cls(eos_token_id=config.eos_token_ids, pad_token_id=config.pad_token_id)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, config: HasEnds | None = None
    ) -> GenerationConfig:
        """Read `path/generation_config.json`; keys that are not fields here are ignored, as in
        transformers.
        """
        file = Path(path) / "generation_config.json"
        found = cls() if config is None else cls.from_model_config(config)
        stored = read_json(file, dict)
        names = found.to_dict()
        found.update(**{k: v for k, v in stored.items() if k in names and v is not None})
        return found

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

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
        values = ((f, getattr(self, f.name)) for f in fields(self))
        changed = (f"{f.name}={value!r}" for f, value in values if value != f.default)
        return f"GenerationConfig({', '.join(changed)})"


# The same fields for type checkers, as in `**settings: Unpack[Settings]`.


class ChatSettings(TypedDict, total=False):
    """Fields beside those that chat names itself."""

    max_new_tokens: int | None
    min_length: int
    top_k: int
    repetition_penalty: float
    no_repeat_ngram_size: int
    length_penalty: float
    early_stopping: bool
    num_return_sequences: int
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
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


def spelled_out(function: Function) -> Function:
    """The function, for help and completion with the fields of GenerationConfig in place of its
    **settings.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    named = {p.name for p in own}
    more = [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type
        )
        for f in fields(GenerationConfig)
        if f.name not in named
    ]
    function.__signature__ = signature.replace(parameters=own + more)  # type: ignore[attr-defined]
    return function
