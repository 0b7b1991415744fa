"""Regular expressions of configs and files, matched in bounded time.

Python's own matcher tries every way through a pattern: `(a+)+b` takes hours over a short name. Here
each part of a pattern is asked once for each place in the text, for all places where it can end, so
the time is at most (parts x length^3). Python's parser reads the pattern.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as constants  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as constants
    import sre_parse as parser

LONGEST, LONGEST_TEXT = 4096, 1000  # characters of a pattern, and of what is matched


class Pattern:
    """A regular expression without back references, flags and conditions.

    Raises ValueError that quotes a pattern which is none, or which uses one of these.
    """

    def __init__(self, pattern: str):
        self.pattern = pattern
        if len(pattern) > LONGEST:
            raise ValueError(f"a regular expression of {len(pattern)} characters is too long")
        quoted = repr(pattern if len(pattern) < 100 else pattern[:100] + "...")
        try:
            parsed = parser.parse(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{quoted} is no regular expression: {error}") from None
        if parsed.state.flags & ~re.UNICODE:
            raise ValueError(f"{quoted}: flags in a regular expression are not supported")
        try:
            self._ends = _sequence(parsed)
        except _NotSupportedError as error:
            raise ValueError(
                f"{quoted}: {error} in a regular expression is not supported"
            ) from None

    def fullmatch(self, text: str) -> bool:
        """Whether the whole text matches."""
        if len(text) > LONGEST_TEXT:
            raise ValueError(f"a text of {len(text)} characters is too long to be matched")
        return len(text) in self._ends(_Memo(text), 0)


class _NotSupportedError(Exception):
    pass


class _Memo:
    """A text, and what was found in it."""

    def __init__(self, text: str):
        self.text = text
        self.found: dict[tuple[int, int], frozenset[int]] = {}


# Where a part of a pattern that starts at a place of the text can end.
Ends = Callable[[_Memo, int], frozenset[int]]
NOWHERE: frozenset[int] = frozenset()


def _remembered(ends: Ends) -> Ends:
    def call(memo: _Memo, at: int) -> frozenset[int]:
        key = id(call), at
        if key not in memo.found:
            memo.found[key] = ends(memo, at)
        return memo.found[key]

    return call


def _after(part: Ends, memo: _Memo, places: Iterable[int]) -> frozenset[int]:
    return frozenset().union(*(part(memo, at) for at in places))


def _sequence(items: Iterable[Any]) -> Ends:
    parts = [_part(op, value) for op, value in items]

    def ends(memo: _Memo, at: int) -> frozenset[int]:
        places = frozenset((at,))
        for part in parts:
            places = _after(part, memo, places)
        return places

    return _remembered(ends)


def _repeated(least: int, most: int, body: Ends) -> Ends:
    def ends(memo: _Memo, at: int) -> frozenset[int]:
        places, reached, count = frozenset((at,)), NOWHERE, 0
        while count <= most and places:
            if count >= least:
                if places <= reached:
                    break
                reached |= places
            following = _after(body, memo, places)
            # Places only go forward, so after at most len(text) rounds they stay as they are.
            count = least if following == places and count < least else count + 1
            places = following
        return reached

    return _remembered(ends)


def _branch(branches: Iterable[Any]) -> Ends:
    ways = [_sequence(branch) for branch in branches]

    def ends(memo: _Memo, at: int) -> frozenset[int]:
        return frozenset().union(*(way(memo, at) for way in ways))

    return ends


def _one_of(allowed: Callable[[str], bool]) -> Ends:
    def ends(memo: _Memo, at: int) -> frozenset[int]:
        fits = at < len(memo.text) and allowed(memo.text[at])
        return frozenset((at + 1,)) if fits else NOWHERE

    return ends


def _where(holds: Callable[[_Memo, int], bool]) -> Ends:
    return lambda memo, at: frozenset((at,)) if holds(memo, at) else NOWHERE


@cache
def _category(name: str) -> Callable[[str], bool]:
    kind = name.rpartition("_")[2]
    letter = {"DIGIT": "d", "SPACE": "s", "WORD": "w"}[kind]
    match = re.compile("\\" + (letter.upper() if "_NOT_" in name else letter)).match
    return lambda character: match(character) is not None


def _set(items: Iterable[tuple[Any, Any]]) -> Callable[[str], bool]:
    tests: list[Callable[[str], bool]] = []
    inverted = False
    for op, value in items:
        if op is constants.NEGATE:
            inverted = True
        elif op is constants.LITERAL:
            tests.append(lambda c, value=value: ord(c) == value)
        elif op is constants.RANGE:
            tests.append(lambda c, value=value: value[0] <= ord(c) <= value[1])
        else:
            tests.append(_category(str(value)))
    return lambda c: any(test(c) for test in tests) != inverted


def _place(value: Any) -> Ends:
    name = str(value)
    if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
        return _where(lambda memo, at: at == 0)
    if name == "AT_END_STRING":
        return _where(lambda memo, at: at == len(memo.text))
    if name == "AT_END":
        return _where(lambda memo, at: memo.text[at:] in ("", "\n"))
    word = _category("CATEGORY_WORD")

    def boundary(memo: _Memo, at: int) -> bool:
        before = at > 0 and word(memo.text[at - 1])
        return before != (at < len(memo.text) and word(memo.text[at]))

    if name == "AT_BOUNDARY":
        return _where(boundary)
    return _where(lambda memo, at: not boundary(memo, at))


def _part(op: Any, value: Any) -> Ends:
    if op is constants.LITERAL:
        return _one_of(lambda c: ord(c) == value)
    if op is constants.NOT_LITERAL:
        return _one_of(lambda c: ord(c) != value)
    if op is constants.ANY:
        return _one_of(lambda c: c != "\n")
    if op is constants.IN:
        return _one_of(_set(value))
    if op is constants.BRANCH:
        return _branch(value[1])
    if op is constants.AT:
        return _place(value)
    if op in (constants.MAX_REPEAT, constants.MIN_REPEAT):
        least, most, body = value
        return _repeated(least, most, _sequence(body))
    if op is constants.SUBPATTERN and not (value[1] or value[2]):
        return _sequence(value[3])
    if op in (constants.ASSERT, constants.ASSERT_NOT) and value[0] > 0:
        ahead, wanted = _sequence(value[1]), op is constants.ASSERT
        return _where(lambda memo, at: bool(ahead(memo, at)) == wanted)
    raise _NotSupportedError(str(op).lower().replace("_", " "))
