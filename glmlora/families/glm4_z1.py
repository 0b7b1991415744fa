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
from .thoughts import CLOSE, OPEN, Thinks, with_tokens
from .vocabulary import TOKENIZER_FILES


class GLMZ1(Thinks, GLM0414):
    name, alias, title = "z1", "glm-z1", "GLM-Z1"
    named = re.compile(r"glm[-_ ]?z1(?!.*rumination)")
    checkpoint = "THUDM/GLM-Z1-9B-0414"
    base = None
    in_template = re.compile(r"<\|assistant\|>(\n|\\n)<think>")  # tells the family
    template_marks = (*GLM0414.template_marks, "content.split('</think>')[-1].strip()")
    after_opening = f"\n{OPEN}"
    opens_thought = thinks = True

    def in_directory(self, directory: Path) -> bool:
        files = (directory / name for name in TOKENIZER_FILES)
        return any(
            self.in_template.search(file.read_bytes()[: 1 << 20].decode("utf-8", "replace"))
            for file in files
            if file.is_file()
        )

    def in_tokenizer(self, config: Mapping[str, Any]) -> bool:
        return self.in_template.search(str(config.get("chat_template"))) is not None

    def visible(self, content: str) -> str:
        return content.rpartition(CLOSE)[2].strip()

    def opening_ids(self, tokenizer: Tokenizer) -> list[int]:
        ids = super().opening_ids(tokenizer)
        return [*ids, *with_tokens(tokenizer, self.after_opening, (OPEN,))]


FAMILY = GLMZ1()
