"""The tokenizer of every family, over a vocabulary of either form; names as transformers'.

A family's special ids follow the vocabulary's. Arrays come back as `Array`, NumPy with the few
torch methods that callers of these tokenizers use.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import families, tell
from ..encoding import NO_LIMIT, DecodeOptions, checked_ids, cleaned, refuse_options
from ..families import recognition
from ..families.vocabulary import VOCABULARIES, fits, is_byte_pairs, is_json, vocabulary_file
from ..files import tokenizer_keywords as keywords
from ..files.hub import check_keywords, model_directory
from ..files.regular import read_bytes, read_text
from ..files.small import TEMPLATES, copy, copy_code, whole_references
from ..files.staging import staged
from ..files.write import read_json, refuse_lfs_pointer, write_json
from ..interrupts import interruptible
from ..names import did_you_mean
from .byte_pairs import BytePairs
from .chats import Chats
from .ice_text import IceText
from .pieces import Pieces
from .special import content_of, special_ids
from .vocabulary import Token, Vocabulary

if TYPE_CHECKING:
    from typing_extensions import Unpack

JSON_VOCABULARY = "tokenizer.json"
CONFIG = "tokenizer_config.json"
TOKENS_MAP = "special_tokens_map.json"
IMAGES = "num_image_tokens"
TEMPLATE = "chat_template.jinja"
LONG_TEXT = 100_000  # characters; from here on encoding takes longer than Ctrl-C should wait
_ADDED = ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder")
_FIXED = {
    **dict.fromkeys(("eos_token", "eos_token_id"), "generate(eos_token_id=..) ends with other ids"),
    **dict.fromkeys(("bos_token", "bos_token_id"), "prompts begin with get_prefix_tokens()"),
    **dict.fromkeys(("unk_token", "unk_token_id", "special_tokens"), "the vocabulary has it"),
    "chat_template": "apply_chat_template(chat_template=..) takes another",
    "family": "AutoTokenizer.from_pretrained(.., family=..) chooses it",
}


class ChatGLMTokenizer(Chats):
    """Text to ids and back; `family` is the name of one in glmlora/families.

    Ids of the vocabulary, then the family's special tokens. A SentencePiece vocabulary begins with
    0 `<unk>` (also padding), 1 `<s>`, 2 `</s>`; one of byte pairs has none of these, its tokens are
    bytes, and special ids are those that tokenizer_config.json lists. Text never encodes to special
    ids, except where it names them with `encode_special_tokens=True` in a family that has roles.
    Ids beyond the vocabulary (models are padded) decode to "".
    Instances can be pickled and copied; the vocabulary file is not needed after construction.
    """

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        padding_side: str = "left",
        encode_special_tokens: bool | None = None,
        family: str = families.DEFAULT,
        config: Mapping[str, Any] | None = None,
        tokens_map: Mapping[str, Any] | None = None,
    ):
        """Read a vocabulary of the form that the family has.

        config, tokens_map: contents of tokenizer_config.json and special_tokens_map.json, which are
        kept when saving; model_max_length, truncation_side, pad_token, encode_special_tokens and
        clean_up_tokenization_spaces hold, other settings are named by one warning. Raises
        ValueError for a file of another form (a git-lfs pointer is named as one) or an argument
        that the family does not have, OSError as open() does, ImportError without the library that
        reads the form (sentencepiece or tiktoken).
        """
        self._family = _family(family)
        self.family = self._family.name
        self._encodes_special = False
        if encode_special_tokens:
            self.encode_special_tokens = True
        self.padding_side = padding_side
        self._truncation_side = "right"
        self._model_max_length = NO_LIMIT
        self.clean_up_tokenization_spaces = False
        self.vocab_file = os.fspath(vocab_file)
        self.name_or_path = os.path.dirname(self.vocab_file)
        self._directory = Path(os.path.abspath(self.vocab_file)).parent
        self._config = dict(config or {})
        self._tokens_map = dict(tokens_map or {})
        self._template = self._config.get("chat_template")
        template = self._directory / TEMPLATE
        if template.is_file():  # is the newer way
            self._template = read_text(template, errors="replace")
        self._model = read_bytes(vocab_file)
        self._open_model()
        self._take_config(encode_special_tokens is None)
        self._ready = True

    def _take_config(self, encode_special_tokens: bool) -> None:
        """Settings in tokenizer_config.json (and special tokens in special_tokens_map.json), and a
        warning that names those that do not hold.
        """
        unused = []
        settings = ["model_max_length", "truncation_side", "pad_token"]
        settings += ["clean_up_tokenization_spaces"]
        settings += ["encode_special_tokens"] if encode_special_tokens else []
        fields = self._family.tokenizer_words({**self._tokens_map, **self._config})
        for name, value in fields.items():
            if name in _ADDED:
                listed = value.values() if isinstance(value, dict) else value
                if not isinstance(listed, Iterable) or isinstance(listed, str):
                    listed = [] if value is None else [value]
                if new := [t for t in map(content_of, listed) if self._unknown(t)]:
                    unused.append(f"{name} {', '.join(map(repr, new[:5]))}, not in the vocabulary")
                continue
            if name == "chat_template" and value:
                continue
            value = content_of(value) if isinstance(value, dict) else value
            if name in settings and value is not None:
                try:
                    setattr(self, name, value)
                except (ValueError, TypeError) as error:
                    unused.append(str(error))
            elif name in {f"{word}_token" for word in self._family.named_tokens}:
                if value not in (None, getattr(self, name)):
                    unused.append(f"{name} {value!r}, it is {getattr(self, name)!r}")
            elif value not in keywords.NOT_HERE.get(name, (value,)):
                unused.append(f"{name} {value!r:.80}")
        if unused:
            tell.warn(f"{self.name_or_path}: {CONFIG}: is not used: {'; '.join(unused)}")

    def _open_model(self) -> None:
        family = self._family
        refuse_lfs_pointer(self.vocab_file, self._model)
        if is_byte_pairs(self._model) and not family.byte_pairs:
            others = [f for f in families.with_tokenizer() if f.byte_pairs]
            raise ValueError(
                f"{self.vocab_file}: is a vocabulary of byte pairs (base64 and rank per line), "
                f"which {' and '.join(f.title for f in others)} have, not {family.title}"
            )
        self._vocabulary: Vocabulary
        self.has_special_pieces = False
        if family.blank_tokens:
            where, images = f"{self.name_or_path}: {CONFIG}: {IMAGES}", self._config.get(IMAGES)
            names = family.special_tokens or ()
            ice_text = IceText(self._model, self.vocab_file, names, images, where)
            self.has_special_pieces = ice_text.has_special_pieces
            self._vocabulary = ice_text
        else:
            form = BytePairs if family.byte_pairs else Pieces
            self._vocabulary = form(self._model, self.vocab_file)
        listed, where = self._vocabulary.added, f"{self.vocab_file}: added_tokens"
        if listed is None:
            listed = self._config.get("added_tokens_decoder")
            where = f"{self.name_or_path}: {CONFIG}: added_tokens_decoder"
        self.special_tokens = special_ids(family, self._vocabulary, listed, where)
        self._special_names = {i: name for name, i in self.special_tokens.items()}
        flags = listed if family.byte_pairs and listed else {}
        plain = (isinstance(t, dict) and t.get("special") is False for t in flags.values())
        self._plain_ids = {int(i) for i, is_plain in zip(flags, plain, strict=True) if is_plain}
        ids, called = {**self._vocabulary.named}, family.named_tokens
        for word, name in called.items():
            i = ids.setdefault(word, self.special_tokens.get(name, -1))
            self.__dict__ |= {f"{word}_token": name, f"{word}_token_id": i}
        self._default_pad_id = ids.get("pad", ids.get("unk", ids["eos"]))
        self.__dict__.setdefault("pad_token_id", self._default_pad_id)
        self._silent_ids = set(self._vocabulary.named.values())
        self._silent: set[Token] = {"", *map(self._vocabulary.token, self._silent_ids)}
        if not family.shows_special_tokens:
            self._silent.update(self.special_tokens)
        self.dummy_space_id = self._vocabulary.dummy_space_id
        # A lone "sop" may be part of a word.
        names = sorted(family.in_texts or self.special_tokens, key=len, reverse=True)
        if family.prefix_tokens and not family.prefix_behind:
            names.insert(0, "".join(family.prefix_tokens))
        self._special_text = re.compile("|".join(map(re.escape, names)))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **options: Any) -> ChatGLMTokenizer:
        """See `AutoTokenizer.from_pretrained`."""
        return AutoTokenizer.from_pretrained(path, **options)

    def __getstate__(self) -> dict[str, Any]:
        made_anew = ("_vocabulary", "_family", "_own", "writer")
        return {n: value for n, value in self.__dict__.items() if n not in made_anew}

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

    @property
    def truncation_side(self) -> str:
        """Where ids are cut away: "right" or "left"."""
        return self._truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        if side not in ("right", "left"):
            raise ValueError(f"truncation_side: expected 'right' or 'left', got {side!r}")
        self._truncation_side = side

    @property
    def model_max_length(self) -> int:
        """Ids to which `truncation=True` cuts where no max_length is given."""
        return self._model_max_length

    @model_max_length.setter
    def model_max_length(self, length: float | None) -> None:
        if length is None:
            length = NO_LIMIT
        if isinstance(length, bool) or not isinstance(length, int | float | np.integer):
            raise ValueError(f"model_max_length: expected a whole number, got {length!r}")
        if not length >= 1:
            raise ValueError(f"model_max_length: expected at least 1, got {length!r}")
        self._model_max_length = int(min(length, NO_LIMIT))

    @property
    def encode_special_tokens(self) -> bool:
        """Whether texts may name special tokens."""
        return self._encodes_special

    @encode_special_tokens.setter
    def encode_special_tokens(self, on: bool) -> None:
        if on and not (self._family.role_tokens or self._family.in_texts):
            raise ValueError(
                f"encode_special_tokens: {self._family.title} has no role tokens to recognise"
            )
        self._encodes_special = bool(on)

    @property
    def pad_token(self) -> str:
        """The token of `pad_token_id`: `<unk>`, or the end token where there is none, unless it is
        set to another of the vocabulary.
        """
        return str(self._token(self.pad_token_id))

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        if self._unknown(token):
            raise ValueError(f"pad_token: {token!r} is not in the vocabulary")
        self.pad_token_id = self.convert_tokens_to_ids(token)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_ready" in self.__dict__ and not name.startswith("_"):
            if name == "pad_token_id" and not (
                isinstance(value, int | np.integer) and 0 <= value < len(self)
            ):
                raise ValueError(f"pad_token_id: expected an id below {len(self)}, got {value!r}")
            if name in _FIXED and value != getattr(self, name):
                raise AttributeError(f"{name}: is {getattr(self, name)!r:.80}; {_FIXED[name]}")
            if name != "padding_side" and value not in keywords.NOT_HERE.get(name, (value,)):
                raise AttributeError(f"{name}: has no effect on this tokenizer, got {value!r:.80}")
            near = "" if hasattr(self, name) else did_you_mean(name, dir(self))
            if near and name not in keywords.NOT_HERE:
                raise AttributeError(f"the tokenizer has no {name!r}{near}")
        super().__setattr__(name, value)

    # Vocabulary

    is_fast = False
    eos_token: str
    unk_token = bos_token = cls_token = sep_token = mask_token = None
    unk_token_id = bos_token_id = cls_token_id = sep_token_id = mask_token_id = None

    @property
    def additional_special_tokens(self) -> list[str]:
        """Names of the special tokens behind the vocabulary."""
        return list(self.special_tokens)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Their ids."""
        return list(self.special_tokens.values())

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """Special tokens by what they are for."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        found = {name: token for name, token in found.items() if token is not None}
        return {**found, "additional_special_tokens": self.additional_special_tokens}

    @property
    def all_special_tokens(self) -> list[str]:
        """Every special token, once."""
        named = self.special_tokens_map
        others = named.pop("additional_special_tokens")
        return list(dict.fromkeys([*named.values(), *others]))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return list(self.convert_tokens_to_ids(self.all_special_tokens))

    def get_added_vocab(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return dict(self.special_tokens)

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """0 for tokens that are there; ValueError for others: the vocabulary is fixed."""
        tokens = new_tokens if isinstance(new_tokens, list | tuple) else [new_tokens]
        new = [t for t in map(str, tokens) if self._unknown(t)]
        if new:
            raise ValueError(
                f"add_tokens: the vocabulary is fixed, it has no {', '.join(map(repr, new[:5]))}"
            )
        return 0

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any], **options: Any) -> int:
        """Set pad_token to a token that is there; 0. ValueError for tokens that are not, and for
        other names than those they have.
        """
        for name, value in special_tokens_dict.items():
            self.add_tokens(value)
            if name == "pad_token":
                self.pad_token = str(value)
            elif name not in ("additional_special_tokens", "extra_special_tokens"):
                if str(value) != getattr(self, name, None):
                    raise ValueError(f"{name}: cannot be set, got {str(value)!r}")
        return 0

    def _unknown(self, token: Any) -> bool:
        """Whether the vocabulary lacks a token."""
        if not isinstance(token, str | bytes):
            return True
        in_it = token in self._silent or token in self.special_tokens
        return not in_it and self._vocabulary.id_of(token) in (None, self.unk_token_id)

    @property
    def vocab_size(self) -> int:
        """Ids, those of special tokens among them; the model's padded vocabulary is larger."""
        return max([self._vocabulary.size - 1, *self._special_names]) + 1

    def __len__(self) -> int:
        return self.vocab_size

    def get_vocab(self) -> dict[Token, int]:
        """Token to id, all of them."""
        vocab = {self._vocabulary.token(i): i for i in range(self._vocabulary.size)}
        return {**vocab, **self.special_tokens}

    def get_command(self, token: str) -> int:
        """Id of a special token by name: `[gMASK]`, `<|user|>`, `<eos>`, ...; else ValueError."""
        named = {"<bos>": self.bos_token_id, "<eos>": self.eos_token_id}
        named |= {"<unk>": self.unk_token_id, "<pad>": self.pad_token_id, **self.special_tokens}
        named = {name: i for name, i in named.items() if i is not None}
        if token not in named:
            raise ValueError(f"token: expected one of {' '.join(named)}, got {token!r}")
        return named[token]

    def get_prefix_tokens(self) -> list[int]:
        """The two ids in front of every prompt, or behind it, `[gMASK] sop`."""
        return [self.special_tokens[token] for token in self._family.prefix_tokens]

    def as_prompt(self, ids: Sequence[int]) -> list[int]:
        """Ids with `get_prefix_tokens` in front, or behind them in families that have them there:
        without `[gMASK]` where they have a mask themselves.
        """
        prefix = self.get_prefix_tokens()
        if not self._family.prefix_behind:
            return [*prefix, *ids]
        masks = {i for i in map(self.special_tokens.get, ("[MASK]", "[gMASK]")) if i in ids}
        return [*ids, *(prefix[1:] if masks else prefix)]

    def convert_tokens_to_ids(self, tokens: Token | Iterable[Token]) -> Any:
        """Id of a token, or list of ids; special tokens by name; an unknown token is `<unk>`, and
        None where there is none.
        """
        if not isinstance(tokens, str | bytes):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        if tokens in self.special_tokens:
            return self.special_tokens[tokens]  # type: ignore[index]
        i = self._vocabulary.id_of(tokens)
        return self.unk_token_id if i is None else i

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or list of tokens; special ids by name, ids beyond the vocabulary ""."""
        if isinstance(ids, int | np.integer):
            return self._token(checked_ids([ids])[0])
        ids = checked_ids(ids)
        return [self._token(i) for i in ids if not (skip_special_tokens and self._is_special(i))]

    def convert_tokens_to_string(self, tokens: Iterable[Token]) -> str:
        """Text of tokens, as `decode` of their ids."""
        return self._text(["" if token in self._silent else token for token in tokens])

    def _token(self, i: int) -> Token:
        if i < self._vocabulary.size:
            return self._vocabulary.token(i)
        return self._special_names.get(i, "")

    def _is_special(self, i: int) -> bool:
        return i in self._silent_ids or (i in self._special_names and i not in self._plain_ids)

    # Encoding

    def build_inputs_with_special_tokens(
        self, token_ids_0: Sequence[int], token_ids_1: Sequence[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop` a, or `[gMASK] sop` a b and the end id; as a tokenizer.json says, where it
        is one: with that prefix or without, no end id.
        """
        own = self._vocabulary.prefix
        if own is None:
            return super().build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [*(self.special_tokens[name] for name in own), *token_ids_0, *(token_ids_1 or ())]

    def _positions(self, ids: list[int]) -> list[Any]:
        return self._family.positions(self, ids)

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
            return self._vocabulary.encode(text)
        return interruptible(self._vocabulary.encode, text)

    def text_offsets(self, text: str) -> list[int]:
        """For every id of `text_ids(text)` the index of the character where it begins."""
        return self._vocabulary.starts(self.text_ids(text), text)

    def _ids(self, text: str) -> list[int]:
        """As `text_ids`, with special tokens recognised if the tokenizer was made so."""
        if not self.encode_special_tokens:
            return self.text_ids(text)
        ids, last = [], 0
        for match in self._special_text.finditer(text):
            ids += self.text_ids(text[last : match.start()])
            i = self.special_tokens.get(match.group())
            ids += self.get_prefix_tokens() if i is None else [i]
            last = match.end()
        return ids + self.text_ids(text[last:])

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False
    ) -> list[Token]:
        """Tokens of text (and of its pair), without special tokens around them unless asked for."""
        a, b = self._ids(text), None if pair is None else self._ids(pair)
        whole = self.build_inputs_with_special_tokens(a, b) if add_special_tokens else a + (b or [])
        return [self._token(i) for i in whole]

    # Decoding

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **others: Unpack[DecodeOptions],
    ) -> str:
        """Text of one row of ids (or one id).

        clean_up_tokenization_spaces: take spaces before English punctuation away, as transformers
        does; None is the tokenizer's own setting.

        Special tokens are shown by name, unless they are skipped, in families that show them.
        `<unk>`, `<s>`, `</s>` and ids beyond the vocabulary are "". Bytes that are not UTF-8 give
        U+FFFD: one each, or one for each cut-off character where tokens are bytes. Raises
        ValueError for a negative id or what is no id.
        """
        if isinstance(token_ids, int | np.integer):
            token_ids = [token_ids]
        ids = checked_ids(token_ids)
        if skip_special_tokens:
            ids = [i for i in ids if not self._is_special(i)]
        refuse_options(others, DecodeOptions, self.decode)
        text = self._text([self._shown(i) for i in ids])
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return cleaned(text) if clean_up_tokenization_spaces else text

    def batch_decode(
        self,
        sequences: Iterable[Any],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **others: Unpack[DecodeOptions],
    ) -> list[str]:
        """`decode` of every row."""
        clean = clean_up_tokenization_spaces
        return [self.decode(ids, skip_special_tokens, clean, **others) for ids in sequences]

    def _shown(self, i: int) -> Token:
        """The token that an id adds to the text."""
        if i >= self._vocabulary.size:
            return self._special_names.get(i, "") if self._family.shows_special_tokens else ""
        return "" if i in self._silent_ids else self._vocabulary.token(i)

    def _text(self, tokens: Sequence[Token]) -> str:
        return self._vocabulary.text(tokens)

    # Files

    def _changed(self) -> dict[str, Any]:
        """Settings that are others than tokenizer_config.json says, or than the default."""
        values = {
            "model_max_length": (self.model_max_length, NO_LIMIT),
            "truncation_side": (self.truncation_side, "right"),
            "pad_token": (self.pad_token, self._token(self._default_pad_id)),
            "encode_special_tokens": (self.encode_special_tokens, False),
            "clean_up_tokenization_spaces": (self.clean_up_tokenization_spaces, False),
        }
        return {
            name: value
            for name, (value, default) in values.items()
            if value != default or (self._config.get(name) is not None and name != "pad_token")
        }

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        **others: Unpack[keywords.TokenizerSaveKeywords],
    ) -> tuple[str, ...]:
        """Write the vocabulary file unchanged, tokenizer_config.json and special_tokens_map.json,
        with copies of the templates and code of the directory it was read from. Code that is not
        there is not named in `auto_map`.

        All take their place together. Returns their paths. others: keywords of transformers that
        mean nothing, as nothing is uploaded; filename_prefix is refused. OSError naming the file.
        """
        check_keywords(
            "save_pretrained",
            others,
            ["save_directory"],
            keywords.SAVE_NEUTRAL,
            keywords.SAVE_REASONS,
        )
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        name = self._family.tokenizer_class
        defaults: dict[str, Any] = {
            "auto_map": {"AutoTokenizer": [f"tokenization_chatglm.{name}", None]},
            "do_lower_case": False,
            "padding_side": "left",
            "remove_space": False,
            "tokenizer_class": name,
        }
        if self._family.role_tokens:
            flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
            flags["special"] = self._family.byte_pairs
            hidden = () if self._family.byte_pairs else ("[MASK]", "[sMASK]", "eop")
            shown = [token for token in self.special_tokens if token not in hidden]
            # The role tokens here are what tells the family of a saved tokenizer.
            defaults["added_tokens_decoder"] = {
                str(self.special_tokens[token]): {"content": token, **flags} for token in shown
            }
        if isinstance(self._vocabulary, IceText):
            defaults[IMAGES] = self._vocabulary.image_tokens
        fields = {**defaults, **self._config, **self._changed()}
        fields.pop(recognition.OWN_KEY, None)
        if not recognition.tells(fields, self.family):
            fields[recognition.OWN_KEY] = self.family
        with staged(directory) as new:
            if self._directory.is_dir() and not os.path.samefile(self._directory, directory):
                copy_code(self._directory, new, fields["auto_map"])
                for name in TEMPLATES:
                    copy(self._directory / name, new / name)
            kept = whole_references(fields["auto_map"], (new, directory))
            fields = {**fields, "auto_map": kept} if kept else _without(fields, "auto_map")
            name = JSON_VOCABULARY if is_json(self._model) else self._family.vocabulary_name
            (new / name).write_bytes(self._model)
            write_json(new / CONFIG, fields)
            write_json(new / TOKENS_MAP, self._tokens_map)
            names = sorted(os.listdir(new))
        return tuple(str(directory / name) for name in names)


