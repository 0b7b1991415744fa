"""Tokenizers over a SentencePiece `tokenizer.model`; names as transformers'.

Families share the vocabulary file; the special ids of each follow its pieces. Arrays come back as
`Array`, NumPy with the few torch methods that callers of these tokenizers use. Only this file
touches the sentencepiece library, imported when a tokenizer is made.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import families
from .families import prompt as prompts
from .families import recognition
from .families.vocabulary import OTHERS, TIKTOKEN, has_tiktoken, is_tiktoken
from .files.regular import read_bytes
from .files.write import atomic_file, model_directory, read_json, refuse_lfs_pointer, write_json
from .interrupts import interruptible

ROLE_TOKEN = re.compile(r"<\|(?:system|user|assistant|observation)\|>")
VOCABULARY = "tokenizer.model"
CONFIG = "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"
DUMMY_SPACE = "\u2581"
LONG_TEXT = 100_000  # characters; from here on encoding takes longer than Ctrl-C should wait
GUARD = "\x00"  # stands for earlier text when a later part is decoded alone; no piece is called so


# What calls return


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


# The tokenizer


class ChatGLMTokenizer:
    """Text to ids and back; `family` is the name of one in glmlora/families.

    Ids 0 `<unk>` (also padding), 1 `<s>`, 2 `</s>`, then the pieces of the vocabulary, then the
    family's special tokens. Text never encodes to special ids, except role markers
    with `encode_special_tokens=True` in a family that has them. Ids beyond the vocabulary (models
    are padded) decode to "".
    Instances can be pickled and copied; the vocabulary file is not needed after construction.
    """

    unk_token = pad_token = "<unk>"
    bos_token = "<s>"
    eos_token = "</s>"
    model_input_names = ("input_ids", "attention_mask", "position_ids")

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        padding_side: str = "left",
        encode_special_tokens: bool = False,
        family: str = families.DEFAULT,
        config: Mapping[str, Any] | None = None,
        tokens_map: Mapping[str, Any] | None = None,
    ):
        """Read a SentencePiece vocabulary.

        config, tokens_map: contents of tokenizer_config.json and special_tokens_map.json to keep
        when saving. Raises ValueError for a file that is no SentencePiece model (a git-lfs pointer
        is named as one) or an argument that the family does not have, OSError as open() does,
        ImportError without sentencepiece.
        """
        self._family = _family(family)
        self.family = self._family.name
        if encode_special_tokens and not self._family.role_tokens:
            raise ValueError(
                f"encode_special_tokens: {self._family.title} has no role tokens to recognise"
            )
        self.encode_special_tokens = bool(encode_special_tokens)
        self.padding_side = padding_side
        self.vocab_file = os.fspath(vocab_file)
        self.name_or_path = os.path.dirname(self.vocab_file)
        self._config = dict(config or {})
        self._tokens_map = dict(tokens_map or {})
        self._model = read_bytes(vocab_file)
        self._open_model()

    def _open_model(self) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ImportError(
                "the tokenizer needs the sentencepiece package: pip install sentencepiece"
            ) from error
        refuse_lfs_pointer(self.vocab_file, self._model)
        if is_tiktoken(self._model):
            raise ValueError(f"{self.vocab_file}: {TIKTOKEN}")
        try:
            if not self._model:
                raise ValueError("file is empty")
            self._sp = SentencePieceProcessor(model_proto=self._model)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"{self.vocab_file}: is not a SentencePiece model: {error}") from error
        sp = self._sp
        self._n_pieces = sp.get_piece_size()
        self.unk_token_id = self.pad_token_id = sp.unk_id()
        self.bos_token_id = sp.bos_id()
        self.eos_token_id = sp.eos_id()
        for name in ("unk", "bos", "eos"):
            if not 0 <= getattr(self, f"{name}_token_id") < self._n_pieces:
                raise ValueError(f"{self.vocab_file}: has no {name} piece")
        names = self._family.special_tokens or ()
        self.special_tokens = {name: self._n_pieces + i for i, name in enumerate(names)}
        self._special_names = {i: name for name, i in self.special_tokens.items()}
        self._silent_ids = {self.unk_token_id, self.bos_token_id, self.eos_token_id}
        self._silent = {self.unk_token, self.bos_token, self.eos_token, ""}
        if not self._family.shows_special_tokens:
            self._silent.update(names)
        dummy = sp.piece_to_id(DUMMY_SPACE)
        self.dummy_space_id = dummy if dummy != self.unk_token_id else None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> ChatGLMTokenizer:
        """See `AutoTokenizer.from_pretrained`."""
        return AutoTokenizer.from_pretrained(path, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in self.__dict__.items() if n not in ("_sp", "_family")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._family = _family(self.family)
        self._open_model()

    def __repr__(self) -> str:
        return f"ChatGLMTokenizer({self.vocab_file!r}, family={self.family!r}, {len(self)} ids)"

    @property
    def padding_side(self) -> str:
        """Always "left": an answer follows the last id of every row."""
        return "left"

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        if side != "left":
            raise ValueError(f"padding_side: expected 'left', got {side!r}")

    # Vocabulary

    @property
    def vocab_size(self) -> int:
        """Pieces and special tokens; the model's padded vocabulary is larger."""
        return self._n_pieces + len(self.special_tokens)

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Token to id, all of them."""
        vocab = {self._sp.id_to_piece(i): i for i in range(self._n_pieces)}
        return {**vocab, **self.special_tokens}

    def get_command(self, token: str) -> int:
        """Id of a special token by name: `[gMASK]`, `<|user|>`, `<eos>`, ...; else ValueError."""
        named = {
            "<bos>": self.bos_token_id,
            "<eos>": self.eos_token_id,
            "<unk>": self.unk_token_id,
            "<pad>": self.pad_token_id,
            **self.special_tokens,
        }
        if token not in named:
            raise ValueError(f"token: expected one of {' '.join(named)}, got {token!r}")
        return named[token]

    def get_prefix_tokens(self) -> list[int]:
        """The two ids in front of every prompt, `[gMASK] sop`."""
        return [self.special_tokens["[gMASK]"], self.special_tokens["sop"]]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Id of a token, or list of ids; special tokens by name, an unknown token is `<unk>`."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self.special_tokens.get(tokens)
        return self._sp.piece_to_id(tokens) if found is None else found

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or list of tokens; special ids by name, ids beyond the vocabulary ""."""
        if isinstance(ids, int | np.integer):
            return self._token(_checked_ids([ids])[0])
        ids = _checked_ids(ids)
        return [self._token(i) for i in ids if not (skip_special_tokens and self._is_special(i))]

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Text of tokens, as `decode` of their ids."""
        return self._text(["" if token in self._silent else token for token in tokens])

    def _token(self, i: int) -> str:
        if i < self._n_pieces:
            return self._sp.id_to_piece(i)
        return self._special_names.get(i, "")

    def _is_special(self, i: int) -> bool:
        return i in self._silent_ids or i in self._special_names

    # Encoding

    def text_ids(self, text: str) -> list[int]:
        """Ids of text alone: no special ids, whatever it says. ValueError for lone surrogates."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text: character {error.start} is a lone surrogate, which UTF-8 cannot hold: "
                f"U+{ord(text[error.start]):04X}"
            ) from None
        except AttributeError:
            raise TypeError(f"text: expected str, got {type(text).__name__}") from None
        if len(text) < LONG_TEXT:
            return self._sp.encode_as_ids(text)
        return interruptible(self._sp.encode_as_ids, text)

    def text_offsets(self, text: str) -> list[int]:
        """For every id of `text_ids(text)` the index of the character where it begins."""
        offsets, position = [], -1  # the dummy space stands one before the text
        for i in self.text_ids(text):
            piece = self._sp.id_to_piece(i)
            if self._sp.is_byte(i):
                begins_character = int(piece[3:5], 16) & 0xC0 != 0x80
                offsets.append(position if begins_character else position - 1)
                position += begins_character
            else:
                offsets.append(max(position, 0))
                position += len(piece)
        return offsets

    def _ids(self, text: str) -> list[int]:
        """As `text_ids`, with role markers recognised if the tokenizer was made so."""
        if not self.encode_special_tokens:
            return self.text_ids(text)
        ids, last = [], 0
        for match in ROLE_TOKEN.finditer(text):
            ids += self.text_ids(text[last : match.start()])
            ids.append(self.special_tokens[match.group()])
            last = match.end()
        return ids + self.text_ids(text[last:])

    def tokenize(self, text: str) -> list[str]:
        """Pieces of text, without special tokens around them."""
        return [self._token(i) for i in self._ids(text)]

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop` a, or `[gMASK] sop` a b `</s>`."""
        ids = self.get_prefix_tokens() + list(token_ids_0)
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Special ids put around a text, or a pair of texts."""
        return len(self.build_inputs_with_special_tokens([], [] if pair else None))

    def encode(
        self,
        text: str,
        text_pair: str | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Any:
        """`input_ids` of `__call__` for one text: a list of ids, or an `Array` (1, T)."""
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        encoding = self(
            text, text_pair, add_special_tokens, padding, truncation, max_length, return_tensors
        )
        return encoding["input_ids"]

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Encode a text, or a list of texts.

        padding: True or "longest", "max_length", False; on the left, mask and positions 0 there.
        truncation: True cuts the right end to `max_length` ids, special ids included; of a pair the
        longer text loses ids first; None cuts where `max_length` is given and padding is not.
        return_tensors: None for lists, "np" or "pt" for `Array` (B, T) int64; a single text gives
        lists without the batch dimension, or arrays with B = 1.
        Raises ValueError naming the argument, TypeError for what is no text.
        """
        truncate = truncation or (truncation is None and max_length is not None and not padding)
        _one_of("truncation", truncation, (None, True, False, "longest_first", "do_not_truncate"))
        limit = max_length if truncate and truncation != "do_not_truncate" else None
        single = isinstance(text, str)
        texts = [text] if single else _texts("text", text)
        pairs: Sequence[str | None] = [None] * len(texts)
        if text_pair is not None:
            pairs = [text_pair] if isinstance(text_pair, str) else _texts("text_pair", text_pair)
            if len(pairs) != len(texts) or single != isinstance(text_pair, str):
                raise ValueError(f"text_pair: expected as many as text, {len(texts)}")
        rows = [
            self._encode_row(a, b, add_special_tokens, limit)
            for a, b in zip(texts, pairs, strict=True)
        ]
        return self._finish(
            rows, single, padding, max_length, return_tensors, return_attention_mask
        )

    def _encode_row(
        self, text: str, pair: str | None, add_special_tokens: bool, limit: int | None
    ) -> dict[str, list[int]]:
        a = self._ids(text)
        b = None if pair is None else self._ids(pair)
        if limit is not None:
            specials = self.num_special_tokens_to_add(b is not None) if add_special_tokens else 0
            if limit < specials:
                raise ValueError(
                    f"max_length: expected at least the {specials} special ids, got {limit}"
                )
            a, b = _truncate_pair(a, b, limit - specials)
        if add_special_tokens:
            return _row(self.build_inputs_with_special_tokens(a, b))
        return _row(a + (b or []))

    def _finish(
        self,
        rows: list[dict[str, list[int]]],
        single: bool,
        padding: bool | str,
        max_length: int | None,
        return_tensors: str | None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Pad the rows, drop the mask if unwanted, and bring them into the form asked for."""
        _one_of("return_tensors", return_tensors, (None, "np", "pt"))
        _one_of("padding", padding, (True, False, "longest", "max_length", "do_not_pad"))
        if padding and padding != "do_not_pad":
            self._pad_rows(rows, max_length if padding == "max_length" else None, padding)
        names = rows[0] if rows else self.model_input_names
        encoding = BatchEncoding({name: [row[name] for row in rows] for name in names})
        if not return_attention_mask:
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
        self, rows: list[dict[str, list[int]]], length: int | None, padding: bool | str
    ) -> None:
        if padding == "max_length" and length is None:
            raise ValueError("max_length: padding='max_length' needs it")
        if length is None:
            length = max((len(row["input_ids"]) for row in rows), default=0)
        for row in rows:
            n = max(length - len(row["input_ids"]), 0)
            row["input_ids"] = [self.pad_token_id] * n + row["input_ids"]
            row["attention_mask"] = [0] * n + row["attention_mask"]
            row["position_ids"] = [0] * n + row["position_ids"]

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Pad encodings on the left: a list of them, or one with a list of rows (or one row).

        Each has `input_ids`, and may have `attention_mask` and `position_ids`. Raises ValueError
        for other fields or lengths that differ.
        """
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
            given = {name: _checked_ids(values) for name, values in row.items()}
            rows[i] = {**_row(given["input_ids"]), **given}
            if len({len(values) for values in rows[i].values()}) > 1:
                raise ValueError(f"encoded_inputs[{i}]: fields have different lengths")
        return self._finish(
            rows, single, padding, max_length, return_tensors, return_attention_mask
        )

    # Decoding

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Text of one row of ids (or one id).

        Special tokens are shown by name, unless they are skipped, in families that show them.
        `<unk>`, `<s>`, `</s>` and ids beyond the vocabulary are "". Bytes that are not UTF-8 give
        one U+FFFD each. Raises ValueError for a negative id or what is no id.
        """
        if isinstance(token_ids, int | np.integer):
            token_ids = [token_ids]
        ids = _checked_ids(token_ids)
        if skip_special_tokens:
            ids = [i for i in ids if not self._is_special(i)]
        return self._text([self._shown(i) for i in ids])

    def batch_decode(
        self, sequences: Iterable[Any], skip_special_tokens: bool = False
    ) -> list[str]:
        """`decode` of every row."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def _shown(self, i: int) -> str:
        """The piece that an id adds to the text."""
        if i >= self._n_pieces:
            return self._special_names.get(i, "") if self._family.shows_special_tokens else ""
        return "" if i in self._silent_ids else self._sp.id_to_piece(i)

    def _text(self, pieces: list[str]) -> str:
        # All at once: only a dummy space at the very beginning is dropped, and bytes join to
        # characters. A special token's name is no piece, and unknown pieces are taken as they are.
        return self._sp.decode_pieces(pieces) if pieces else ""

    # Chat

    def build_prompt(self, query: str, history: Any = None) -> str:
        """Prompt text of the families whose histories are (query, answer) pairs."""
        return families.default().prompt_text(query, history)

    def build_chat_input(
        self, query: str, history: Any = None, role: str = "user"
    ) -> BatchEncoding:
        """Arrays (1, T) of a chat prompt, see `prompt.chat_ids`."""
        ids = prompts.chat_ids(self, query, history, role)
        return self._finish([_row(ids)], True, False, None, "np")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = False,
    ) -> Any:
        """A list of messages {"role", "content"} in the family's chat template.

        Returns a list of ids; the text with `tokenize=False`; an `Array` (1, T) with
        `return_tensors`; a `BatchEncoding` with `return_dict`.
        """
        if not tokenize:
            return self._family.template_text(messages, add_generation_prompt)
        ids = self._family.template_ids(self, messages, add_generation_prompt)
        encoding = self._finish([_row(ids)], True, False, None, return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    # Files

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> tuple[str, ...]:
        """Write the vocabulary file unchanged, tokenizer_config.json and special_tokens_map.json.

        Each file is replaced as a whole. Returns their paths. OSError as open() does.
        """
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        name = "tokenization_chatglm.ChatGLMTokenizer"
        defaults: dict[str, Any] = {
            "auto_map": {"AutoTokenizer": [name, None]},
            "do_lower_case": False,
            "padding_side": "left",
            "remove_space": False,
            "tokenizer_class": "ChatGLMTokenizer",
        }
        if self._family.role_tokens:
            flags = dict.fromkeys(
                ("lstrip", "normalized", "rstrip", "single_word", "special"), False
            )
            shown = [t for t in self.special_tokens if t not in ("[MASK]", "[sMASK]", "eop")]
            # The role tokens here are what tells the family of a saved tokenizer.
            defaults["added_tokens_decoder"] = {
                str(self.special_tokens[token]): {"content": token, **flags} for token in shown
            }
        with atomic_file(directory / VOCABULARY) as file:
            file.write(self._model)
        fields = {**defaults, **self._config}
        fields.pop(recognition.OWN_KEY, None)
        if not recognition.tells(fields, self.family):
            fields[recognition.OWN_KEY] = self.family
        write_json(directory / CONFIG, fields)
        write_json(directory / TOKENS_MAP, self._tokens_map)
        return tuple(str(directory / name) for name in (CONFIG, TOKENS_MAP, VOCABULARY))


class AutoTokenizer:
    """`AutoTokenizer.from_pretrained(path)` -> ChatGLMTokenizer."""

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike[str],
        *,
        trust_remote_code: bool = False,
        revision: str | None = None,
        use_fast: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        padding_side: str = "left",
        encode_special_tokens: bool = False,
        family: str | None = None,
    ) -> ChatGLMTokenizer:
        """The tokenizer of a model directory on this machine.

        `trust_remote_code`, `revision`, `use_fast` and `cache_dir` are accepted and mean nothing:
        no code of the directory runs and nothing is downloaded.

        family: a name or alias of one in glmlora/families, or None to find out. The vocabulary
        files are the same, so names and small files have to tell: the last part of `_name_or_path`
        in config.json; role tokens in the tokenizer's files; the last part of `name_or_path` in
        tokenizer_config.json and of the directory. A guess, and evidence that disagrees, is told by
        a warning. The config's `seq_length` decides nothing: families have variants with 32768.

        Raises OSError for a missing directory or file, ValueError for a file that is no vocabulary
        of a family (a git-lfs pointer is named as one), ImportError without sentencepiece.
        """
        directory = model_directory(path)
        vocabulary = directory / VOCABULARY
        if not vocabulary.exists():
            hints = [f"; {hint}" for name, hint in OTHERS.items() if (directory / name).is_file()]
            raise FileNotFoundError(f"{directory}: has no {VOCABULARY}{''.join(hints)}")
        config, tokens_map = (
            read_json(directory / name, dict) if (directory / name).exists() else {}
            for name in (CONFIG, TOKENS_MAP)
        )
        tokenizer = ChatGLMTokenizer(
            vocabulary,
            padding_side=padding_side,
            encode_special_tokens=encode_special_tokens,
            family=_found_family(directory, config) if family is None else family,
            config=config,
            tokens_map=tokens_map,
        )
        tokenizer.name_or_path = os.fspath(path)
        return tokenizer


def _family(name: str) -> families.Family:
    known = families.with_tokenizer()
    for family in known:
        if name in (family.name, family.alias):
            return family
    names, aliases = " or ".join(f.name for f in known), ", ".join(f.alias for f in known)
    raise ValueError(f"family: expected {names} ({aliases}: what this release has), got {name!r}")


def _found_family(directory: Path, tokenizer_config: dict[str, Any]) -> str:
    """The family that the directory of a tokenizer says."""
    if has_tiktoken(directory):
        return families.DEFAULT  # refused with its name when it is opened
    config = directory / "config.json"
    fields = read_json(config, dict) if config.exists() else {}
    return recognition.find(fields, directory, tokenizer_config)


# Streaming


class TextStream:
    """Text of ids that arrive one by one; `text` always equals `decode` of all of them.

    Only the ids since the last whole character are decoded again, so a long answer costs no more
    per id than a short one.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._settled = ""  # decoded for good
        self._pieces: list[str] = []  # since then
        self.text = ""

    def feed(self, *ids: int) -> str | None:
        """Take more ids. The whole text so far, or None while it is empty or ends in U+FFFD, which
        may be half a character. Raises ValueError as `decode`.
        """
        tokenizer = self._tokenizer
        for i in _checked_ids(ids):
            if self._skip and tokenizer._is_special(i):
                continue
            self._pieces.append(tokenizer._shown(i))
            if self._settled:
                window = tokenizer._text([GUARD, *self._pieces])[len(GUARD) :]
            else:
                window = tokenizer._text(self._pieces)
            self.text = self._settled + window
            if self.text and not self.text.endswith("\ufffd"):
                self._settled, self._pieces = self.text, []
        return None if not self.text or self.text.endswith("\ufffd") else self.text


# Small parts


def _row(ids: list[int]) -> dict[str, list[int]]:
    return {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "position_ids": list(range(len(ids))),
    }


def _array(rows: list[list[int]]) -> Array:
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1).view(Array)


def _unzip(encoding: Mapping[str, Any]) -> list[dict[str, Any]]:
    lengths = {len(values) for values in encoding.values()}
    if len(lengths) > 1:
        raise ValueError("encoded_inputs: fields have different numbers of rows")
    n = lengths.pop() if lengths else 0
    return [{name: values[i] for name, values in encoding.items()} for i in range(n)]


def _texts(name: str, values: Any) -> list[str]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected str or a list of str, got {type(values).__name__}")
    values = list(values)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{i}]: expected str, got {type(value).__name__}")
    return values


def _truncate_pair(
    a: list[int], b: list[int] | None, room: int
) -> tuple[list[int], list[int] | None]:
    """Cut right ends until both fit, the longer one first (the first one stays longer by a tie)."""
    if b is None:
        return a[:room], None
    n, m = len(a), len(b)
    while n + m > room:
        if n > m:
            n -= max(min(n - m, n + m - room), 1)
        else:
            m -= max(min(m - n, n + m - room), 1)
    return a[:n], b[:m]


def _checked_ids(ids: Any) -> list[int]:
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


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
