"""ChatGLM2: the rounds of a conversation in one text, numbered from 1."""

from __future__ import annotations

import re
from pathlib import Path

from .family import Tokenizer
from .rounds import Rounds
from .vocabulary import TOKENIZER_FILES, has_text


class ChatGLM2(Rounds):
    name, alias, title = "v2", "chatglm2", "ChatGLM2"
    named = re.compile(r"chatglm[-_ ]?2(?!\d)|codegeex[-_ ]?2(?!\d)")
    checkpoint = "THUDM/chatglm2-6b"
    base = re.compile(r"codegeex2-6b(-int[48])?")
    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
    template_mark = "[Round"
    round_form = "[Round {}]\n\n问：{}\n\n答："
    after_answer = "\n\n"

    def in_directory(self, directory: Path) -> bool:
        return has_text(directory, TOKENIZER_FILES, b"[Round {}]")

    def rope_mode(self, rope_ratio: float) -> str:
        return "interpolate" if rope_ratio != 1 else "base"

    def stream_ids(self, tokenizer: Tokenizer, query: str, number: int, role: str) -> list[int]:
        """The separator and the round without the dummy space that encoding puts in front."""
        self._only_user(role)
        ids = tokenizer.text_ids(self.after_answer + self.asked_text(number, str(query)))
        return ids[1:] if ids[0] == tokenizer.dummy_space_id else ids


FAMILY = ChatGLM2()