def _without(fields: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k != name}


class AutoTokenizer:
    """`AutoTokenizer.from_pretrained(path)` -> ChatGLMTokenizer."""

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        padding_side: str = "left",
        encode_special_tokens: bool | None = None,
        family: str | None = None,
        model_max_length: int | None = None,
        truncation_side: str | None = None,
        pad_token: str | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        subfolder: str = "",
        **others: Unpack[keywords.TokenizerKeywords],
    ) -> ChatGLMTokenizer:
        """The tokenizer of a model directory on this machine, or of `subfolder` in it.

        others: keywords of transformers that mean nothing here: those about downloads and code
        (`trust_remote_code`, `revision`, `cache_dir`, `token`, `local_files_only`, ...: NOTHING in
        files/hub.py), which are never done, and NEUTRAL in files/tokenizer_keywords.py.

        family: a name or alias of one in glmlora/families, or None to find out. Where families have
        the same vocabulary file, names and small files have to tell: `_name_or_path` in config.json
        (its last part); role tokens in the tokenizer's files; the last part of `name_or_path` in
        tokenizer_config.json and of the directory. A guess, and evidence that disagrees, is told by
        a warning. The config's `seq_length` decides nothing: families have variants with 32768.

        Raises OSError for a missing directory or file, ValueError for a file that is no vocabulary
        of a family (a git-lfs pointer is named as one) and for a keyword of transformers that is
        not supported, TypeError for an unknown one, ImportError without the library that reads the
        vocabulary (sentencepiece or tiktoken).
        """
        what = "AutoTokenizer.from_pretrained"
        known = inspect.signature(AutoTokenizer.from_pretrained).parameters
        check_keywords(what, others, known, keywords.NEUTRAL, keywords.REASONS)
        directory = model_directory(pretrained_model_name_or_path, subfolder)
        if vocabulary_file(directory) is None:
            raise FileNotFoundError(f"{directory}: has no {' or '.join(VOCABULARIES)}")
        config, tokens_map = (
            read_json(directory / name, dict) if (directory / name).exists() else {}
            for name in (CONFIG, TOKENS_MAP)
        )
        name = _found_family(directory, config) if family is None else _family(family).name
        own = _family(name).vocabulary_name
        tokenizer = ChatGLMTokenizer(
            vocabulary_file(directory, own) or directory / own,
            padding_side=padding_side,
            encode_special_tokens=encode_special_tokens,
            family=name,
            config=config,
            tokens_map=tokens_map,
        )
        place = Path(pretrained_model_name_or_path, subfolder or "")
        tokenizer.name_or_path = os.fspath(place)
        for name, value in (
            ("model_max_length", model_max_length),
            ("truncation_side", truncation_side),
            ("pad_token", pad_token),
            ("clean_up_tokenization_spaces", clean_up_tokenization_spaces),
        ):
            if value is not None:
                setattr(tokenizer, name, value)
        return tokenizer


def _found_family(directory: Path, tokenizer_config: dict[str, Any]) -> str:
    """The family that the directory of a tokenizer says."""
    config = directory / "config.json"
    fields = read_json(config, dict) if config.exists() else {}
    name = recognition.find(fields, directory, tokenizer_config)
    known = families.with_tokenizer()
    fit = [f for f in known if fits(directory, f.vocabulary_name, f.byte_pairs)]
    if name not in {family.name for family in fit}:
        file = vocabulary_file(directory)
        raise ValueError(
            f"{directory}: its config.json or {CONFIG} says family {name!r}, whose tokenizer is "
            f"another than its {file and file.name}; say {recognition.choices(fit)} if that is "
            "wrong"
        )
    return name


def _family(name: str) -> families.Family:
    known = families.with_tokenizer()
    for family in known:
        if name in (family.name, family.alias):
            return family
    names, aliases = " or ".join(f.name for f in known), ", ".join(f.alias for f in known)
    raise ValueError(f"family: expected {names} ({aliases}: what this release has), got {name!r}")
