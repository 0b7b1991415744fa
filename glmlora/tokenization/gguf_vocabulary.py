"""A tokenizer as the keys of a GGUF file, and the files of a tokenizer of such keys.

llama.cpp has both forms: `llama` merges pieces by their scores, as SentencePiece does, and `gpt2`
with the cuts of GLM-4 (`glm4`, which takes a token that is there before it merges, as tiktoken
does).
"""

from __future__ import annotations

import json
import struct
from base64 import b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import tell
from ..families import Family
from .protobuf import FIXED32, VARINT, fields, key, sized, varint
from .tokenizer import ChatGLMTokenizer
from .tokenizer_json import bytes_of, merges, shown, written

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
# Kinds of tokens, numbered alike by SentencePiece and llama.cpp.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of SentencePiece's file
_BPE = 2  # its kind of model
_FORMS = {True: ("gpt2", "glm4"), False: ("llama", "chatglm-spm")}  # by `Family.byte_pairs`
_FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)


def _pieces(data: bytes, where: str) -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and kinds of the pieces of a tokenizer.model. ValueError for one that llama.cpp
    would cut otherwise.
    """
    texts, scores, kinds = [], [], []
    for number, value in fields(data):
        if number == _PIECES:
            piece = dict(fields(value))
            texts.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            kinds.append(piece.get(3, _NORMAL))
        elif number == _TRAINER and dict(fields(value)).get(3, 1) != _BPE:
            raise ValueError(f"{where}: is no BPE model of SentencePiece, which llama.cpp needs")
        elif number == _NORMALIZER and dict(fields(value)).get(2):
            tell.warn(f"{where}: normalises texts before it cuts them, which llama.cpp does not")
    return texts, scores, kinds


def gguf_fields(tokenizer: ChatGLMTokenizer, family: Family, size: int) -> dict[str, Any]:
    """The keys of a tokenizer for a model with `size` ids; those behind its own are unused.

    The chat template is the checkpoint's, or where it has none the family's. ValueError where
    llama.cpp has no such vocabulary: two tokens of one text, or SentencePiece's other models.
    """
    data, where = tokenizer._model, tokenizer.vocab_file
    scores: list[float] = []
    found: dict[str, Any] = {}
    if family.byte_pairs:
        vocabulary = tokenizer._vocabulary
        ranks = {bytes(vocabulary.token(i)): i for i in range(vocabulary.size)}  # type: ignore[arg-type]
        texts = [shown(token) for token in ranks]
        kinds = [_NORMAL] * len(texts)
        found["merges"] = [f"{a} {b}" for a, b in merges(ranks)]
    else:
        texts, scores, kinds = _pieces(data, where)
        found |= {"add_space_prefix": True, "remove_extra_whitespaces": False}
    special = {i: name for name, i in tokenizer.special_tokens.items()}
    for i in range(len(texts), size):
        texts.append(special.get(i, f"[PAD{i}]"))
        plain = _USER_DEFINED if i in tokenizer._plain_ids else _CONTROL
        kinds.append(plain if i in special else _UNUSED)
        scores.append(0.0)
    if len(set(texts)) < len(texts):
        twice = next(text for i, text in enumerate(texts) if text in texts[:i])
        raise ValueError(f"{where}: token {twice!r:.60} stands twice, which llama.cpp refuses")
    model, cuts = _FORMS[family.byte_pairs]
    found |= {"model": model, "pre": cuts, "tokens": texts, "token_type": kinds}
    if not family.byte_pairs:
        found["scores"] = scores
    # Ends of an answer: of the text, of a turn, of a message that calls a tool.
    for word, name in zip(("eot", "eom"), family.end_tokens, strict=False):
        found[f"{word}_token_id"] = tokenizer.special_tokens[name]
    for word in ("bos", "eos", "unk", "pad"):
        i = getattr(tokenizer, f"{word}_token_id")
        if i is not None:
            found[f"{word}_token_id"] = int(i)
    found |= {"add_bos_token": False, "add_eos_token": False}
    template = tokenizer.chat_template or family.jinja_template()
    return {**{PREFIX + name: value for name, value in found.items()}, TEMPLATE: template}


# Back


class Vocabulary:
    """The tokenizer of a GGUF file.

    byte_pairs: its form, None where it has none. texts, kinds, scores: of every id. ends: ids that
    end an answer. config: what its tokenizer_config.json says of special tokens and template.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        """ValueError naming a key with another kind of value, and a form that no family has."""
        self.metadata = metadata
        model = metadata.get(PREFIX + "model")
        forms = {form[0]: byte_pairs for byte_pairs, form in _FORMS.items()} | {"none": None}
        if model not in forms:
            raise ValueError(f"{PREFIX}model: expected one of {' '.join(forms)}, got {model!r:.60}")
        self.byte_pairs = forms[model]
        self.texts = self._listed("tokens", str)
        self.kinds = self._listed("token_type", int) or [_NORMAL] * len(self.texts)
        self.scores = self._listed("scores", float) or [0.0] * len(self.texts)
        if len({len(self.texts), len(self.kinds), len(self.scores)}) > 1:
            raise ValueError(f"{PREFIX}tokens, token_type, scores: expected one of each for an id")
        ends = (metadata.get(f"{PREFIX}{word}_token_id") for word in ("eos", "eot", "eom"))
        self.ends = list(dict.fromkeys(i for i in ends if type(i) is int))
        self.size = self._size()
        self.config = self._config()

    def _listed(self, name: str, kind: type) -> list[Any]:
        found = self.metadata.get(PREFIX + name, [])
        if not isinstance(found, list) or found and type(found[0]) is not kind:
            raise ValueError(f"{PREFIX}{name}: expected a list of {kind.__name__}")
        return found

    def _size(self) -> int:
        """Tokens in front of the special ones behind them."""
        if self.byte_pairs:
            normal = (i for i, kind in enumerate(self.kinds) if kind != _NORMAL)
            return next(normal, len(self.kinds))
        first = "[MASK]"  # of what the families with pieces have behind them
        return self.texts.index(first) if first in self.texts else len(self.texts)

    def _config(self) -> dict[str, Any]:
        added = {
            str(i): {"content": self.texts[i], **_FLAGS, "special": kind == _CONTROL}
            for i, kind in enumerate(self.kinds)
            if i >= self.size and kind in (_CONTROL, _USER_DEFINED)
        }
        found: dict[str, Any] = {"added_tokens_decoder": added} if added else {}
        template = self.metadata.get(TEMPLATE)
        return found | ({"chat_template": template} if isinstance(template, str) else {})

    def write(self, directory: Path, family: Family) -> None:
        """Write the tokenizer's files of a family. ValueError naming the key for tokens of which
        there are none.
        """
        pad = self.metadata.get(PREFIX + "pad_token_id")
        config = dict(self.config)
        if family.byte_pairs:
            name, data = self._byte_pairs(family)
            config["eos_token"] = family.named_tokens["eos"]
            if type(pad) is int and 0 <= pad < len(self.texts):
                config["pad_token"] = self.texts[pad]
        else:
            name, data = family.vocabulary_name, self._sentencepiece(family)
            listed = config.pop("added_tokens_decoder", {})
            if family.role_tokens:
                config["added_tokens_decoder"] = {
                    i: {**token, "special": False}
                    for i, token in listed.items()
                    if token["content"] in (*family.prefix_tokens, *family.in_texts)
                }
        (directory / name).write_bytes(data)
        tokenizer = ChatGLMTokenizer(directory / name, family=family.name, config=config)
        tokenizer.save_pretrained(directory)

    def _byte_pairs(self, family: Family) -> tuple[str, bytes]:
        try:
            ranks = {bytes_of(text): i for i, text in enumerate(self.texts[: self.size])}
        except ValueError as error:
            raise ValueError(f"{PREFIX}tokens: {error}") from None
        if not family.tokenizer_class.endswith("Fast"):  # a class that reads tiktoken's form
            lines = (b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
            return family.vocabulary_name, b"".join(lines)
        added = self.config.get("added_tokens_decoder", {})
        there = {token["content"] for token in added.values()}
        prefix = [name for name in family.prefix_tokens if name in there]
        fields = written(ranks, added, prefix)
        return "tokenizer.json", json.dumps(fields, ensure_ascii=False).encode()

    def _sentencepiece(self, family: Family) -> bytes:
        """A tokenizer.model: pieces, how they are cut, and that texts are taken as they are."""
        data = b""
        named: Sequence[str] = ("unk", "bos", "eos")  # stand first
        for i, text in enumerate(self.texts[: self.size]):
            if i < len(named):
                text = family.named_tokens[named[i]]
            piece = sized(1, text.encode()) + key(2, FIXED32) + struct.pack("<f", self.scores[i])
            data += sized(_PIECES, piece + key(3, VARINT) + varint(self.kinds[i]))
        numbers = {3: _BPE, 4: self.size, 35: 1, 40: 0, 41: 1, 42: 2}  # byte_fallback, ids
        trainer = b"".join(key(n, VARINT) + varint(value) for n, value in numbers.items())
        as_they_are = {3: 1, 4: 0, 5: 1}  # a space in front, blanks kept, written as U+2581
        spec = b"".join(key(n, VARINT) + varint(value) for n, value in as_they_are.items())
        return data + sized(_TRAINER, trainer) + sized(_NORMALIZER, sized(1, b"identity") + spec)
