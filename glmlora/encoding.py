"""Texts to rows of ids that are cut and padded: the calls that tokenizers have in transformers, and
what they return. Arrays come back as `Array`, NumPy with the few torch methods that callers use.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from . import tell
from .names import did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Unpack

NO_LIMIT = int(1e30)  # `model_max_length` where there is none, as in transformers


class _Size(int):
    """Number of elements that can be called for the shape, as torch has it."""

    shape: tuple[int, ...]

    def __call__(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]


class Array(np.ndarray):
    """A NumPy array with `.to()`, `.cuda()`, `.cpu()`, `.numpy()` and `.size()`, so that code
    written for torch tensors runs. Nothing moves: the arrays stay in main memory.
    """

    def to(self, *device: Any, **options: Any) -> Array:
        """The array itself, whatever the device."""
        return self

    def cuda(self, device: Any = None) -> Array:
        """The array itself."""
        return self

    def cpu(self) -> Array:
        """The array itself."""
        return self

    def numpy(self) -> np.ndarray:
        """The same data as a plain ndarray."""
        return self.view(np.ndarray)

    @property
    def size(self) -> _Size:
        """`a.size` is the number of elements, `a.size()` the shape, `a.size(i)` one dimension."""
        size = _Size(np.ndarray.size.__get__(self))
        size.shape = self.shape
        return size


class BatchEncoding(dict):
    """`input_ids`, `attention_mask`, `position_ids` of a call, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"BatchEncoding has no {name!r}, only {', '.join(self) or 'nothing'}"
            ) from None

    def to(self, *device: Any, **options: Any) -> BatchEncoding:
        """The encoding itself: arrays stay in main memory."""
        return self


# Options of transformers' tokenizers that are accepted where they change nothing, else refused.


class EncodeOptions(TypedDict, total=False):
    """Of calls that make ids."""

    stride: int
    is_split_into_words: bool
    padding_side: str | None
    return_token_type_ids: bool | None
    return_overflowing_tokens: bool
    return_special_tokens_mask: bool
    return_offsets_mapping: bool
    return_length: bool
    split_special_tokens: bool | None
    prepend_batch_axis: bool
    tokenizer_kwargs: Any
    verbose: bool


class DecodeOptions(TypedDict, total=False):
    """Of calls that make text."""

    spaces_between_special_tokens: bool | None
    use_source_tokenizer: bool


class TemplateOptions(TypedDict, total=False):
    """Of apply_chat_template."""

    documents: Any
    enable_thinking: bool | None
    continue_final_message: bool
    sanitize_control_tokens: bool
    return_assistant_tokens_mask: bool
    tokenizer_kwargs: Any


# Values that change nothing, where that is not False.
_NEUTRAL: dict[str, Any] = {
    "stride": 0,
    "padding_side": "left",
    "spaces_between_special_tokens": True,
    **dict.fromkeys(("tokenizer_kwargs", "documents", "enable_thinking")),
}
_INSTEAD = {
    "documents": "the template reads none",
    "enable_thinking": "the template has no switch for thoughts",
    "is_split_into_words": "join the words to a text",
    "return_overflowing_tokens": "cut the ids yourself",
}


def refuse_options(given: Mapping[str, Any], options: Any, function: Any) -> None:
    """ValueError for one of `options` that would change something, TypeError for what is none, with
    the nearest argument of the function.
    """
    for name, value in given.items():
        if name not in options.__annotations__:
            arguments = inspect.signature(function).parameters
            near = did_you_mean(
                name, [*arguments, *options.__annotations__, *Options.__annotations__]
            )
            raise TypeError(f"{function.__name__}: unknown argument {name!r}{near}")
        neutral = _NEUTRAL.get(name, False)
        fine = value is None or value == neutral or not (value or neutral)
        if not fine and name != "verbose":
            how = _INSTEAD.get(name, f"leave it at {neutral!r}")
            raise ValueError(f"{name}: is not supported, got {value!r:.80}; {how}")


