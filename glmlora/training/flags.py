"""What a flag is: a field of a dataclass, with its help, choices and bound.

A value, text too, becomes one of the field's type; what the type says stands in the annotation.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import operator
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any, ClassVar, NamedTuple, TypeVar

from ..names import did_you_mean, near_path

Kind = TypeVar("Kind", bound=type)
StrPath = str | os.PathLike[str]
REQUIRED = dataclasses.MISSING


class Flag(NamedTuple):
    """One flag. Marks: W in the workflow's script, D its default matters there, S supported, A
    accepted without effect (noticed once), R refused unless it has its default (`help` then says
    what to do instead).
    """

    name: str
    kind: str  # str, int, float, bool; list: split on commas; words: one or more words
    default: Any  # None: optional; REQUIRED: must be given
    mark: str
    help: str
    choices: tuple[str, ...] = ()
    bound: str = ""  # a key of BOUNDS
    annotation: str = ""  # its type, as the field has it


BOUNDS = {
    ">=1": (lambda v: v >= 1, "at least 1"),
    ">=2": (lambda v: v >= 2, "at least 2"),
    ">=3": (lambda v: v >= 3, "at least 3"),
    ">=0": (lambda v: v >= 0, "0 or more"),
    ">0": (lambda v: v > 0, "more than 0"),
    "!=0": (lambda v: v != 0, "other than 0"),
    "[0,1]": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "[0,1)": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "seed": (lambda v: 0 <= v < 2**63, "from 0 to 2^63 - 1"),
    "[1,1024]": (lambda v: 1 <= v <= 1024, "from 1 to 1024"),
    "4,8": (lambda v: v in (4, 8), "4 or 8"),
}

# Annotation of a field, without "| None" -> kind of the flag.
_KINDS = {
    "str": "str",
    "StrPath": "str",
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str | list[str]": "list",
}


def about(
    mark: str, help: str, choices: tuple[str, ...] = (), bound: str = "", kind: str = ""
) -> dict[str, Any]:
    """The metadata of a field that is a flag; kind: where its type does not say it."""
    return {"mark": mark, "help": help, "choices": choices, "bound": bound, "kind": kind}


def option(default: Any, *args: Any, **kwargs: Any) -> Any:
    """A field with a default; the other arguments as in `about`."""
    return dataclasses.field(default=default, metadata=about(*args, **kwargs))


@lru_cache
def flags_of(group: type) -> tuple[Flag, ...]:
    """The flags of a group, in order."""
    flags = []
    for field in dataclasses.fields(group):
        m, annotation = field.metadata, str(field.type)
        kind = m["kind"] or _KINDS[annotation.removesuffix(" | None")]
        flags.append(
            Flag(
                field.name,
                kind,
                field.default,
                m["mark"],
                m["help"],
                m["choices"],
                m["bound"],
                annotation,
            )
        )
    return tuple(flags)


_TRUE = ("true", "yes", "t", "y", "1")
_FALSE = ("false", "no", "f", "n", "0")


def convert(flag: Flag, value: Any) -> Any:
    """The value in the flag's type; text is read as on the command line. Raises ValueError."""
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None:
        if flag.default is None:
            return None
        raise ValueError(f"{flag.name}: expected {_expected(flag)}, got None")
    try:
        result = _CONVERTERS[flag.kind](value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{flag.name}: expected {_expected(flag)}, got {value!r}") from None
    if flag.choices and result not in flag.choices:
        raise ValueError(f"{flag.name}: expected one of {', '.join(flag.choices)}, got {value!r}")
    return result


def _refuse_unless_default(flag: Flag, value: Any) -> None:
    try:
        is_default = convert(flag, value) == flag.default
    except ValueError:  # of another type, such as a DeepSpeed configuration given as a dict
        is_default = False
    if not is_default:
        shown = "a token" if "token" in flag.name else repr(value)
        raise ValueError(f"{flag.name}: not supported, got {shown}: {flag.help}")


def _to_bool(value: Any) -> bool:
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
    elif type(value).__name__ in ("bool", "bool_") or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError


def _to_int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, str):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return operator.index(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    result = float(value)
    if not math.isfinite(result):
        raise ValueError
    return result


def _to_str(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise TypeError
    return value


def _to_list(value: Any) -> list[str]:
    if isinstance(value, (str, os.PathLike)):
        value = _to_str(value).split(",")
    items = [_to_str(item).strip() for item in value]
    if not items or "" in items:
        raise ValueError
    return items


def _to_words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [_to_str(item) for item in value]


_CONVERTERS = {
    "str": _to_str,
    "int": _to_int,
    "float": _to_float,
    "bool": _to_bool,
    "list": _to_list,
    "words": _to_words,
}


def _expected(flag: Flag) -> str:
    kind = {
        "str": "text",
        "int": "an integer",
        "float": "a finite number",
        "bool": "true or false",
        "list": "one or more names separated by commas",
        "words": "a list of names",
    }[flag.kind]
    return f"{kind} {BOUNDS[flag.bound][1]}" if flag.bound else kind


def check_directory(name: str, path: str | os.PathLike[str]) -> None:
    """FileNotFoundError for a directory that is not there: the flag, where it was looked for, and
    the nearest name there.
    """
    if os.path.isdir(path):
        return
    near = near_path(path)
    raise FileNotFoundError(
        f"{name}: {os.fspath(path)!r}: looked for a directory (from {os.getcwd()}) and found none"
        f"{near}"
    )


def given_twice(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Sentences about flags of a command line that stand there twice with different values.

    names: of the flags that take one value, each with what it sets; the last value is used.
    """
    values: dict[str, str] = {}
    told: dict[str, str] = {}
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in names:
            continue
        sets = names[name]
        if name == f"--no_{sets}":
            value = "false"
        elif not equals:
            value = words[i + 1] if i + 1 < len(words) else ""
            value = "true" if value.startswith("--") or not value else value
        if values.setdefault(sets, value) != value:
            told[sets] = f"{name} is given twice: {value} is used, not {values[sets]}"
            values[sets] = value
    return list(told.values())


def names_unknown_flags(cls: Kind) -> Kind:
    """A group whose TypeError for an unknown keyword names the nearest flag that there is."""
    init = cls.__init__

    @wraps(init)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in given:
            if name not in known:
                raise TypeError(
                    f"{cls.__name__}: unknown argument {name!r}{did_you_mean(name, known)}"
                )
        init(self, *args, **given)

    cls.__init__ = checked  # type: ignore[misc]
    return cls


class Group:
    """What the argument groups, which are dataclasses of flags, share: types and bounds, refusals,
    notices and the JSON form.
    """

    _hidden: ClassVar[tuple[str, ...]] = ()  # left out of the JSON form
    _newer: ClassVar[tuple[str, ...]] = ()  # and these, that the original does not know, if default

    def __post_init__(self) -> None:
        self.notices: list[str] = []
        for flag in flags_of(type(self)):
            value = getattr(self, flag.name)
            if flag.mark == "R":
                _refuse_unless_default(flag, value)
                continue
            value = convert(flag, value)
            setattr(self, flag.name, value)
            if flag.mark == "A" and value != flag.default and value not in ([], ["none"], "none"):
                self.notices.append(f"{flag.name} has no effect: {flag.help}")
            if flag.bound and value is not None and not BOUNDS[flag.bound][0](value):
                raise ValueError(f"{flag.name}: expected {_expected(flag)}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `Class(**d)` makes an equal object."""
        return {
            flag.name: getattr(self, flag.name)
            for flag in flags_of(type(self))
            if flag.name not in self._hidden
            and not (flag.name in self._newer and getattr(self, flag.name) == flag.default)
        }

    def to_json_string(self) -> str:
        """The text of `finetuning_args.json` and `training_args.bin`: indent 2, sorted keys, final
        newline.
        """
        import json

        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
