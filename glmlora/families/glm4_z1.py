"""GLM-Z1 (`model_type` glm4): GLM-4-0414's model and prompts, whose answers begin inside a thought
that the prompt opens. Prompts have no thoughts of earlier answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .family import Tokenizer
from .glm4_0414 import GLM0414
from .vocabulary import TOKENIZER_FILES

OPEN, CLOSE = "<think>", "</think>"
# In a template. Rumination, of the same series, opens no thought.
_OPENS = re.compile(r"<\|assistant\|>(\n|\\n)<think>")


class GLMZ1(GLM0414):
    name, alias, title = "z1", "glm-z1", "GLM-Z1"
    named = re.compile(r"glm[-_ ]?z1(?!.*rumination)")
    checkpoint = "THUDM/GLM-Z1-9B-0414"
    base = None
    template_marks = (*GLM0414.template_marks, "content.split('</think>')[-1].strip()")
    after_opening = f"\n{OPEN}"

    def in_directory(self, directory: Path) -> bool:
        files = (directory / name for name in TOKENIZER_FILES)
        return any(
            _OPENS.search(file.read_bytes()[: 1 << 20].decode("utf-8", "replace")) is not None
            for file in files
            if file.is_file()
        )

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        return _OPENS.search(str(config.get("chat_template"))) is not None

    def visible(self, content: str) -> str:
        return content.rpartition(CLOSE)[2].strip()

    def opening_ids(self, tokenizer: Tokenizer) -> list[int]:
        ids = super().opening_ids(tokenizer)
        if OPEN in tokenizer.special_tokens:
            return [*ids, *tokenizer.text_ids("\n"), tokenizer.get_command(OPEN)]
        return [*ids, *tokenizer.text_ids(self.after_opening)]

    def answer(self, text: str, asked: list[Any]) -> tuple[Any, list[Any]]:
        """The answer is what stands behind the thought, "" while there is nothing; the thought is
        `thought` of the history's last message.
        """
        thought, _, said = text.partition(CLOSE)
        said = said.strip()
        name = said.partition("\n")[0].strip()
        if name not in _tool_names(asked):  # the first line is the answer's own
            said = f"\n{said}"
        response, history = super().answer(said, asked)
        history[-1]["thought"] = thought.removeprefix(OPEN).strip()
        return response, history

    def answer_ids(self, tokenizer: Tokenizer, response: str) -> list[int]:
        """The response behind the thought that it has, or behind an empty one."""
        whole = response.removeprefix(OPEN) if CLOSE in response else f"{CLOSE}\n{response}"
        thought, _, said = whole.partition(CLOSE)
        if CLOSE not in tokenizer.special_tokens:
            return tokenizer.text_ids(whole)
        close = tokenizer.get_command(CLOSE)
        return [*tokenizer.text_ids(thought), close, *tokenizer.text_ids(said)]


def _tool_names(messages: list[Any]) -> set[str]:
    """Names of the functions that messages tell of."""
    names = set()
    for message in messages:
        for tool in message.get("tools") or ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
            names.add(str(function.get("name", "")) if isinstance(function, Mapping) else "")
    return names - {""}


FAMILY = GLMZ1()