class Options(EncodeOptions, total=False):
    """What `encode_plus` and `batch_encode_plus` take beside the texts: see `Encoder.__call__`."""

    add_special_tokens: bool
    padding: bool | str
    truncation: bool | str | None
    max_length: int | None
    pad_to_multiple_of: int | None
    return_tensors: str | None
    return_attention_mask: bool | None


class Encoder:
    """The part of a tokenizer that makes rows of ids; the rest is in tokenization/."""

    pad_token_id: int
    eos_token_id: int
    truncation_side: str  # "right" or "left": where ids are cut away
    model_max_length: int
    model_input_names = ("input_ids", "attention_mask", "position_ids")

    if TYPE_CHECKING:

        def as_prompt(self, ids: Sequence[int]) -> list[int]: ...
        def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any: ...
        def _ids(self, text: str) -> list[int]: ...

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop` a, or `[gMASK] sop` a b `</s>`; in a family that has them behind prompts, a
        `[gMASK] <sop>`, or a `[gMASK] <sop>` b `<eop>`.
        """
        ids = self.as_prompt(token_ids_0)
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Special ids put around a text, or a pair of texts."""
        return len(self.build_inputs_with_special_tokens([], [] if pair else None))

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 over special ids, 0 over others, of what `build_inputs_with_special_tokens` gives; or
        of `token_ids_0` as they are.
        """
        ids = list(token_ids_0)
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(ids, token_ids_1)
        return [int(self._is_special(i)) for i in ids]

    def encode(
        self,
        text: str | Sequence[int] | Sequence[str],
        text_pair: str | Sequence[int] | Sequence[str] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        **others: Unpack[EncodeOptions],
    ) -> Any:
        """`input_ids` of `encode_plus`: a list of ids, or an `Array` (1, T)."""
        refuse_options(others, EncodeOptions, self.encode)
        return self.encode_plus(
            text,
            text_pair,
            add_special_tokens=add_special_tokens,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
        )["input_ids"]

    def encode_plus(
        self,
        text: str | Sequence[int] | Sequence[str],
        text_pair: str | Sequence[int] | Sequence[str] | None = None,
        **options: Unpack[Options],
    ) -> BatchEncoding:
        """As `__call__` for one text, which may be a list of ids, or of tokens, too."""
        a = self._any_ids("text", text)
        b = None if text_pair is None else self._any_ids("text_pair", text_pair)
        return self._encoded([(a, b)], True, options, self.encode_plus)

    def batch_encode_plus(
        self, batch_text_or_text_pairs: Sequence[Any], **options: Unpack[Options]
    ) -> BatchEncoding:
        """As `__call__` for a list of texts, of lists of ids, or of pairs of texts."""
        rows = self._rows("batch_text_or_text_pairs", batch_text_or_text_pairs)
        return self._encoded(rows, False, options, self.batch_encode_plus)

    def prepare_for_model(
        self, ids: Sequence[int], pair_ids: Sequence[int] | None = None, **options: Unpack[Options]
    ) -> BatchEncoding:
        """As `encode_plus` of ids."""
        return self.encode_plus(ids, pair_ids, **options)

    def __call__(
        self,
        text: Any = None,
        text_pair: str | Sequence[str] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = True,
        *,
        text_target: str | Sequence[str] | None = None,
        text_pair_target: str | Sequence[str] | None = None,
        pad_to_multiple_of: int | None = None,
        **others: Unpack[EncodeOptions],
    ) -> BatchEncoding:
        """Encode a text, or a list of texts (or of ids, or of pairs of texts).

        padding: True or "longest", "max_length", False; on the left, mask and positions 0 there.
        Positions are two lines, position and block, in a family that has both: (2, T).
        truncation: True cuts to `max_length` ids (else `model_max_length`), special ids included,
        at the `truncation_side`; of a pair the longer text loses ids first, or as "only_first" and
        "only_second" say; None cuts where `max_length` is given and padding is not.
        return_tensors: None for lists, "np" or "pt" for `Array` (B, T) int64; a single text gives
        lists without the batch dimension, or arrays with B = 1. text_target: encoded alike, its ids
        are `labels`; alone it is the text. Other options of transformers are refused by name where
        they would change something. Raises ValueError naming the argument, TypeError for what is no
        text.
        """
        refuse_options(others, EncodeOptions, self.__call__)
        options: Options = {
            "add_special_tokens": add_special_tokens,
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "pad_to_multiple_of": pad_to_multiple_of,
            "return_tensors": return_tensors,
            "return_attention_mask": return_attention_mask,
        }
        if text_target is not None:
            labels = self(text_target, text_pair_target, **options)
            if text is None:
                return labels
        if _is_one(text):
            if text_pair is not None and not _is_one(text_pair):
                raise ValueError("text_pair: expected one text, as text")
            encoding = self.encode_plus(text, text_pair, **options)
        else:
            rows = self._rows("text", text)
            if text_pair is not None:
                pairs = [] if isinstance(text_pair, str) else self._rows("text_pair", text_pair)
                if len(pairs) != len(rows):
                    raise ValueError(f"text_pair: expected as many as text, {len(rows)}")
                rows = [(a, b) for (a, _), (b, _) in zip(rows, pairs, strict=True)]
            encoding = self._encoded(rows, False, options, self.__call__)
        if text_target is not None:
            encoding["labels"] = labels["input_ids"]
        return encoding

    def _any_ids(self, name: str, text: Any) -> list[int]:
        """Ids of a text, of ids, or of tokens."""
        if isinstance(text, str):
            return self._ids(text)
        if isinstance(text, np.ndarray | list | tuple) and len(text):
            if all(isinstance(token, str) for token in text):
                return list(self.convert_tokens_to_ids(text))
            if all(isinstance(i, int | np.integer) for i in text):
                return checked_ids(text)
        raise TypeError(f"{name}: expected str, or a list of ids, got {text!r:.80}")

    def _rows(self, name: str, texts: Any) -> list[tuple[list[int], list[int] | None]]:
        """(ids, ids of its pair or None) of each."""
        if not isinstance(texts, Iterable) or isinstance(texts, str | Mapping):
            raise TypeError(f"{name}: expected str or a list of str, got {type(texts).__name__}")
        rows: list[tuple[list[int], list[int] | None]] = []
        for i, text in enumerate(texts):
            if isinstance(text, list | tuple) and len(text) == 2 and _are_texts(text):
                rows.append((self._ids(text[0]), self._ids(text[1])))
            elif isinstance(text, list | tuple) and text and _are_texts(text):
                raise TypeError(f"{name}[{i}]: expected a text or a pair, got {len(text)} texts")
            else:
                rows.append((self._any_ids(f"{name}[{i}]", text), None))
        return rows

    def _encoded(
        self,
        rows: Sequence[tuple[list[int], list[int] | None]],
        single: bool,
        options: Options,
        function: Any,
    ) -> BatchEncoding:
        """Cut, framed by special ids, padded, and in the form asked for."""
        given = dict(options)
        known = set(Options.__annotations__) - set(EncodeOptions.__annotations__)
        refuse_options({n: v for n, v in given.items() if n not in known}, EncodeOptions, function)
        padding, max_length = given.get("padding") or False, given.get("max_length")
        _check_length("max_length", max_length)
        _check_length("pad_to_multiple_of", given.get("pad_to_multiple_of"))
        add_special = bool(given.get("add_special_tokens", True))
        strategy = given.get("truncation")
        _one_of("truncation", strategy, _TRUNCATIONS)
        if strategy is None and max_length is not None and not padding:
            strategy = True
        limit = None
        if strategy and strategy != "do_not_truncate":
            limit = self._limit(max_length)
        encoded = [self._framed(a, b, add_special, limit, strategy) for a, b in rows]
        longest = max((len(row["input_ids"]) for row in encoded), default=0)
        if longest > self.model_max_length:
            tell.once(
                f"the tokenizer: a text has {longest} ids, more than its model_max_length "
                f"{self.model_max_length}; truncation=True cuts it"
            )
        return self._finish(
            encoded,
            single,
            padding,
            max_length,
            given.get("return_tensors"),
            given.get("return_attention_mask"),
            given.get("pad_to_multiple_of"),
        )

    def _limit(self, max_length: int | None) -> int | None:
        if max_length is not None:
            return max_length
        if self.model_max_length < NO_LIMIT:
            return self.model_max_length
        tell.once(
            "truncation: nothing is cut, since neither max_length nor the tokenizer's "
            "model_max_length is given"
        )
        return None

    def _framed(
        self,
        a: list[int],
        b: list[int] | None,
        add_special_tokens: bool,
        limit: int | None,
        strategy: Any,
    ) -> dict[str, list[Any]]:
        if limit is not None:
            specials = self.num_special_tokens_to_add(b is not None) if add_special_tokens else 0
            if limit < specials:
                raise ValueError(
                    f"max_length: expected at least the {specials} special ids, got {limit}"
                )
            a, b = _truncate_pair(a, b, limit - specials, strategy, self.truncation_side)
        if add_special_tokens:
            return self._row(self.build_inputs_with_special_tokens(a, b))
        return self._row(a + (b or []))

    def _row(self, ids: list[int]) -> dict[str, list[Any]]:
        """The fields of one row without padding."""
        positions = self._positions(ids)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": positions}

    def _positions(self, ids: list[int]) -> list[Any]:
        """The positions of a row, or lines of them where a model has several."""
        return list(range(len(ids)))

    def _finish(
        self,
        rows: list[dict[str, list[Any]]],
        single: bool,
        padding: bool | str,
        max_length: int | None,
        return_tensors: str | None,
        return_attention_mask: bool | None = True,
        multiple: int | None = None,
    ) -> BatchEncoding:
        """Pad the rows, drop the mask if unwanted, and bring them into the form asked for."""
        _one_of("return_tensors", return_tensors, (None, "np", "pt"))
        _one_of("padding", padding, (True, False, "longest", "max_length", "do_not_pad"))
        if padding and padding != "do_not_pad":
            self._pad_rows(rows, max_length if padding == "max_length" else None, padding, multiple)
        names = rows[0] if rows else self.model_input_names
        encoding = BatchEncoding({name: [row[name] for row in rows] for name in names})
        if return_attention_mask is False:
            del encoding["attention_mask"]
        if return_tensors is not None:
            if len({len(row["input_ids"]) for row in rows}) > 1:
                raise ValueError("return_tensors: rows have different lengths; pass padding=True")
            for name, values in encoding.items():
                encoding[name] = _array(values)
        elif single:
            for name, values in encoding.items():
                encoding[name] = values[0]
        return encoding

    def _pad_rows(
        self,
        rows: list[dict[str, list[Any]]],
        length: int | None,
        padding: bool | str,
        multiple: int | None,
    ) -> None:
        if padding == "max_length" and length is None:
            if self.model_max_length >= NO_LIMIT:
                raise ValueError("max_length: padding='max_length' needs it")
            length = self.model_max_length
        if length is None:
            length = max((len(row["input_ids"]) for row in rows), default=0)
        if multiple:
            length = -(-length // multiple) * multiple
        for row in rows:
            n = max(length - len(row["input_ids"]), 0)
            row["input_ids"] = [self.pad_token_id] * n + row["input_ids"]
            row["attention_mask"] = [0] * n + row["attention_mask"]
            places = row["position_ids"]
            lines = [[0] * n + line for line in (places if _are_lines(places) else [places])]
            row["position_ids"] = lines if _are_lines(places) else lines[0]

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        return_attention_mask: bool | None = True,
        return_tensors: str | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pad encodings on the left: a list of them, or one with a list of rows (or one row).

        Each has `input_ids`, and may have `attention_mask` and `position_ids`. Raises ValueError
        for other fields or lengths that differ.
        """
        refuse_options({"padding_side": padding_side}, EncodeOptions, self.pad)
        single = False
        if isinstance(encoded_inputs, Mapping):
            ids = encoded_inputs.get("input_ids", [])
            single = len(ids) > 0 and np.ndim(ids[0]) == 0
            rows = [dict(encoded_inputs)] if single else _unzip(encoded_inputs)
        else:
            rows = [dict(row) for row in encoded_inputs]
        for i, row in enumerate(rows):
            unknown = set(row) - set(self.model_input_names)
            if unknown or "input_ids" not in row:
                raise ValueError(
                    f"encoded_inputs[{i}]: expected input_ids, attention_mask, position_ids, "
                    f"got {', '.join(row) or 'nothing'}"
                )
            given = {
                name: [*map(checked_ids, values)] if _are_lines(values) else checked_ids(values)
                for name, values in row.items()
            }
            rows[i] = {**self._row(given["input_ids"]), **given}
            flat = (v if _are_lines(v) else [v] for v in rows[i].values())
            if len({len(line) for lines in flat for line in lines}) > 1:
                raise ValueError(f"encoded_inputs[{i}]: fields have different lengths")
        return self._finish(
            rows,
            single,
            padding,
            max_length,
            return_tensors,
            return_attention_mask,
            pad_to_multiple_of,
        )


def _are_lines(values: Any) -> bool:
    """Whether the values of a row are several lines of them."""
    return len(values) > 0 and not isinstance(values, str) and np.ndim(values[0]) == 1


def _array(rows: list[list[Any]]) -> Array:
    array = np.array(rows, dtype=np.int64)
    return (array if array.ndim == 3 else array.reshape(len(rows), -1)).view(Array)


def _unzip(encoding: Mapping[str, Any]) -> list[dict[str, Any]]:
    lengths = {len(values) for values in encoding.values()}
    if len(lengths) > 1:
        raise ValueError("encoded_inputs: fields have different numbers of rows")
    n = lengths.pop() if lengths else 0
    return [{name: values[i] for name, values in encoding.items()} for i in range(n)]


_TRUNCATIONS = (
    *(None, True, False),
    *("longest_first", "only_first", "only_second", "do_not_truncate"),
)


def _is_one(text: Any) -> bool:
    """Whether it is one text: a str, or ids."""
    return isinstance(text, str) or (
        isinstance(text, list | tuple | np.ndarray)
        and len(text) > 0
        and isinstance(text[0], int | np.integer)
    )


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _truncate_pair(
    a: list[int], b: list[int] | None, room: int, strategy: Any, side: str
) -> tuple[list[int], list[int] | None]:
    """Cut until both fit, the longer one first (the first one stays longer by a tie), or the one
    that the strategy names.
    """
    n, m = len(a), len(b or ())
    if strategy == "only_first" or b is None:
        n = min(n, room - m)
    elif strategy == "only_second":
        m = min(m, room - n)
    if n < 0 or m < 0 or (strategy == "only_second" and b is None and n > room):
        raise ValueError(f"truncation: {strategy!r} leaves no room for the other text")
    while n + m > room:
        if n > m:
            n -= max(min(n - m, n + m - room), 1)
        else:
            m -= max(min(m - n, n + m - room), 1)
    if side == "left":
        return a[len(a) - n :], None if b is None else b[len(b) - m :]
    return a[:n], None if b is None else b[:m]


def checked_ids(ids: Any) -> list[int]:
    """Ids as a list of Python ints. ValueError naming what is no id."""
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1:
            raise ValueError(
                f"ids: expected one row, got shape {ids.shape}; batch_decode takes several"
            )
        ids = ids.tolist()
    try:
        checked = list(map(operator.index, ids))
    except TypeError:
        if not isinstance(ids, Iterable):
            raise ValueError(f"ids: expected a row of ids, got {ids!r:.80}") from None
        for at, i in enumerate(ids):
            if not hasattr(i, "__index__"):
                raise ValueError(f"ids[{at}]: expected a whole number, got {i!r:.80}") from None
        raise
    if checked and min(checked) < 0:
        at, i = next((at, i) for at, i in enumerate(checked) if i < 0)
        raise ValueError(f"ids[{at}]: expected an id from 0, got {i}")
    return checked


def _check_length(name: str, value: Any) -> None:
    """ValueError where it is neither None nor a whole number."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer)):
        raise ValueError(f"{name}: expected a whole number, got {value!r:.80}")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")


def cleaned(text: str) -> str:
    """Text without spaces before English punctuation, as transformers cleans it up."""
    for mark in (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(mark, mark[1:])
        if mark == " ,":
            text = text.replace(" ' ", "'")
    return text
