"""Text of ids that arrive one by one."""

from __future__ import annotations

from ..encoding import checked_ids
from .tokenizer import ChatGLMTokenizer
from .vocabulary import Token

GUARD = "\x00"  # stands for earlier text when a later part is decoded alone; no token is called so


class TextStream:
    """Text of ids that arrive one by one; `text` always equals `decode` of all of them.

    Only the ids since the last whole character are decoded again, so a long answer costs no more
    per id than a short one.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, skip_special_tokens: bool = False):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._settled = ""  # decoded for good
        self._pieces: list[Token] = []  # since then
        self.text = ""

    def feed(self, *ids: int) -> str | None:
        """Take more ids. The whole text so far, or None while it is empty or ends in U+FFFD, which
        may be half a character. Raises ValueError as `decode`.
        """
        tokenizer = self._tokenizer
        for i in checked_ids(ids):
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
